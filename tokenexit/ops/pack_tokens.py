"""Where the tokens and words of a padded batch are."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from tokenexit import reference
from tokenexit.ops import compiled_devices, use_compiled
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
    by_token, offsets, first_token = pack_tokens(attention_mask != 0, word_ids.long())
    slots, positions, sentence_of_token, word_of_token, word_at = by_token.unbind()
    cu_tokens, cu_words = offsets.unbind()
    return Packed(
        shape=tuple(attention_mask.shape),
        slots=slots,
        positions=positions,
        cu_tokens=cu_tokens,
        cu_words=cu_words,
        first_token=first_token,
        word_of_token=word_of_token,
        word_at=word_at,
        sentence_of_token=sentence_of_token,
    )


def pack_static(real: torch.Tensor, word_ids: torch.Tensor) -> Packed:
    """As `pack`, in shapes that hang on no value: room for B * N tokens and words.

    What it has in excess are tokens of slot 0 and of no word, in a last, empty sentence B.

    Args:
        real: `[B, N]` bool, true at real tokens; word_ids: `[B, N]` int64.
    """
    num_sentences, longest = real.shape
    each = torch.arange(real.numel(), device=real.device)
    slots = _inverse(real.flatten().cumsum(0) - 1, real.flatten())
    lengths = F.pad(real.sum(1), (0, 1))
    cu_tokens = F.pad(lengths.cumsum(0), (1, 0))
    excess = each >= cu_tokens[-1]
    sentence = (slots // longest).masked_fill(excess, num_sentences)
    positions = (each - cu_tokens[sentence]).masked_fill(excess, 1)  # not the first of a sentence
    ids = word_ids.flatten()[slots].masked_fill(excess, -1)
    word_of_token, word_at, cu_words = reference.words_of(ids, sentence, positions, lengths)
    return Packed(
        shape=(num_sentences + 1, longest),
        slots=slots,
        positions=positions,
        cu_tokens=cu_tokens,
        cu_words=cu_words,
        first_token=_inverse(word_at, word_at >= 0),
        word_of_token=word_of_token,
        word_at=word_at,
        sentence_of_token=sentence,
    )


def _inverse(index: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """`result[index[i]] = i` where mask, else 0; indices are distinct, below their number."""
    size = len(index)
    places = torch.arange(size, device=index.device)
    return places.new_zeros(size + 1).scatter_(0, index.where(mask, size), places)[:size]


if _DEVICES:

    @torch.library.register_fake("tokenexit::pack_tokens")
    def _(mask, word_ids):
        size = torch.library.get_ctx().new_dynamic_size
        new = word_ids.new_empty
        return new((5, size())), new((2, len(mask) + 1)), new((size(),))
