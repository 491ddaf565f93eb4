"""The loop with static shapes: that nothing in it waits for the host, and how much it launches."""

import importlib.util
from collections import Counter

import pytest
import torch
from functorch.compile import make_boxed_func
from random_models import FAMILIES, random_batch, random_tagger
from torch._dynamo.backends.common import aot_autograd
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from tokenexit import ExitPolicy, loops
from tokenexit.conditions import TENSORS, unmet
from tokenexit.layers import ExitHead
from tokenexit.loops import CONDITIONS, LOOPS, Call, gpu
from tokenexit.loops.eager import ExitEncoder, Unmet
from tokenexit.models.pipeline import tag
from tokenexit.models.rows import Rows
from tokenexit.ops import extension_available, extension_error
from tokenexit.ops.pack_tokens import pack
from tokenexit.schedule import Schedule

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton"),
    pytest.mark.skipif(not extension_available(), reason=str(extension_error())),
]
needs_gpu = pytest.mark.skipif(
    not torch.cuda.is_available() or not gpu._DEVICES,
    reason="needs a GPU and compact_active compiled for it",
)
LENGTHS = [5, 17, 1, 9]
WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "repeat_interleave"}
VIEWS = {"t", "view", "slice", "select", "unbind", "_unsafe_view", "alias", "getitem", "detach"}


def arguments(device="cpu", dtype=torch.float32, bias=False, policy=None, lengths=LENGTHS):
    tagger = random_tagger(dtype=dtype).to(device)
    longest = max(lengths)
    mask = (torch.arange(longest) < torch.tensor(lengths)[:, None]).long().to(device)
    packed = pack(mask, torch.arange(longest, device=device).expand_as(mask).contiguous())
    h = torch.randn(sum(lengths), 32, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    schedule = Schedule.of(policy or ExitPolicy(threshold=0.3, window=1), 4, len(lengths), h)
    table = torch.randn(4, 9, device=device, dtype=dtype) if bias else None
    return tagger.encoder.layers, tagger.encoder.heads, h, packed, schedule, table


def test_more_sentences_than_a_grid_has(monkeypatch):
    monkeypatch.setattr(gpu, "MOST_SENTENCES", 2)
    with pytest.raises(Unmet, match="at most 2 sentences in a call"):
        gpu.pack(torch.ones(3, 4, dtype=int), torch.ones(3, 4, dtype=int))


def traced(bias=False, after=lambda logits, layers: None):
    """Calls of operators, in order, of the loop on tensors without values."""
    rest = arguments(bias=bias)

    def loop(h):
        logits, layers = gpu.exit_loop(rest[0], rest[1], h, *rest[3:])
        after(logits, layers)
        return logits, layers

    with torch.no_grad():
        graph = make_fx(loop, tracing_mode="fake", _allow_non_fake_inputs=True)(rest[2])
    calls = [node.target for node in graph.graph.nodes if node.op == "call_function"]
    names = [getattr(call, "_opname", getattr(call, "__name__", str(call))) for call in calls]
    return [name for name in names if name not in VIEWS]


@pytest.mark.parametrize("bias", [False, True])
def test_a_layer_is_seven_launches(bias):
    names = traced(bias)
    starts = [i for i, name in enumerate(names) if name == "query_key_value"]
    assert len(starts) == 4
    for start, end in zip(starts, starts[1:], strict=False):
        launches = [
            name for name in names[start:end] if not name.startswith(("empty", "new_empty"))
        ]
        wanted = ["query_key_value", "exit_attention", *["linear_"] * 3, "exit_step_"]
        assert launches == [*wanted, "compact_active", *["index"] * bias]


@pytest.mark.parametrize("bias", [False, True])
def test_no_size_and_no_step_of_the_host_hangs_on_a_value(bias):
    assert not WAITS & set(traced(bias))
    assert "_local_scalar_dense" in traced(after=lambda logits, layers: layers.max().item())
    assert "nonzero" in traced(after=lambda logits, layers: layers.nonzero())


@pytest.mark.parametrize("bias", [False, True])
def test_one_graph_for_torch_compile(bias):
    """Down to the launches."""
    layers, heads, h, packed, schedule, table = arguments(bias=bias)
    graphs = []

    def compiler(graph, inputs):
        graphs.append(graph)
        results = [node.meta["val"] for node in graph.graph.output_node().args[0]]
        return make_boxed_func(lambda *_: [torch.zeros(r.shape, dtype=r.dtype) for r in results])

    with torch.no_grad():
        backend = aot_autograd(fw_compiler=compiler)
        run = torch.compile(gpu.exit_loop, backend=backend, fullgraph=True)
        logits, _ = run(layers, heads, h, packed, schedule, table)
    assert len(graphs) == 1 and logits.shape == (len(h), 5)
    calls = [node for node in graphs[0].graph.nodes if node.op == "call_function"]
    wrapped = ["auto_functionalized" in str(node.target) for node in calls]  # as it writes
    names = [str(n.args[0] if w else n.target) for n, w in zip(calls, wrapped, strict=True)]
    launches = "linear_", "query_key_value", "exit_step_", "triton_kernel_wrapper"
    assert [sum(name in x for x in names) for name in launches] == [3 * 4, 4, 4, 4]
    assert sum("compact_active" in name for name in names) == 3
    assert not any(wait in name for name in names for wait in WAITS)


def test_torch_export_takes_it():
    layers, heads, h, packed, schedule, _ = arguments()

    class Loop(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layers, self.heads = layers, heads

        def forward(self, h):
            return gpu.exit_loop(self.layers, self.heads, h, packed, schedule)

    with torch.no_grad():
        program = torch.export.export(Loop(), (h,))
    names = [str(node.target) for node in program.graph.nodes]
    assert sum("query_key_value" in name for name in names) == 4
    assert not any(wait in name for name in names for wait in WAITS)


def call_of(layers, heads, h):
    return Call(ExitEncoder(layers, heads), h, Schedule.of(ExitPolicy(), 4, 1, torch.zeros(0)))


@torch.no_grad()
def test_when_it_applies(monkeypatch):
    layers, heads, h, *_ = arguments()

    def failed(layers=layers, heads=heads, h=h):
        return unmet(CONDITIONS["gpu"], call_of(layers, heads, h))

    assert failed() == "states on a GPU"
    monkeypatch.setattr(gpu, "_DEVICES", {"cpu"})
    assert failed() is None
    assert failed(h=h.double()) == "states in fp16, bf16 or fp32"
    with torch.enable_grad():
        assert failed() == "no gradients"
    bare = [*heads[:3], torch.nn.Linear(32, 5, bias=False)]
    assert failed(heads=bare) == "a weight and a bias in each part"
    turned = [*heads[:3], torch.nn.Linear(32, 5)]
    turned[3].weight = torch.nn.Parameter(torch.randn(32, 5).T)
    assert failed(heads=turned) == "contiguous weights"
    many = [torch.nn.Linear(32, 257) for _ in range(4)]
    assert failed(heads=many) == "at most 256 outputs of a classifier"
    for module in (layers[3], heads[0]):
        hook = module.register_forward_hook(lambda *_: None)
        assert failed() == "no hooks"
        hook.remove()
    assert failed() is None
    for name in ("query", "output_norm"):  # as adapters do it: the same weights, another forward
        part = getattr(layers[2], name)
        setattr(layers[2], name, type("Adapted", (type(part),), {})(*part.weight.shape))
        assert failed() == "modules of the classes they were made of"
        setattr(layers[2], name, part)
    layers[1].activation = torch.tanh
    assert failed() == "GELU, exact or by tanh"
    layers[1].activation = torch.nn.functional.gelu
    layers[1].dropout.train().p = 0.1
    assert failed() == "no dropout to be done"
    layers[1].dropout.eval()
    layers[1].train().attention_dropout = 0.1
    assert failed() == "no dropout to be done"
    layers[1].eval()
    dropping = [*heads[:3], ExitHead(32, 5, dropout=0.1)]
    assert failed(heads=dropping) == "no dropout before a classifier"
    dropping[3].eval()
    assert failed(heads=dropping) is None


FIELDS = ("word_ids", "token_type_ids", "position_ids", "exit_layers")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("given", [(), FIELDS], ids=["defaults", "all given"])
@torch.no_grad()
def test_the_whole_model_waits_for_nothing(family, given):
    """From padded ids to padded logits: no size and no step of the host hangs on a value."""
    tagger = random_tagger(family, dtype=torch.float32)
    batch = random_batch([5, 9, 1])
    names = ("input_ids", "attention_mask", *FIELDS)
    rows = dict.fromkeys(names) | {"attention_mask": batch["attention_mask"] != 0}
    rows |= {name: batch["input_ids"] for name in ("input_ids", *given)}
    schedule = Schedule.of(ExitPolicy(threshold=0.3), 4, 3, torch.zeros(0))
    call, loop = Call(tagger.encoder, torch.zeros(1, 32), schedule), LOOPS["gpu"]

    def run(input_ids):
        return tag(tagger, Rows(**rows | {"input_ids": input_ids}), call, loop)[:3]

    tracing = make_fx(run, tracing_mode="fake", _allow_non_fake_inputs=True)
    calls = [n.target for n in tracing(rows["input_ids"]).graph.nodes if n.op == "call_function"]
    names = {getattr(call, "_opname", str(call)) for call in calls}
    assert "embed" in names and "exit_step_" in names
    assert not WAITS & names
    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        logits, layers, sound = compiled(mode.from_tensor(rows["input_ids"]))
    assert logits.shape == (3, 9, 5) and layers.shape == (3, 9) and sound.shape == ()


ODD_EMBEDDINGS = {
    "plain": lambda embeddings: None,
    "max_norm": lambda embeddings: setattr(embeddings.position, "max_norm", 0.5),
    "dropout": lambda embeddings: embeddings.dropout.train(),
    "layout": lambda embeddings: setattr(
        embeddings.word, "weight", torch.nn.Parameter(embeddings.word.weight.T.contiguous().T)
    ),
    "dtype": lambda embeddings: embeddings.norm.double(),
}


@pytest.mark.parametrize("odd", ODD_EMBEDDINGS)
def test_the_kernel_takes_plain_embeddings_only(odd, monkeypatch):
    tagger = random_tagger(dtype=torch.float32)
    ODD_EMBEDDINGS[odd](tagger.embeddings)
    seen, ids = [], torch.tensor([5, 6, 5])
    packed = pack(torch.ones(1, 3, dtype=torch.int64), torch.arange(3)[None])
    monkeypatch.setattr("tokenexit.kernels.embed.embed", lambda *_: seen.append("the kernel"))
    monkeypatch.setattr(tagger.embeddings, "forward", lambda *_: seen.append("the module"))
    gpu.embed(None, tagger.embeddings, packed, ids, packed.positions)
    assert seen == ["the kernel" if odd == "plain" else "the module"]


@pytest.mark.parametrize("missing", ["the CUDA op compact_active", "triton"])
@torch.no_grad()
def test_a_gpu_without_what_it_wants_is_told_once(missing, monkeypatch):
    layers, heads, *_ = arguments()
    if missing == "triton":
        monkeypatch.setattr(gpu, "_DEVICES", {"cuda"})
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(gpu, "FALLBACKS", Counter())
    # Weights of a GPU there are none here.
    met = [x for x in CONDITIONS["gpu"] if x[0] not in dict(TENSORS)]
    monkeypatch.setattr(loops, "CONDITIONS", CONDITIONS | {"gpu": met})
    with FakeTensorMode():
        call = call_of(layers, heads, torch.empty(1, 32, device="cuda"))
    with pytest.warns(UserWarning, match=f"slow on this GPU: {missing} .*is missing") as told:
        assert {loops.choose("auto", call).name for _ in range(3)} == {"eager"}
    assert len(told) == 1 and gpu.FALLBACKS == {"not installed": 3}


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("dtype", gpu.DTYPES, ids=str)
@torch.no_grad()
def test_graphs_replay_what_the_model_does(dtype):
    tagger = random_tagger(dtype=dtype).cuda()
    # With a graph's spare rows too, each is small or large as without: the same tiles, so bits.
    for lengths in (LENGTHS, [9, 31, 2], LENGTHS, [128] * 64):
        batch = {name: value.cuda() for name, value in random_batch(lengths).items()}
        for policy in (ExitPolicy(threshold=0.3, window=1), ExitPolicy(threshold=0.6)):
            results = []
            for tagger.cuda_graphs in (False, True, True):
                out = tagger(**batch, policy=policy)
                results.append((out.logits, out.exit_layers))
            for direct, graphed, again in zip(*results, strict=True):
                assert torch.equal(graphed, again)
                assert torch.equal(direct, graphed)
    assert tagger._graphs._graphs and all(tagger._graphs._graphs.values())  # recorded


@pytest.mark.gpu
@needs_gpu
@torch.no_grad()
def test_same_bits_every_time():
    values = arguments("cuda", torch.float16, lengths=[128] * 64)
    first = gpu.exit_loop(*values)
    for _ in range(50):
        assert all(map(torch.equal, first, gpu.exit_loop(*values)))
