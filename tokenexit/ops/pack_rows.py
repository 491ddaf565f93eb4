"""Padded inputs to packed ones in one pass: what is out of range, which tokens make up which word,
where they are."""

from __future__ import annotations

import torch

from tokenexit.ops import compiled_devices, register_fake

_DEVICES = compiled_devices("pack_rows")


def takes(*tensors: torch.Tensor | None) -> bool:
    """Whether `pack_rows` is there for these: on a CPU, with values, compiled."""
    return (
        "cpu" in _DEVICES
        and not torch.compiler.is_compiling()
        and all([x is None or (type(x) is torch.Tensor and x.is_cpu) for x in tensors])
    )


def pack_rows(
    mask: torch.Tensor,
    ids: torch.Tensor,
    word_ids: torch.Tensor | None,
    kinds: torch.Tensor,
    types: torch.Tensor | None,
    positions: torch.Tensor | None,
    num_ids: int,
    num_types: int,
    num_positions: int,
    most: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:
    """What `pack_tokens` gives for a batch, and its inputs packed; None if they are not sound.

    They are sound if all that real tokens have may be looked up, there is one, and no sentence has
    more than so many.

    Args:
        mask: `[B, N]` bool or int64, not 0 at real tokens.
        ids, word_ids, types, positions: `[B, N]` int64; all but the first may be None.
        kinds: `[num_ids]` uint8, what makes words without word_ids, see
            `tokenexit.packing.word_ids_from_kinds`.
        num_ids, num_types, num_positions: of each, one more than the largest.
        most: tokens of a sentence.

    Returns:
        As `pack_tokens`, the first `[5 + n, T]`: with the n of ids, types and positions that are
        given.

    Raises:
        RuntimeError: other dtypes or shapes; fewer kinds than ids.
    """
    numbers = num_ids, num_types, num_positions, most
    layout = torch.ops.tokenexit.pack_rows(mask, ids, word_ids, kinds, types, positions, *numbers)
    return layout if layout[0].shape[1] else None


if _DEVICES:

    @register_fake("pack_rows")
    def _(mask, ids, word_ids, kinds, types, positions, *numbers):
        size = torch.library.get_ctx().new_dynamic_size
        lists = 6 + (types is not None) + (positions is not None)
        new = ids.new_empty
        return new((lists, size())), new((2, mask.shape[0] + 1)), new((size(),))
