"""exit_attention against the fp64 reference: forward, every gradient, odd shapes."""

import math
import subprocess
import sys

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from assertions import assert_as_exact, attention_sizes

from tokenexit import reference
from tokenexit.ops import extension_available, extension_error
from tokenexit.ops.exit_attention import exit_attention

compiled = pytest.mark.skipif(not extension_available(), reason=str(extension_error()))
by_reference = reference.exit_attention

# (active, all) tokens of each sentence
SHAPES = {
    "one token": [(1, 1)],
    "full": [(63, 63), (129, 129)],
    "ragged": [(5, 17), (1, 63), (129, 129), (2, 2)],
    "one active": [(1, 129)],
    "finished sentences": [(0, 9), (3, 7), (0, 1), (0, 0)],
    "nothing active": [(0, 5), (0, 3)],
    "long": [(40, 513)],
}


def inputs(shape, dtype, heads=3, dim=8, bias=False, seed=0):
    g = torch.Generator().manual_seed(seed)
    active, all_ = zip(*shape, strict=True)
    values = {
        name: torch.randn(sum(n), heads, dim, generator=g, dtype=torch.float64).to(dtype)
        for name, n in (("q", active), ("k", all_), ("v", all_))
    }
    offsets = [torch.tensor([0, *torch.tensor(n).cumsum(0).tolist()]) for n in (active, all_)]
    table = positions = None
    if bias:
        table = torch.randn(heads, 2 * 6 + 1, generator=g, dtype=torch.float64).to(dtype)
        positions = torch.cat([torch.randperm(n, generator=g)[:a].sort()[0] for a, n in shape])
    return values, offsets, table, positions


def grad_of(out):
    g = torch.Generator().manual_seed(1)
    return torch.randn(out.shape, generator=g, dtype=torch.float64).to(out.dtype)


def run(function, dtype, shape, bias, with_grad=True, **sizes):
    """Output and gradients in a dtype."""
    values, offsets, table, positions = inputs(shape, dtype, bias=bias, **sizes)
    leaves = [*values.values(), *([table] if bias else [])]
    for leaf in leaves:
        leaf.requires_grad_(with_grad)
    out = function(*values.values(), *offsets, 0.4, table, positions)
    if with_grad and out.numel():
        out.backward(grad_of(out))
    return out.detach(), [leaf.grad for leaf in leaves]


def scales_of(out, shape, bias, dropout_p=0.0, **sizes):
    """For the gradients that `run` gives."""
    values, offsets, *table = inputs(shape, out.dtype, bias=bias, **sizes)
    return attention_sizes(grad_of(out), *values.values(), *offsets, 0.4, *table, dropout_p)


def assert_right(shape, dtype, bias, **sizes):
    ours, our_grads = run(exit_attention, dtype, shape, bias, **sizes)
    plain, plain_grads = run(reference.exit_attention, dtype, shape, bias, **sizes)
    # The truth starts from the same rounded inputs.
    exact = lambda *args: reference.exit_attention(  # noqa: E731
        *(a.to(dtype).double() if torch.is_tensor(a) and a.is_floating_point() else a for a in args)
    )
    truth, truth_grads = run(exact, torch.float64, shape, bias, **sizes)
    assert ours.dtype == dtype and ours.shape == truth.shape
    assert_as_exact(ours, truth, plain, "forward")
    if not ours.numel():
        return
    scales = scales_of(ours, shape, bias, **sizes)
    for name, *results in zip(
        ("q", "k", "v", "bias"), our_grads, truth_grads, plain_grads, scales, strict=False
    ):
        assert_as_exact(*results[:3], "backward", name, results[3])


@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_forward_and_gradients(shape, dtype, bias):
    assert_right(shape, dtype, bias)


@compiled
@hypothesis.settings(max_examples=60)
@hypothesis.given(
    lengths=st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40)), min_size=1, max_size=6),
    heads=st.integers(1, 4),
    dim=st.sampled_from([1, 4, 7, 8, 24, 32, 64]),
    bias=st.booleans(),
)
def test_any_batch(lengths, heads, dim, bias):
    shape = [(min(pair), max(pair)) for pair in lengths]
    assert_right(shape, torch.float32, bias, heads=heads, dim=dim)


@compiled
def test_second_result_is_the_logarithm_of_the_sum():
    values, offsets, table, positions = inputs([(3, 17), (2, 2)], torch.float32, bias=True)
    q, k, v = values.values()
    arguments = (*offsets, 0.4, None, None, 0.0, 0, 0)
    _, lse = torch.ops.tokenexit.exit_attention(q, k, v, *arguments)
    expected = torch.cat(
        [
            torch.einsum("ahd,khd->ahk", q[a:b], k[c:d]).mul(0.4).logsumexp(-1)
            for a, b, c, d in ((0, 3, 0, 17), (3, 5, 17, 19))
        ]
    )
    torch.testing.assert_close(lse, expected)
    with pytest.raises(RuntimeError, match=r"got a bias of 2 dimensions and 26 elements; expected"):
        torch.ops.tokenexit.exit_attention(q, k, v, *offsets, 0.4, table[:2], positions, 0.0, 0, 0)


@pytest.mark.parametrize("bias", [False, True])
def test_gradcheck(bias):
    values, offsets, table, positions = inputs([(2, 4), (0, 2), (3, 3)], torch.float64, bias=bias)
    leaves = [v.requires_grad_() for v in (*values.values(), *([table] if bias else []))]

    def function(q, k, v, table=None):
        return exit_attention(q, k, v, *offsets, 0.4, table, positions)

    assert torch.autograd.gradcheck(function, leaves)


def test_queries_of_some_tokens_are_rows_of_attention_over_all():
    values, (cu, _), _, _ = inputs([(9, 9), (6, 6)], torch.float64)
    q, k, v = values.values()
    whole = exit_attention(q, k, v, cu, cu, 0.4)
    some = torch.tensor([1, 4, 8, 11])
    part = exit_attention(q[some], k, v, torch.tensor([0, 3, 4]), cu, 0.4)
    torch.testing.assert_close(part, whole[some])


def test_dropout_keeps_the_mean():
    values, offsets, _, _ = inputs([(40, 60)], torch.float32)
    exact = exit_attention(*values.values(), *offsets, 0.4)
    runs = torch.stack(
        [
            exit_attention(*values.values(), *offsets, 0.4, dropout_p=0.2, seed=seed)
            for seed in range(400)
        ]
    )
    assert not torch.equal(runs[0], runs[1])
    assert (runs.mean(0) - exact).abs().mean() < 0.02


def test_dropout_where_no_op_is_compiled():
    values, offsets, _, _ = inputs([(5, 17), (2, 2)], torch.float64)
    call = (*values.values(), *offsets, 0.4, None, None, 0.5, 7)
    assert torch.equal(exit_attention(*call), reference.exit_attention(*call))


@compiled
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_training_in_half_precision_takes_the_compiled_op(dtype, monkeypatch):
    """On the CPU as well, where plain PyTorch goes sentence by sentence."""
    monkeypatch.delattr(reference, "exit_attention")
    values, offsets, table, positions = inputs([(5, 17), (2, 2)], dtype, bias=True)
    leaves = [v.requires_grad_() for v in (*values.values(), table)]
    out = exit_attention(*leaves[:3], *offsets, 0.4, table, positions, 0.5, 7)
    out.backward(grad_of(out))
    assert [leaf.grad.dtype for leaf in leaves] == [dtype] * 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("shape", [SHAPES["ragged"], SHAPES["finished sentences"]], ids=str)
def test_dropout_is_that_of_the_reference(shape, bias, dtype):
    """The same weights go, forward and backward, for the same seed."""
    ours, plain = (
        lambda *args, f=f: f(*args, dropout_p=0.3, seed=2**31 + 7)
        for f in (exit_attention, reference.exit_attention)
    )
    got, got_grads = run(ours, dtype, shape, bias)
    rough, rough_grads = run(plain, dtype, shape, bias)
    exact = lambda *args: plain(  # noqa: E731
        *(a.to(dtype).double() if torch.is_tensor(a) and a.is_floating_point() else a for a in args)
    )
    truth, truth_grads = run(exact, torch.float64, shape, bias)
    assert_as_exact(got, truth, rough)
    scales = scales_of(got, shape, bias, 0.3)
    for mine, wanted, near, scale in zip(got_grads, truth_grads, rough_grads, scales, strict=True):
        assert_as_exact(mine, wanted, near, "backward", scale=scale)


@compiled
@pytest.mark.parametrize("dim", [1, 5, 24, 32, 64, 80])
def test_head_sizes_and_halves_of_one_tensor(dim):
    """Keys and values as a layer has them, side by side in one tensor."""
    g = torch.Generator().manual_seed(0)
    cu_q, cu_k = torch.tensor([0, 20, 21, 24]), torch.tensor([0, 40, 47, 50])
    q = torch.randn(24, 2, dim, generator=g, dtype=torch.float64)
    pair = torch.randn(50, 2, 2, dim, generator=g, dtype=torch.float64)
    weight = torch.randn(24, 2, dim, generator=g)
    results = []
    for function, dtype in (
        (exit_attention, torch.float32),
        (reference.exit_attention, torch.float32),
        (reference.exit_attention, torch.float64),
    ):
        leaves = [x.float().to(dtype).requires_grad_() for x in (q, pair)]
        out = function(leaves[0], *leaves[1].unbind(1), cu_q, cu_k, 0.3)
        (out * weight).sum().backward()
        results.append((out.detach(), *(leaf.grad for leaf in leaves)))
    for got, rough, truth in zip(*results, strict=True):
        assert_as_exact(got, truth, rough, "backward")


@compiled
def test_same_bits_on_any_number_of_threads():
    values, offsets, table, positions = inputs(SHAPES["ragged"], torch.float32, bias=True)
    leaves = [*values.values(), table]

    def everything():
        for leaf in leaves:
            leaf.requires_grad_().grad = None
        out = exit_attention(*values.values(), *offsets, 0.4, table, positions, 0.1, 5)
        out.backward(torch.ones_like(out))
        return [out.detach(), *(leaf.grad for leaf in leaves)]

    expected = everything()
    before = torch.get_num_threads()
    try:
        for threads in (2, 3, 5):
            torch.set_num_threads(threads)
            assert all(map(torch.equal, everything(), expected))
    finally:
        torch.set_num_threads(before)


@compiled
def test_nan_and_huge_scores():
    values, offsets, _, _ = inputs([(3, 5), (2, 4)], torch.float32)
    values["k"][1] = float("nan")
    out = exit_attention(*values.values(), *offsets, 0.4)
    assert out[:3].isnan().all() and out[3:].isfinite().all()
    values, offsets, _, _ = inputs([(3, 5), (2, 4)], torch.float32)
    huge = {**values, "q": 1e4 * values["q"], "k": 1e4 * values["k"]}
    got = exit_attention(*huge.values(), *offsets, 0.4)
    torch.testing.assert_close(got, reference.exit_attention(*huge.values(), *offsets, 0.4))


@compiled
@pytest.mark.parametrize("name", "qkv")
@pytest.mark.parametrize("bits", [0x7FC00000, 0x7FC00001, -1], ids=hex)
def test_any_nan_is_one(bits, name):
    """Whatever its low bits are: memory full of ones is NaN too."""
    values, offsets, _, _ = inputs([(4, 5), (2, 4)], torch.float32)
    values[name].view(torch.int32)[1, 0, 2] = bits
    got, expected = (f(*values.values(), *offsets, 0.4) for f in (exit_attention, by_reference))
    assert torch.equal(got.isnan(), expected.isnan()) and expected.isnan().any()


@compiled
@pytest.mark.parametrize("value", [math.inf, -math.inf])
@pytest.mark.parametrize("name", ["q", "k", "v", "bias"])
def test_infinities_are_those_of_the_reference(name, value):
    values, offsets, table, positions = inputs([(4, 5), (2, 4)], torch.float32, bias=True)
    ({**values, "bias": table[None]})[name][0, 0, 2] = value
    rest = (*values.values(), *offsets, 0.4, table, positions)
    torch.testing.assert_close(exit_attention(*rest), by_reference(*rest), equal_nan=True)


def unmix(x):
    """The reverse of the hash that dropout draws by."""
    x ^= x >> 16
    x = x * pow(0x846CA68B, -1, 2**32) & 0xFFFFFFFF
    x ^= x >> 15 ^ x >> 30
    x = x * pow(0x7FEB352D, -1, 2**32) & 0xFFFFFFFF
    return x ^ x >> 16


@compiled
@pytest.mark.parametrize("p", [0.1, 0.2, 0.25, 0.3, 0.9])
@pytest.mark.parametrize("below", [0, 1])
def test_dropout_at_the_very_draw_that_decides(p, below):
    seed = unmix(unmix(unmix(math.floor(p * 2**32) - below)))  # row, head and key are 0
    one, cu = torch.ones(1, 1, 4), torch.tensor([0, 1])
    got, expected = (
        f(one, one, one, cu, cu, 1.0, dropout_p=p, seed=seed)
        for f in (exit_attention, by_reference)
    )
    assert expected.any() == (not below)
    torch.testing.assert_close(got, expected)


@compiled
def test_dropout_of_nearly_all():
    values, offsets, _, _ = inputs([(40, 60)], torch.float32)
    for p in (0.999, 1 - 1e-9):
        got, expected = (
            f(*values.values(), *offsets, 0.4, dropout_p=p, seed=3)
            for f in (exit_attention, by_reference)
        )
        torch.testing.assert_close(got, expected)


@compiled
def test_more_keys_than_fit_into_memory():
    """By an expanded tensor that takes none itself; in a process of its own, as it may crash."""
    code = """
import torch
from tokenexit.ops.exit_attention import exit_attention
for keys in (2**40, 2**59, 2**60, 2**62):
    k = torch.zeros(1, 1, 1).expand(keys, 1, 1)
    try:
        exit_attention(k[:1], k, k, torch.tensor([0, 1]), torch.tensor([0, keys]), 1.0)
    except RuntimeError:
        print(keys, flush=True)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    refused = [int(line) for line in done.stdout.split()]
    assert refused == [2**40, 2**59, 2**60, 2**62], (done.returncode, done.stderr)


@compiled
@pytest.mark.parametrize("bias", [False, True])
def test_opcheck(bias):
    shape = [(2, 5), (0, 3), (1, 1)]
    values, offsets, table, positions = inputs(shape, torch.float32, bias=bias)
    leaves = [v.requires_grad_() for v in values.values()]
    arguments = (*leaves, *offsets, 0.4, table, positions, 0.1, 3, 0)
    torch.library.opcheck(torch.ops.tokenexit.exit_attention.default, arguments)
    plain = tuple(a.detach() if torch.is_tensor(a) else a for a in arguments)
    out, lse = torch.ops.tokenexit.exit_attention(*plain)
    backward = torch.ops.tokenexit.exit_attention_backward.default
    torch.library.opcheck(backward, (torch.ones_like(out), *plain[:3], out, lse, *plain[3:]))


@compiled
@pytest.mark.parametrize(
    "change, message",
    [
        ({"cu_k": torch.tensor([0, 2, 2**33])}, "offsets up to 3 and 8589934592 of 3 queries"),
        ({"cu_q": torch.tensor([0, 1, 2])}, "offsets up to 2 and .* of 3 queries"),
        ({"cu_q": torch.tensor([0, 2, 1])}, "cu_q falls from 2 to 1"),
        ({"cu_q": torch.tensor([1, 2, 3])}, "cu_q starts at 1"),
    ],
)
def test_refuses_offsets_out_of_range(change, message):
    arguments = {
        "q": torch.zeros(3, 3, 8),
        "k": torch.zeros(4, 3, 8),
        "v": torch.zeros(4, 3, 8),
        "cu_q": torch.tensor([0, 1, 3]),
        "cu_k": torch.tensor([0, 1, 4]),
        "scale": 1.0,
    }
    with pytest.raises(RuntimeError, match=message):
        exit_attention(**{**arguments, **change})


@pytest.mark.parametrize(
    "change, message",
    [
        ({"k": torch.zeros(4, 3, 7)}, r"expected \[A, H, D\]"),
        ({"cu_q": torch.tensor([0, 2])}, "expected B \\+ 1 of both"),
        ({"bias": torch.zeros(3, 5)}, r"got positions None with a bias; expected \[3\]"),
        ({"bias": torch.zeros(3, 4), "positions": torch.arange(3)}, r"expected \[3, 2R\+1\]"),
        ({"dropout_p": 1.0}, "dropout_p=1.0; expected a probability below 1"),
        ({"backend": "fast"}, "got backend 'fast'"),
    ],
)
def test_refuses(change, message):
    arguments = {
        "q": torch.zeros(3, 3, 8),
        "k": torch.zeros(4, 3, 8),
        "v": torch.zeros(4, 3, 8),
        "cu_q": torch.tensor([0, 1, 3]),
        "cu_k": torch.tensor([0, 1, 4]),
        "scale": 1.0,
    }
    with pytest.raises(ValueError, match=message):
        exit_attention(**{**arguments, **change})


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_bias_of_another_dtype(dtype):
    values, offsets, table, positions = inputs([(2, 5), (1, 3)], dtype, bias=True)
    call = (*values.values(), *offsets, 0.3, table.float(), positions)
    got, expected = exit_attention(*call), exit_attention(*call, backend="reference")
    assert got.dtype == expected.dtype == dtype
    torch.testing.assert_close(got, expected, atol=0.02, rtol=0.02)
