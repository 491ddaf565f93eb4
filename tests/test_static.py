"""The loop with static shapes: that nothing in it waits for the host, and how much it launches."""

import contextlib
import importlib.util
import warnings
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from functorch.compile import make_boxed_func
from random_models import FAMILIES, random_batch, random_tagger
from recording import Stream, pretend
from torch._dynamo.backends.common import aot_autograd
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from tokenexit import ExitPolicy, static
from tokenexit.encoder import Schedule
from tokenexit.ops import extension_available, extension_error
from tokenexit.ops.pack_tokens import pack

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton"),
    pytest.mark.skipif(not extension_available(), reason=str(extension_error())),
]
needs_gpu = pytest.mark.skipif(
    not torch.cuda.is_available() or not static._DEVICES,
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


def traced(bias=False, after=lambda logits, layers: None):
    """Calls of operators, in order, of the loop on tensors without values."""
    rest = arguments(bias=bias)

    def loop(h):
        logits, layers = static.exit_loop(rest[0], rest[1], h, *rest[3:])
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
    """Down to the kernels: an op of Triton's is one launch."""
    layers, heads, h, packed, schedule, table = arguments(bias=bias)
    graphs = []

    def compiler(graph, inputs):
        graphs.append(graph)
        results = [node.meta["val"] for node in graph.graph.output_node().args[0]]
        return make_boxed_func(lambda *_: [torch.zeros(r.shape, dtype=r.dtype) for r in results])

    with torch.no_grad():
        backend = aot_autograd(fw_compiler=compiler)
        run = torch.compile(static.exit_loop, backend=backend, fullgraph=True)
        logits, _ = run(layers, heads, h, packed, schedule, table)
    assert len(graphs) == 1 and logits.shape == (len(h), 5)
    calls = [node for node in graphs[0].graph.nodes if node.op == "call_function"]
    wrapped = ["auto_functionalized" in str(node.target) for node in calls]  # as it writes
    names = [str(n.args[0] if w else n.target) for n, w in zip(calls, wrapped, strict=True)]
    assert sum("triton_kernel_wrapper" in name for name in names) == 6 * 4
    assert sum("compact_active" in name for name in names) == 3
    assert not any(wait in name for name in names for wait in WAITS)


def test_torch_export_takes_it():
    layers, heads, h, packed, schedule, _ = arguments()

    class Loop(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layers, self.heads = layers, heads

        def forward(self, h):
            return static.exit_loop(self.layers, self.heads, h, packed, schedule)

    with torch.no_grad():
        program = torch.export.export(Loop(), (h,))
    names = [str(node.target) for node in program.graph.nodes]
    assert sum("query_key_value" in name for name in names) == 4
    assert not any(wait in name for name in names for wait in WAITS)


def test_buckets():
    assert [static.bucket(n) for n in (1, 16, 17, 100, 129)] == [16, 16, 32, 112, 160]
    for size in range(1, 3000):
        assert size <= static.bucket(size) <= max(16, 1.25 * size + 16)
        assert static.bucket(static.bucket(size)) == static.bucket(size)


@torch.no_grad()
def test_when_it_applies(monkeypatch):
    layers, heads, h, *_ = arguments()
    assert not static.applies(layers, heads, h)  # on a CPU
    monkeypatch.setattr(static, "_DEVICES", {"cpu"})
    assert static.applies(layers, heads, h)
    assert not static.applies(layers, heads, h.double())
    with torch.enable_grad():
        assert not static.applies(layers, heads, h)
    bare = [*heads[:3], torch.nn.Linear(32, 5, bias=False)]
    assert not static.applies(layers, bare, h)
    turned = [*heads[:3], torch.nn.Linear(32, 5)]
    turned[3].weight = torch.nn.Parameter(torch.randn(32, 5).T)
    assert not static.applies(layers, turned, h)
    for module in (layers[3], heads[0]):
        hook = module.register_forward_hook(lambda *_: None)
        assert not static.applies(layers, heads, h)
        hook.remove()
    assert static.applies(layers, heads, h)
    for name in ("query", "output_norm"):  # as adapters do it: the same weights, another forward
        part = getattr(layers[2], name)
        setattr(layers[2], name, type("Adapted", (type(part),), {})(*part.weight.shape))
        assert not static.applies(layers, heads, h)
        setattr(layers[2], name, part)
    layers[1].activation = torch.tanh
    assert not static.applies(layers, heads, h)


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

    def run(input_ids):
        return tagger._tag_static(rows | {"input_ids": input_ids}, schedule)

    tracing = make_fx(run, tracing_mode="fake", _allow_non_fake_inputs=True)
    calls = [n.target for n in tracing(rows["input_ids"]).graph.nodes if n.op == "call_function"]
    names = {getattr(call, "_opname", str(call)) for call in calls}
    assert "embedding" in names and "exit_step_" in names
    assert not WAITS & names
    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        logits, layers, sound = compiled(mode.from_tensor(rows["input_ids"]))
    assert logits.shape == (3, 9, 5) and layers.shape == (3, 9) and sound.shape == ()


def test_buffers_made_in_inference_mode_are_filled_in_any():
    for number, mode in enumerate([torch.inference_mode, torch.no_grad, torch.inference_mode]):
        with mode():
            rows = {"attention_mask": torch.ones(2, 3, dtype=torch.bool), "word_ids": None}
            rows["input_ids"] = torch.full((2, 3), number)
            schedule = Schedule.of(ExitPolicy(threshold=0.1 * number), 4, 2, torch.zeros(0))
            if number == 0:
                inputs = static.buffers((8, 16), rows, schedule)
            static.fill(*inputs, rows, schedule)
            assert inputs[0]["attention_mask"].sum() == 6 and inputs[0]["word_ids"] is None
            assert torch.equal(inputs[0]["input_ids"][:2, :3], rows["input_ids"])
            assert torch.equal(inputs[1].threshold[:, :2], schedule.threshold)


class Sums(torch.nn.Module):
    """All that graphs are told apart by goes into its result; its sums are exact in fp32."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor(2.0))
        self.register_buffer("shift", torch.tensor(3.0))
        self.inner = torch.nn.ModuleList([torch.nn.Linear(1, 1, bias=False)])
        torch.nn.init.ones_(self.inner[0].weight)

    def forward(self, rows, schedule):
        value = self.weight * rows["input_ids"] + self.shift + self.inner[0].weight
        for name, part in self.named_children():
            value = value + sum(p.sum() for p in part.parameters()) * (1 + len(name))
        if rows["word_ids"] is not None:
            value = value + rows["word_ids"] / 16
        value = value + sum(schedule.decides) / 4 + schedule.max_prob / 8
        value = value + (static.float32_precision() == "ieee") / 32
        value = value + schedule.threshold[0, :, None] + schedule.window[:, None]
        value = value.where(rows["attention_mask"], 0)
        return value, value.sum()


@pytest.fixture
def recorded(monkeypatch):
    """The recordings so far."""
    return pretend(monkeypatch)


def rows_of(sentences=3, tokens=5, **more):
    ids = torch.arange(sentences * tokens).view(sentences, tokens)
    return {"input_ids": ids, "attention_mask": ids % 4 > 0, "word_ids": None, **more}


def schedule_of(policy=None, sentences=3):
    return Schedule.of(policy or ExitPolicy(threshold=0.25), 4, sentences, torch.zeros(0))


def other_parameter(module):
    module.weight = torch.nn.Parameter(torch.tensor(5.0))


def other_data(module):
    module.inner[0].weight.data = torch.tensor([[7.0]])


def other_buffer(module):
    module.shift = torch.tensor(1.0)


def more_modules(module):
    module.new = torch.nn.Linear(2, 2, bias=False)
    torch.nn.init.ones_(module.new.weight)


CHANGES = [other_parameter, other_data, other_buffer, more_modules]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@torch.no_grad()
def test_other_weights_get_another_graph(change, recorded):
    recorded.module = module = Sums()
    graphs = static.Graphs()
    for step in ("as made", "replayed", change, "replayed"):
        if callable(step):
            step(module)
        got = graphs(module, rows_of(), schedule_of(), module)
        assert all(map(torch.equal, got, module(rows_of(), schedule_of()))), step
    assert len(recorded) == 2
    module.weight.fill_(9)  # in place, which the graph reads
    got = graphs(module, rows_of(), schedule_of(), module)
    assert all(map(torch.equal, got, module(rows_of(), schedule_of())))
    assert len(recorded) == 2 and not static.FALLBACKS


BASE = ExitPolicy(threshold=0.25)
INPUTS = {
    "decides": (rows_of(), schedule_of(ExitPolicy(threshold=(0.25, 0, 0.25, 0.25)))),
    "max_prob": (rows_of(), schedule_of(ExitPolicy(threshold=0.25, criterion="max_prob"))),
    "row": (rows_of(word_ids=torch.ones(3, 5).long()), schedule_of()),
    "dtype": (rows_of(input_ids=torch.ones(3, 5).int()), schedule_of()),
    "bucket": (rows_of(9, 5), schedule_of(sentences=9)),
}


@pytest.mark.parametrize("name", INPUTS)
@torch.no_grad()
def test_other_options_get_another_graph(name, recorded):
    recorded.module = module = Sums()
    graphs = static.Graphs()
    for rows, schedule in (both := [(rows_of(), schedule_of()), INPUTS[name]]) * 2:
        got = graphs(module, rows, schedule, module)
        assert all(map(torch.equal, got, module(rows, schedule)))
    assert len(recorded) == len(both)


@torch.no_grad()
def test_one_graph_serves_values_sizes_and_thresholds(recorded):
    recorded.module = module = Sums()
    graphs = static.Graphs()
    for sentences, tokens, threshold in [(3, 5, 0.25), (8, 16, 0.5), (1, 1, 0.75), (3, 5, 0.25)]:
        policies = [ExitPolicy(threshold=threshold, window=i) for i in range(sentences)]
        rows, schedule = rows_of(sentences, tokens), schedule_of(policies, sentences)
        got = graphs(module, rows, schedule, module)
        assert all(map(torch.equal, got, module(rows, schedule)))
    assert len(recorded) == 1


@torch.no_grad()
def test_precision_gets_another_graph(recorded):
    recorded.module = module = Sums()
    graphs, before = static.Graphs(), torch.get_float32_matmul_precision()
    try:
        for precision in ("highest", "high"):
            torch.set_float32_matmul_precision(precision)
            got = graphs(module, rows_of(), schedule_of(), module)
            assert all(map(torch.equal, got, module(rows_of(), schedule_of())))
    finally:
        torch.set_float32_matmul_precision(before)
    assert len(recorded) == 2


@torch.no_grad()
def test_where_recording_fails_all_is_run_directly_and_told_once(recorded, monkeypatch):
    def fails(run, pool=None):
        recorded.append(run)
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(static, "record", fails)
    module, graphs = Sums(), static.Graphs()
    with pytest.warns(UserWarning, match="without a CUDA graph: operation not permitted") as told:
        for sentences in (3, 3, 9):
            rows, schedule = rows_of(sentences), schedule_of(sentences=sentences)
            got = graphs(module, rows, schedule, module)
            assert all(map(torch.equal, got, module(rows, schedule)))
    assert len(recorded) == 2  # not tried again for the same key
    assert len(told) == 1 and static.FALLBACKS == {"not recorded": 2}


@torch.no_grad()
def test_calls_on_another_stream_wait_for_those_before(recorded, monkeypatch):
    recorded.module = module = Sums()
    graphs, a, b = static.Graphs(), Stream(), Stream()
    for stream in (a, a, b, b, a):
        monkeypatch.setattr(torch.cuda, "current_stream", lambda stream=stream: stream)
        graphs(module, rows_of(), schedule_of(), module)
    assert b.waited == [a] and a.waited == [b]


@torch.no_grad()
def test_where_memory_is_short_all_graphs_are_forgotten(recorded, monkeypatch):
    recorded.module = module = Sums()
    graphs, record = static.Graphs(), static.record

    def fails(run, pool=None):
        raise torch.OutOfMemoryError("CUDA out of memory")

    for sentences, way in ((3, record), (9, fails), (9, record), (3, record)):
        monkeypatch.setattr(static, "record", way)
        rows, schedule = rows_of(sentences), schedule_of(sentences=sentences)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            got = graphs(module, rows, schedule, module)
        assert all(map(torch.equal, got, module(rows, schedule)))
    assert len(recorded) == 2 and static.FALLBACKS == {"not recorded": 1}


def test_a_failed_recording_leaves_the_stream_as_it_was(monkeypatch):
    """torch.cuda.graph does not, where its end raises."""

    before = Stream()
    streams = [before]

    @contextlib.contextmanager
    def stream(new):
        old, streams[0] = streams[0], new
        yield
        streams[0] = old

    @contextlib.contextmanager
    def graph(_, pool, capture_error_mode):
        streams[0] = Stream()
        yield
        raise RuntimeError("the capture was invalidated")

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: streams[0])
    monkeypatch.setattr(torch.cuda, "set_stream", lambda new: streams.__setitem__(0, new))
    monkeypatch.setattr(torch.cuda, "stream", stream)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: None)
    monkeypatch.setattr(torch.cuda, "graph", graph)
    with pytest.raises(RuntimeError, match="invalidated"):
        static.record(lambda: None)
    assert streams == [before]


@pytest.mark.parametrize("missing", ["the CUDA op compact_active", "triton"])
@torch.no_grad()
def test_a_gpu_without_what_it_wants_is_told_once(missing, monkeypatch):
    layers, heads, *_ = arguments()
    if missing == "triton":
        monkeypatch.setattr(static, "_DEVICES", {"cuda"})
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(static, "FALLBACKS", Counter())
    monkeypatch.setattr(static, "TENSORS", ())  # weights of a GPU there are none here
    with FakeTensorMode():
        h = torch.empty(1, 32, device="cuda")
    with pytest.warns(UserWarning, match=f"slow on this GPU: {missing} .*is missing") as told:
        assert not any(static.applies(layers, heads, h) for _ in range(3))
    assert len(told) == 1 and static.FALLBACKS == {"not installed": 3}


@pytest.mark.parametrize("policies", [BASE, [BASE, replace(BASE, window=3)]], ids=["one", "two"])
def test_a_schedule_is_one_copy_that_nobody_waits_for(policies, monkeypatch):
    made, copies, tensor = [], [], torch.tensor

    def from_host(*args, pin_memory=False, **kwargs):
        made.append(pin_memory)
        return tensor(*args, **kwargs)

    class Copies(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            kwargs = kwargs or {}
            if kwargs.get("device") is not None and args[0].device.type == "cpu":
                copies.append(kwargs.get("non_blocking"))
            return function(*args, **kwargs)

    monkeypatch.setattr(torch, "tensor", from_host)
    device = torch.device("meta")  # in place of a GPU
    like = SimpleNamespace(device=device, is_cuda=True, dtype=torch.float16)
    with Copies():
        schedule = Schedule.of(policies, 4, 2, like)
    assert made == [True] and copies == [True]
    values = schedule.window, schedule.min_active, schedule.threshold
    assert {(v.device, v.shape[-1]) for v in values} == {(device, 2)}


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("dtype", static.DTYPES, ids=str)
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
    first = static.exit_loop(*values)
    for _ in range(50):
        assert all(map(torch.equal, first, static.exit_loop(*values)))
