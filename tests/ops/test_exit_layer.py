"""A whole compiled layer against the fp64 reference: both ways of attention, and mixed."""

import subprocess
import sys

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from assertions import assert_as_exact

from tokenexit import reference
from tokenexit.layers import ExitLayer
from tokenexit.ops import extension_available, extension_error
from tokenexit.ops.bias_gelu import gelu_tanh
from tokenexit.ops.exit_layer import exit_layer
from tokenexit.ops.pack_tokens import pack
from tokenexit.packing import Active

pytestmark = pytest.mark.skipif(not extension_available(), reason=str(extension_error()))

PROJECTED, ABSORBED = [0.0, 0.0, 1e30, 1e30], [1e30, 1e30, 0.0, 0.0]
MIXED = [1.0, 0.0, 4.0, 0.0]  # absorbed where less than a fourth of the tokens is active
ALONE = [3.0, 0.0, 1.0, 1.0]  # absorbed where a token is alone
WAYS = {"projected": PROJECTED, "absorbed": ABSORBED, "mixed": MIXED, "alone": ALONE}
DTYPES = (torch.float32, torch.bfloat16)
# (active, all) tokens of each sentence
SHAPES = {
    "one token": [(1, 1)],
    "full": [(63, 63), (129, 129)],
    "ragged": [(5, 17), (1, 63), (129, 129), (2, 2), (8, 40), (9, 40)],
    "finished sentences": [(0, 9), (3, 7), (0, 1), (1, 30)],
    "nothing active": [(0, 5), (0, 3)],
    "long": [(40, 513), (600, 600)],
    "groups": [(70, 70)] * 9 + [(1, 300)] * 9,
    "all active, one token among them": [(1, 1), (20, 20), (1, 1), (7, 7)],
}


def make_layer(d=48, heads=3, inner=80, dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    layer = ExitLayer(d, heads, inner)
    for parameter in layer.parameters():
        if parameter.dim() == 1:
            parameter.data += 0.3 * torch.randn_like(parameter)
    return layer.to(dtype).eval()


def make_batch(shape, d, seed=0):
    """States in fp64, and the active tokens."""
    g = torch.Generator().manual_seed(seed)
    n = max(length for _, length in shape)
    lengths = torch.tensor([length for _, length in shape])
    mask = (torch.arange(n) < lengths[:, None]).long()
    packed = pack(mask, torch.arange(n).expand_as(mask))
    chosen = [
        start + torch.randperm(length, generator=g)[:count].sort()[0]
        for start, (count, length) in zip(packed.cu_tokens.tolist(), shape, strict=False)
    ]
    cu = torch.tensor([0, *(count for count, _ in shape)]).cumsum(0)
    h = torch.randn(int(lengths.sum()), d, generator=g, dtype=torch.float64)
    return h, Active(packed, torch.cat(chosen), cu)


def weights_of(layer):
    return [
        w
        for name in ("query", "key_value", "attention_output", "attention_norm")
        + ("up", "down", "output_norm")
        for part in (getattr(layer, name),)
        for w in (part.weight.detach(), part.bias.detach())
    ]


def run(layer, h, active, costs, **options):
    scale = (h.shape[1] // layer.num_heads) ** -0.5
    return exit_layer(
        h,
        active,
        weights_of(layer),
        [],
        costs,
        layer.num_heads,
        scale,
        1e-12,
        tanh=layer.activation is gelu_tanh,
        **options,
    )


@torch.no_grad()
def by_reference(layer, h, active, pre_norm=False, bias=None):
    cu = active.packed.cu_tokens.tolist()
    pieces = [h[a:b] for a, b in zip(cu, cu[1:], strict=False)]
    rows = torch.cat([reference.layer_sum(layer, p, bias) if len(p) else p for p in pieces])
    return (rows if pre_norm else layer.output_norm(rows))[active.tokens]


def assert_right(got, layer, h, active, **options):
    truth = by_reference(make_like(layer, torch.float64), h, active, **options)
    options = {k: v.to(got.dtype) if torch.is_tensor(v) else v for k, v in options.items()}
    assert_as_exact(got, truth, by_reference(layer, h.to(got.dtype), active, **options))


def make_like(layer, dtype):
    d, inner = layer.down.weight.shape
    other = ExitLayer(d, layer.num_heads, inner, layer.activation).to(dtype)
    other.load_state_dict(layer.state_dict())
    return other.eval()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_equals_the_reference(shape, way, dtype):
    layer = make_layer(dtype=dtype)
    h, active = make_batch(shape, 48)
    got = run(layer, h.to(dtype), active, way)
    assert got.shape == (len(active.tokens), 48) and got.isfinite().all()
    assert_right(got, layer, h, active)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize(
    "d, heads, inner", [(64, 1, 64), (384, 12, 1536), (40, 5, 30), (36, 2, 7), (768, 12, 512)]
)
def test_widths(d, heads, inner, way, dtype):
    if dtype == torch.bfloat16:
        inner += inner % 2
    layer = make_layer(d, heads, inner, dtype)
    h, active = make_batch([(5, 17), (20, 20), (1, 9)], d)
    assert_right(run(layer, h.to(dtype), active, way), layer, h, active)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", ["ragged", "groups"])
@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_bias_and_pre_norm(way, shape, dtype):
    layer = make_layer(dtype=dtype)
    h, active = make_batch(SHAPES[shape], 48)
    g = torch.Generator().manual_seed(2)
    bias = torch.randn(3, 2 * 6 + 1, generator=g, dtype=torch.float64)
    got = run(layer, h.to(dtype), active, way, pre_norm=True, bias=bias.to(dtype))
    assert_right(got, layer, h, active, pre_norm=True, bias=bias)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("way", ["projected", "absorbed"])
def test_gelu_by_tanh(way, dtype):
    """Weights are such that the two kinds of GELU differ by more than rounding does."""
    layer = make_layer(dtype=torch.float64)
    layer.activation = gelu_tanh
    with torch.no_grad():
        layer.down.weight *= 30
    layer.to(dtype)
    h, active = make_batch(SHAPES["ragged"], 48)
    got = run(layer, h.to(dtype), active, WAYS[way], pre_norm=True)
    assert_right(got, layer, h, active, pre_norm=True)
    if dtype == torch.float32:
        layer.activation = F.gelu
        assert not torch.allclose(got, by_reference(layer, h.float(), active, True), atol=1e-3)


@hypothesis.settings(max_examples=60)
@hypothesis.given(
    lengths=st.lists(st.tuples(st.integers(0, 40), st.integers(1, 40)), min_size=1, max_size=6),
    heads=st.sampled_from([1, 2, 4]),
    size=st.sampled_from([4, 8, 20, 32]),
    way=st.sampled_from([PROJECTED, ABSORBED, MIXED]),
    dtype=st.sampled_from(DTYPES),
)
def test_any_batch(lengths, heads, size, way, dtype):
    shape = [(min(pair), max(pair)) for pair in lengths]
    layer = make_layer(heads * size, heads, 24, dtype)
    h, active = make_batch(shape, heads * size, seed=len(shape))
    assert_right(run(layer, h.to(dtype), active, way), layer, h, active)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_same_bits_alone_in_any_order_and_on_any_number_of_threads(way, dtype):
    layer = make_layer(dtype=dtype)
    shape = SHAPES["ragged"]
    h, active = make_batch(shape, 48)
    h = h.to(dtype)
    whole = run(layer, h, active, way)
    cu, rows = active.packed.cu_tokens, active.cu_tokens
    for b, (count, length) in enumerate(shape):
        mine = active.tokens[rows[b] : rows[b + 1]] - cu[b]
        packed = pack(torch.ones(1, length), torch.arange(length)[None])
        alone = Active(packed, mine, torch.tensor([0, count]))
        got = run(layer, h[cu[b] : cu[b + 1]], alone, way)
        assert torch.equal(got, whole[rows[b] : rows[b + 1]])
    before = torch.get_num_threads()
    try:
        for threads in (2, 3, 5):
            torch.set_num_threads(threads)
            assert torch.equal(run(layer, h, active, way), whole)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 7, 8, 9, 16, 17, 23, 24, 25, 32, 33])
@pytest.mark.parametrize("d, heads, inner", [(72, 2, 134), (30, 5, 64), (60, 5, 35), (48, 3, 34)])
def test_few_rows_have_the_bits_that_many_have(rows, d, heads, inner):
    """Of whole and broken tiles of features, and pieces of depth."""
    layer = make_layer(d, heads, inner)
    h, both = make_batch([(rows, rows), (50, 50)], d)
    _, alone = make_batch([(rows, rows)], d)
    h = h.float()
    got = run(layer, h[:rows], alone, PROJECTED)
    assert torch.equal(got, run(layer, h, both, PROJECTED)[:rows])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_same_bits_in_another_order_of_a_batch_of_several_groups(way, dtype):
    layer = make_layer(dtype=dtype)
    shape = [*SHAPES["groups"], *SHAPES["ragged"]]
    h, active = make_batch(shape, 48)
    h = h.to(dtype)
    whole = run(layer, h, active, way)
    tokens = [length for _, length in shape]
    counts = [count for count, _ in shape]
    order = torch.randperm(len(shape), generator=torch.Generator().manual_seed(0)).tolist()
    states, expected = h.split(tokens), whole.split(counts)
    chosen = [
        mine - start
        for mine, start in zip(active.tokens.split(counts), active.packed.cu_tokens, strict=False)
    ]
    lengths = torch.tensor([tokens[b] for b in order])
    mask = (torch.arange(max(tokens)) < lengths[:, None]).long()
    packed = pack(mask, torch.arange(max(tokens)).expand_as(mask))
    there = [chosen[b] + packed.cu_tokens[at] for at, b in enumerate(order)]
    cu = torch.tensor([0, *(counts[b] for b in order)]).cumsum(0)
    moved = Active(packed, torch.cat(there), cu)
    got = run(layer, torch.cat([states[b] for b in order]), moved, way)
    assert torch.equal(got, torch.cat([expected[b] for b in order]))


def test_the_ways_agree():
    layer = make_layer()
    h, active = make_batch(SHAPES["ragged"], 48)
    projected, absorbed, *others = (run(layer, h.float(), active, way) for way in WAYS.values())
    for other in (absorbed, *others):
        torch.testing.assert_close(other, projected, atol=1e-5, rtol=0)
    assert not torch.equal(absorbed, projected)


@torch.no_grad()
def test_norm_of_rows_far_from_zero():
    """Off by no more than the mean itself, which fp32 holds to half of 2^-14 there."""
    layer = make_layer()
    layer.down.bias += 1000
    layer.output_norm.weight[:], layer.output_norm.bias[:] = 1, 0
    h, active = make_batch(SHAPES["ragged"], 48)
    got = run(layer, h.float(), active, PROJECTED)
    std = run(layer, h.float(), active, PROJECTED, pre_norm=True).double().std(1, unbiased=False)
    assert (got.double().mean(1).abs() * std).max() < 1.01 * 2**-15


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_stays_in_its_sentence(dtype):
    layer = make_layer(dtype=dtype)
    h, active = make_batch([(3, 9), (2, 5), (4, 4)], 48)
    h = h.to(dtype)
    h[11] = float("nan")
    for way in WAYS.values():
        bad = run(layer, h, active, way).isnan().any(1)
        assert bad.tolist() == [False] * 3 + [True] * 2 + [False] * 4


def test_costs_decide():
    """The same weights read as keys and values, or not at all."""
    layer = make_layer()
    h, active = make_batch([(2, 30), (30, 30)], 48)
    broken = weights_of(layer)
    broken[3] = torch.full_like(broken[3], float("nan"))  # bias of keys and values
    results = {}
    for name, way in WAYS.items():
        out = exit_layer(h.float(), active, broken, [], way, 3, 0.25, 1e-12)
        results[name] = out.isnan().any(1)
    assert results["projected"].all()
    assert results["absorbed"].all()  # the values' bias comes last
    broken = weights_of(layer)
    broken[3][:48] = float("nan")  # the keys' bias: absorbed attention drops it
    for name, way in WAYS.items():
        out = exit_layer(h.float(), active, broken, [], way, 3, 0.25, 1e-12)
        results[name] = out.isnan().any(1).tolist()
    assert results["projected"] == [True] * 32
    assert results["absorbed"] == [False] * 32
    assert results["mixed"] == [False] * 2 + [True] * 30


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"heads": 5}, ValueError, "5 heads"),
        ({"weight": (0, torch.zeros(48, 47))}, RuntimeError, "weight of 2256 elements"),
        ({"weight": (2, torch.zeros(96, 48).double())}, RuntimeError, "Double"),
        ({"weight": (8, torch.zeros(48, 80).T)}, RuntimeError, "contiguous"),
        ({"weight": (8, torch.zeros(48, 80))}, RuntimeError, "weight"),
        ({"costs": [1.0]}, RuntimeError, "1 costs"),
        ({"tokens": torch.tensor([0, 99])}, RuntimeError, "token 99 of 6"),
        ({"tokens": torch.tensor([0, -1])}, RuntimeError, "token -1 of 6"),
        ({"tokens": torch.tensor([5, 0])}, RuntimeError, "token 5"),
        ({"tokens": torch.tensor([1, 1]), "cu": torch.tensor([0, 2, 2])}, RuntimeError, "token 1"),
        ({"tokens": torch.tensor([0.0, 1.0])}, TypeError, "expected torch.int64"),
        ({"cu": torch.tensor([0, 2])}, ValueError, r"expected \[3\]"),
        ({"cu": torch.tensor([0, 2, 1])}, RuntimeError, "cu_active falls from 2 to 1"),
        ({"cu": torch.tensor([0, 1, 3])}, RuntimeError, "expected 2 active of 6 tokens"),
        ({"bias": torch.zeros(3, 4)}, ValueError, r"expected \[3, 2R\+1\]"),
        ({"h": torch.zeros(6)}, ValueError, r"expected \[T, d\]"),
    ],
)
def test_refuses(change, error, message):
    layer = make_layer()
    h, active = make_batch([(1, 4), (1, 2)], 48)
    weights = weights_of(layer)
    if "weight" in change:
        weights[change["weight"][0]] = change["weight"][1]
    active = Active(
        active.packed, change.get("tokens", active.tokens), change.get("cu", active.cu_tokens)
    )
    with pytest.raises(error, match=message):
        exit_layer(
            change.get("h", h.float()),
            active,
            weights,
            [],
            change.get("costs", PROJECTED),
            change.get("heads", 3),
            0.25,
            1e-12,
            bias=change.get("bias"),
        )


def test_no_width_is_right_or_refused():
    """In a process of its own: a division by zero would end this one."""
    code = f"""
import torch
from tokenexit.ops.exit_layer import exit_layer
from tokenexit.ops.pack_tokens import pack
from tokenexit.packing import Active
active = Active.all(pack(torch.ones(1, 4), torch.arange(4)[None]))
for d, f in ((0, 8), (8, 0)):
    shapes = [(d, d), d, (2 * d, d), 2 * d, (d, d), d, d, d, (f, d), f, (d, f), d, d, d]
    weights = [torch.ones(shape) for shape in shapes]
    try:
        out = exit_layer(torch.ones(4, d), active, weights, [], {PROJECTED}, 1, 1.0, 1e-12)
        assert out.shape == (4, d)
    except (RuntimeError, ValueError) as error:
        assert "expected" in str(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, (done.returncode, done.stderr)


def test_opcheck():
    layer = make_layer()
    h, active = make_batch([(3, 9), (1, 4)], 48)
    tail = (weights_of(layer), [], MIXED, 3, 0.25, 1e-12, False, False, None, None)
    arguments = (h.float(), active.tokens, active.cu_tokens, active.packed.cu_tokens, *tail)
    torch.library.opcheck(torch.ops.tokenexit.exit_layer.default, arguments)
