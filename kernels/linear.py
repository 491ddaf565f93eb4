"""Matrix products over the first rows of a buffer; how many they are is read on the device.

Programs are persistent: as many as the GPU holds at a time take the count's tiles in turn, so that
nobody waits for anybody. Tiles follow from the capacity, without autotuning: results must not
change from run to run. On Hopper, whose unit for that (TMA) copies tiles, it does so where rows are
multiples of 16 bytes; rows that are gathered, and other GPUs, load by pointers.

LayerNorm has no launch of its own: the product that makes a row x leaves sum and squared deviations
of each of its column blocks (`stats`), and stores `y = gamma * x`. With m and s the mean and the
1 / standard deviation of x, what `up` makes of the normalized row is, by linearity,

    s * (W @ y) - s * m * (W @ gamma) + (W @ beta + b)

so its loop is that of a plain product. Means of a BERT's rows are small (below 0.1 deviations in
MiniLM), so nothing cancels; each deviation of the mean costs about a bit. The two vectors
(`folded`) are made in every call, as weights may change unseen, beside queries, keys and values,
by programs that have no tile left.
"""

import torch
import triton
import triton.language as tl
from tokenexit.kernels.dependent import begin, begins
from tokenexit.kernels.norm import gelu, gelu_tanh
from torch import Tensor
from torch.library import custom_op
from triton.tools.tensor_descriptor import TensorDescriptor

ACTIVATIONS = ("none", "gelu", "gelu_tanh")
_FOLD_K = 256  # columns of a weight, folded at a time
_SMALL = 512  # rows, up to which tiles of other GPUs are small: they have to spread


def is_wide(x):
    """Whether tiles are as measured on Hopper, by TMA; so they are without a GPU, too."""
    if x.device.type != "cuda":
        return True
    return not torch.version.hip and torch.cuda.get_device_capability(x.device)[0] == 9


def tiles_of(x, num_rows, n, k, alone=True):
    """Of products of up to so many rows, in the dtype of x: programs of a multiprocessor, options.

    Those for Hopper are the fastest of 17 on an H100, for 400 to 8192 rows of BERT-base; and of 12
    on an H200 for up to 1344 rows, where the smallest win of which a GPU computes all at once.

    Args:
        alone: whether the loop over depth stands alone in that over tiles; they can be made one.
    """
    size, stages = x.element_size(), 2 if torch.version.hip else 3
    if size == 2 and is_wide(x):
        return _wide_tiles(num_rows, n, k, alone, multiprocessors(x))
    if num_rows <= _SMALL:
        return 4, _options(32, 32, 256 // size, 4, stages)
    if size == 4:  # 128 rows would not fit the registers of sm_100 beside a residual's LayerNorm
        return 1, _options(64, 128, 32, 8, stages)
    return 1, _options(128, 128, 64, 8, stages)


def _wide_tiles(num_rows, n, k, alone, places):
    """`tiles_of` for Hopper, that has so many multiprocessors."""
    square, deep = _options(64, 64, 128, 4, 3), _options(64, 128, 64, 4, 6)
    two = _options(128, 128, 64, 4, 3)  # of which one computes while the other ends a tile
    if num_rows <= 128:
        return 2, _options(64, 32, 128, 4, 4)
    if n > k:  # its loop is short, and its end hides behind the start of the next tile's
        some = [(2, square), (2, _options(64, 128, 64, 4, 4)), (2, two)]
        last = (1, _options(128, 256, 64, 8, 4, flatten=True)) if alone else (2, two)
    elif n < k:
        some, last = [(1, square), (1, deep)], (1, _options(64, 256, 64, 8, 5))
    else:
        some, last = [(2, square)], (2, two)
    for held, tiles in some:
        if _most_tiles(num_rows, n, tiles) <= places * held:
            return held, tiles
    return last


def _options(rows, columns, depth, warps, stages, flatten=False):
    return dict(
        BLOCK_M=rows, BLOCK_N=columns, BLOCK_K=depth, FLATTEN=flatten,
        num_warps=warps, num_stages=stages,
    )  # fmt: skip


def stats_block(stats, d):
    """Columns of a block, from the stats `[R, blocks, 2]` of rows of d columns."""
    return triton.next_power_of_2(triton.cdiv(d, max(1, stats.shape[1])))


def multiprocessors(x):
    """Of x's GPU; without one, of an H100."""
    cuda = x.device.type == "cuda"
    return torch.cuda.get_device_properties(x.device).multi_processor_count if cuda else 132


def descriptor(x, rows, columns):
    """By which tiles of `[R, K]` x are copied, or None where pointers have to do."""
    aligned = x.data_ptr() % 16 == 0 and x.stride(0) * x.element_size() % 16 == 0
    if x.element_size() == 4 or not is_wide(x) or not aligned or not x.numel():
        return None
    return TensorDescriptor(x, list(x.shape), [x.stride(0), 1], [rows, columns])


def is_even(tiles, k, *columns):
    """Whether no tile is cut by the edge of a weight, so that its loads need no masks."""
    return k % tiles["BLOCK_K"] == 0 and all(n % tiles["BLOCK_N"] == 0 for n in columns)


@triton.jit
def load_stats(
    stats_ptr, rows, mask_m, num_blocks, S: tl.constexpr, AXIS: tl.constexpr
):  # fmt: skip
    """The sums and squared deviations of rows, a block beside the other along AXIS.

    With AXIS 1 what is made of them is laid out as the loads are; with 0 it keeps the layout of its
    other parts.
    """
    offs_s = tl.expand_dims(tl.arange(0, S), 1 - AXIS)
    mask = tl.expand_dims(mask_m, AXIS) & (offs_s < num_blocks)
    at = stats_ptr + (tl.expand_dims(rows, AXIS) * num_blocks + offs_s) * 2
    return tl.load(at, mask=mask, other=0.0), tl.load(at + 1, mask=mask, other=0.0)


@triton.jit
def mean_rstd(
    total, squares, D, num_blocks,
    EPS: tl.constexpr, BLOCK_S: tl.constexpr, S: tl.constexpr, AXIS: tl.constexpr,
):  # fmt: skip
    """Of rows of D columns, from the stats of blocks of BLOCK_S columns (`load_stats`)."""
    offs_s = tl.expand_dims(tl.arange(0, S), 1 - AXIS)
    size = tl.minimum(D - offs_s * BLOCK_S, BLOCK_S).to(tl.float32)
    mean = tl.sum(total, AXIS) / D
    apart = total / size - tl.expand_dims(mean, AXIS)
    apart = tl.where(offs_s < num_blocks, squares + size * apart * apart, 0.0)
    return mean, 1 / tl.sqrt(tl.sum(apart, AXIS) / D + EPS)


@triton.jit
def load_row(x_ptr, cols, mask):
    """A vector as a row of a tile, in fp32."""
    return tl.load(x_ptr + cols, mask=mask, other=0.0).to(tl.float32)[None, :]


@triton.jit
def _product(
    acc, x_ptr, x_desc, first, rows, mask_m, w_ptr, w_desc, first_n, K, stride_xm,
    EVEN: tl.constexpr, PRECISION: tl.constexpr, N,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """`acc + x[rows] @ w[first_n : first_n + BLOCK_N].T`; by x_desc, rows are those from first."""
    cols = first_n + tl.arange(0, BLOCK_N)
    mask_n = (cols < N) | EVEN
    for k in range(0, K, BLOCK_K):
        offs_k = k + tl.arange(0, BLOCK_K)
        mask_k = (offs_k < K) | EVEN
        if x_desc is not None:
            x = x_desc.load([first, k])
        else:
            x_at = x_ptr + rows[:, None] * stride_xm + offs_k[None, :]
            x = tl.load(x_at, mask=mask_m[:, None] & mask_k[None, :], other=0.0)
        if w_desc is not None:
            w = w_desc.load([first_n, k]).T
        else:
            w_at = w_ptr + cols.to(tl.int64)[None, :] * K + offs_k[:, None]
            w = tl.load(w_at, mask=mask_n[None, :] & mask_k[:, None], other=0.0)
        acc = tl.dot(x, w, acc, input_precision=PRECISION)
    return acc


@triton.jit
def _linear_kernel(
    x_ptr, x_desc, w_ptr, w_desc, bias_ptr, out_ptr, count_ptr,
    residual_ptr, residual_gather_ptr, stats_in_ptr, norm_weight_ptr, norm_bias_ptr, folded_ptr,
    stats_ptr, num_rows, N, K, stride_xm, stride_rm, stride_om, num_stats,
    EPS: tl.constexpr, NORM_X: tl.constexpr, NORM_RESIDUAL: tl.constexpr, NORM_OUT: tl.constexpr,
    ACTIVATION: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_S: tl.constexpr, S: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, FLATTEN: tl.constexpr,
    DEPENDENT: tl.constexpr,
):  # fmt: skip
    begin(DEPENDENT)
    count = num_rows
    if count_ptr is not None:
        count = tl.minimum(tl.load(count_ptr), num_rows).to(tl.int32)
    num_blocks = tl.cdiv(N, BLOCK_N)
    tiles = tl.cdiv(count, BLOCK_M) * num_blocks
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=FLATTEN):
        pid_n, first = tile % num_blocks, (tile // num_blocks) * BLOCK_M
        offs_m = first.to(tl.int64) + tl.arange(0, BLOCK_M)
        own = tl.arange(0, BLOCK_M)[:, None]  # within a tile 32 bits suffice: half the registers
        mask_m = offs_m < count
        cols = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
        mask_n = (cols < N) | EVEN
        # Asked for before the product, needed after it.
        near = offs_m
        if residual_ptr is not None:
            at = residual_ptr + first.to(tl.int64) * stride_rm + (own * stride_rm + cols[None, :])
            if residual_gather_ptr is not None:
                near = tl.load(residual_gather_ptr + offs_m, mask=mask_m, other=0)
                at = residual_ptr + near[:, None] * stride_rm + cols[None, :]
            r = tl.load(at, mask=mask_m[:, None] & mask_n[None, :], other=0.0)
        if NORM_RESIDUAL:
            sums, squares = load_stats(stats_in_ptr, near, mask_m, num_stats, S, 0)
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        acc = _product(
            acc, x_ptr, x_desc, first, offs_m, mask_m, w_ptr, w_desc, pid_n * BLOCK_N, K, stride_xm,
            EVEN, PRECISION, N, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        if residual_ptr is not None:
            if NORM_RESIDUAL:
                m, s = mean_rstd(sums, squares, N, num_stats, EPS, BLOCK_S, S, 0)
                acc += r.to(tl.float32) * s[:, None]
                acc -= (m * s)[:, None] * load_row(norm_weight_ptr, cols, mask_n)
                acc += load_row(norm_bias_ptr, cols, mask_n)
            else:
                acc += r.to(tl.float32)
        if bias_ptr is not None:
            acc += load_row(bias_ptr, cols, mask_n)
        if NORM_X:
            sums, squares = load_stats(stats_in_ptr, offs_m, mask_m, num_stats, S, 0)
            m, s = mean_rstd(sums, squares, K, num_stats, EPS, BLOCK_S, S, 0)
            acc = (acc - m[:, None] * load_row(folded_ptr, cols, mask_n)) * s[:, None]
            acc += load_row(folded_ptr + N, cols, mask_n)
        if ACTIVATION == "gelu":
            acc = gelu(acc)
        elif ACTIVATION == "gelu_tanh":
            acc = gelu_tanh(acc)
        if stats_ptr is not None:
            total = tl.sum(tl.where(mask_n[None, :], acc, 0.0), 1)
            mean = total / tl.minimum(N - pid_n * BLOCK_N, BLOCK_N)
            apart = tl.where(mask_n[None, :], acc - mean[:, None], 0.0)
            at = stats_ptr + (offs_m * num_blocks + pid_n) * 2
            tl.store(at, total, mask=mask_m)
            tl.store(at + 1, tl.sum(apart * apart, 1), mask=mask_m)
        if NORM_OUT:
            acc *= load_row(norm_weight_ptr, cols, mask_n)
        at = out_ptr + first.to(tl.int64) * stride_om + (own * stride_om + cols[None, :])
        tl.store(at, acc.to(out_ptr.dtype.element_ty), mask=mask_m[:, None] & mask_n[None, :])


@triton.jit
def _fold_norm(
    w_ptr, bias_ptr, gamma_ptr, beta_ptr, folded_ptr, cols, N, K,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """`w[cols] @ gamma` and `w[cols] @ beta + bias[cols]`, see the top of this file."""
    mask_n = cols < N
    of_gamma = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    of_beta = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    for k in range(0, K, BLOCK_K):
        offs_k = k + tl.arange(0, BLOCK_K)
        mask_k = offs_k < K
        w_at = w_ptr + cols.to(tl.int64)[:, None] * K + offs_k[None, :]
        w = tl.load(w_at, mask=mask_n[:, None] & mask_k[None, :], other=0.0).to(tl.float32)
        of_gamma += w * load_row(gamma_ptr, offs_k, mask_k)
        of_beta += w * load_row(beta_ptr, offs_k, mask_k)
    bias = tl.load(bias_ptr + cols, mask=mask_n, other=0.0).to(tl.float32)
    tl.store(folded_ptr + cols, tl.sum(of_gamma, 1), mask=mask_n)
    tl.store(folded_ptr + N + cols, tl.sum(of_beta, 1) + bias, mask=mask_n)


@triton.jit
def _dealt(before, programs):
    """A program's first task, where so many were dealt before, one to each in turn."""
    return (tl.program_id(0) + programs - before % programs) % programs


@triton.jit
def _project(
    h_ptr, h_desc, rows_ptr, count, w_ptr, w_desc, bias_ptr, out_ptr, before, N, K, stride_hm,
    EVEN: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """`F.linear(h[rows], w, bias)`; how many tiles have been dealt with it."""
    num_blocks = tl.cdiv(N, BLOCK_N)
    tiles, programs = tl.cdiv(count, BLOCK_M) * num_blocks, tl.num_programs(0)
    for tile in tl.range(_dealt(before, programs), tiles, programs):
        pid_n, first = tile % num_blocks, (tile // num_blocks) * BLOCK_M
        offs_m = first.to(tl.int64) + tl.arange(0, BLOCK_M)
        mask_m = offs_m < count
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        if rows_ptr is None:
            acc = _product(
                acc, h_ptr, h_desc, first, offs_m, mask_m, w_ptr, w_desc, pid_n * BLOCK_N, K,
                stride_hm, EVEN, PRECISION, N, BLOCK_M, BLOCK_N, BLOCK_K,
            )  # fmt: skip
        else:
            rows = tl.load(rows_ptr + offs_m, mask=mask_m, other=0)
            near = 0
            in_line = False
            if h_desc is not None:  # whole sentences mostly are
                last = tl.minimum(first + BLOCK_M, count) - 1
                near = tl.load(rows_ptr + first).to(tl.int32)
                in_line = tl.load(rows_ptr + last).to(tl.int32) - near == last - first
            if in_line:
                acc = _product(
                    acc, h_ptr, h_desc, near, rows, mask_m, w_ptr, w_desc, pid_n * BLOCK_N, K,
                    stride_hm, EVEN, PRECISION, N, BLOCK_M, BLOCK_N, BLOCK_K,
                )  # fmt: skip
            else:
                acc = _product(
                    acc, h_ptr, None, first, rows, mask_m, w_ptr, w_desc, pid_n * BLOCK_N, K,
                    stride_hm, EVEN, PRECISION, N, BLOCK_M, BLOCK_N, BLOCK_K,
                )  # fmt: skip
        cols = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
        mask_n = (cols < N) | EVEN
        acc += load_row(bias_ptr, cols, mask_n)
        own = tl.arange(0, BLOCK_M)[:, None]
        at = out_ptr + first.to(tl.int64) * N + (own * N + cols[None, :])
        tl.store(at, acc.to(out_ptr.dtype.element_ty), mask=mask_m[:, None] & mask_n[None, :])
    return before + tiles


@triton.jit
def _query_key_value_kernel(
    h_ptr, h_desc, wq_ptr, wq_desc, bq_ptr, wkv_ptr, wkv_desc, bkv_ptr, q_ptr, kv_ptr,
    active_ptr, num_active_ptr, seen_ptr, num_seen_ptr,
    up_ptr, up_bias_ptr, norm_weight_ptr, norm_bias_ptr, folded_ptr,
    num_q, num_kv, Nq, Nkv, Nup, K, stride_hm,
    EVEN: tl.constexpr, PRECISION: tl.constexpr, FOLD_N: tl.constexpr, FOLD_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    begin(DEPENDENT)
    dealt = _project(
        h_ptr, h_desc, seen_ptr,
        tl.minimum(tl.load(num_seen_ptr), num_kv).to(tl.int32),
        wkv_ptr, wkv_desc, bkv_ptr, kv_ptr, 0, Nkv, K, stride_hm,
        EVEN, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    dealt = _project(
        h_ptr, h_desc, active_ptr,
        tl.minimum(tl.load(num_active_ptr), num_q).to(tl.int32),
        wq_ptr, wq_desc, bq_ptr, q_ptr, dealt, Nq, K, stride_hm,
        EVEN, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    for fold in range(_dealt(dealt, tl.num_programs(0)), tl.cdiv(Nup, FOLD_N), tl.num_programs(0)):
        _fold_norm(
            up_ptr, up_bias_ptr, norm_weight_ptr, norm_bias_ptr, folded_ptr,
            fold * FOLD_N + tl.arange(0, FOLD_N), Nup, K, FOLD_N, FOLD_K,
        )  # fmt: skip


def _launch(kernel, x, held, num_tiles, *args, **options):
    """Persistent programs, so many on a multiprocessor, and no more than there may be tiles."""
    kernel[(min(multiprocessors(x) * held, num_tiles),)](*args, **options)


@custom_op("tokenexit_triton::linear_", mutates_args={"out", "stats"})
def linear_(
    out: Tensor, stats: Tensor | None, x: Tensor, weight: Tensor, bias: Tensor | None = None,
    count: Tensor | None = None,
    residual: Tensor | None = None, residual_gather: Tensor | None = None,
    norm_stats: Tensor | None = None, norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None, folded: Tensor | None = None, eps: float = 1e-12,
    norm_on: str = "none", activation: str = "none", precision: str = "tf32",
) -> None:  # fmt: skip
    """A product with bias, activation, residual and LayerNorm, over the first `count` rows.

    `out = act(x @ weight.T + bias + residual[residual_gather])`, without a gradient. A LayerNorm is
    shared by three products: the first has it on "out", and stores `out * norm_weight` and stats;
    of what it stored, the second takes the LayerNorm for its x, the third for its residual.

    Args:
        out: `[R, N]` in the dtype of x, dense rows.
        stats: `[R, blocks, 2]` fp32, written if given: what a LayerNorm of out's rows needs.
            Those of out before it is multiplied by norm_weight.
        x: `[R, K]` fp16, bf16 or fp32, dense rows; weight: `[N, K]` contiguous; bias: `[N]`.
        count: one int64 on the device, or None for all rows. Later rows of out are not touched.
        residual: `[.., N]`, dense rows.
        residual_gather: `[R]` int64, the row of the residual for each; None: the same.
        norm_on: "none", "out", "x" or "residual".
        norm_weight, norm_bias, eps: the LayerNorm, for "out" and "residual"; "x" wants eps alone.
        norm_stats: the stats that came with x or the residual.
        folded: `[2, N]` fp32 for "x", of `query_key_value`; it has the bias, which is None then.
        activation: "none", "gelu" (by erf) or "gelu_tanh" (approximated by it).
        precision: of fp32 products, "tf32" or "ieee"; sums are always fp32.

    Raises:
        ValueError: shapes that do not fit, or unknown options.
    """
    num_rows, (n, k) = len(x), weight.shape
    if x.shape[1] != k or out.shape != (num_rows, n) or not weight.is_contiguous():
        raise ValueError(
            f"got x {tuple(x.shape)}, out {tuple(out.shape)} and weight {tuple(weight.shape)}; "
            "expected [R, K], [R, N] and a contiguous [N, K]"
        )
    if activation not in ACTIVATIONS or norm_on not in ("none", "out", "x", "residual"):
        raise ValueError(
            f"got activation {activation!r} and norm_on {norm_on!r}; expected one of "
            f"{ACTIVATIONS}, and 'none', 'out', 'x' or 'residual'"
        )
    if norm_on == "residual" and residual is None:
        raise ValueError("got norm_on 'residual' without a residual")
    if norm_on in ("out", "residual") and (norm_weight is None or norm_bias is None):
        raise ValueError(f"got norm_on {norm_on!r} without norm_weight and norm_bias")
    if norm_on == "x" and (folded is None or bias is not None or residual is not None):
        raise ValueError("got norm_on 'x'; expected it with folded, without bias and residual")
    reads, of = norm_on in ("x", "residual"), k if norm_on == "x" else n
    if reads and (norm_stats is None or len(norm_stats) < 1 or norm_stats.shape[2:] != (2,)):
        got = None if norm_stats is None else tuple(norm_stats.shape)
        raise ValueError(f"got norm_stats {got}; expected those of its rows, [R, blocks, 2]")
    if not num_rows:
        return
    held, tiles = tiles_of(x, num_rows, n, k)
    block_m, block_n, block_k = (tiles[f"BLOCK_{axis}"] for axis in "MNK")
    num_stats = norm_stats.shape[1] if reads else 1
    _launch(
        _linear_kernel, x, held, _most_tiles(num_rows, n, tiles),
        x, descriptor(x, block_m, block_k), weight, descriptor(weight, block_n, block_k),
        bias, out, count, residual, residual_gather, norm_stats, norm_weight, norm_bias, folded,
        stats, num_rows, n, k, x.stride(0),
        0 if residual is None else residual.stride(0), out.stride(0), num_stats, eps,
        norm_on == "x", norm_on == "residual", norm_on == "out",
        activation, is_even(tiles, k, n), precision, stats_block(norm_stats, of) if reads else 1,
        triton.next_power_of_2(num_stats), **tiles, **begins(x),
    )  # fmt: skip


def _most_tiles(num_rows, n, tiles):
    """How many tiles there may be."""
    return triton.cdiv(num_rows, tiles["BLOCK_M"]) * triton.cdiv(n, tiles["BLOCK_N"])


def linear(x, weight, bias=None, count=None, want_stats=False, **options):
    """`linear_` into new tensors: out `[R, N]`, or (out, stats) if wanted; its other options."""
    num_rows, n = len(x), len(weight)
    out = x.new_empty(num_rows, n)
    tiles = tiles_of(x, num_rows, *weight.shape)[1]
    blocks = triton.cdiv(n, tiles["BLOCK_N"])
    stats = x.new_empty(num_rows, blocks, 2, dtype=torch.float32) if want_stats else None
    linear_(out, stats, x, weight, bias, count, **options)
    return (out, stats) if want_stats else out


@custom_op("tokenexit_triton::query_key_value", mutates_args={})
def query_key_value(
    h: Tensor, query_weight: Tensor, query_bias: Tensor, key_value_weight: Tensor,
    key_value_bias: Tensor, active: Tensor | None, cu_active: Tensor, seen: Tensor | None,
    cu_seen: Tensor, norm_weight: Tensor, norm_bias: Tensor, up_weight: Tensor, up_bias: Tensor,
    precision: str = "tf32",
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Queries of the active tokens, keys and values of the seen ones, and folded, in one launch.

    `F.linear(h[active], query_weight, query_bias)`, `F.linear(h[seen], key_value_weight, ...)`, and
    beside them `up_weight @ norm_weight` and `F.linear(norm_bias, up_weight, up_bias)`: with
    these, a product with up_weight takes the place of one of a LayerNorm's rows.

    Args:
        h: `[T, K]` fp16, bf16 or fp32, dense rows.
        query_weight: `[N, K]`; key_value_weight: `[M, K]`; both contiguous. Biases `[N]`, `[M]`.
        active, seen: `[A]` and `[S]` int64, rows of h; entries beyond the last of cu_active and
            cu_seen are not read. None, for both: all tokens, in their order.
        cu_active, cu_seen: `[B+1]` int64.
        norm_weight, norm_bias: `[K]`; up_weight: `[F, K]` contiguous; up_bias: `[F]`.
        precision: of fp32 products, "tf32" or "ieee"; folded is always "ieee".

    Returns:
        `[A, N]`, `[S, M]`, and folded `[2, F]` fp32. Rows beyond the last of cu_active and cu_seen
        are not written.
    """
    q, kv, folded = _empty(h, query_weight, key_value_weight, active, seen, up_weight)
    (num_q, n), (num_kv, m), (f, k) = q.shape, kv.shape, up_weight.shape
    rows = max(num_q, num_kv)
    held, tiles = tiles_of(h, rows, n + m, k, alone=False)
    tiles.pop("FLATTEN")
    block_m, block_n, block_k = (tiles[f"BLOCK_{axis}"] for axis in "MNK")
    fold = 2 * tiles["num_warps"], _FOLD_K  # 16 numbers of a thread
    most = sum(_most_tiles(rows, size, tiles) for size in (n, m)) + triton.cdiv(f, fold[0])
    _launch(
        _query_key_value_kernel, h, held, most,
        h, descriptor(h, block_m, block_k),
        query_weight, descriptor(query_weight, block_n, block_k), query_bias,
        key_value_weight, descriptor(key_value_weight, block_n, block_k), key_value_bias, q, kv,
        active, cu_active[-1:], seen, cu_seen[-1:], up_weight, up_bias, norm_weight, norm_bias,
        folded, num_q, num_kv, n, m, f, k, h.stride(0), is_even(tiles, k, n, m), precision, *fold,
        **tiles, **begins(h),
    )  # fmt: skip
    return q, kv, folded


@query_key_value.register_fake
def _(h, query_weight, _bq, key_value_weight, _bkv, active, _ca, seen, _cs, _nw, _nb, up, *_):
    return _empty(h, query_weight, key_value_weight, active, seen, up)


def _empty(h, query_weight, key_value_weight, active, seen, up_weight):
    """What `query_key_value` fills."""
    num_q, num_kv = (len(h if rows is None else rows) for rows in (active, seen))
    return (
        h.new_empty(num_q, len(query_weight)),
        h.new_empty(num_kv, len(key_value_weight)),
        h.new_empty(2, len(up_weight), dtype=torch.float32),
    )
