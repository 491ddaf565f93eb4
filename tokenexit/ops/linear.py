"""A product of some rows with a few features, row by row the same in every batch."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from tokenexit.ops import compiled_devices, register_fake, use_compiled

_DEVICES = compiled_devices("linear")


def linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, *, backend: str = "auto"
) -> torch.Tensor:
    """`F.linear(x, weight, bias)`, for classifiers.

    Compiled, for fp32 or bf16 on a CPU without gradients, a row's result is the same to the bit
    whatever the other rows are; a library picks another order of summation for another number of
    rows.

    Args:
        x: `[A, K]`.
        weight: `[N, K]`.
        bias: `[N]`, or None.
        backend: "auto", or "reference" for plain PyTorch.

    Returns:
        `[A, N]`.

    Raises:
        ValueError: shapes that do not fit each other; an unknown backend.
    """
    if bias is None:
        bias = weight.new_zeros(weight.shape[:1])
    if x.dim() != 2 or weight.shape[1:] != x.shape[1:] or bias.shape != weight.shape[:1]:
        raise ValueError(
            f"got x {tuple(x.shape)}, weight {tuple(weight.shape)}, bias {tuple(bias.shape)}; "
            "expected [A, K], [N, K], [N]"
        )
    fits = (
        x.dtype == weight.dtype == bias.dtype
        and x.dtype in (torch.float32, torch.bfloat16)
        and x.shape[1] > 0
        and not torch.is_grad_enabled()
    )
    if use_compiled(backend, x.device, _DEVICES) and fits:
        return torch.ops.tokenexit.linear(x, weight, bias)
    return F.linear(x, weight, bias)


if _DEVICES:

    @register_fake("linear")
    def _(x, weight, bias):
        return x.new_empty(x.shape[0], weight.shape[0])
