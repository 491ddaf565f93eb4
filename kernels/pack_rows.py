"""Where the tokens and words of a padded batch are, in shapes that hang on no value.

The first launch counts a row's tokens and words, a program each; the second adds up those of the
rows before, and writes.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton

from tokenexit.packing import CONTINUES_WORD, SPECIAL

_CELLS, _ROWS = 128, 256  # of a row, and rows' counts, looked at by a program at a time
_CONTINUES_WORD, _SPECIAL = tl.constexpr(CONTINUES_WORD), tl.constexpr(SPECIAL)


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b)


@triton.jit
def _kinds(ids_ptr, kinds_ptr, at, real, num_ids):
    """Those of cells; of no word where there is no token."""
    ids = tl.load(ids_ptr + at, mask=real, other=0)
    ids = tl.minimum(tl.maximum(ids, 0), num_ids - 1)
    return tl.load(kinds_ptr + ids, mask=real, other=_SPECIAL)


@triton.jit
def _cells(
    mask_ptr, ids_ptr, words_ptr, kinds_ptr, num_ids, first, start, N, last, BLOCK: tl.constexpr
):  # fmt: skip
    """Of a block of a row's cells: are they tokens, of words, the first of them; and new `last`.

    By ids of words, one starts where the id is none of before: of the token before, `last` if in no
    block yet. By kinds, see `tokenexit.packing.word_ids_from_kinds`.
    """
    offs = start + tl.arange(0, BLOCK)
    behind = offs - 1
    real = tl.load(mask_ptr + first + offs, mask=offs < N, other=0) != 0
    near = tl.load(mask_ptr + first + behind, mask=(behind >= 0) & (offs < N), other=0) != 0
    if words_ptr is None:
        kinds = _kinds(ids_ptr, kinds_ptr, first + offs, real, num_ids)
        after = _kinds(ids_ptr, kinds_ptr, first + behind, near, num_ids) != _SPECIAL
        of_word = kinds != _SPECIAL
        starts = of_word & ((kinds != _CONTINUES_WORD) | (after == 0))
    else:
        words = tl.load(words_ptr + first + offs, mask=real, other=-1)
        at = tl.maximum(tl.associative_scan(tl.where(near, behind, -1), 0, _larger), last)
        before = tl.load(words_ptr + first + at, mask=real & (at >= 0), other=-1)
        of_word = words >= 0
        starts = of_word & (words != before)
        last = tl.maximum(last, tl.max(tl.where(real, offs, -1), 0))
    return real, of_word, starts, last


@triton.jit
def _outside(values_ptr, at, real, least, end):
    """Whether a token's value is not one of least..end - 1."""
    values = tl.load(values_ptr + at, mask=real, other=least)
    return (values < least) | (values >= end)


@triton.jit
def _count_kernel(
    mask_ptr, ids_ptr, words_ptr, kinds_ptr, types_ptr, positions_ptr, counts_ptr,
    num_ids, num_types, num_positions, most, N, BLOCK: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64)
    tokens, words, bad, last = 0, 0, 0, -1
    for start in range(0, N, BLOCK):
        real, _, starts, last = _cells(
            mask_ptr, ids_ptr, words_ptr, kinds_ptr, num_ids, b * N, start, N, last, BLOCK
        )
        tokens += tl.sum(real.to(tl.int32), 0)
        words += tl.sum(starts.to(tl.int32), 0)
        at = b * N + start + tl.arange(0, BLOCK)
        outside = _outside(ids_ptr, at, real, 0, num_ids)
        if words_ptr is not None:
            outside |= tl.load(words_ptr + at, mask=real, other=0) < -1
        if types_ptr is not None:
            outside |= _outside(types_ptr, at, real, 0, num_types)
        if positions_ptr is not None:
            outside |= _outside(positions_ptr, at, real, 0, num_positions)
        bad += tl.sum(outside.to(tl.int32), 0)
    tl.store(counts_ptr + 3 * b, tokens)
    tl.store(counts_ptr + 3 * b + 1, words)
    tl.store(counts_ptr + 3 * b + 2, ((bad > 0) | (tokens > most)).to(tl.int32))


@triton.jit
def _counts(counts_ptr, rows, mask):
    """Of rows: tokens, and words with the token that stands in for a missing one."""
    tokens = tl.load(counts_ptr + 3 * rows, mask=mask, other=0).to(tl.int64)
    words = tl.load(counts_ptr + 3 * rows + 1, mask=mask, other=0).to(tl.int64)
    return tokens, tl.where(tokens > 0, tl.maximum(words, 1), 0)


@triton.jit
def _give(values_ptr, out_ptr, cell, to, mask, real, end):
    """Values of tokens, within bounds; 0 of what is in excess."""
    values = tl.load(values_ptr + cell, mask=mask & real, other=0)
    tl.store(out_ptr + to, tl.minimum(tl.maximum(values, 0), end - 1), mask=mask)


@triton.jit
def _place_kernel(
    mask_ptr, ids_ptr, words_ptr, kinds_ptr, types_ptr, positions_ptr, counts_ptr,
    by_token_ptr, cu_ptr, first_token_ptr, place_ptr, sound_ptr,
    num_ids, num_types, num_positions, B, N, BLOCK: tl.constexpr, BLOCK_B: tl.constexpr,
):  # fmt: skip
    b, size = tl.program_id(0).to(tl.int64), tl.num_programs(0).to(tl.int64) * N
    tokens, words, all_tokens, all_words, bad = b * 0, b * 0, b * 0, b * 0, 0
    for i in range(0, B, BLOCK_B):
        rows = i + tl.arange(0, BLOCK_B)
        t, w = _counts(counts_ptr, rows, rows < B)
        tokens += tl.sum(tl.where(rows < b, t, 0), 0)
        words += tl.sum(tl.where(rows < b, w, 0), 0)
        all_tokens += tl.sum(t, 0)
        all_words += tl.sum(w, 0)
        bad += tl.sum(tl.load(counts_ptr + 3 * rows + 2, mask=rows < B, other=0), 0)
    tl.store(sound_ptr, ((all_tokens > 0) & (bad == 0)).to(tl.uint8), mask=b == 0)
    _, my_words = _counts(counts_ptr, b, b < B)
    starting = tl.load(counts_ptr + 3 * b + 1)
    cu_words_ptr = cu_ptr + B + 2
    tl.store(cu_ptr + b, tokens)
    tl.store(cu_words_ptr + b, words)
    ends = B + tl.arange(0, 2)  # of the last row and of the empty sentence, by the last program
    tl.store(cu_ptr + ends, all_tokens, mask=ends + 2 * b >= 3 * B - 2)
    tl.store(cu_words_ptr + ends, all_words, mask=ends + 2 * b >= 3 * B - 2)
    # Where what is in excess goes: all rows' before, behind all tokens and words.
    spare, spare_words = all_tokens + b * N - tokens, all_words + b * N - words
    ranked, started, last = tokens * 0, words * 0, -1
    for start in range(0, N, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        real, of_word, starts, last = _cells(
            mask_ptr, ids_ptr, words_ptr, kinds_ptr, num_ids, b * N, start, N, last, BLOCK
        )
        rank = ranked + tl.cumsum(real.to(tl.int64), 0) - 1
        alone = real & (rank + starting == 0)  # stands in, as no token starts a word
        starts = starts | alone
        word = words + started + tl.cumsum(starts.to(tl.int64), 0) - 1
        # Cells that are no tokens fill what is in excess.
        to = tl.where(real, tokens + rank, spare + offs - rank - 1)
        cell = b * N + offs
        row = by_token_ptr + to
        mask = offs < N
        tl.store(row, tl.where(real, cell, 0), mask=mask)
        tl.store(row + size, tl.where(real, rank, 1), mask=mask)
        tl.store(row + 2 * size, tl.where(real, b, B), mask=mask)
        tl.store(row + 3 * size, tl.where(of_word | alone, word, -1), mask=mask)
        tl.store(row + 4 * size, tl.where(starts, word, -1), mask=mask)
        lists_ptr = by_token_ptr + 5 * size
        _give(ids_ptr, lists_ptr, cell, to, mask, real, num_ids)
        if types_ptr is not None:
            lists_ptr += size
            _give(types_ptr, lists_ptr, cell, to, mask, real, num_types)
        if positions_ptr is not None:
            lists_ptr += size
            _give(positions_ptr, lists_ptr, cell, to, mask, real, num_positions)
        tl.store(first_token_ptr + word, to, mask=starts)
        tl.store(first_token_ptr + spare_words + offs, offs * 0, mask=offs < N - my_words)
        tl.store(place_ptr + cell, tl.where(real, to, all_tokens), mask=mask)
        ranked += tl.sum(real.to(tl.int64), 0)
        started += tl.sum(starts.to(tl.int64), 0)


@triton_op("tokenexit_triton::pack_rows", mutates_args={})
def pack_rows(
    mask: Tensor, ids: Tensor, word_ids: Tensor | None, kinds: Tensor, types: Tensor | None,
    positions: Tensor | None, num_ids: int, num_types: int, num_positions: int, most: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """`tokenexit.ops.pack_rows` with room for all cells, whether they are sound or not.

    The layout is that of `tokenexit.reference.pack_static`. Ids, types and positions are within
    bounds, and 0 of what is in excess.

    Args:
        See `tokenexit.ops.pack_rows.pack_rows`; all on one GPU.

    Returns:
        By token `[5 + n, B * N]`, offsets `[2, B + 2]`, first_token `[B * N]`, place `[B, N]`, and
        sound `[]` bool.
    """
    (num_rows, longest), new = ids.shape, ids.new_empty
    lists = 6 + (types is not None) + (positions is not None)
    by_token, cu = new(lists, num_rows * longest), new(2, num_rows + 2)
    first_token, place = new(num_rows * longest), new(num_rows, longest)
    counts, sound = new(num_rows, 3, dtype=torch.int32), new((), dtype=torch.bool)
    mask = mask.contiguous()
    mask = mask.view(torch.uint8) if mask.dtype == torch.bool else mask
    rows = (x if x is None else x.contiguous() for x in (ids, word_ids, kinds, types, positions))
    given, ends = (mask, *rows, counts), (num_ids, num_types, num_positions)
    wrap_triton(_count_kernel)[(num_rows,)](*given, *ends, most, longest, _CELLS)
    wrap_triton(_place_kernel)[(num_rows,)](
        *given, by_token, cu, first_token, place, sound.view(torch.uint8), *ends, num_rows, longest,
        _CELLS, _ROWS,
    )  # fmt: skip
    return by_token, cu, first_token, place, sound
