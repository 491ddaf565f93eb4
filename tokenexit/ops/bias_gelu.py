"""GELU of a sum with a bias."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from tokenexit.kernels import autograd
from tokenexit.ops import compiled_devices, register_fake, use_compiled, use_triton

_DEVICES = compiled_devices("bias_gelu")


def gelu_tanh(x: torch.Tensor) -> torch.Tensor:
    """GELU approximated by tanh."""
    return F.gelu(x, approximate="tanh")


# The activations that the ops have, and what `F.gelu` calls their approximation.
GELUS = {F.gelu: "none", gelu_tanh: "tanh"}


def bias_gelu(
    x: torch.Tensor, bias: torch.Tensor, approximate: str = "none", *, backend: str = "auto"
) -> torch.Tensor:
    """`F.gelu(x + bias, approximate=approximate)`. Differentiable.

    Args:
        x: `[A, f]`.
        bias: `[f]`; of another dtype than x, as under autocast, it is rounded to that.
        approximate: "none", by the error function; or "tanh", what Hugging Face calls "gelu_new".
        backend: "auto", or "reference" for plain PyTorch.

    Returns:
        `[A, f]`, in the dtype of x.

    Raises:
        ValueError: shapes that do not fit each other; an unknown approximation or backend.

    Source: Hendrycks and Gimpel 2016 (arXiv 1606.08415).
    """
    if x.dim() != 2 or bias.shape != x.shape[1:]:
        raise ValueError(f"got x {tuple(x.shape)}, bias {tuple(bias.shape)}; expected [A, f], [f]")
    if approximate not in GELUS.values():
        raise ValueError(f"approximate is {approximate!r}; expected one of {[*GELUS.values()]}")
    if bias.dtype != x.dtype:
        bias = bias.to(x.dtype)
    if use_triton(backend, x, bias):
        return torch.ops.tokenexit_triton.bias_gelu(x, bias, approximate == "tanh")
    if use_compiled(backend, x.device, _DEVICES) and x.dtype == torch.float32:
        return torch.ops.tokenexit.bias_gelu(x, bias, approximate == "tanh")
    return F.gelu(x + bias, approximate=approximate)


if _DEVICES:

    @register_fake("bias_gelu")
    def _(x, bias, tanh=False):
        return x.new_empty(x.shape)

    _backward, _setup = autograd.of_bias_gelu()
    torch.library.register_autograd("tokenexit::bias_gelu", _backward, setup_context=_setup)
