"""add_layer_norm and bias_gelu against fp64: forward and every gradient."""

import pytest
import torch
import torch.nn.functional as F
from assertions import assert_as_exact

from tokenexit.ops import extension_available, extension_error
from tokenexit.ops.add_layer_norm import add_layer_norm
from tokenexit.ops.bias_gelu import bias_gelu

compiled = pytest.mark.skipif(not extension_available(), reason=str(extension_error()))


def plain_norm(x, residual, weight, bias):
    return F.layer_norm(x + residual, weight.shape, weight, bias, 1e-12)


def our_norm(x, residual, weight, bias):
    return add_layer_norm(x, residual, weight, bias, 1e-12)


OPS = {
    "add_layer_norm": (our_norm, plain_norm, lambda a, d: [(a, d), (a, d), (d,), (d,)]),
    "bias_gelu": (bias_gelu, lambda x, b: F.gelu(x + b), lambda a, d: [(a, d), (d,)]),
    "bias_gelu by tanh": (
        lambda x, b: bias_gelu(x, b, "tanh"),
        lambda x, b: F.gelu(x + b, approximate="tanh"),
        lambda a, d: [(a, d), (d,)],
    ),
}


def run(function, shapes, dtype, seed=0):
    """Output and gradients; the inputs are rounded to fp32 first."""
    g = torch.Generator().manual_seed(seed)
    values = [(3 * torch.randn(shape, generator=g)).to(dtype).requires_grad_() for shape in shapes]
    out = function(*values)
    out.backward(torch.randn(out.shape, generator=g).to(dtype))
    return out.detach(), [value.grad for value in values]


@pytest.mark.parametrize("rows, width", [(1, 1), (3, 7), (63, 48), (129, 385), (5, 3072)])
@pytest.mark.parametrize("op", OPS)
def test_forward_and_gradients(op, rows, width):
    ours, plain, shapes = OPS[op]
    got, got_grads = run(ours, shapes(rows, width), torch.float32)
    rough, rough_grads = run(plain, shapes(rows, width), torch.float32)
    truth, truth_grads = run(plain, shapes(rows, width), torch.float64)
    assert_as_exact(got, truth, rough)
    for mine, exact, near in zip(got_grads, truth_grads, rough_grads, strict=True):
        assert_as_exact(mine, exact, near, "backward")


@pytest.mark.parametrize("op", OPS)
def test_gradcheck_and_other_dtypes(op):
    ours, plain, shapes = OPS[op]
    values = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes(3, 5)]
    assert torch.autograd.gradcheck(ours, values)
    halves = [value.detach().bfloat16() for value in values]
    assert torch.equal(ours(*halves), plain(*halves))
    mixed = [values[0].detach().float(), *(value.detach() for value in values[1:])]
    torch.testing.assert_close(ours(*mixed), plain(*mixed), check_dtype=False)


def test_eps_of_the_norm():
    x, weight = torch.randn(3, 5), torch.randn(5)
    for dtype in (torch.float32, torch.float64):
        values = [value.to(dtype) for value in (x, x, weight, weight)]
        got = add_layer_norm(*values, eps=0.5)
        torch.testing.assert_close(got, F.layer_norm(values[0] * 2, (5,), *values[2:], 0.5))


@compiled
@pytest.mark.parametrize("approximate", ["none", "tanh"])
@torch.no_grad()
def test_gelu_everywhere(approximate):
    x = torch.linspace(-12, 12, 100_001)[None]
    got = bias_gelu(x, torch.zeros(x.shape[1]), approximate)
    error = got.double() - F.gelu(x.double(), approximate=approximate)
    assert (error.abs() <= 1e-6 * x.abs().clamp(min=1)).all()
    odd = torch.tensor([[float("nan"), float("inf"), 0.0, -0.0, 1e20]])
    got = bias_gelu(odd, torch.zeros(5), approximate)[0]
    assert got[0].isnan() and got[1] == float("inf") and (got[2:4] == 0).all()
    assert got[4] == odd[0, 4]


@compiled
@torch.no_grad()
def test_norm_of_rows_far_from_zero_and_of_nan():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(5, 64, generator=g) + 1000
    x[3, 5] = float("nan")
    one, zero = torch.ones(64), torch.zeros(64)
    got = our_norm(x, torch.zeros_like(x), one, zero)
    truth = plain_norm(x.double(), torch.zeros(5, 64).double(), one.double(), zero.double())
    assert got.isnan().any(1).tolist() == [False, False, False, True, False]
    clean = [0, 1, 2, 4]
    assert (got[clean] - truth[clean]).abs().max() < 1e-3


@compiled
@torch.no_grad()
def test_norm_of_rows_that_hardly_vary():
    """Off by no more than the mean itself, which fp32 holds to half of 2^-14 there."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(64, 64, generator=g) / 100 + 1000
    got = our_norm(x, torch.zeros_like(x), torch.ones(64), torch.zeros(64)).double()
    std, mean = torch.std_mean(x.double(), 1, unbiased=False, keepdim=True)
    assert ((got - (x.double() - mean) / std).abs() * std).max() < 1.01 * 2**-15
    torch.testing.assert_close(
        got.var(1, unbiased=False), torch.ones(64).double(), atol=1e-5, rtol=0
    )


@compiled
@pytest.mark.parametrize("name", OPS)
def test_opcheck_and_bits_on_any_number_of_threads(name):
    shapes = OPS[name][2](70, 400)
    values = [torch.randn(shape) for shape in shapes]
    whole = OPS[name][0](*values)
    before = torch.get_num_threads()
    try:
        for threads in (2, 5):
            torch.set_num_threads(threads)
            assert torch.equal(OPS[name][0](*values), whole)
    finally:
        torch.set_num_threads(before)
    op = getattr(torch.ops.tokenexit, name.split()[0]).default
    extra = (1e-12,) if name == "add_layer_norm" else (name.endswith("tanh"),)
    values = [torch.randn(shape, requires_grad=True) for shape in OPS[name][2](3, 20)]
    torch.library.opcheck(op, (*values, *extra))


def test_refuses():
    with pytest.raises(ValueError, match=r"expected \[A, d\], \[A, d\], \[d\]"):
        our_norm(torch.zeros(2, 3), torch.zeros(2, 4), torch.ones(3), torch.zeros(3))
    with pytest.raises(ValueError, match=r"got bias \(4,\); expected \(3,\)"):
        our_norm(torch.zeros(2, 3), torch.zeros(2, 3), torch.ones(3), torch.zeros(4))
    with pytest.raises(ValueError, match=r"expected \[A, f\], \[f\]"):
        bias_gelu(torch.zeros(2, 3), torch.zeros(4))
    with pytest.raises(ValueError, match=r"approximate is 'erf'; expected one of \['none', 'tanh'"):
        bias_gelu(torch.zeros(2, 3), torch.zeros(3), "erf")


def test_under_autocast_gelu_is_in_the_dtype_of_the_product():
    """As Hugging Face's is: not in fp32, because the bias is, which takes twice the memory."""
    x = torch.randn(5, 8, dtype=torch.bfloat16, requires_grad=True)
    bias = torch.randn(8, requires_grad=True)
    out = bias_gelu(x, bias)
    assert out.dtype == torch.bfloat16
    expected = F.gelu(x.detach() + bias.detach().bfloat16())
    torch.testing.assert_close(out, expected, atol=0.02, rtol=0.02)
    out.float().sum().backward()
    assert x.grad.dtype == torch.bfloat16 and bias.grad.dtype == torch.float32
