"""The loop with static shapes: that nothing in it waits for the host, and how much it launches."""

import importlib.util

import pytest
import torch
from functorch.compile import make_boxed_func
from random_models import random_tagger
from torch._dynamo.backends.common import aot_autograd
from torch.fx.experimental.proxy_tensor import make_fx

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
    names = [str(node.target) for node in graphs[0].graph.nodes]
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
    layers, heads, h, _, schedule, _ = arguments()
    assert not static.applies(layers, heads, h, schedule)  # on a CPU
    monkeypatch.setattr(static, "_DEVICES", {"cpu"})
    assert static.applies(layers, heads, h, schedule)
    for policy in (ExitPolicy(copy="pre_norm"), ExitPolicy(neighbors="recompute")):
        assert not static.applies(layers, heads, h, Schedule.of(policy, 4, 4, h))
    assert not static.applies(layers, heads, h.double(), schedule)
    with torch.enable_grad():
        assert not static.applies(layers, heads, h, schedule)
    bare = [*heads[:3], torch.nn.Linear(32, 5, bias=False)]
    assert not static.applies(layers, bare, h, schedule)
    turned = [*heads[:3], torch.nn.Linear(32, 5)]
    turned[3].weight = torch.nn.Parameter(torch.randn(32, 5).T)
    assert not static.applies(layers, turned, h, schedule)
    layers[1].activation = torch.tanh
    assert not static.applies(layers, heads, h, schedule)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("dtype", static.DTYPES, ids=str)
@torch.no_grad()
def test_graphs_replay_what_the_loop_does(dtype):
    loop = static.GraphedLoop()
    for lengths in (LENGTHS, [9, 33, 2], LENGTHS, [128] * 64):
        values = arguments("cuda", dtype, lengths=lengths)
        direct, graphed, again = static.exit_loop(*values), loop(*values), loop(*values)
        for a, b, c in zip(direct, graphed, again, strict=True):
            assert torch.equal(b, c)
            assert torch.equal(a, b)
    assert all(loop._graphs.values())  # recorded, not run directly


@pytest.mark.gpu
@needs_gpu
@torch.no_grad()
def test_same_bits_every_time():
    values = arguments("cuda", torch.float16, lengths=[128] * 64)
    first = static.exit_loop(*values)
    for _ in range(50):
        assert all(map(torch.equal, first, static.exit_loop(*values)))
