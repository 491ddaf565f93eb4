"""GELU of a sum with a bias."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from tokenexit.kernels import autograd
from tokenexit.ops import compiled_devices, register_fake, use_compiled, use_triton

_DEVICES = compiled_devices("bias_gelu")


def bias_gelu(x: torch.Tensor, bias: torch.Tensor, *, backend: str = "auto") -> torch.Tensor:
    """`F.gelu(x + bias)`, by the error function. Differentiable.

    Args:
        x: `[A, f]`.
        bias: `[f]`.
        backend: "auto", or "reference" for plain PyTorch.

    Returns:
        `[A, f]`, in the dtype of x.

    Raises:
        ValueError: shapes that do not fit each other; an unknown backend.

    Source: Hendrycks and Gimpel 2016 (arXiv 1606.08415).
    """
    if x.dim() != 2 or bias.shape != x.shape[1:]:
        raise ValueError(f"got x {tuple(x.shape)}, bias {tuple(bias.shape)}; expected [A, f], [f]")
    if use_triton(backend, x, bias):
        return torch.ops.tokenexit_triton.bias_gelu(x, bias)
    fits = x.dtype == bias.dtype == torch.float32
    if use_compiled(backend, x.device, _DEVICES) and fits:
        return torch.ops.tokenexit.bias_gelu(x, bias)
    return F.gelu(x + bias)


if _DEVICES:

    @register_fake("bias_gelu")
    def _(x, bias):
        return x.new_empty(x.shape)

    _backward, _setup = autograd.of_bias_gelu()
    torch.library.register_autograd("tokenexit::bias_gelu", _backward, setup_context=_setup)
