"""Attention of active queries over the keys and values of all tokens."""

from __future__ import annotations

import torch

from tokenexit import reference
from tokenexit.kernels import autograd
from tokenexit.ops import (
    attention_by_sentence,
    check_attention,
    check_bias,
    compiled_devices,
    float32_precision,
    register_fake,
    use_compiled,
    use_triton,
)

_DEVICES = compiled_devices("exit_attention")


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
    seed: int = 0,
    max_length: int = 0,
    *,
    backend: str = "auto",
) -> torch.Tensor:
    """Softmax attention within each packed sentence, with fewer queries than keys.

    For sentence b: `softmax(q_b @ k_b.T * scale + bias) @ v_b`, head by head. Differentiable in
    q, k, v and bias.

    Args:
        q: `[A, H, D]` queries of the active tokens.
        k: `[K, H, D]` keys of all tokens of the sentences that are not finished.
        v: `[K, H, D]` their values.
        cu_q: `[B+1]` int64, offsets of each sentence's queries, up to A; a finished one has none.
        cu_k: `[B+1]` int64, offsets of each sentence's keys.
        scale: factor of the scores, usually `D ** -0.5`.
        bias: `[H, 2R+1]` added to the scores by relative position: entry `r + R` for a key r
            tokens after the query, distances beyond R counting as R. None: nothing is added.
        positions: `[A]` int64, each query's position in its sentence; needed with `bias`.
        dropout_p: probability that an attention weight is zeroed (the others are scaled up).
        seed: what dropout draws from; the same weights go on every backend.
        max_length: no sentence has more queries or keys; 0 if unknown. A GPU sizes its grid by it.
        backend: "auto", or "reference" for plain PyTorch.

    Returns:
        `[A, H, D]`, in the dtype of q.

    Raises:
        ValueError: shapes that do not fit each other; a bias without positions; a probability
            outside [0, 1); an unknown backend.
        RuntimeError: offsets out of range. Only the compiled CPU op looks at values.

    Source: Li et al. 2021 (arXiv 2105.13878), section 3.3: tokens that left are keys and values.
    """
    check_attention(q, k, v, cu_q, cu_k, dropout_p)
    check_bias(bias, positions, q)
    arguments = (q, k, v, cu_q, cu_k, scale, bias, positions, dropout_p, seed)
    if use_triton(backend, q, k, v):
        run = torch.ops.tokenexit_triton.exit_attention
        return run(*arguments, max_length, float32_precision())[0]
    if use_compiled(backend, q.device, _DEVICES) and q.dtype != torch.float64:
        rows = (x.float() for x in (q, k, v))
        table = None if bias is None else bias.float()
        rest = (cu_q, cu_k, scale, table, positions, dropout_p, seed, max_length)
        return torch.ops.tokenexit.exit_attention(*rows, *rest)[0].to(q.dtype)
    if backend == "reference" or dropout_p:
        return reference.exit_attention(*arguments)
    return _by_sentence(q, k, v, cu_q, cu_k, scale, bias, positions)


def _by_sentence(q, k, v, cu_q, cu_k, scale, bias, positions):
    def mask(mine, seen):
        if bias is None:
            return None
        return reference.relative_bias(bias, positions[mine], seen.stop - seen.start)

    return attention_by_sentence(q, k, v, cu_q, cu_k, scale, mask)


if _DEVICES:

    @register_fake("exit_attention")
    def _(q, k, v, cu_q, cu_k, scale, bias, positions, dropout_p, seed, max_length):
        return q.new_empty(q.shape), q.new_empty(q.shape[:2], dtype=torch.float32)

    @register_fake("exit_attention_backward")
    def _(grad, q, k, v, out, lse, cu_q, cu_k, scale, bias, positions, dropout_p, seed, max_length):
        table = (0, 0) if bias is None else bias.shape
        return (*(x.new_empty(x.shape) for x in (q, k, v)), q.new_empty(table, dtype=torch.float32))

    _backward, _setup = autograd.of_exit_attention(torch.ops.tokenexit.exit_attention_backward)
    torch.library.register_autograd("tokenexit::exit_attention", _backward, setup_context=_setup)
