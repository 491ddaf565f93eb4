"""Where the tokens and words of a padded batch are."""

from __future__ import annotations

import torch

from tokenexit import reference
from tokenexit.ops import compiled_devices, register_fake, use_compiled
from tokenexit.packing import Packed

_DEVICES = compiled_devices("pack_tokens")


def pack_tokens(
    mask: torch.Tensor, word_ids: torch.Tensor, *, backend: str = "auto"
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Lay out a padded batch without its padding; see `tokenexit.packing.Packed` for the parts.

    Args:
        mask: `[B, N]` bool, true at real tokens.
        word_ids: `[B, N]` int64; a word is a run of neighboring real tokens with the same id, -1
            is no word's token.
        backend: "auto", or "reference" for plain PyTorch.

    Returns:
        `[5, T]` int64: slots, positions, sentence_of_token, word_of_token and word_at; `[2, B+1]`:
        cu_tokens and cu_words; `[W]`: first_token.

    Raises:
        TypeError: dtypes other than those above.
        ValueError: shapes that differ or are not `[B, N]`; an unknown backend.
    """
    if mask.dtype != torch.bool or word_ids.dtype != torch.int64:
        raise TypeError(f"got {mask.dtype} and {word_ids.dtype}; expected torch.bool, torch.int64")
    if mask.dim() != 2 or mask.shape != word_ids.shape:
        raise ValueError(
            f"got a mask {list(mask.shape)} and word_ids {list(word_ids.shape)}; expected both "
            "[B, N]"
        )
    compiled = use_compiled(backend, mask.device, _DEVICES)
    run = torch.ops.tokenexit.pack_tokens if compiled else reference.pack_tokens
    return run(mask, word_ids)


def pack(attention_mask: torch.Tensor, word_ids: torch.Tensor) -> Packed:
    """Lay out a padded batch without its padding.

    Args:
        attention_mask: `[B, N]`, nonzero at real tokens, wherever in the row they stand.
        word_ids: `[B, N]` integers; a word is a run of neighboring real tokens with the same
            id, -1 is no word's token. Ids may start anew within a row (sentence pairs).
    """
    layout = pack_tokens(attention_mask != 0, word_ids.long())
    return Packed.of(attention_mask.shape, *layout)


if _DEVICES:

    @register_fake("pack_tokens")
    def _(mask, word_ids):
        size = torch.library.get_ctx().new_dynamic_size
        new = word_ids.new_empty
        return new((5, size())), new((2, mask.shape[0] + 1)), new((size(),))
