"""Which words leave at a layer: uncertainties of rows, then decisions of sentences.

A word stays if a word that is not sure lies within its window, so no sliding maximum is needed and
any window will do. Words see each other's uncertainties but never each other's exits, so those of a
sentence are decided in any order.
"""

import torch
import triton
import triton.language as tl
from tokenexit.kernels.dependent import begin, begins
from tokenexit.kernels.linear import load_row, load_stats, mean_rstd, stats_block
from torch import Tensor
from torch.library import custom_op, triton_op, wrap_triton

_WORDS = 32  # of a sentence, decided at a time
_ROWS = 16  # of a program, the least that tensor cores take
_BYTES, _MOST_BYTES = 512, 32768  # at a time, of a row; and of as much of all rows of a head


@triton.jit
def _uncertainty(x, mask_c, C: tl.constexpr, MAX_PROB: tl.constexpr):
    """Of rows of logits in fp32 or fp64; NaN if a row holds one."""
    top = tl.max(tl.where(mask_c[None, :], x, float("-inf")), 1)
    below = x - top[:, None]
    e = tl.where(mask_c[None, :], tl.exp(below), 0.0)
    total = tl.sum(e, 1)
    if C == 1:
        u = total - 1
    elif MAX_PROB:
        u = (1 - 1 / total) * (C / (C - 1))
    else:
        # 0 * -inf, a label that is ruled out, adds nothing.
        weighted = tl.sum(tl.where(e > 0, e * below, 0.0), 1)
        log_c = tl.log(tl.full((1,), C, x.dtype))
        u = (tl.log(total) - weighted / total) / log_c
    u = tl.where(u < 0, 0.0, u)
    return tl.where(u > 1, 1.0, u)


@triton.jit
def _asked(b, cu_words_ptr, window_ptr, threshold_ptr, min_active_ptr):
    """Of sentence b: its first word, how many it has, window, threshold, least words to go on."""
    first = tl.load(cu_words_ptr + b)
    num_words = tl.load(cu_words_ptr + b + 1) - first
    least = num_words * 0
    if min_active_ptr is not None:
        least = tl.minimum(tl.load(min_active_ptr + b), num_words)
    # The window may be huge: not to be added to anything before.
    window = tl.minimum(tl.load(window_ptr + b), num_words)
    return first, num_words, window, tl.load(threshold_ptr + b), least


@triton.jit
def _decide(
    u_ptr, exit_in_ptr, exit_out_ptr, first, num_words, k, limit, least, layer,
    BLOCK_W: tl.constexpr,
):  # fmt: skip
    """The exits of a sentence; exit_in and exit_out may be the same."""
    staying = 0
    for w in range(0, num_words, BLOCK_W):
        offs_w = w + tl.arange(0, BLOCK_W)
        mask_w = offs_w < num_words
        blocked = tl.zeros((BLOCK_W,), tl.int32)
        for v in range(tl.maximum(w - k, 0), tl.minimum(w + BLOCK_W + k, num_words), BLOCK_W):
            offs_v = v + tl.arange(0, BLOCK_W)
            u = tl.load(u_ptr + first + offs_v, mask=offs_v < num_words, other=float("-inf"))
            near = tl.abs(offs_v[None, :] - offs_w[:, None]) <= k
            unsure = near & ~(u < limit)[None, :]  # NaN is not sure
            blocked = tl.maximum(blocked, tl.max(unsure.to(tl.int32), 1))
        left = tl.load(exit_in_ptr + first + offs_w, mask=mask_w, other=1)
        blocked = tl.where(limit == float("inf"), 0, blocked)
        left = tl.where((left == 0) & (blocked == 0), layer, left)
        tl.store(exit_out_ptr + first + offs_w, left, mask=mask_w)
        staying += tl.sum((left == 0).to(tl.int32), 0)
    if staying < least:  # only once some have left: it is no more than all
        for w in range(0, num_words, BLOCK_W):
            offs_w = w + tl.arange(0, BLOCK_W)
            mask_w = offs_w < num_words
            left = tl.load(exit_in_ptr + first + offs_w, mask=mask_w, other=1)
            left = tl.where(left == 0, layer, left)
            tl.store(exit_out_ptr + first + offs_w, left, mask=mask_w)


@triton.jit
def _uncertainty_kernel(
    logits_ptr, words_ptr, u_ptr, count_ptr, num_rows, stride_lr,
    C: tl.constexpr, MAX_PROB: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    count = num_rows
    if count_ptr is not None:
        count = tl.minimum(tl.load(count_ptr), num_rows)
    start = tl.program_id(0).to(tl.int64) * BLOCK_R
    if start >= count:
        return
    rows = start + tl.arange(0, BLOCK_R)
    words = tl.load(words_ptr + rows, mask=rows < count, other=-1)
    asked = words >= 0
    offs_c = tl.arange(0, BLOCK_C)
    mask_c = offs_c < C
    at = logits_ptr + rows[:, None] * stride_lr + offs_c[None, :]
    x = tl.load(at, mask=asked[:, None] & mask_c[None, :], other=0.0)
    u = _uncertainty(x.to(u_ptr.dtype.element_ty), mask_c, C, MAX_PROB)
    tl.store(u_ptr + words, u, mask=asked)


@triton.jit(do_not_specialize=["layer"])
def _exit_decision_kernel(
    u_ptr, exit_in_ptr, exit_out_ptr, cu_words_ptr, window_ptr, threshold_ptr, min_active_ptr,
    layer, BLOCK_W: tl.constexpr,
):  # fmt: skip
    first, num_words, window, limit, least = _asked(
        tl.program_id(0), cu_words_ptr, window_ptr, threshold_ptr, min_active_ptr
    )
    _decide(
        u_ptr, exit_in_ptr, exit_out_ptr, first, num_words, window, limit, least, layer, BLOCK_W
    )


@triton.jit
def _hear(
    b, first, last, active_ptr, cu_tokens_ptr, word_at_ptr, said_ptr, logits_ptr, u_ptr,
    C: tl.constexpr, MAX_PROB: tl.constexpr, DECIDE: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Logits, and uncertainties, of a sentence's active tokens: what they said of themselves and
    what those beside them told last."""
    begins_at = tl.load(cu_tokens_ptr + b)
    ends_at = tl.load(cu_tokens_ptr + b + 1)
    offs_c = tl.arange(0, BLOCK_C)
    mask_c = offs_c < C
    for start in range(first, last, BLOCK_R):
        rows = start + tl.arange(0, BLOCK_R)
        mask_r = rows < last
        tokens = tl.load(active_ptr + rows, mask=mask_r, other=0)
        mask = mask_r[:, None] & mask_c[None, :]
        at = said_ptr + tokens[:, None] * (3 * C) + offs_c[None, :]
        # From the row before, its second part; from the row after, its third.
        has_last, has_next = tokens > begins_at, tokens + 1 < ends_at
        own = tl.load(at, mask=mask, other=0.0).to(tl.float32)
        before = tl.load(at - 2 * C, mask=mask & has_last[:, None], other=0.0).to(tl.float32)
        after = tl.load(at + 5 * C, mask=mask & has_next[:, None], other=0.0).to(tl.float32)
        heard = (own + before + after).to(logits_ptr.dtype.element_ty)
        tl.store(logits_ptr + tokens[:, None] * C + offs_c[None, :], heard, mask=mask)
        if DECIDE:
            words = tl.load(word_at_ptr + tokens, mask=mask_r, other=-1)
            u = _uncertainty(heard.to(tl.float32), mask_c, C, MAX_PROB)
            tl.store(u_ptr + words, u, mask=words >= 0)


@triton.jit(do_not_specialize=["layer"])
def _exit_step_kernel(
    x_ptr, stats_ptr, norm_weight_ptr, norm_bias_ptr, head_weight_ptr, head_bias_ptr,
    active_ptr, cu_active_ptr, word_at_ptr, h_ptr, logits_ptr, token_layer_ptr, u_ptr, exit_ptr,
    cu_words_ptr, window_ptr, threshold_ptr, min_active_ptr, arrived_ptr, said_ptr, cu_tokens_ptr,
    D, stride_xr, stride_ht, num_stats, layer, EPS: tl.constexpr,
    C: tl.constexpr, MAX_PROB: tl.constexpr, ANSWER: tl.constexpr, DECIDE: tl.constexpr,
    BLOCK_S: tl.constexpr, S: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_O: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_W: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    HEARS: tl.constexpr = said_ptr is not None
    OUTPUTS: tl.constexpr = 3 * C if HEARS else C  # of the head
    begin(DEPENDENT)
    b = tl.program_id(0)
    first = tl.load(cu_active_ptr + b)
    last = tl.load(cu_active_ptr + b + 1)
    start = first + tl.program_id(1) * BLOCK_R
    if start >= last:
        return
    rows = start + tl.arange(0, BLOCK_R)
    mask_r = rows < last
    tokens = tl.load(active_ptr + rows, mask=mask_r, other=0)
    offs_o = tl.arange(0, BLOCK_O)
    mask_o = offs_o < OUTPUTS
    # Asked for before they are needed.
    if DECIDE:
        words = tl.load(word_at_ptr + tokens, mask=mask_r, other=-1)
        first_word, num_words, window, limit, least = _asked(
            b, cu_words_ptr, window_ptr, threshold_ptr, min_active_ptr
        )
    sums, squares = load_stats(stats_ptr, rows, mask_r, num_stats, S, 1)
    mean, rstd = mean_rstd(sums, squares, D, num_stats, EPS, BLOCK_S, S, 1)
    said = tl.zeros((BLOCK_R, BLOCK_O), tl.float32)
    for d in range(0, D, BLOCK_D):
        offs_d = d + tl.arange(0, BLOCK_D)
        mask_d = offs_d < D
        mask = mask_r[:, None] & mask_d[None, :]
        x = tl.load(x_ptr + rows[:, None] * stride_xr + offs_d[None, :], mask=mask, other=0.0)
        h = (x.to(tl.float32) - mean[:, None]) * rstd[:, None]
        h = h * load_row(norm_weight_ptr, offs_d, mask_d) + load_row(norm_bias_ptr, offs_d, mask_d)
        h = h.to(x.dtype)
        tl.store(h_ptr + tokens[:, None] * stride_ht + offs_d[None, :], h, mask=mask)
        if ANSWER:
            w_at = head_weight_ptr + offs_o[None, :] * D + offs_d[:, None]
            w = tl.load(w_at, mask=mask_o[None, :] & mask_d[:, None], other=0.0)
            said = tl.dot(h, w, said, input_precision="ieee")
    if ANSWER:
        said += tl.load(head_bias_ptr + offs_o, mask=mask_o, other=0.0).to(tl.float32)[None, :]
        rounded = said.to(logits_ptr.dtype.element_ty)
        to = (said_ptr if HEARS else logits_ptr) + tokens[:, None] * OUTPUTS + offs_o[None, :]
        tl.store(to, rounded, mask=mask_r[:, None] & mask_o[None, :])
        tl.store(token_layer_ptr + tokens, tl.full((BLOCK_R,), layer, tl.int64), mask=mask_r)
        if DECIDE and not HEARS:
            u = _uncertainty(rounded.to(tl.float32), mask_o, C, MAX_PROB)
            tl.store(u_ptr + words, u, mask=words >= 0)
        if DECIDE or HEARS:
            # The sentence's last program does what hangs on all its tokens. All that a program
            # says is stored before it arrives; the atomic's release and acquire make the others'
            # visible to it.
            tl.debug_barrier()
            arrived = tl.atomic_add(arrived_ptr + b, 1, sem="acq_rel", scope="gpu")
            tl.debug_barrier()
            if arrived == tl.cdiv(last - first, BLOCK_R) - 1:
                tl.store(arrived_ptr + b, 0)
                if HEARS:
                    _hear(
                        b, first, last, active_ptr, cu_tokens_ptr, word_at_ptr, said_ptr,
                        logits_ptr, u_ptr, C, MAX_PROB, DECIDE, BLOCK_R, BLOCK_C,
                    )  # fmt: skip
                    tl.debug_barrier()
                if DECIDE:
                    _decide(
                        u_ptr, exit_ptr, exit_ptr, first_word, num_words, window, limit, least,
                        layer, BLOCK_W,
                    )  # fmt: skip


@triton_op("tokenexit_triton::exit_decision", mutates_args={})
def exit_decision(
    logits: Tensor, words: Tensor, uncertainty: Tensor, exit_layer: Tensor, cu_words: Tensor,
    window: Tensor, threshold: Tensor, layer: int, max_prob: bool = False,
    min_active: Tensor | None = None, count: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`tokenexit.ops.exit_decision`, with two more arguments.

    Args:
        min_active: `[B]` int64 or None; a sentence some of whose words have left, with fewer than
            this many still active after the decisions, is finished: they leave too.
        count: one int64 on the device, or None for all; later rows are not read.

    Returns:
        The new uncertainty `[W]` and the new exit_layer `[W]`.
    """
    num_rows, labels = logits.shape
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    words, exit_layer, cu_words = words.contiguous(), exit_layer.contiguous(), cu_words.contiguous()
    window, threshold = window.contiguous(), threshold.contiguous()
    min_active = None if min_active is None else min_active.contiguous()
    u, left = uncertainty.clone(memory_format=torch.contiguous_format), torch.empty_like(exit_layer)
    if num_rows:
        block_c = triton.next_power_of_2(labels)
        block_r = max(1, 1024 // block_c)
        wrap_triton(_uncertainty_kernel)[(triton.cdiv(num_rows, block_r),)](
            logits, words, u, count, num_rows, logits.stride(0), labels, max_prob, block_r, block_c
        )
    if len(window):
        wrap_triton(_exit_decision_kernel)[(len(window),)](
            u, exit_layer, left, cu_words, window, threshold, min_active, layer, _WORDS
        )
    return u, left


@custom_op(
    "tokenexit_triton::exit_step_",
    mutates_args={"h", "logits", "token_layer", "uncertainty", "exit_layer", "arrived", "said"},
)
def exit_step_(
    x: Tensor, norm_stats: Tensor, norm_weight: Tensor, norm_bias: Tensor, eps: float,
    head_weight: Tensor, head_bias: Tensor, active: Tensor, cu_active: Tensor, word_at: Tensor,
    h: Tensor, logits: Tensor, token_layer: Tensor, uncertainty: Tensor, exit_layer: Tensor,
    cu_words: Tensor, window: Tensor, threshold: Tensor, min_active: Tensor | None, arrived: Tensor,
    layer: int, max_length: int, max_prob: bool = False, decide: bool = True, answer: bool = True,
    said: Tensor | None = None, cu_tokens: Tensor | None = None,
) -> None:  # fmt: skip
    """A layer's end in one launch: LayerNorm, store, head and decision (post_norm, frozen).

    With `mine = active[: cu_active[B]]`::

        h[mine] = layer_norm(x[: len(mine)])
        logits[mine] = F.linear(h[mine], head_weight, head_bias)
        token_layer[mine] = layer
        uncertainty, exit_layer = exit_decision(logits[mine], word_at[mine], ...)  # if decide

    Of a head that tells neighbours, in place of the second line::

        said[mine] = F.linear(h[mine], head_weight, head_bias)
        logits[mine] = reference.heard(said[mine, :C], said[:, C:], mine, ...)

    Args:
        x, norm_stats: `[A, d]` and its stats, of `tokenexit.kernels.linear.linear`.
        norm_weight, norm_bias, eps: the LayerNorm.
        head_weight, head_bias: `[C, d]` contiguous and `[C]`, or `[3C, d]` and `[3C]`; at most 256
            rows. fp32 products are not rounded to tf32 here: decisions hang on them.
        active, cu_active: `[A]` and `[B+1]` int64.
        word_at: `[T]` int64, the word whose first token it is, or -1.
        h: `[T, d]`, the stored states; logits: `[T, C]` contiguous; token_layer: `[T]` int64.
        uncertainty, exit_layer, cu_words, window, threshold, min_active, layer, max_prob: see
            `exit_decision`; uncertainty and threshold are fp32.
        arrived: `[B]` int32, zeros; and zeros again afterwards.
        max_length: no sentence has more tokens.
        decide: False if exits are given, or nobody asks.
        answer: False if no token can leave here: logits, token_layer and said stay as they are.
        said: `[T, 3C]` contiguous in the dtype of logits, for heads that tell neighbours. None: of
            others.
        cu_tokens: `[B+1]` int64, with `said`.

    Raises:
        ValueError: more than 256 outputs of a head, or not as many as there have to be; norm_stats
            of another shape.
    """
    outputs, d = head_weight.shape
    labels, num_stats = logits.shape[1], norm_stats.shape[1]
    if outputs > 256:
        raise ValueError(f"got {outputs} outputs of a head; expected at most 256")
    if outputs != (labels if said is None else 3 * labels):
        raise ValueError(f"got {outputs} outputs of a head for {labels} labels; expected as many, "
                         "or with `said` three times as many")  # fmt: skip
    if norm_stats.shape != (len(x), num_stats, 2):
        raise ValueError(f"got norm_stats {tuple(norm_stats.shape)}; expected [A, blocks, 2]")
    size, block_o = x.element_size(), max(16, triton.next_power_of_2(outputs))
    if len(window) and max_length:
        _exit_step_kernel[(len(window), triton.cdiv(max_length, _ROWS))](
            x, norm_stats, norm_weight, norm_bias, head_weight, head_bias,
            active, cu_active, word_at, h, logits, token_layer, uncertainty, exit_layer,
            cu_words, window, threshold, min_active, arrived, said, cu_tokens,
            d, x.stride(0), h.stride(0), num_stats, layer, eps, labels, max_prob, answer, decide,
            stats_block(norm_stats, d), triton.next_power_of_2(num_stats),
            _ROWS, min(_BYTES, _MOST_BYTES // block_o) // size, block_o,
            triton.next_power_of_2(labels), _WORDS,
            num_stages=2, **begins(x),
        )  # fmt: skip
