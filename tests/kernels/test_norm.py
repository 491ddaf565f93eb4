from types import MappingProxyType

import pytest
import torch
import torch.nn.functional as F
from assertions import assert_as_exact
from tokenexit.kernels.norm import add_layer_norm, bias_gelu

DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * torch.cuda.is_available()
NAN = float("nan")


def leaves(tensors, dtype):
    return [None if t is None else t.detach().to(dtype).requires_grad_() for t in tensors]


def check(ours, exact, tensors, name, scales=MappingProxyType({})):
    """Forward and every gradient, against fp64 and plain PyTorch; scales by the result's number."""
    dtype = tensors[0].dtype
    results = []
    for run, kind in ((ours, dtype), (exact, torch.float64), (exact, dtype)):
        args = leaves(tensors, kind)
        out = run(*args)
        weights = torch.linspace(-1, 1, out.numel(), device=out.device).to(kind).view_as(out)
        out.backward(weights)
        results.append([out.detach(), *(a.grad for a in args if a is not None)])
    for i, (got, truth, plain) in enumerate(zip(*results, strict=True)):
        assert_as_exact(
            got, truth, plain, "backward" if i else "forward", f"{name} {i}", scales.get(i)
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("with_residual", [True, False])
@pytest.mark.parametrize(("rows", "d"), [(1, 1), (63, 24), (129, 384), (7, 1025)])
def test_add_layer_norm(rows, d, with_residual, dtype, device):
    torch.manual_seed(0)
    x = (3 * torch.randn(rows, d) + 10).to(device, dtype)
    residual = torch.randn(rows, d).to(device, dtype) if with_residual else None
    weight, bias = torch.randn(d).to(device, dtype), torch.randn(d).to(device, dtype)

    def exact(x, residual, weight, bias):
        total = x if residual is None else x + residual
        return F.layer_norm(total, [d], weight, bias, 1e-5)

    def ours(*args):
        return add_layer_norm(*args, 1e-5)[0]

    # What is normalised to nothing by itself still rounds, and is divided by the root of epsilon.
    scales = {3 if with_residual else 2: x.abs().max() / 1e-5**0.5} if d == 1 else {}
    check(ours, exact, [x, residual, weight, bias], "add_layer_norm", scales)


def test_vectors_with_gaps(device):
    torch.manual_seed(0)
    x, weight, bias = (torch.randn(*size).to(device) for size in ((7, 40), (40, 2), (40, 2)))
    apart, dense = (weight[:, 0], bias[:, 0]), (weight[:, 0].clone(), bias[:, 0].clone())
    got, expected = (add_layer_norm(x, x, *vectors, 1e-5)[0] for vectors in (apart, dense))
    assert torch.equal(got, expected)
    assert torch.equal(bias_gelu(x, apart[1]), bias_gelu(x, dense[1]))


@pytest.mark.parametrize("rows", [1, 20, 33])
def test_rows_beyond_the_count(rows, device):
    torch.use_deterministic_algorithms(True)  # what is allocated is filled with NaN
    try:
        x = torch.randn(33, 40, device=device)
        x[rows:] = NAN
        weight, bias = torch.ones(40, device=device), torch.zeros(40, device=device)
        out, mean, rstd = add_layer_norm(x, x, weight, bias, 1e-5, torch.tensor([rows]).to(device))
    finally:
        torch.use_deterministic_algorithms(False)
    torch.testing.assert_close(out[:rows], F.layer_norm(2 * x[:rows], [40], eps=1e-5))
    torch.testing.assert_close(mean[:rows, 0], 2 * x[:rows].mean(1))
    deviation = ((2 * x[:rows]).std(1, correction=0) ** 2 + 1e-5).sqrt()
    torch.testing.assert_close(rstd[:rows, 0], 1 / deviation)
    assert all(t[rows:].isnan().all() for t in (out, mean, rstd))


def test_no_gradient_with_a_count(device):
    x, weight = (torch.ones(3, 4, device=device).requires_grad_(), torch.ones(4, device=device))
    out, *_ = add_layer_norm(x, None, weight, weight, 1e-5, torch.tensor([2], device=device))
    with pytest.raises(ValueError, match="no gradient with a count"):
        out.sum().backward()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (63, 129), (2, 3, 384)], ids=str)
@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_bias_gelu(approximate, shape, dtype, device):
    torch.manual_seed(0)
    x = (3 * torch.randn(*shape)).to(device, dtype)
    bias = torch.randn(shape[-1]).to(device, dtype)
    check(
        lambda x, bias: bias_gelu(x, bias, approximate == "tanh"),
        lambda x, bias: F.gelu(x + bias, approximate=approximate),
        [x, bias],
        "bias_gelu",
    )


def test_no_rows(device):
    x, weight = torch.empty(0, 4, device=device), torch.ones(4, device=device)
    assert add_layer_norm(x, x, weight, weight)[0].shape == (0, 4)
    assert bias_gelu(x, weight).shape == (0, 4)
