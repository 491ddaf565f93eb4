"""Where the tokens and words of a padded batch are, in shapes that hang on no value.

The first launch counts a row's tokens and words, a program each; the second adds up those of the
rows before, and writes.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton

_CELLS, _ROWS = 128, 256  # of a row, and rows' counts, looked at by a program at a time


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b)


@triton.jit
def _cells(real_ptr, ids_ptr, first, start, N, last, BLOCK: tl.constexpr):
    """Of a block of a row's cells: are they tokens, their ids, do they start words; and new `last`.

    A word starts where the id is none of before: of the token before, `last` if in no block yet.
    """
    offs = start + tl.arange(0, BLOCK)
    real = tl.load(real_ptr + first + offs, mask=offs < N, other=0) != 0
    ids = tl.load(ids_ptr + first + offs, mask=real, other=-1)
    behind = offs - 1
    after_real = tl.load(real_ptr + first + behind, mask=(behind >= 0) & (offs < N), other=0) != 0
    near = tl.associative_scan(tl.where(after_real, behind, -1), 0, _larger)
    near = tl.maximum(near, last)
    before = tl.load(ids_ptr + first + near, mask=real & (near >= 0), other=-1)
    last = tl.maximum(last, tl.max(tl.where(real, offs, -1), 0))
    return real, ids, real & (ids >= 0) & (ids != before), last


@triton.jit
def _count_kernel(real_ptr, ids_ptr, counts_ptr, N, BLOCK: tl.constexpr):
    b = tl.program_id(0).to(tl.int64)
    tokens, words, last = 0, 0, -1
    for start in range(0, N, BLOCK):
        real, _, starts, last = _cells(real_ptr, ids_ptr, b * N, start, N, last, BLOCK)
        tokens += tl.sum(real.to(tl.int32), 0)
        words += tl.sum(starts.to(tl.int32), 0)
    tl.store(counts_ptr + 2 * b, tokens)
    tl.store(counts_ptr + 2 * b + 1, words)


@triton.jit
def _counts(counts_ptr, rows, mask):
    """Of rows: tokens, and words with the token that stands in for a missing one."""
    tokens = tl.load(counts_ptr + 2 * rows, mask=mask, other=0).to(tl.int64)
    words = tl.load(counts_ptr + 2 * rows + 1, mask=mask, other=0).to(tl.int64)
    return tokens, tl.where(tokens > 0, tl.maximum(words, 1), 0)


@triton.jit
def _place_kernel(
    real_ptr, ids_ptr, counts_ptr, by_token_ptr, cu_ptr, first_token_ptr, place_ptr, B, N,
    BLOCK: tl.constexpr, BLOCK_B: tl.constexpr,
):  # fmt: skip
    b, size = tl.program_id(0).to(tl.int64), tl.num_programs(0).to(tl.int64) * N
    tokens, words, all_tokens, all_words = b * 0, b * 0, b * 0, b * 0
    for i in range(0, B, BLOCK_B):
        rows = i + tl.arange(0, BLOCK_B)
        t, w = _counts(counts_ptr, rows, rows < B)
        tokens += tl.sum(tl.where(rows < b, t, 0), 0)
        words += tl.sum(tl.where(rows < b, w, 0), 0)
        all_tokens += tl.sum(t, 0)
        all_words += tl.sum(w, 0)
    _, my_words = _counts(counts_ptr, b, b < B)
    starting = tl.load(counts_ptr + 2 * b + 1)
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
        real, ids, starts, last = _cells(real_ptr, ids_ptr, b * N, start, N, last, BLOCK)
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
        tl.store(row + 3 * size, tl.where((ids >= 0) | alone, word, -1), mask=mask)
        tl.store(row + 4 * size, tl.where(starts, word, -1), mask=mask)
        tl.store(first_token_ptr + word, to, mask=starts)
        tl.store(first_token_ptr + spare_words + offs, offs * 0, mask=offs < N - my_words)
        tl.store(place_ptr + cell, tl.where(real, to, 0), mask=mask)
        ranked += tl.sum(real.to(tl.int64), 0)
        started += tl.sum(starts.to(tl.int64), 0)


@triton_op("tokenexit_triton::pack_static", mutates_args={})
def pack_static(real: Tensor, word_ids: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`tokenexit.reference.pack_static`: the layout of a padded batch with room for all cells.

    Args:
        real: `[B, N]` bool, true at tokens; word_ids: `[B, N]` int64.

    Returns:
        By token `[5, B * N]`, offsets `[2, B + 2]`, first_token `[B * N]` and place `[B, N]`.
    """
    (num_rows, longest), new = real.shape, word_ids.new_empty
    by_token, cu = new(5, num_rows * longest), new(2, num_rows + 2)
    first_token, place = new(num_rows * longest), new(num_rows, longest)
    counts = new(num_rows, 2, dtype=torch.int32)
    rows = real.contiguous().view(torch.uint8), word_ids.contiguous(), counts
    if num_rows == 0:
        return by_token, cu.zero_(), first_token, place
    wrap_triton(_count_kernel)[(num_rows,)](*rows, longest, _CELLS)
    wrap_triton(_place_kernel)[(num_rows,)](
        *rows, by_token, cu, first_token, place, num_rows, longest, _CELLS, _ROWS
    )
    return by_token, cu, first_token, place
