"""Attention of active queries over the keys and values of all tokens."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from tokenexit import reference


def exit_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_q: torch.Tensor,
    cu_k: torch.Tensor,
    scale: float,
    bias: torch.Tensor | None = None,
    positions: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    backend: str = "auto",
) -> torch.Tensor:
    """Softmax attention within each packed sentence, with fewer queries than keys.

    For sentence b: `softmax(q_b @ k_b.T * scale + bias) @ v_b`, head by head. Differentiable in
    q, k, v and bias.

    Args:
        q: `[A, H, D]` queries of the active tokens.
        k: `[K, H, D]` keys of all tokens of the sentences that are not finished.
        v: `[K, H, D]` their values.
        cu_q: `[B+1]` int64, offsets of each sentence's queries; a finished one has none.
        cu_k: `[B+1]` int64, offsets of each sentence's keys.
        scale: factor of the scores, usually `D ** -0.5`.
        bias: `[H, 2R+1]` added to the scores by relative position: entry `r + R` for a key r
            tokens after the query, distances beyond R counting as R. None: nothing is added.
        positions: `[A]` int64, each query's position in its sentence; needed with `bias`.
        dropout_p: probability that an attention weight is zeroed (the others are scaled up).
        backend: "auto" or "reference".

    Returns:
        `[A, H, D]`, in the dtype of q.

    Raises:
        ValueError: shapes that do not fit each other; a bias without positions; dropout on the
            reference, which has none.

    Source: Li et al. 2021 (arXiv 2105.13878), section 3.3: tokens that left are keys and values.
    """
    if q.dim() != 3 or k.shape != v.shape or k.dim() != 3 or q.shape[1:] != k.shape[1:]:
        raise ValueError(
            f"got q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}; "
            "expected [A, H, D], [K, H, D], [K, H, D]"
        )
    if cu_q.shape != cu_k.shape:
        raise ValueError(
            f"got {len(cu_q)} offsets of queries and {len(cu_k)} of keys; expected B + 1 of both"
        )
    if bias is not None:
        if positions is None or positions.shape != q.shape[:1]:
            got = None if positions is None else tuple(positions.shape)
            raise ValueError(f"got positions {got} with a bias; expected [{len(q)}]")
        if bias.dim() != 2 or len(bias) != q.shape[1] or bias.shape[1] % 2 == 0:
            raise ValueError(f"got bias {tuple(bias.shape)}; expected [{q.shape[1]}, 2R+1]")
    if backend == "reference":
        if dropout_p:
            raise ValueError(f"got dropout_p={dropout_p} on the reference backend; expected 0")
        return reference.exit_attention(q, k, v, cu_q, cu_k, scale, bias, positions)

    num_q, num_k = cu_q.diff().tolist(), cu_k.diff().tolist()
    parts = []
    start = 0
    for q_b, k_b, v_b in zip(q.split(num_q), k.split(num_k), v.split(num_k), strict=True):
        if len(q_b):
            where = None if positions is None else positions[start : start + len(q_b)]
            mask = None if bias is None else reference.relative_bias(bias, where, len(k_b))
            parts.append(
                F.scaled_dot_product_attention(
                    q_b.transpose(0, 1)[None],
                    k_b.transpose(0, 1)[None],
                    v_b.transpose(0, 1)[None],
                    attn_mask=mask,
                    dropout_p=dropout_p,
                    scale=scale,
                )[0].transpose(0, 1)
            )
        start += len(q_b)
    return torch.cat(parts) if parts else torch.empty_like(q)
