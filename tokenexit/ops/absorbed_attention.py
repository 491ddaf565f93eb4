"""Attention of active queries over the raw hidden states: no token is projected for it."""

from __future__ import annotations

import torch

from tokenexit import reference
from tokenexit.ops import (
    check_bias,
    compiled_devices,
    float32_precision,
    register_fake,
    use_compiled,
    use_triton,
)

_DEVICES = compiled_devices("absorbed_attention")


def absorbed_attention(
    q: torch.Tensor,
    h: torch.Tensor,
    cu_q: torch.Tensor,
    cu_k: torch.Tensor,
    scale: float,
    bias: torch.Tensor | None = None,
    positions: torch.Tensor | None = None,
    max_length: int = 0,
    *,
    backend: str = "auto",
) -> torch.Tensor:
    """Softmax attention whose keys and values are the hidden states, the same for all heads.

    With queries carried into the hidden space, `q = W_K.T @ q'` head by head, this and `W_V` on
    its result are attention over projected keys and values: `q' . (W_K h + b_K)` is
    `(W_K.T q') . h` and a term that is the same for every key, which the softmax drops; the weights
    add up to 1, so `b_V` may come last. For sentence b and head i::

        softmax(q_b[:, i] @ h_b.T * scale + bias) @ h_b

    For inference: no gradient. No argument is changed.

    Args:
        q: `[A, H, d]` carried queries of the active tokens.
        h: `[K, d]` hidden states of all tokens of the sentences that are not finished.
        cu_q, cu_k, scale, bias, positions, max_length: see `tokenexit.ops.exit_attention`.
        backend: "auto", or "reference" for plain PyTorch.

    Returns:
        `[A, H, d]`, in the dtype of q.

    Raises:
        ValueError: shapes that do not fit each other; a bias without positions; an unknown backend.
        RuntimeError: offsets out of range. Only the compiled CPU op looks at values.

    Source: the associativity that DeepSeek-V2 (arXiv 2405.04434, section 2.1) uses for its keys.
    """
    if q.dim() != 3 or h.dim() != 2 or q.shape[2] != h.shape[1]:
        raise ValueError(
            f"got q {tuple(q.shape)} and h {tuple(h.shape)}; expected [A, H, d], [K, d]"
        )
    if cu_q.shape != cu_k.shape:
        raise ValueError(
            f"got {len(cu_q)} offsets of queries and {len(cu_k)} of keys; expected B + 1 of both"
        )
    check_bias(bias, positions, q)
    arguments = (q, h, cu_q, cu_k, scale, bias, positions)
    if use_triton(backend, q, h):
        from tokenexit.kernels.attention import ABSORBED_BYTES

        if h.shape[1] * h.element_size() <= ABSORBED_BYTES:
            run = torch.ops.tokenexit_triton.absorbed_attention
            return run(*arguments, max_length, float32_precision())
    if use_compiled(backend, q.device, _DEVICES) and q.dtype == torch.float32:
        table = None if bias is None else bias.float()
        rest = (cu_q, cu_k, scale, table, positions, max_length)
        return torch.ops.tokenexit.absorbed_attention(q, h, *rest)
    return reference.absorbed_attention(*arguments)


if _DEVICES:

    @register_fake("absorbed_attention")
    def _(q, h, cu_q, cu_k, scale, bias, positions, max_length):
        return q.new_empty(q.shape)
