"""linear against fp64, and a row's bits in any company."""

import pytest
import torch
import torch.nn.functional as F
from assertions import assert_as_exact

from tokenexit.ops import extension_available, extension_error
from tokenexit.ops.linear import linear

compiled = pytest.mark.skipif(not extension_available(), reason=str(extension_error()))


def arguments(rows, width, features, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    shapes = ((rows, width), (features, width), (features,))
    return [torch.randn(s, generator=g, dtype=torch.float64).to(dtype) for s in shapes]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [0, 1, 8, 9, 16, 63, 129])
@pytest.mark.parametrize("width, features", [(1, 1), (7, 9), (64, 2), (513, 44), (768, 13)])
@torch.no_grad()
def test_equals_fp64(rows, width, features, dtype):
    values = arguments(rows, width, features, dtype)
    truth = F.linear(*(value.double() for value in values))
    assert_as_exact(linear(*values), truth, F.linear(*values))


@compiled
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@torch.no_grad()
def test_a_row_has_the_same_bits_in_any_company(dtype):
    x, weight, bias = arguments(70, 100, 9, dtype)
    whole = linear(x, weight, bias)
    order = torch.randperm(70)
    assert torch.equal(linear(x[order], weight, bias), whole[order])
    for rows in (slice(0, 1), slice(3, 12), slice(40, 70)):
        assert torch.equal(linear(x[rows], weight, bias), whole[rows])
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert torch.equal(linear(x, weight, bias), whole)
    finally:
        torch.set_num_threads(before)


@compiled
@pytest.mark.parametrize("rows", range(1, 25))
@pytest.mark.parametrize(
    "width, features", [(768, 16), (3072, 8), (35, 27), (3, 9), (135, 77), (512, 70), (1024, 33)]
)
@torch.no_grad()
def test_few_rows_have_the_bits_that_many_have(rows, width, features):
    x, weight, bias = arguments(40, width, features)
    assert torch.equal(linear(x[:rows], weight, bias), linear(x, weight, bias)[:rows])


@compiled
def test_opcheck():
    torch.library.opcheck(torch.ops.tokenexit.linear.default, tuple(arguments(20, 7, 3)))


def test_has_gradients():
    values = [v.requires_grad_() for v in arguments(3, 4, 2, torch.float64)]
    assert torch.autograd.gradcheck(linear, values)


@pytest.mark.parametrize(
    "shapes", [((3, 4), (2, 5), (2,)), ((3, 4), (2, 4), (3,)), ((4,), (2, 4), (2,))], ids=str
)
def test_refuses(shapes):
    with pytest.raises(ValueError, match=r"expected \[A, K\], \[N, K\], \[N\]"):
        linear(*(torch.zeros(shape) for shape in shapes))


@torch.no_grad()
def test_rows_without_width_are_the_bias():
    for rows in (0, 3, 40):
        bias = torch.arange(5.0)
        got = linear(torch.zeros(rows, 0), torch.zeros(5, 0), bias)
        assert torch.equal(got, bias.expand(rows, 5))
