"""Products over a count told on the device, as they might be done in place of kernels/linear.py's.

Candidates for `gpu_probes.py`, which times them beside ours: persistent, with loads and stores by
tensor descriptors (TMA on Hopper and later). None is part of the package before it has won there.
"""

import triton
import triton.language as tl
from tokenexit.kernels.linear import multiprocessors
from triton.tools.tensor_descriptor import TensorDescriptor

# By name: rows, columns and depth of a tile, warps, stages, programs a multiprocessor, parts that a
# tile is stored in. Warp specialisation is not among them: asked for it, Triton 3.6 and 3.9 make
# the same code for Hopper as without.
CANDIDATES = {
    "TMA 128x128": (128, 128, 64, 8, 3, 1, 1),
    "TMA 128x128 4w": (128, 128, 64, 4, 3, 1, 1),
    "TMA 128x128 x2": (128, 128, 64, 4, 2, 2, 2),
    "TMA 128x256": (128, 256, 64, 8, 3, 1, 1),
    "TMA 128x256 4s": (128, 256, 64, 8, 4, 1, 2),
    "TMA 64x256": (64, 256, 64, 4, 4, 1, 1),
}


@triton.jit
def _product_kernel(
    x_desc, w_desc, out_desc, count_ptr, num_rows, N, K,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, HALVES: tl.constexpr,
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
        if HALVES:  # half the shared memory for what is stored
            halves = tl.permute(tl.reshape(acc, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1))
            left, right = tl.split(halves)
            out_desc.store([m, n], left.to(x_desc.dtype))
            out_desc.store([m, n + BLOCK_N // 2], right.to(x_desc.dtype))
        else:
            out_desc.store([m, n], acc.to(x_desc.dtype))


def product(x, weight, count, tiles):
    """`F.linear(x, weight)` for the first `count` rows; up to a tile of later ones is overwritten.

    Args:
        x: `[R, K]`, weight: `[N, K]`, contiguous, fp16 or bf16; K and N multiples of 8.
        count: one int64 on the device.
        tiles: a value of CANDIDATES.
    """
    rows, columns, depth, warps, stages, residents, parts = tiles
    (num_rows, k), n = x.shape, len(weight)
    out = x.new_empty(num_rows, n)
    _product_kernel[(multiprocessors(x) * residents,)](
        TensorDescriptor.from_tensor(x, [rows, depth]),
        TensorDescriptor.from_tensor(weight, [columns, depth]),
        TensorDescriptor.from_tensor(out, [rows, columns // parts]),
        *(count, num_rows, n, k, rows, columns, depth, parts == 2),
        num_warps=warps,
        num_stages=stages,
    )
    return out
