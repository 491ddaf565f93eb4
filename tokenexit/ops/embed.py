"""The sum of the embeddings of packed tokens, in one pass."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from tokenexit.ops import compiled_devices, register_fake, use_compiled

_DEVICES = compiled_devices("embed")


def embed(
    ids: torch.Tensor,
    positions: torch.Tensor,
    types: torch.Tensor | None,
    word: torch.Tensor,
    position: torch.Tensor | None = None,
    token_type: torch.Tensor | None = None,
    scale: torch.Tensor | None = None,
    *,
    backend: str = "auto",
) -> torch.Tensor:
    """`word[ids] + position[positions] + token_type[types]`, to the bit; no gradient.

    (Where the processor rounds to bf16 by an instruction, sums below 2^-126 become 0.)

    Args:
        ids, positions, types: `[T]` int64; types None: all 0.
        word, position, token_type: tables `[*, d]` of one dtype; of the last two, None: not there.
        scale: `[*]` fp32, of the rows of `word`, which is int8 then, and other tables fp32.
        backend: "auto", or "reference" for plain PyTorch.

    Returns:
        `[T, d]` in the tables' dtype; fp32 with a scale.

    Raises:
        ValueError: an unknown backend.
        IndexError, RuntimeError: numbers beyond a table; tables that do not fit each other.
    """
    fits = scale is not None or word.dtype in (torch.float32, torch.bfloat16)
    if use_compiled(backend, word.device, _DEVICES) and fits:
        return torch.ops.tokenexit.embed(ids, positions, types, word, position, token_type, scale)
    h = F.embedding(ids, word) if scale is None else word[ids] * scale[ids, None]
    if position is not None:
        h = h + F.embedding(positions, position)
    if token_type is not None:
        h = h + F.embedding(torch.zeros_like(ids) if types is None else types, token_type)
    return h


if _DEVICES:

    @register_fake("embed")
    def _(ids, positions, types, word, position, token_type, scale=None):
        return (word if scale is None else scale).new_empty(ids.shape[0], word.shape[1])
