"""What tokens left with, back in the padded batch; and whether there was a NaN."""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import custom_op

_CELLS = 64  # of a program


@triton.jit
def _unpack_kernel(
    logits_ptr, layers_ptr, place_ptr, sizes_ptr, out_ptr, layer_of_cell_ptr, sound_ptr,
    num_cells, labels, num_sizes, BLOCK: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    cells = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = cells < num_cells
    at = tl.load(place_ptr + cells, mask=inside, other=0)
    tl.store(layer_of_cell_ptr + cells, tl.load(layers_ptr + at, mask=inside), mask=inside)
    cols = tl.arange(0, BLOCK_C)[None, :]
    mask = inside[:, None] & (cols < labels)
    x = tl.load(logits_ptr + at[:, None] * labels + cols, mask=mask, other=0.0)
    tl.store(out_ptr + cells[:, None] * labels + cols, x, mask=mask)
    bad = tl.sum(tl.sum((x != x).to(tl.int32), 1), 0)
    if tl.program_id(0) == 0:
        offs = tl.arange(0, BLOCK_S)
        sizes = tl.load(sizes_ptr + offs, mask=offs < num_sizes, other=0.0).to(tl.float32)
        bad += tl.sum(((sizes < float("inf")) == 0).to(tl.int32), 0)
    tl.store(sound_ptr, 0, mask=bad > 0)


@custom_op("tokenexit_triton::unpack_", mutates_args={"sound"})
def unpack_(
    logits: Tensor, layers: Tensor, place: Tensor, sizes: Tensor, sound: Tensor
) -> tuple[Tensor, Tensor]:
    """`logits[place]` and `layers[place]`; sound is made false by a NaN or a size that is none.

    Args:
        logits: `[T, C]` contiguous; layers: `[T]` int64.
        place: `[B, N]` int64, contiguous.
        sizes: `[S]`, which have to be finite.
        sound: `[]` bool.

    Returns:
        `[B, N, C]` and `[B, N]`.
    """
    (padded, layer_of_cell), labels = _empty(logits, layers, place), logits.shape[1]
    _unpack_kernel[(triton.cdiv(place.numel(), _CELLS),)](
        logits, layers, place, sizes, padded, layer_of_cell, sound.view(torch.uint8),
        place.numel(), labels, len(sizes), _CELLS, triton.next_power_of_2(labels),
        triton.next_power_of_2(len(sizes)),
    )  # fmt: skip
    return padded, layer_of_cell


@unpack_.register_fake
def _(logits, layers, place, _sizes, _sound):
    return _empty(logits, layers, place)


def _empty(logits, layers, place):
    return logits.new_empty(*place.shape, logits.shape[1]), layers.new_empty(place.shape)
