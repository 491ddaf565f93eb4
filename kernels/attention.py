"""Attention of packed sentences with fewer queries than keys; the counts are read on the device.

A grid fits the longest sentence, and programs beyond a sentence's queries leave at once. Scores,
statistics and sums are fp32. Tiles follow from shapes alone, without autotuning: results must not
change from run to run, and the best tile depends on counts that the host never knows.

Arguments that all ops share:
    cu_q, cu_k: `[B+1]` int64 on the device, offsets of each sentence's queries and keys; either
        may have none. Rows of q beyond `cu_q[B]` are neither read nor written. B < 65,536.
    scale: factor of the scores.
    bias: `[H, 2R+1]` or None, added to the scores: entry `clamp(j - positions[i], -R, R) + R` for
        query i and the sentence's j-th key.
    positions: `[A]` int64, each query's position in its sentence; needed with a bias.
    max_length: no sentence has more queries or keys; 0: as many as there are rows.
    precision: of fp32 products, "tf32" or "ieee"; fp16 and bf16 do not look at it.

Source: Dao 2023 (arXiv 2307.08691), algorithms 1 and 2.
"""

import torch
import triton
import triton.language as tl
from tokenexit.kernels import autograd
from tokenexit.kernels.dependent import begin, begins
from torch.library import triton_op, wrap_triton

_LOG2_E = tl.constexpr(1.4426950408889634)


MOST_SENTENCES = 2**16 - 1  # the third dimension of a grid


@triton.jit
def _span(cu_ptr, b):
    """First row and number of rows of sentence b."""
    first = tl.load(cu_ptr + b)
    return first, (tl.load(cu_ptr + b + 1) - first).to(tl.int32)


@triton.jit
def _load(x_ptr, offsets, mask, start, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Columns start .. start + BLOCK_D of the rows at `offsets`; 0 beyond D and the mask."""
    cols = start + tl.arange(0, BLOCK_D)
    mask = mask[:, None] & (cols < D)[None, :]
    return tl.load(x_ptr + offsets[:, None] + cols[None, :], mask=mask, other=0.0)


@triton.jit
def _store(x_ptr, offsets, mask, start, x, D: tl.constexpr, BLOCK_D: tl.constexpr):
    cols = start + tl.arange(0, BLOCK_D)
    mask = mask[:, None] & (cols < D)[None, :]
    tl.store(x_ptr + offsets[:, None] + cols[None, :], x.to(x_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _positions(positions_ptr, rows, mask):
    """Of the queries in their sentence; whatever without a bias."""
    if positions_ptr is None:
        position = rows
    else:
        position = tl.load(positions_ptr + rows, mask=mask, other=0)
    return position.to(tl.int32)


@triton.jit
def _bias(
    SCALE: tl.constexpr, offs_k, bias_ptr, head, position, REACH, Q: tl.constexpr, K: tl.constexpr
):
    """`[Q, K]` to start products `q . k` from; offs_k and position have to broadcast to it.

    Added afterwards the bias would bring its layout along, in which softmax is slow.
    """
    start = tl.zeros((Q, K), tl.float32)
    if bias_ptr is not None:
        entry = tl.minimum(tl.maximum(offs_k - position, -REACH), REACH) + REACH
        start += tl.load(bias_ptr + head * (2 * REACH + 1) + entry).to(tl.float32) * (1 / SCALE)
    return start


@triton.jit
def _scores(product, SCALE: tl.constexpr, offs_k, num_k):
    """Scores to the base 2 of products; offs_k has to broadcast to them."""
    return tl.where(offs_k < num_k, product * (SCALE * _LOG2_E), float("-inf"))


@triton.jit
def _mix(x):
    x ^= x >> 16
    x *= 0x7FEB352D
    x ^= x >> 15
    x *= 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def _dropout(x, seed, rows, head, keys, DROP_BELOW: tl.constexpr):
    """Keep what draws at least DROP_BELOW of 32 bits; `tokenexit.reference.dropout_keep`."""
    if DROP_BELOW > 0:
        drawn = _mix(_mix(seed.to(tl.uint32) ^ rows.to(tl.uint32)) ^ head.to(tl.uint32))
        drawn = _mix(drawn ^ keys.to(tl.uint32))
        x = tl.where(drawn >= DROP_BELOW, x * (4294967296 / (4294967296 - DROP_BELOW)), 0.0)
    return x


@triton.jit
def _softmax_step(s, top, total):
    """Weights of a block of scores, and what the sums so far have to be multiplied by."""
    new_top = tl.maximum(top, tl.max(s, 1))
    base = tl.where(new_top == float("-inf"), 0.0, new_top)  # all so far may have a bias of -inf
    shrink = tl.exp2(top - base)
    p = tl.exp2(s - base[:, None])
    return p, shrink[:, None], new_top, total * shrink + tl.sum(p, 1)


@triton.jit(do_not_specialize=["seed"])
def _exit_attention_fwd_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, cu_q_ptr, cu_k_ptr, bias_ptr, positions_ptr,
    SCALE: tl.constexpr, seed, H, REACH,
    stride_qa, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh,
    DROP_BELOW: tl.constexpr, PRECISION: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    begin(DEPENDENT)
    start = tl.program_id(0) * BLOCK_Q
    head, b = tl.program_id(1).to(tl.int64), tl.program_id(2)
    first_q, num_q = _span(cu_q_ptr, b)
    if start >= num_q:
        return
    first_k, num_k = _span(cu_k_ptr, b)
    offs_q = start + tl.arange(0, BLOCK_Q)
    mask_q, rows = offs_q < num_q, first_q + offs_q
    position = _positions(positions_ptr, rows, mask_q)[:, None]
    q = _load(q_ptr + head * stride_qh, rows * stride_qa, mask_q, 0, D, BLOCK_D)
    top = tl.full((BLOCK_Q,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_Q,), tl.float32)
    acc = tl.zeros((BLOCK_Q, BLOCK_D), tl.float32)
    for j in range(0, num_k, BLOCK_K):
        offs_k = j + tl.arange(0, BLOCK_K)
        mask_k, keys = offs_k < num_k, first_k + offs_k
        k = _load(k_ptr + head * stride_kh, keys * stride_kt, mask_k, 0, D, BLOCK_D)
        v = _load(v_ptr + head * stride_vh, keys * stride_vt, mask_k, 0, D, BLOCK_D)
        s = _bias(SCALE, offs_k[None, :], bias_ptr, head, position, REACH, BLOCK_Q, BLOCK_K)
        s = tl.dot(q, tl.trans(k), s, input_precision=PRECISION)
        s = _scores(s, SCALE, offs_k[None, :], num_k)
        p, shrink, top, total = _softmax_step(s, top, total)
        p = _dropout(p, seed, rows[:, None], head, keys[None, :], DROP_BELOW)
        acc = tl.dot(p.to(v.dtype), v, acc * shrink, input_precision=PRECISION)
    acc = acc / tl.where(total > 0, total, 1.0)[:, None]  # without keys: 0
    _store(out_ptr, (rows * H + head) * D, mask_q, 0, acc, D, BLOCK_D)
    tl.store(lse_ptr + rows * H + head, top / _LOG2_E + tl.log(total), mask=mask_q)


@triton.jit
def _gradients(
    q, k, g, v, lse, delta, rows, position, offs_k, first_k, num_k, bias_ptr, head,
    SCALE: tl.constexpr, seed, REACH, DROP_BELOW: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile of the weights after dropout, and of the gradient of the scores.

    `[queries, keys]`, or with q and k, g and v exchanged `[keys, queries]`; the vectors have to
    broadcast to it.
    """
    s = _bias(SCALE, offs_k, bias_ptr, head, position, REACH, q.shape[0], k.shape[0])
    s = _scores(tl.dot(q, tl.trans(k), s, input_precision=PRECISION), SCALE, offs_k, num_k)
    p = tl.exp2(s - lse)
    dp = tl.dot(g, tl.trans(v), input_precision=PRECISION)
    keys = first_k + offs_k
    ds = p * (_dropout(dp, seed, rows, head, keys, DROP_BELOW) - delta)
    return _dropout(p, seed, rows, head, keys, DROP_BELOW), ds


@triton.jit
def _keys_gradients(
    k_ptr, v_ptr, q, g, lse, delta, rows, position, offs_k, first_k, num_k, bias_ptr, head,
    SCALE: tl.constexpr, seed, REACH, stride_kt, stride_kh, stride_vt, stride_vh,
    DROP_BELOW: tl.constexpr, PRECISION: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """A block of keys, and the gradient of its scores: `[queries, keys]`."""
    mask_k, keys = offs_k < num_k, first_k + offs_k
    k = _load(k_ptr + head * stride_kh, keys * stride_kt, mask_k, 0, D, BLOCK_D)
    v = _load(v_ptr + head * stride_vh, keys * stride_vt, mask_k, 0, D, BLOCK_D)
    _, ds = _gradients(
        q, k, g, v, lse[:, None], delta[:, None], rows[:, None], position[:, None],
        offs_k[None, :], first_k, num_k, bias_ptr, head, SCALE, seed, REACH, DROP_BELOW, PRECISION,
    )  # fmt: skip
    return k, ds


@triton.jit(do_not_specialize=["seed"])
def _exit_attention_dq_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, grad_ptr, delta_ptr, dq_ptr, dbias_ptr,
    cu_q_ptr, cu_k_ptr, bias_ptr, positions_ptr, SCALE: tl.constexpr, seed, H, REACH,
    stride_qa, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh,
    DROP_BELOW: tl.constexpr, PRECISION: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Also this block's part of dbias; and delta, the sum of out * grad, for the other kernel."""
    start = tl.program_id(0) * BLOCK_Q
    head, b = tl.program_id(1).to(tl.int64), tl.program_id(2)
    first_q, num_q = _span(cu_q_ptr, b)
    if start >= num_q:
        return
    first_k, num_k = _span(cu_k_ptr, b)
    offs_q = start + tl.arange(0, BLOCK_Q)
    mask_q, rows = offs_q < num_q, first_q + offs_q
    position = _positions(positions_ptr, rows, mask_q)
    q = _load(q_ptr + head * stride_qh, rows * stride_qa, mask_q, 0, D, BLOCK_D)
    g = _load(grad_ptr, (rows * H + head) * D, mask_q, 0, D, BLOCK_D)
    out = _load(out_ptr, (rows * H + head) * D, mask_q, 0, D, BLOCK_D)
    lse = tl.load(lse_ptr + rows * H + head, mask=mask_q, other=float("inf")) * _LOG2_E
    delta = tl.sum(out.to(tl.float32) * g.to(tl.float32), 1)
    tl.store(delta_ptr + rows * H + head, delta, mask=mask_q)
    acc = tl.zeros((BLOCK_Q, BLOCK_D), tl.float32)
    for j in range(0, num_k, BLOCK_K):
        k, ds = _keys_gradients(
            k_ptr, v_ptr, q, g, lse, delta, rows, position, j + tl.arange(0, BLOCK_K), first_k,
            num_k, bias_ptr, head, SCALE, seed, REACH, stride_kt, stride_kh, stride_vt, stride_vh,
            DROP_BELOW, PRECISION, D, BLOCK_D,
        )  # fmt: skip
        acc = tl.dot(ds.to(k.dtype), k, acc, input_precision=PRECISION)
    _store(dq_ptr, (rows * H + head) * D, mask_q, 0, acc * SCALE, D, BLOCK_D)
    if dbias_ptr is not None:
        last = 2 * REACH
        low = tl.min(tl.where(mask_q, position, num_k), 0)
        high = tl.max(tl.where(mask_q, position, 0), 0)
        dbias_ptr += ((tl.program_id(0) * tl.num_programs(2) + b) * H + head) * (last + 1)
        for c in range(0, last + 1, BLOCK_K):
            # Each entry sums a diagonal; the first and the last all that is farther away, too.
            entry = c + tl.arange(0, BLOCK_K)
            begin = tl.where(c == 0, 0, tl.maximum(low + c - REACH, 0))
            end = tl.minimum(high + c - REACH + BLOCK_K, num_k)
            end = tl.where(c + BLOCK_K > last, num_k, end)
            part = tl.zeros((BLOCK_K,), tl.float32)
            for j in range(begin, end, BLOCK_K):
                offs_k = j + tl.arange(0, BLOCK_K)
                _, ds = _keys_gradients(
                    k_ptr, v_ptr, q, g, lse, delta, rows, position, offs_k, first_k, num_k,
                    bias_ptr, head, SCALE, seed, REACH, stride_kt, stride_kh, stride_vt, stride_vh,
                    DROP_BELOW, PRECISION, D, BLOCK_D,
                )  # fmt: skip
                at = position[:, None] + (entry - REACH - j)[None, :]
                found = tl.gather(ds, tl.minimum(tl.maximum(at, 0), BLOCK_K - 1), 1)
                inner = (at >= 0) & (at < BLOCK_K) & ((entry > 0) & (entry < last))[None, :]
                away = offs_k[None, :] - position[:, None]
                left = away <= -REACH
                right = (away >= REACH) & ~left
                left = tl.sum(tl.sum(tl.where(left, ds, 0.0), 1), 0)
                right = tl.sum(tl.sum(tl.where(right, ds, 0.0), 1), 0)
                part += tl.sum(tl.where(inner, found, 0.0), 0)
                part += tl.where(entry == 0, left, 0.0) + tl.where(entry == last, right, 0.0)
            tl.store(dbias_ptr + entry, part, mask=entry <= last)


@triton.jit(do_not_specialize=["seed"])
def _exit_attention_dkdv_kernel(
    q_ptr, k_ptr, v_ptr, lse_ptr, grad_ptr, delta_ptr, dk_ptr, dv_ptr,
    cu_q_ptr, cu_k_ptr, bias_ptr, positions_ptr, SCALE: tl.constexpr, seed, H, REACH,
    stride_qa, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh,
    DROP_BELOW: tl.constexpr, PRECISION: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    start = tl.program_id(0) * BLOCK_K
    head, b = tl.program_id(1).to(tl.int64), tl.program_id(2)
    first_k, num_k = _span(cu_k_ptr, b)
    if start >= num_k:
        return
    first_q, num_q = _span(cu_q_ptr, b)
    offs_k = start + tl.arange(0, BLOCK_K)
    mask_k, keys = offs_k < num_k, first_k + offs_k
    k = _load(k_ptr + head * stride_kh, keys * stride_kt, mask_k, 0, D, BLOCK_D)
    v = _load(v_ptr + head * stride_vh, keys * stride_vt, mask_k, 0, D, BLOCK_D)
    dk = tl.zeros((BLOCK_K, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK_K, BLOCK_D), tl.float32)
    for i in range(0, num_q, BLOCK_Q):
        offs_q = i + tl.arange(0, BLOCK_Q)
        mask_q, rows = offs_q < num_q, first_q + offs_q
        q = _load(q_ptr + head * stride_qh, rows * stride_qa, mask_q, 0, D, BLOCK_D)
        g = _load(grad_ptr, (rows * H + head) * D, mask_q, 0, D, BLOCK_D)
        # Weights of rows beyond the last come out 0.
        lse = tl.load(lse_ptr + rows * H + head, mask=mask_q, other=float("inf")) * _LOG2_E
        delta = tl.load(delta_ptr + rows * H + head, mask=mask_q, other=0.0)
        position = _positions(positions_ptr, rows, mask_q)
        p, ds = _gradients(
            k, q, v, g, lse[None, :], delta[None, :], rows[None, :], position[None, :],
            offs_k[:, None], first_k, num_k, bias_ptr, head, SCALE, seed, REACH,
            DROP_BELOW, PRECISION,
        )  # fmt: skip
        dv = tl.dot(p.to(g.dtype), g, dv, input_precision=PRECISION)
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
    _store(dk_ptr, (keys * H + head) * D, mask_k, 0, dk * SCALE, D, BLOCK_D)
    _store(dv_ptr, (keys * H + head) * D, mask_k, 0, dv, D, BLOCK_D)


@triton.jit
def _absorbed_attention_kernel(
    q_ptr, h_ptr, out_ptr, cu_q_ptr, cu_k_ptr, bias_ptr, positions_ptr,
    SCALE: tl.constexpr, H, REACH, stride_qa, stride_qh, stride_ht,
    PRECISION: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """A row is a pair of a query and a head, as all heads share their keys."""
    start, b = tl.program_id(0) * BLOCK_R, tl.program_id(1)
    first_q, num_q = _span(cu_q_ptr, b)
    if start >= num_q * H:
        return
    first_k, num_k = _span(cu_k_ptr, b)
    offs_r = start + tl.arange(0, BLOCK_R)
    mask_r, rows, head = offs_r < num_q * H, first_q + offs_r // H, offs_r % H
    position = _positions(positions_ptr, rows, mask_r)[:, None]
    q_at = rows * stride_qa + head.to(tl.int64) * stride_qh
    top = tl.full((BLOCK_R,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_R,), tl.float32)
    accs = ()  # columns in chunks of a power of two, which D need not be
    for _ in tl.static_range(CHUNKS):
        accs += (tl.zeros((BLOCK_R, BLOCK_D), tl.float32),)
    for j in range(0, num_k, BLOCK_K):
        offs_k = j + tl.arange(0, BLOCK_K)
        mask_k, h_at = offs_k < num_k, (first_k + offs_k) * stride_ht
        cols = offs_k[None, :]
        s = _bias(SCALE, cols, bias_ptr, head[:, None], position, REACH, BLOCK_R, BLOCK_K)
        hs, new_accs = (), ()
        for c in tl.static_range(CHUNKS):
            q = _load(q_ptr, q_at, mask_r, c * BLOCK_D, D, BLOCK_D)
            hs += (_load(h_ptr, h_at, mask_k, c * BLOCK_D, D, BLOCK_D),)
            s = tl.dot(q, tl.trans(hs[c]), s, input_precision=PRECISION)
        s = _scores(s, SCALE, cols, num_k)
        p, shrink, top, total = _softmax_step(s, top, total)
        p = p.to(h_ptr.dtype.element_ty)
        for c in tl.static_range(CHUNKS):
            new_accs += (tl.dot(p, hs[c], accs[c] * shrink, input_precision=PRECISION),)
        accs = new_accs
    total = tl.where(total > 0, total, 1.0)[:, None]
    out_at = (rows * H + head) * D
    for c in tl.static_range(CHUNKS):
        _store(out_ptr, out_at, mask_r, c * BLOCK_D, accs[c] / total, D, BLOCK_D)


def _dense(x):
    return x if x.stride(-1) == 1 else x.contiguous()


def _table(bias, positions):
    if bias is None:
        return None, None, 0
    return bias.contiguous(), positions.contiguous(), bias.shape[1] // 2


def _call(q, k, v, cu_q, cu_k, scale, bias, positions, dropout_p, seed, max_length, precision):
    """What launches share: arguments by position and by name, the grid, a block and half of it."""
    (num_q, heads, d), num_k = q.shape, k.shape[0]  # len() would fix the size of a traced graph
    longest = max_length or max(num_q, num_k)
    block_d = max(16, triton.next_power_of_2(d))
    # 64 rows fill the products of sm_90 and sm_100; 16 are the least that there may be. Registers
    # suffice for blocks of half as many to be looped over, where more than the plain op is asked.
    block = max(16, min(64, 8192 // (block_d * q.element_size())))
    block = min(block, 16 if longest <= 16 else 32 if longest <= 32 else 64)
    bias, positions, reach = _table(bias, positions)
    strides = (*q.stride()[:2], *k.stride()[:2], *v.stride()[:2])
    offsets = cu_q.contiguous(), cu_k.contiguous()
    shared = (*offsets, bias, positions, scale, seed, heads, reach, *strides)
    named = dict(
        DROP_BELOW=int(dropout_p * 2**32), PRECISION=precision, D=d, BLOCK_D=block_d,
        num_warps=4, num_stages=2,
    )  # fmt: skip
    grid = (triton.cdiv(longest, block), heads, cu_q.shape[0] - 1)
    if grid[2] > MOST_SENTENCES:
        raise ValueError(f"got {grid[2]} sentences; expected at most {MOST_SENTENCES}")
    return shared, named, grid, block, max(16, block // 2)


@triton_op("tokenexit_triton::exit_attention", mutates_args={})
def exit_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_q: torch.Tensor, cu_k: torch.Tensor,
    scale: float, bias: torch.Tensor | None = None, positions: torch.Tensor | None = None,
    dropout_p: float = 0.0, seed: int = 0, max_length: int = 0, precision: str = "tf32",
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Sentence by sentence and head by head, `softmax(q @ k.T * scale + bias) @ v`.

    Differentiable in q, k, v and bias.

    Args:
        q: `[A, H, D]` fp16, bf16 or fp32; k, v: `[K, H, D]`. May be views with gaps.
        dropout_p, seed: probability that a weight is zeroed, and what its draws depend on.
        For the others see the top of this file.

    Returns:
        `[A, H, D]`, 0 for a query without keys; and `[A, H]` fp32, the logarithm of the sum of
        its scores' exponentials.
    """
    q, k, v = _dense(q), _dense(k), _dense(v)
    out, lse = q.new_empty(q.shape), q.new_empty(q.shape[:2], dtype=torch.float32)
    shared, named, grid, block, half = _call(
        q, k, v, cu_q, cu_k, scale, bias, positions, dropout_p, seed, max_length, precision
    )
    if out.numel() and grid[2]:
        wrap_triton(_exit_attention_fwd_kernel)[grid](
            q, k, v, out, lse, *shared, **named | dict(num_stages=3) | begins(q),
            BLOCK_Q=block, BLOCK_K=half if dropout_p or bias is not None else block,
        )  # fmt: skip
    return out, lse


@triton_op("tokenexit_triton::exit_attention_backward", mutates_args={})
def exit_attention_backward(
    grad: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor,
    lse: torch.Tensor, cu_q: torch.Tensor, cu_k: torch.Tensor, scale: float,
    bias: torch.Tensor | None = None, positions: torch.Tensor | None = None,
    dropout_p: float = 0.0, seed: int = 0, max_length: int = 0, precision: str = "tf32",
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """Gradients of `exit_attention`; without atomics, so the same bits in each run.

    Args:
        grad: `[A, H, D]`; out, lse: what `exit_attention` returned. For the others see there.

    Returns:
        Of q, k and v, contiguous; of the bias `[H, 2R+1]` fp32, empty without one. Keys of a
        sentence without queries get 0; rows of no sentence are not written.
    """
    q, k, v, grad = _dense(q), _dense(k), _dense(v), grad.contiguous()
    shared, named, grid, block, half = _call(
        q, k, v, cu_q, cu_k, scale, bias, positions, dropout_p, seed, max_length, precision
    )
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    # By the compile report, what spills on no GPU; not timed.
    narrow = named["BLOCK_D"] <= 32
    fit_q = dict(num_warps=8, num_stages=2) if narrow else dict(num_warps=4, num_stages=1)
    fit_k = dict(num_warps=8, num_stages=1)
    delta, dbias = torch.empty_like(lse), None
    if bias is not None:
        dbias = lse.new_zeros(grid[0], grid[2], *bias.shape)
    if k.shape[1:].numel() and grid[0] and grid[2]:
        wrap_triton(_exit_attention_dq_kernel)[grid](
            q, k, v, out, lse, grad, delta, dq, dbias, *shared, **(named | fit_q),
            BLOCK_Q=block, BLOCK_K=half,
        )  # fmt: skip
        wrap_triton(_exit_attention_dkdv_kernel)[grid](
            q, k, v, lse, grad, delta, dk, dv, *shared, **(named | fit_k),
            BLOCK_Q=half, BLOCK_K=block,
        )  # fmt: skip
    return dq, dk, dv, lse.new_empty(0, 0) if dbias is None else dbias.sum((0, 1))


_backward, _setup = autograd.of_exit_attention(exit_attention_backward)
exit_attention.register_autograd(_backward, setup_context=_setup)


# Of a row of states: tokenexit.ops leaves wider ones to PyTorch, for want of shared memory.
ABSORBED_BYTES = 2048


@triton_op("tokenexit_triton::absorbed_attention", mutates_args={})
def absorbed_attention(
    q: torch.Tensor, h: torch.Tensor, cu_q: torch.Tensor, cu_k: torch.Tensor, scale: float,
    bias: torch.Tensor | None = None, positions: torch.Tensor | None = None,
    max_length: int = 0, precision: str = "tf32",
) -> torch.Tensor:  # fmt: skip
    """`exit_attention` whose keys and values are the hidden states, shared by the heads.

    For inference: no gradient.

    Args:
        q: `[A, H, d]` fp16, bf16 or fp32, queries carried into the hidden space; may be a view.
        h: `[K, d]` hidden states.
        For the others see the top of this file.

    Returns:
        `[A, H, d]`, 0 for a query without keys.
    """
    q, h = _dense(q), _dense(h)
    (num_q, heads, d), num_k = q.shape, h.shape[0]
    out, (bias, positions, reach) = q.new_empty(q.shape), _table(bias, positions)
    cu_q, cu_k = cu_q.contiguous(), cu_k.contiguous()
    # A block of rows of q and one of h have to fit the shared memory, whole: 99 KiB on most GPUs,
    # and the registers of AMD's.
    size = d * q.element_size()
    half = q.element_size() == 2
    block_r = 32 if half and size <= 2048 else 16
    block_k = 32 if half and size <= 1536 and not torch.version.hip else 16
    grid = (triton.cdiv((max_length or max(num_q, num_k)) * heads, block_r), cu_q.shape[0] - 1)
    block_d = max(16, triton.next_power_of_2(triton.cdiv(d, triton.cdiv(d, 256))))
    if out.numel() and grid[1]:
        wrap_triton(_absorbed_attention_kernel)[grid](
            q, h, out, cu_q, cu_k, bias, positions, scale, heads, reach, *q.stride()[:2],
            h.stride(0), PRECISION=precision, D=d, BLOCK_D=block_d, BLOCK_R=block_r,
            BLOCK_K=block_k, CHUNKS=triton.cdiv(d, block_d),
            num_warps=8, num_stages=2,
        )  # fmt: skip
    return out
