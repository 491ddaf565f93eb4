"""States before the first layer: embeddings of words, positions and kinds, and their LayerNorm."""

import triton
import triton.language as tl
from tokenexit.kernels.norm import layer_norm
from torch import Tensor
from torch.library import triton_op, wrap_triton


@triton.jit
def _embed_kernel(
    ids_ptr, positions_ptr, types_ptr, word_ptr, position_ptr, type_ptr, weight_ptr, bias_ptr,
    out_ptr, count_ptr, num_rows, D,
    EPS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    count = num_rows
    if count_ptr is not None:
        count = tl.minimum(tl.load(count_ptr), num_rows)
    start = tl.program_id(0).to(tl.int64) * BLOCK_R
    if start >= count:
        return
    rows = start + tl.arange(0, BLOCK_R)
    mask_r = rows < count
    cols = tl.arange(0, BLOCK_D)
    mask_d = cols < D
    mask = mask_r[:, None] & mask_d[None, :]
    ids = tl.load(ids_ptr + rows, mask=mask_r, other=0)
    x = tl.load(word_ptr + ids[:, None] * D + cols[None, :], mask=mask, other=0.0).to(tl.float32)
    if position_ptr is not None:
        at = tl.load(positions_ptr + rows, mask=mask_r, other=0)[:, None] * D + cols[None, :]
        x += tl.load(position_ptr + at, mask=mask, other=0.0).to(tl.float32)
    if type_ptr is not None:
        if types_ptr is None:
            x += tl.load(type_ptr + cols, mask=mask_d, other=0.0).to(tl.float32)[None, :]
        else:
            at = tl.load(types_ptr + rows, mask=mask_r, other=0)[:, None] * D + cols[None, :]
            x += tl.load(type_ptr + at, mask=mask, other=0.0).to(tl.float32)
    out, _, _ = layer_norm(x, cols, mask_d, weight_ptr, bias_ptr, D, EPS)
    tl.store(out_ptr + rows[:, None] * D + cols[None, :], out.to(out_ptr.dtype.element_ty), mask)


@triton_op("tokenexit_triton::embed", mutates_args={})
def embed(
    ids: Tensor, positions: Tensor, types: Tensor | None, word: Tensor, position: Tensor | None,
    token_type: Tensor | None, norm_weight: Tensor, norm_bias: Tensor, eps: float = 1e-12,
    count: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """`F.layer_norm(word[ids] + position[positions] + token_type[types], [d], ...)`, no gradient.

    Args:
        ids, positions, types: `[T]` int64, in range; types None: all 0.
        word, position, token_type: tables `[.., d]` contiguous, of one dtype; the last two or None.
        norm_weight, norm_bias, eps: the LayerNorm, `[d]`.
        count: one int64 on the device, or None for all rows. Later rows are not touched.

    Returns:
        `[T, d]` in the tables' dtype; summed and normalized in fp32.
    """
    num_rows, d = len(ids), word.shape[1]
    out = word.new_empty(num_rows, d)
    block_d = triton.next_power_of_2(d)
    block_r = max(1, 2048 // block_d)
    if num_rows:
        wrap_triton(_embed_kernel)[(triton.cdiv(num_rows, block_r),)](
            ids, positions, types, word, position, token_type, norm_weight, norm_bias,
            out, count, num_rows, d, eps, block_r, block_d,
        )  # fmt: skip
    return out
