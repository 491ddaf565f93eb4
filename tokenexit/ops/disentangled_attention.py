"""Attention whose scores tell what a token is from how far away it is."""

from __future__ import annotations

import torch

from tokenexit import reference
from tokenexit.ops import attention_by_sentence, check_attention


def disentangled_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_q: torch.Tensor,
    cu_k: torch.Tensor,
    scale: float,
    buckets: torch.Tensor,
    positions: torch.Tensor,
    position_keys: torch.Tensor | None = None,
    position_queries: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    seed: int = 0,
    *,
    backend: str = "auto",
) -> torch.Tensor:
    """Softmax attention within each packed sentence, content to position and back.

    With p the bucket of their relative position, the score of query i for key j is::

        scale * (q[i] @ k[j] + q[i] @ position_keys[p] + position_queries[p] @ k[j])

    head by head. Differentiable in q, k, v, position_keys and position_queries. In plain PyTorch on
    every device, a call of its attention for each sentence.

    Args:
        q, k, v, cu_q, cu_k, scale: see `tokenexit.ops.exit_attention`.
        buckets: `[2R+1]` int64, the bucket of each relative position: entry `r + R` for a key r
            tokens after the query, distances beyond R counting as R.
        positions: `[A]` int64, each query's position in its sentence.
        position_keys, position_queries: `[P, H, D]`, of each bucket; None: the score has no such
            term.
        dropout_p, seed: see `tokenexit.ops.exit_attention`.
        backend: "auto", or "reference" for plain PyTorch without its attention.

    Returns:
        `[A, H, D]`, in the dtype of q.

    Raises:
        ValueError: shapes that do not fit each other; a probability outside [0, 1); an unknown
            backend.

    Source: He et al. 2021 (arXiv 2006.03654), section 3.1.
    """
    check_attention(q, k, v, cu_q, cu_k, dropout_p)
    if positions.shape != q.shape[:1] or buckets.dim() != 1 or len(buckets) % 2 == 0:
        raise ValueError(
            f"got positions {tuple(positions.shape)} and buckets {tuple(buckets.shape)}; expected "
            f"[{len(q)}], [2R+1]"
        )
    heads, dim = q.shape[1:]
    for name, states in (("keys", position_keys), ("queries", position_queries)):
        if states is not None and (states.dim() != 3 or states.shape[1:] != q.shape[1:]):
            raise ValueError(
                f"got position_{name} {tuple(states.shape)}; expected [P, {heads}, {dim}]"
            )
    if backend not in ("auto", "reference"):
        raise ValueError(f'got backend {backend!r}; expected "auto" or "reference"')
    terms = buckets, positions, position_keys, position_queries
    if backend == "reference" or dropout_p:
        return reference.disentangled_attention(q, k, v, cu_q, cu_k, scale, *terms, dropout_p, seed)
    # A program of torch.export holds a call of the op: how long sentences are, it does not know.
    run = _op if torch.compiler.is_exporting() else _by_sentence
    return run(q, k, v, cu_q, cu_k, scale, *terms)


def _by_sentence(q, k, v, cu_q, cu_k, scale, buckets, positions, position_keys, position_queries):
    """The terms of positions as the masks of PyTorch's attention."""
    of_queries = of_keys = None
    if position_keys is not None:
        of_queries = torch.einsum("ahd,phd->hap", q, position_keys) * scale
    if position_queries is not None:
        of_keys = torch.einsum("khd,phd->hpk", k, position_queries) * scale

    def mask(mine, seen):
        num_k, terms = seen.stop - seen.start, []
        bucket = reference.relative_bias(buckets[None], positions[mine], num_k)
        bucket = bucket.expand(q.shape[1], -1, -1)
        if of_queries is not None:
            terms.append(of_queries[:, mine].gather(2, bucket))
        if of_keys is not None:
            terms.append(of_keys[:, :, seen].gather(1, bucket))
        return sum(terms[1:], terms[0]) if terms else None

    return attention_by_sentence(q, k, v, cu_q, cu_k, scale, mask)


_op = torch.library.custom_op(
    "tokenexit::disentangled_attention",
    _by_sentence,
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, Tensor cu_q, Tensor cu_k, float scale, Tensor buckets, "
    "Tensor positions, Tensor? position_keys, Tensor? position_queries) -> Tensor",
)


@_op.register_fake
def _(q, *others):
    return q.new_empty(q.shape)
