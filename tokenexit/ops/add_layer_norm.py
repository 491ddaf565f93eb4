"""LayerNorm of a sum."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from tokenexit.kernels import autograd
from tokenexit.ops import compiled_devices, register_fake, use_compiled, use_triton

_DEVICES = compiled_devices("add_layer_norm")


def add_layer_norm(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float = 1e-12,
    *,
    backend: str = "auto",
) -> torch.Tensor:
    """`F.layer_norm(x + residual, weight.shape, weight, bias, eps)`. Differentiable.

    Args:
        x, residual: `[A, d]`.
        weight, bias: `[d]`.
        eps: added to the variance.
        backend: "auto", or "reference" for plain PyTorch.

    Returns:
        `[A, d]`, in the dtype of x.

    Raises:
        ValueError: shapes that do not fit each other; an unknown backend.

    Source: Ba et al. 2016 (arXiv 1607.06450).
    """
    if x.dim() != 2 or x.shape != residual.shape or weight.shape != x.shape[1:]:
        raise ValueError(
            f"got x {tuple(x.shape)}, residual {tuple(residual.shape)}, weight "
            f"{tuple(weight.shape)}; expected [A, d], [A, d], [d]"
        )
    if weight.shape != bias.shape:
        raise ValueError(f"got bias {tuple(bias.shape)}; expected {tuple(weight.shape)}")
    tensors = (x, residual, weight, bias)
    if use_triton(backend, *tensors):
        return torch.ops.tokenexit_triton.add_layer_norm(*tensors, eps)[0]
    fits = all(tensor.dtype == torch.float32 for tensor in tensors)
    if use_compiled(backend, x.device, _DEVICES) and fits:
        return torch.ops.tokenexit.add_layer_norm(*tensors, eps)[0]
    return F.layer_norm(x + residual, weight.shape, weight, bias, eps)


if _DEVICES:

    @register_fake("add_layer_norm")
    def _(x, residual, weight, bias, eps):
        return x.new_empty(x.shape), x.new_empty(x.shape[:1]), x.new_empty(x.shape[:1])

    _backward, _setup = autograd.of_add_layer_norm()
    torch.library.register_autograd("tokenexit::add_layer_norm", _backward, setup_context=_setup)
