"""Products over a count told on the device, as they might be done in place of kernels/linear.py's.

Candidates for `gpu_probes.py`, which times them beside ours: persistent, with loads and stores by
tensor descriptors (TMA on Hopper and later). None is part of the package before it has won there.
"""

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

# By name: rows, columns and depth of a tile, warps, stages. Warp specialisation is not among them:
# asked for it, Triton 3.6 and 3.9 make the same code for Hopper as without.
CANDIDATES = {
    "TMA 128x128": (128, 128, 64, 8, 3),
    "TMA 128x128 4w": (128, 128, 64, 4, 3),
    "TMA 128x256": (128, 256, 64, 8, 3),
    "TMA 64x256": (64, 256, 64, 4, 4),
}


@triton.jit
def _product_kernel(
    x_desc, w_desc, out_desc, count_ptr, num_rows, N, K,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    count = tl.minimum(tl.load(count_ptr), num_rows).to(tl.int32)
    num_blocks = tl.cdiv(N, BLOCK_N)
    tiles = tl.cdiv(count, BLOCK_M) * num_blocks
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=True):
        m, n = (tile // num_blocks) * BLOCK_M, (tile % num_blocks) * BLOCK_N
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k in range(0, K, BLOCK_K):
            x = x_desc.load([m, k])
            w = w_desc.load([n, k])
            acc = tl.dot(x, w.T, acc)
        out_desc.store([m, n], acc.to(x_desc.dtype))


def product(x, weight, count, tiles, programs=None):
    """`F.linear(x, weight)` for the first `count` rows; up to a tile of later ones is overwritten.

    Args:
        x: `[R, K]`, weight: `[N, K]`, contiguous, fp16 or bf16; K and N multiples of 8.
        count: one int64 on the device.
        tiles: a value of CANDIDATES.
        programs: None: one for each multiprocessor.
    """
    rows, columns, depth, warps, stages = tiles
    (num_rows, k), n = x.shape, len(weight)
    out = x.new_empty(num_rows, n)
    if programs is None:
        programs = torch.cuda.get_device_properties(x.device).multi_processor_count
    _product_kernel[(programs,)](
        TensorDescriptor.from_tensor(x, [rows, depth]),
        TensorDescriptor.from_tensor(weight, [columns, depth]),
        TensorDescriptor.from_tensor(out, [rows, columns]),
        *(count, num_rows, n, k, rows, columns, depth),
        num_warps=warps,
        num_stages=stages,
    )
    return out
