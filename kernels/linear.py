"""Matrix products over the first rows of a buffer; how many they are is read on the device.

Programs of `linear` are persistent: as many as the GPU holds at a time take the count's tiles in
turn. Tiles follow from the capacity, without autotuning: results must not change from run to run.
Where tiles are few they are split along K, and whichever program of a tile is the last adds its
parts up, in their order. So nobody waits for anybody, and a row hangs on the count by rounding at
most. The grid of `query_key_value` fits all tokens, and programs beyond the counts leave at once.

LayerNorm has no launch of its own: the product that makes a row x leaves sum and squared deviations
of each of its column blocks (`stats`), and stores `y = gamma * x`. With m and s the mean and the
1 / standard deviation of x, what `up` makes of the normalized row is, by linearity,

    s * (W @ y) - s * m * (W @ gamma) + (W @ beta + b)

so its loop is that of a plain product. Nothing cancels: means of a BERT's rows are small (below 0.1
deviations in MiniLM), and at 5 deviations the error is still that of plain PyTorch. The two vectors
(`folded`) are made in every call, as weights may change unseen, beside queries, keys and values,
where a GPU has time to spare.
"""

import torch
import triton
import triton.language as tl
from tokenexit.kernels.norm import gelu, gelu_tanh
from torch import Tensor
from torch.library import triton_op, wrap_triton

MOST_SPLITS = 8
ACTIVATIONS = ("none", "gelu", "gelu_tanh")
_FOLD_K = 256  # columns of a weight, folded at a time


def tiles_of(num_rows, itemsize):
    """Sizes and options for products of so many rows: small ones have to spread over the GPU."""
    stages = 2 if torch.version.hip else 3
    if num_rows <= 256:
        return dict(BLOCK_M=32, BLOCK_N=32, BLOCK_K=256 // itemsize, num_warps=4, num_stages=stages)
    # 128 rows of fp32 would not fit the registers of sm_100 beside a residual's LayerNorm.
    rows = 128 if itemsize == 2 else 64
    return dict(BLOCK_M=rows, BLOCK_N=128, BLOCK_K=128 // itemsize, num_warps=8, num_stages=stages)


def on_hopper(x):
    return x.device.type == "cuda" and torch.cuda.get_device_capability(x.device)[0] == 9


def residents(x, tiles, norm_on="none"):
    """Programs of `linear_` that a multiprocessor holds by registers, and an option for that.

    Two let one compute while the other starts or ends its tile. By the compile report large tiles
    leave registers for two on sm_90 alone, and not where a residual is normalized.
    """
    if tiles["BLOCK_M"] == 32:
        return 4, {}
    two = norm_on != "residual" and on_hopper(x)
    return (2, {"maxnreg": 128}) if two else (1, {})


def multiprocessors(x):
    """Of x's GPU; without one, of an H100."""
    cuda = x.device.type == "cuda"
    return torch.cuda.get_device_properties(x.device).multi_processor_count if cuda else 132


def is_even(tiles, k, *columns):
    """Whether no tile is cut by the edge of a weight, so that its loads need no masks."""
    return k % tiles["BLOCK_K"] == 0 and all(n % tiles["BLOCK_N"] == 0 for n in columns)


@triton.jit
def mean_rstd(
    stats_ptr, rows, mask_m, D, num_blocks, eps,
    BLOCK_S: tl.constexpr, S: tl.constexpr, AXIS: tl.constexpr,
):  # fmt: skip
    """Of rows of D columns, from the sums and squared deviations of blocks of BLOCK_S columns.

    AXIS is that of the blocks. With 1 what is made of the results is laid out as the loads are;
    with 0 it keeps the layout of its other parts.
    """
    across: tl.constexpr = 1 - AXIS
    offs_s = tl.expand_dims(tl.arange(0, S), across)
    size = tl.minimum(D - offs_s * BLOCK_S, BLOCK_S).to(tl.float32)
    mask = tl.expand_dims(mask_m, AXIS) & (offs_s < num_blocks)
    at = stats_ptr + (tl.expand_dims(rows, AXIS) * num_blocks + offs_s) * 2
    total = tl.load(at, mask=mask, other=0.0)
    squares = tl.load(at + 1, mask=mask, other=0.0)
    mean = tl.sum(total, AXIS) / D
    apart = tl.where(mask, total / size - tl.expand_dims(mean, AXIS), 0.0)
    variance = tl.sum(tl.where(mask, squares + size * apart * apart, 0.0), AXIS) / D
    return mean, 1 / tl.sqrt(variance + eps)


@triton.jit
def load_row(x_ptr, cols, mask):
    """A vector as a row of a tile, in fp32."""
    return tl.load(x_ptr + cols, mask=mask, other=0.0).to(tl.float32)[None, :]


@triton.jit
def _product(
    acc, x_ptr, rows, mask_m, w_ptr, cols, mask_n, first_k, last_k, K, stride_xm,
    EVEN: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """`acc + x[rows] @ w[cols].T` from first_k to last_k."""
    for k in range(first_k, last_k, BLOCK_K):
        offs_k = k + tl.arange(0, BLOCK_K)
        mask_k = (offs_k < K) | EVEN
        x_at = x_ptr + rows[:, None] * stride_xm + offs_k[None, :]
        x = tl.load(x_at, mask=mask_m[:, None] & mask_k[None, :], other=0.0)
        w_at = w_ptr + cols.to(tl.int64)[None, :] * K + offs_k[:, None]
        w = tl.load(w_at, mask=mask_n[None, :] & mask_k[:, None], other=0.0)
        acc = tl.dot(x, w, acc, input_precision=PRECISION)
    return acc


@triton.jit
def _splits(tiles, steps, slots, MOST: tl.constexpr):
    """Parts to split K into, with which the slowest program has the fewest steps to do.

    To store a part takes about as long as a step, to read it as another, to arrive as two.
    """
    best, least = 1, tl.cdiv(tiles, slots) * steps
    for splits in tl.static_range(2, MOST + 1):
        cost = tl.cdiv(tiles * splits, slots) * (tl.cdiv(steps, splits) + 1) + splits + 2
        better = (cost < least) & (tiles * splits <= 2 * slots)
        best, least = tl.where(better, splits, best), tl.where(better, cost, least)
    return best


@triton.jit
def _linear_kernel(
    x_ptr, w_ptr, bias_ptr, out_ptr, count_ptr, gather_ptr, scatter_ptr,
    residual_ptr, residual_gather_ptr, stats_in_ptr, norm_weight_ptr, norm_bias_ptr, folded_ptr,
    stats_ptr, parts_ptr, arrived_ptr,
    slots, num_rows, N, K, stride_xm, stride_rm, stride_om, num_stats, eps,
    NORM_X: tl.constexpr, NORM_RESIDUAL: tl.constexpr, NORM_OUT: tl.constexpr,
    ACTIVATION: tl.constexpr,
    EVEN: tl.constexpr, PRECISION: tl.constexpr, S: tl.constexpr, MOST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    count = num_rows
    if count_ptr is not None:
        count = tl.minimum(tl.load(count_ptr), num_rows).to(tl.int32)
    tiles = tl.cdiv(count, BLOCK_M) * tl.cdiv(N, BLOCK_N)
    splits = _splits(tiles, tl.cdiv(K, BLOCK_K), slots, MOST)
    # By the compile report, tiles of 64 rows alone leave registers for what tiles have in common.
    full: tl.constexpr = BLOCK_M != 64
    for part in tl.range(tl.program_id(0), tiles * splits, tl.num_programs(0), disable_licm=full):
        tile, num_blocks = part // splits, tl.cdiv(N, BLOCK_N)
        pid_n, first = tile % num_blocks, (tile // num_blocks).to(tl.int64) * BLOCK_M
        offs_m = first + tl.arange(0, BLOCK_M)
        own = tl.arange(0, BLOCK_M)[:, None]  # within a tile 32 bits suffice: half the registers
        mask_m = offs_m < count
        cols = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
        mask_n = (cols < N) | EVEN
        split, depth = part % splits, tl.cdiv(tl.cdiv(K, BLOCK_K), splits) * BLOCK_K
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        rows = offs_m
        if gather_ptr is not None:
            rows = tl.load(gather_ptr + offs_m, mask=mask_m, other=0)
        acc = _product(
            acc, x_ptr, rows, mask_m, w_ptr, cols, mask_n, split * depth,
            tl.minimum(split * depth + depth, K), K, stride_xm, EVEN, PRECISION,
            BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        if splits > 1:
            size: tl.constexpr = BLOCK_M * BLOCK_N
            offs = tl.arange(0, BLOCK_M)[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
            tl.store(parts_ptr + part * size + offs, acc)
            # Stored before it arrives, so that the last sees all; as in `_exit_step_kernel`.
            tl.debug_barrier()
            last = tl.atomic_add(arrived_ptr + tile, 1, sem="acq_rel", scope="gpu") == splits - 1
            tl.debug_barrier()
            if last:
                tl.store(arrived_ptr + tile, 0)
            mask_m = offs_m < tl.where(last, count, 0)  # the others have nothing to store
            acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
            for i in range(tl.where(last, splits, 0)):
                acc += tl.load(parts_ptr + (part - split + i) * size + offs)
        if residual_ptr is not None:
            near = offs_m
            at = residual_ptr + first * stride_rm + (own * stride_rm + cols[None, :])
            if residual_gather_ptr is not None:
                near = tl.load(residual_gather_ptr + offs_m, mask=mask_m, other=0)
                at = residual_ptr + near[:, None] * stride_rm + cols[None, :]
            r = tl.load(at, mask=mask_m[:, None] & mask_n[None, :], other=0.0).to(tl.float32)
            if NORM_RESIDUAL:
                m, s = mean_rstd(stats_in_ptr, near, mask_m, N, num_stats, eps, BLOCK_N, S, 0)
                acc += r * s[:, None]
                acc -= (m * s)[:, None] * load_row(norm_weight_ptr, cols, mask_n)
                acc += load_row(norm_bias_ptr, cols, mask_n)
            else:
                acc += r
        if bias_ptr is not None:
            acc += load_row(bias_ptr, cols, mask_n)
        if NORM_X:
            m, s = mean_rstd(stats_in_ptr, rows, mask_m, K, num_stats, eps, BLOCK_N, S, 0)
            acc = (acc - m[:, None] * load_row(folded_ptr, cols, mask_n)) * s[:, None]
            acc += load_row(folded_ptr + N, cols, mask_n)
        if ACTIVATION == "gelu":
            acc = gelu(acc)
        elif ACTIVATION == "gelu_tanh":
            acc = gelu_tanh(acc)
        to = offs_m
        out_at = out_ptr + first * stride_om + (own * stride_om + cols[None, :])
        if scatter_ptr is not None:
            to = tl.load(scatter_ptr + offs_m, mask=mask_m, other=0)
            out_at = out_ptr + to[:, None] * stride_om + cols[None, :]
        if stats_ptr is not None:
            total = tl.sum(tl.where(mask_n[None, :], acc, 0.0), 1)
            mean = total / tl.minimum(N - pid_n * BLOCK_N, BLOCK_N)
            apart = tl.where(mask_n[None, :], acc - mean[:, None], 0.0)
            at = stats_ptr + (to * num_blocks + pid_n) * 2
            tl.store(at, total, mask=mask_m)
            tl.store(at + 1, tl.sum(apart * apart, 1), mask=mask_m)
        if NORM_OUT:
            acc *= load_row(norm_weight_ptr, cols, mask_n)
        tl.store(out_at, acc.to(out_ptr.dtype.element_ty), mask=mask_m[:, None] & mask_n[None, :])


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
def _query_key_value_kernel(
    h_ptr, wq_ptr, bq_ptr, wkv_ptr, bkv_ptr, q_ptr, kv_ptr,
    active_ptr, num_active_ptr, seen_ptr, num_seen_ptr,
    up_ptr, up_bias_ptr, norm_weight_ptr, norm_bias_ptr, folded_ptr,
    num_q, num_kv, Nq, Nkv, Nup, K, stride_hm,
    EVEN: tl.constexpr, PRECISION: tl.constexpr, FOLD_N: tl.constexpr, FOLD_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    blocks_q = tl.cdiv(Nq, BLOCK_N)
    num_blocks = blocks_q + tl.cdiv(Nkv, BLOCK_N)
    num_folds = tl.cdiv(Nup, FOLD_N)  # these come first, as of the last ones most leave
    pid = tl.program_id(0) - num_folds
    if pid < 0:
        cols = tl.program_id(0) * FOLD_N + tl.arange(0, FOLD_N)
        _fold_norm(
            up_ptr, up_bias_ptr, norm_weight_ptr, norm_bias_ptr, folded_ptr, cols, Nup, K,
            FOLD_N, FOLD_K,
        )  # fmt: skip
        return
    pid_m = pid // num_blocks
    pid_n = pid % num_blocks
    offs_m = pid_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    if pid_n < blocks_q:
        count = tl.minimum(tl.load(num_active_ptr), num_q)
        rows_ptr, w_ptr, bias_ptr, out_ptr, N = active_ptr, wq_ptr, bq_ptr, q_ptr, Nq
    else:
        pid_n -= blocks_q
        count = tl.minimum(tl.load(num_seen_ptr), num_kv)
        rows_ptr, w_ptr, bias_ptr, out_ptr, N = seen_ptr, wkv_ptr, bkv_ptr, kv_ptr, Nkv
    if pid_m * BLOCK_M >= count:
        return
    mask_m = offs_m < count
    rows = tl.load(rows_ptr + offs_m, mask=mask_m, other=0)
    cols = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = (cols < N) | EVEN
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    acc += load_row(bias_ptr, cols, mask_n)
    acc = _product(
        acc, h_ptr, rows, mask_m, w_ptr, cols, mask_n, 0, K, K, stride_hm,
        EVEN, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    at = out_ptr + offs_m[:, None] * N + cols[None, :]
    tl.store(at, acc.to(out_ptr.dtype.element_ty), mask=mask_m[:, None] & mask_n[None, :])


def scratch(x):
    """Where parts of products of `[A, K]` x wait: `parts` and `arrived` of `linear_`."""
    tiles = tiles_of(len(x), x.element_size())
    most = 2 * multiprocessors(x) * residents(x, tiles)[0]
    parts = x.new_empty(most, tiles["BLOCK_M"] * tiles["BLOCK_N"], dtype=torch.float32)
    return parts, x.new_zeros(most, dtype=torch.int32)


@triton_op("tokenexit_triton::linear_", mutates_args={"out", "stats", "parts", "arrived"})
def linear_(
    out: Tensor, stats: Tensor | None, parts: Tensor, arrived: Tensor,
    x: Tensor, weight: Tensor, bias: Tensor | None = None,
    count: Tensor | None = None, gather: Tensor | None = None, scatter: Tensor | None = None,
    residual: Tensor | None = None, residual_gather: Tensor | None = None,
    norm_stats: Tensor | None = None, norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None, folded: Tensor | None = None, eps: float = 1e-12,
    norm_on: str = "none", activation: str = "none", precision: str = "tf32",
) -> None:  # fmt: skip
    """A product with bias, activation, residual and LayerNorm, over the first `count` rows.

    `out[scatter] = act(x[gather] @ weight.T + bias + residual[residual_gather])`, without a
    gradient. A LayerNorm is shared by three products: the first has it on "out", and stores
    `out * norm_weight` and stats; of what it stored, the second takes the LayerNorm for its x, the
    third for its residual.

    Args:
        out: `[.., N]` in the dtype of x, dense rows.
        stats: `[.., blocks, 2]` fp32, written if given: what a LayerNorm of out's rows needs.
            Those of out before it is multiplied by norm_weight.
        parts, arrived: `scratch(x)`; may serve one product after the other.
        x: `[R, K]` fp16, bf16 or fp32, dense rows; weight: `[N, K]` contiguous; bias: `[N]`.
        count: one int64 on the device, or None for all rows. Later rows are not touched.
        gather, scatter, residual_gather: `[A]` int64, the row of x, out and residual for each row
            of the product; None: the same. A is R without a gather.
        residual: `[.., N]`, dense rows.
        norm_on: "none", "out", "x" or "residual".
        norm_weight, norm_bias, eps: the LayerNorm, for "out" and "residual"; "x" wants eps alone.
        norm_stats: the stats that came with x or the residual.
        folded: `[2, N]` fp32 for "x", of `query_key_value`; it has the bias, which is None then.
        activation: "none", "gelu" (by erf) or "gelu_tanh" (approximated by it).
        precision: of fp32 products, "tf32" or "ieee"; sums are always fp32.

    Raises:
        ValueError: shapes that do not fit, or unknown options.
    """
    num_rows = len(x) if gather is None else len(gather)
    n, k = weight.shape
    if x.shape[1] != k or out.shape[1] != n or not weight.is_contiguous():
        raise ValueError(
            f"got x {tuple(x.shape)}, out {tuple(out.shape)} and weight {tuple(weight.shape)}; "
            "expected [R, K], [.., N] and a contiguous [N, K]"
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
    tiles = tiles_of(num_rows, x.element_size())
    num_stats = triton.cdiv(k if norm_on == "x" else n, tiles["BLOCK_N"])
    reads = norm_on in ("x", "residual")
    if reads and (norm_stats is None or norm_stats.shape[1] != num_stats):
        got = None if norm_stats is None else tuple(norm_stats.shape)
        raise ValueError(f"got norm_stats {got}; expected [R, {num_stats}, 2], of as many rows")
    resident, options = residents(x, tiles, norm_on)
    slots, size = multiprocessors(x) * resident, tiles["BLOCK_M"] * tiles["BLOCK_N"]
    if parts.shape[1:] != (size,) or min(len(parts), len(arrived)) < 2 * slots:
        raise ValueError(
            f"got parts {tuple(parts.shape)} and arrived {tuple(arrived.shape)}; "
            f"expected at least {2 * slots, size} and {(2 * slots,)}"
        )
    most = min(MOST_SPLITS, triton.cdiv(k, tiles["BLOCK_K"]))
    grid = triton.cdiv(num_rows, tiles["BLOCK_M"]) * triton.cdiv(n, tiles["BLOCK_N"]) * most
    if num_rows:
        wrap_triton(_linear_kernel)[(min(grid, slots),)](
            x, weight, bias, out, count, gather, scatter, residual, residual_gather,
            norm_stats, norm_weight, norm_bias, folded, stats, parts, arrived, slots,
            num_rows, n, k, x.stride(0), 0 if residual is None else residual.stride(0),
            out.stride(0), num_stats, eps, norm_on == "x", norm_on == "residual",
            norm_on == "out", activation, is_even(tiles, k, n), precision,
            triton.next_power_of_2(num_stats), most, **tiles, **options,
        )  # fmt: skip


def linear(x, weight, bias=None, count=None, gather=None, want_stats=False, split=None, **options):
    """`linear_` into new tensors: out `[A, N]`, or (out, stats) if wanted.

    `split` is `scratch(x)`, None: made for this product; options are those of `linear_`.
    """
    num_rows = len(x) if gather is None else len(gather)
    out = x.new_empty(num_rows, len(weight))
    blocks = triton.cdiv(len(weight), tiles_of(num_rows, x.element_size())["BLOCK_N"])
    stats = x.new_empty(num_rows, blocks, 2, dtype=torch.float32) if want_stats else None
    linear_(out, stats, *(split or scratch(x)), x, weight, bias, count, gather, **options)
    return (out, stats) if want_stats else out


@triton_op("tokenexit_triton::query_key_value", mutates_args={})
def query_key_value(
    h: Tensor, query_weight: Tensor, query_bias: Tensor, key_value_weight: Tensor,
    key_value_bias: Tensor, active: Tensor, cu_active: Tensor, seen: Tensor, cu_seen: Tensor,
    norm_weight: Tensor, norm_bias: Tensor, up_weight: Tensor, up_bias: Tensor,
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
            cu_seen are not read.
        cu_active, cu_seen: `[B+1]` int64.
        norm_weight, norm_bias: `[K]`; up_weight: `[F, K]` contiguous; up_bias: `[F]`.
        precision: of fp32 products, "tf32" or "ieee"; folded is always "ieee".

    Returns:
        `[A, N]`, `[S, M]`, and folded `[2, F]` fp32. Rows beyond the last of cu_active and cu_seen
        are not written.
    """
    num_q, num_kv = len(active), len(seen)
    (n, k), m, f = query_weight.shape, len(key_value_weight), len(up_weight)
    q, kv = h.new_empty(num_q, n), h.new_empty(num_kv, m)
    folded = h.new_empty(2, f, dtype=torch.float32)
    tiles = tiles_of(max(num_q, num_kv), h.element_size())
    columns = triton.cdiv(n, tiles["BLOCK_N"]) + triton.cdiv(m, tiles["BLOCK_N"])
    blocks = triton.cdiv(max(num_q, num_kv), tiles["BLOCK_M"])
    fold = 2 * tiles["num_warps"], _FOLD_K  # 16 numbers of a thread
    wrap_triton(_query_key_value_kernel)[(blocks * columns + triton.cdiv(f, fold[0]),)](
        h, query_weight, query_bias, key_value_weight, key_value_bias, q, kv,
        active, cu_active[-1:], seen, cu_seen[-1:], up_weight, up_bias, norm_weight, norm_bias,
        folded, num_q, num_kv, n, m, f, k, h.stride(0), is_even(tiles, k, n, m), precision,
        *fold, **tiles,
    )  # fmt: skip
    return q, kv, folded
