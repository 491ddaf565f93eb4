"""The truth: every op and the whole exit forward, in plain PyTorch.

Nothing here is made to be fast. Every backend is held against these functions; they work in
any float dtype, fp64 included, and autograd goes through them.

Notation. B sentences, T tokens and W words are packed one after another without padding;
`cu_tokens [B+1]` and `cu_words [B+1]` are their offsets. A: active tokens, K: tokens that are
keys, H heads, D head dim, C labels, L layers (numbered 1..L).

Source: Li et al. 2021 (arXiv 2105.13878), sections 3.2 to 3.4.
"""

import math

import torch
import torch.nn.functional as F

__all__ = [
    "absorbed_attention",
    "compact_active",
    "disentangled_attention",
    "dropout_keep",
    "exit_attention",
    "exit_decision",
    "exit_forward",
    "exit_step",
    "heard",
    "layer_sum",
    "linear",
    "norm_first_sum",
    "pack_static",
    "pack_tokens",
    "query_key_value",
    "relative_bias",
    "rotated",
    "too_few",
    "uncertainty",
    "window_max",
    "words_of",
]


def pack_tokens(mask, word_ids):
    """The layout of a padded batch, see `tokenexit.ops.pack_tokens`."""
    slots = mask.flatten().nonzero().squeeze(1)
    lengths = mask.sum(1)
    cu_tokens = F.pad(lengths.cumsum(0), (1, 0))
    sentence = torch.arange(len(lengths), device=mask.device).repeat_interleave(lengths)
    positions = torch.arange(len(slots), device=mask.device) - cu_tokens[sentence]
    of_token, at, cu_words = words_of(word_ids.flatten()[slots], sentence, positions, lengths)
    return (
        torch.stack([slots, positions, sentence, of_token, at]),
        torch.stack([cu_tokens, cu_words]),
        (at >= 0).nonzero().squeeze(1),
    )


def pack_static(real, word_ids):
    """As `pack_tokens`, in shapes that hang on no value: room for B * N tokens and words.

    What it has in excess are tokens of slot 0 and of no word, in a last, empty sentence B.

    Args:
        real: `[B, N]` bool, true at real tokens; word_ids: `[B, N]` int64.

    Returns:
        What `pack_tokens` gives; and `[B, N]` int64, the packed index of each real token, else
        their number.
    """
    num_sentences, longest = real.shape
    each, mask = torch.arange(real.numel(), device=real.device), real.flatten()
    place = torch.where(mask, mask.cumsum(0) - 1, mask.sum())
    slots = _inverse(place, mask)
    lengths = F.pad(real.sum(1), (0, 1))
    cu_tokens = F.pad(lengths.cumsum(0), (1, 0))
    excess = each >= cu_tokens[-1]
    sentence = (slots // longest).masked_fill(excess, num_sentences)
    positions = (each - cu_tokens[sentence]).masked_fill(excess, 1)  # not the first of a sentence
    ids = word_ids.flatten()[slots].masked_fill(excess, -1)
    of_token, at, cu_words = words_of(ids, sentence, positions, lengths)
    return (
        torch.stack([slots, positions, sentence, of_token, at]),
        torch.stack([cu_tokens, cu_words]),
        _inverse(at, at >= 0),
        place.view(real.shape),
    )


def _inverse(index, mask):
    """`result[index[i]] = i` where mask, else 0; indices are distinct, below their number."""
    size = len(index)
    places = torch.arange(size, device=index.device)
    return places.new_zeros(size + 1).scatter_(0, index.where(mask, size), places)[:size]


def words_of(ids, sentence, positions, lengths):
    """word_of_token, word_at and cu_words of packed tokens' word ids, see `packing.Packed`."""
    first_of_sentence = positions == 0
    starts = (ids >= 0) & (first_of_sentence | (ids != ids.roll(1)))
    words = starts.new_zeros(len(lengths), dtype=torch.int64).index_add_(0, sentence, starts.long())
    stand_in = first_of_sentence & (words == 0)[sentence]
    starts |= stand_in
    words += (words == 0) & (lengths > 0)
    word_of_token = (starts.cumsum(0) - 1).masked_fill((ids < 0) & ~stand_in, -1)
    return word_of_token, word_of_token.masked_fill(~starts, -1), F.pad(words.cumsum(0), (1, 0))


def uncertainty(logits, max_prob=False):
    """How unsure each row of logits is, in [0, 1]: `[..., C] -> [...]`, in fp32 or fp64.

    `H(p) / ln C`, or `(1 - max p) / (1 - 1/C)` if max_prob; 0 for a single label.
    """
    labels = logits.shape[-1]
    p = logits.to(torch.promote_types(logits.dtype, torch.float32)).softmax(-1)
    if labels == 1:
        return 0 * p[..., 0]  # NaN stays NaN
    if max_prob:
        return ((1 - p.amax(-1)) / (1 - 1 / labels)).clamp(min=0)
    return (torch.special.entr(p).sum(-1) / math.log(labels)).clamp(min=0)


def window_max(values, cu_words, window):
    """Largest value among the words within `window [B]` of each word of its own sentence: [W]."""
    if not len(values):
        return values
    lengths = cu_words.diff()
    sentence = torch.arange(len(lengths), device=values.device).repeat_interleave(lengths)
    position = torch.arange(len(values), device=values.device) - cu_words[sentence]
    longest = int(lengths.max())
    padded = values.new_full((len(lengths), longest), -math.inf)
    padded[sentence, position] = values
    window = window.clamp(max=longest)
    result = torch.empty_like(padded)
    for k in window.unique().tolist():
        rows = window == k
        result[rows] = F.max_pool1d(padded[rows][None], 2 * k + 1, stride=1, padding=k)[0]
    return result[sentence, position]


def exit_decision(
    logits,
    words,
    uncertainty_,
    exit_layer,
    cu_words,
    window,
    threshold,
    layer,
    max_prob=False,
    min_active=None,
):
    """Decide which words leave at `layer`; see `tokenexit.ops.exit_decision`."""
    rows = words >= 0
    fresh = uncertainty_.clone()
    fresh[words[rows]] = uncertainty(logits[rows], max_prob).to(fresh.dtype)
    limit = threshold.repeat_interleave(cu_words.diff())
    sure = window_max(fresh, cu_words, window) < limit
    leaves = (exit_layer == 0) & (sure | (limit == math.inf))
    left = exit_layer.masked_fill(leaves, layer)
    if min_active is not None:
        left = left.masked_fill(too_few(left, cu_words, min_active), layer)
    return fresh, left


def too_few(exit_layer, cu_words, min_active):
    """Active words of sentences that go on no further: some left, fewer than `[B]` have not."""
    lengths = cu_words.diff()
    sentence = torch.arange(len(lengths), device=lengths.device).repeat_interleave(lengths)
    active = exit_layer == 0
    count = torch.zeros_like(lengths).index_add_(0, sentence, active.to(lengths.dtype))
    return active & ((count < lengths) & (count < min_active))[sentence]


def heard(own, told, tokens, positions):
    """Logits of classifiers that hear their neighbours: own and what these told last, `[n, C]`.

    Sums are taken in fp32 or fp64, and rounded once.

    Args:
        own: `[n, C]`, what classifiers said of the tokens themselves.
        told: `[T, 2C]`, what each token told last to the one after it, and to the one before it.
        tokens: `[n]` int64, which they are.
        positions: `[T]` int64 in their sentences, from 0 on, but at tokens in no sentence, who told
            nothing.
    """
    labels, ends = own.shape[1], F.pad(positions[1:], (0, 1)) == 0
    to_next, to_last = told.split(labels, 1)
    before = to_next[(tokens - 1).clamp(min=0)].masked_fill((positions[tokens] == 0)[:, None], 0)
    after = to_last[(tokens + 1).clamp(max=told.shape[0] - 1)].masked_fill(ends[tokens][:, None], 0)
    wide = torch.promote_types(own.dtype, torch.float32)
    return (own.to(wide) + before.to(wide) + after.to(wide)).to(own.dtype)


def compact_active(active, cu_active, word_of_token, exit_layer, cu_tokens=None, scratch=None):
    """Drop the tokens of words that left; see `tokenexit.ops.compact_active`."""
    counts = cu_active.diff()
    sentence = torch.arange(len(counts), device=active.device).repeat_interleave(counts)
    listed = active[: len(sentence)]
    word = word_of_token[listed]
    stays = (word >= 0) & (exit_layer[word.clamp(min=0)] == 0)
    open_sentences = torch.zeros_like(counts).index_add_(0, sentence, stays.to(counts.dtype)) > 0
    stays |= (word < 0) & open_sentences[sentence]
    kept = listed[stays]
    counts = torch.zeros_like(counts).index_add_(0, sentence, stays.to(counts.dtype))
    result = F.pad(kept, (0, len(active) - len(kept))), F.pad(counts.cumsum(0), (1, 0))
    if cu_tokens is None:
        return *result, active.new_empty(0), cu_active.new_empty(0)
    lengths = cu_tokens.diff()
    shown = open_sentences.repeat_interleave(lengths).nonzero()[:, 0]
    cu_seen = F.pad((lengths * open_sentences).cumsum(0), (1, 0))
    return *result, F.pad(shown, (0, len(word_of_token) - len(shown))), cu_seen


def exit_attention(q, k, v, cu_q, cu_k, scale, bias=None, positions=None, dropout_p=0.0, seed=0):
    """Active queries over all keys; see `tokenexit.ops.exit_attention`."""
    out = torch.zeros_like(q)
    for b in range(len(cu_q) - 1):
        mine, seen = slice(cu_q[b], cu_q[b + 1]), slice(cu_k[b], cu_k[b + 1])
        scores = torch.einsum("ahd,khd->hak", q[mine], k[seen]) * scale
        if bias is not None:
            scores = scores + relative_bias(bias, positions[mine], scores.shape[-1])
        rows = torch.arange(len(q), device=q.device)[mine]
        out[mine] = _mixed(scores, v[seen], rows, cu_k[b], dropout_p, seed)
    return out


def disentangled_attention(
    q,
    k,
    v,
    cu_q,
    cu_k,
    scale,
    buckets,
    positions,
    position_keys=None,
    position_queries=None,
    dropout_p=0.0,
    seed=0,
):
    """Attention to what and how far tokens are; see `tokenexit.ops.disentangled_attention`."""
    out = torch.zeros_like(q)
    for b in range(len(cu_q) - 1):
        mine, seen = slice(cu_q[b], cu_q[b + 1]), slice(cu_k[b], cu_k[b + 1])
        scores = torch.einsum("ahd,khd->hak", q[mine], k[seen])
        bucket = relative_bias(buckets[None], positions[mine], scores.shape[-1])
        if position_keys is not None:
            of_queries = torch.einsum("ahd,phd->hap", q[mine], position_keys)
            scores = scores + of_queries.gather(2, bucket.expand_as(scores))
        if position_queries is not None:
            of_keys = torch.einsum("khd,phd->hpk", k[seen], position_queries)
            scores = scores + of_keys.gather(1, bucket.expand_as(scores))
        rows = torch.arange(len(q), device=q.device)[mine]
        out[mine] = _mixed(scores * scale, v[seen], rows, cu_k[b], dropout_p, seed)
    return out


def _mixed(scores, v, rows, first_key, dropout_p, seed):
    """`softmax(scores [H, A, K]) @ v [K, H, D]` with dropout of the weights: `[A, H, D]`."""
    weights = scores.softmax(-1)
    if dropout_p:
        keep = dropout_keep(seed, rows, v.shape[1], first_key, len(v), dropout_p)
        weights = weights * keep / (1 - dropout_p)
    return torch.einsum("hak,khd->ahd", weights.to(v.dtype), v)


def absorbed_attention(q, h, cu_q, cu_k, scale, bias=None, positions=None):
    """Active queries over hidden states; see `tokenexit.ops.absorbed_attention`."""
    shared = h[:, None].expand(-1, q.shape[1], -1)
    return exit_attention(q, shared, shared, cu_q, cu_k, scale, bias, positions)


def dropout_keep(seed, rows, num_heads, first_key, num_keys, dropout_p):
    """Which attention weights dropout keeps: `[H, A, keys]`, a function of its arguments alone.

    Each weight draws 32 bits from a hash of the seed, its query's row in q, its head and its key's
    row in k, so that every backend keeps the same.
    """
    heads = torch.arange(num_heads, device=rows.device)[:, None, None]
    keys = first_key + torch.arange(num_keys, device=rows.device)
    drawn = _mix(_mix(_mix((seed ^ rows) & 0xFFFFFFFF)[:, None] ^ heads) ^ keys)
    return drawn >= math.floor(dropout_p * 2**32)


def _mix(x):
    """A hash of 32 bits (Wellons' lowbias32), in int64."""
    x = x ^ (x >> 16)
    x = x * 0x7FEB352D & 0xFFFFFFFF
    x = x ^ (x >> 15)
    x = x * 0x846CA68B & 0xFFFFFFFF
    return x ^ (x >> 16)


def relative_bias(bias, positions, num_keys):
    """Scores' bias of queries at `positions [A]`: `[H, 2R+1] -> [H, A, num_keys]`.

    Entry r + R of a row is for a key r tokens after the query; distances beyond R count as R.
    """
    reach = bias.shape[-1] // 2
    offset = torch.arange(num_keys, device=positions.device) - positions[:, None]
    return bias[:, offset.clamp(-reach, reach) + reach]


def linear(
    x,
    weight,
    bias=None,
    residual=None,
    residual_gather=None,
    norm_on="none",
    norm_weight=None,
    norm_bias=None,
    eps=1e-12,
    activation="none",
):
    """A product, LayerNorms taken where they stand; see `linear_` of `tokenexit.kernels.linear`.

    norm_on: "x" or "residual" is normalised before anything else is done with it. The row that
    `linear_` normalises on its way out is that of this function with "none".
    """

    def normed(values, on):
        if norm_on != on:
            return values
        return F.layer_norm(values, values.shape[1:], norm_weight, norm_bias, eps)

    out = F.linear(normed(x, "x"), weight, bias)
    if residual is not None:
        near = residual if residual_gather is None else residual[residual_gather]
        out = out + normed(near, "residual")
    if activation == "none":
        return out
    return F.gelu(out, approximate="tanh" if activation == "gelu_tanh" else "none")


def query_key_value(
    h,
    query_weight,
    query_bias,
    key_value_weight,
    key_value_bias,
    active,
    cu_active,
    seen,
    cu_seen,
    norm_weight,
    norm_bias,
    up_weight,
    up_bias,
):
    """Queries, keys and values, and the folded LayerNorm; see `tokenexit.kernels.linear`."""
    active, seen = (  # without a list, all
        h[: cu[-1]] if rows is None else h[rows[: cu[-1]]]
        for rows, cu in ((active, cu_active), (seen, cu_seen))
    )
    q = F.linear(active, query_weight, query_bias)
    kv = F.linear(seen, key_value_weight, key_value_bias)
    return q, kv, torch.stack([up_weight @ norm_weight, F.linear(norm_bias, up_weight, up_bias)])


def exit_step(
    x,
    norm_weight,
    norm_bias,
    eps,
    head_weight,
    head_bias,
    active,
    cu_active,
    word_at,
    h,
    logits,
    token_layer,
    uncertainty_,
    exit_layer,
    cu_words,
    window,
    threshold,
    min_active,
    layer,
    max_prob=False,
    decide=True,
    said=None,
    cu_tokens=None,
):
    """What `exit_step_` of `tokenexit.kernels.decision` makes of h, logits, token_layer,
    uncertainty and exit_layer, in new tensors."""
    mine = active[: cu_active[-1]]
    fresh = F.layer_norm(x[: len(mine)], x.shape[1:], norm_weight, norm_bias, eps)
    asked = F.linear(fresh, head_weight, head_bias)
    if said is not None:
        labels = logits.shape[1]
        told = said[:, labels:].index_copy(0, mine, asked[:, labels:])
        starts = cu_tokens[:-1].repeat_interleave(cu_tokens.diff())
        positions = torch.arange(len(starts), device=h.device) - starts
        asked = heard(asked[:, :labels], told, mine, positions)
    h, logits = h.index_copy(0, mine, fresh), logits.index_copy(0, mine, asked)
    token_layer = token_layer.index_fill(0, mine, layer)
    if decide:
        uncertainty_, exit_layer = exit_decision(
            asked,
            word_at[mine],
            uncertainty_,
            exit_layer,
            cu_words,
            window,
            threshold,
            layer,
            max_prob,
            min_active,
        )
    return h, logits, token_layer, uncertainty_, exit_layer


def rotated(x, cos, sin):
    """Rotary positions: the halves of each head `[n, H, D]` turned by angles, `[n, D/2]` of each.

    Source: Su et al. 2021 (arXiv 2104.09864), section 3.4, with halves in place of neighbours.
    """
    low, high = x.to(torch.promote_types(x.dtype, torch.float32)).chunk(2, -1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat([low * cos - high * sin, high * cos + low * sin], -1).to(x.dtype)


def norm_first_sum(layer, h, rotary=None, tokens=slice(None)):
    """One layer that normalises what it reads, on all tokens of one sentence: [n, d].

    What it gives is the sum itself: whoever reads that has a LayerNorm of its own.

    Args:
        rotary: `tokenexit.layers.Rotary` or None; tokens: where the sentence's are in it.
    """
    n = len(h)
    normed = layer.attention_norm(h)
    q = layer.query(normed).view(n, layer.num_heads, -1)
    k, v = layer.key_value(normed).view(n, 2, layer.num_heads, -1).unbind(1)
    if rotary is not None:
        cos, sin = (part[tokens] for part in rotary.turns[layer.theta])
        q, k = rotated(q, cos, sin), rotated(k, cos, sin)
    scores = torch.einsum("ahd,khd->hak", q, k) * layer.scale
    if layer.reach is not None:
        at = torch.arange(n, device=h.device)
        scores = scores.masked_fill((at[:, None] - at).abs() > layer.reach, -math.inf)
    context = torch.einsum("hak,khd->ahd", scores.softmax(-1), v).flatten(1)
    h = h + layer.attention_output(context)
    inner, gate = layer.up(layer.inner_norm(h)).chunk(2, -1)
    return h + layer.down(layer.activation(inner) * gate)


def layer_sum(layer, h, bias=None, tokens=slice(None)):
    """One layer on all tokens of one sentence, short of a last LayerNorm: [n, d]."""
    if layer.norm_first:
        return norm_first_sum(layer, h, bias, tokens)
    n = len(h)
    q = layer.query(h).view(n, layer.num_heads, -1)
    k, v = layer.key_value(h).view(n, 2, layer.num_heads, -1).unbind(1)
    whole, positions = torch.tensor([0, n], device=h.device), torch.arange(n, device=h.device)
    common = q, k, v, whole, whole, layer.scale
    if bias is None or isinstance(bias, torch.Tensor):
        context = exit_attention(*common, bias, positions).flatten(1)
    else:
        states = layer.position_states(bias)
        context = disentangled_attention(*common, bias.buckets, positions, *states).flatten(1)
    read, h = h, layer.attention_norm(h + layer.attention_output(context))
    h = h + layer.down(layer.activation(layer.up(h)))
    if not layer.convolves:
        return h
    near = layer.convolution(read.T[None])[0].T  # beyond the sentence are zeros
    return layer.inner_norm(h) + layer.convolved(near)


def _from_both_sides(told):
    """What the tokens of one sentence hear from those beside them: `[n, 2C] -> [n, C]`."""
    to_next, to_last = told.chunk(2, 1)
    return F.pad(to_next[:-1], (0, 0, 1, 0)) + F.pad(to_last[1:], (0, 0, 0, 1))


def exit_forward(h, layers, heads, packed, schedule, bias=None, exit_layer=None, neighbor_heads=0):
    """The exit forward, sentence by sentence; every layer computes all tokens, keeps the active.

    Args:
        h: `[T, d]`, the embeddings.
        layers, heads: L layers (`tokenexit.layers.ExitLayer`; only its weights are used, no
            dropout) and L functions `[n, d] -> [n, C]`.
        packed: `tokenexit.packing.Packed`, the offsets and words of the batch.
        schedule: `tokenexit.schedule.Schedule`, the policy of each sentence.
        bias: `[H, 2R+1]` or None, relative-position bias of the scores; or, for layers of
            disentangled attention, `tokenexit.layers.Relative`; for those that normalise first,
            `tokenexit.layers.Rotary`.
        exit_layer: `[W]` or None; where given, words leave there, and the schedule is not asked.
        neighbor_heads: how many heads, from the first, are `[n, d] -> [n, 3C]`: see
            `tokenexit.layers.NeighborHead`. None, L - 1 or all.

    Returns:
        For each layer that was reached, `(active [A], logits [A, C])`: the tokens computed in
        it, ascending, and its head's logits for them. A token's result is its last logits.
    """
    trace = [[] for _ in layers]
    for b in range(packed.num_sentences):
        first, last = packed.cu_tokens[b], packed.cu_tokens[b + 1]
        w0, w1 = packed.cu_words[b], packed.cu_words[b + 1]
        word = packed.word_of_token[first:last] - w0  # negative for special tokens
        head_token = packed.first_token[w0:w1] - first
        state = h[first:last]
        stored = state
        left = torch.zeros_like(head_token)  # the layer each word left at; 0: active
        u = state.new_zeros(len(left), dtype=schedule.threshold.dtype)
        whole = torch.tensor([0, len(left)], device=h.device)
        told = 0  # [n, 2C], what each token told its neighbours last
        for number, (layer, head) in enumerate(zip(layers, heads, strict=True), 1):
            if (left > 0).all():
                break
            active = (word < 0) | (left[word.clamp(min=0)] == 0)
            fresh = layer_sum(layer, state, bias, slice(first, last))
            if schedule.pre_norm:
                stored = torch.where(active[:, None], fresh, stored)
                state = layer.output_norm(stored)
            else:
                state = torch.where(active[:, None], layer.output_norm(fresh), state)
            tokens = active.nonzero().squeeze(1)
            said = head(state)
            if number <= neighbor_heads:
                said, tells = said.tensor_split([said.shape[1] // 3], 1)
                told = torch.where(active[:, None], tells, told)
                said = said + _from_both_sides(told)
            trace[number - 1].append((first + tokens, said[tokens]))
            if exit_layer is not None:
                left = left.masked_fill(exit_layer[w0:w1] == number, number)
                continue
            asked = torch.arange(len(left), device=h.device)
            if not schedule.recompute:
                asked = asked.masked_fill(left > 0, -1)
            u, left = exit_decision(
                said[head_token].detach(),
                asked,
                u,
                left,
                whole,
                schedule.window[b : b + 1],
                schedule.threshold[number - 1, b : b + 1],
                number,
                schedule.max_prob,
                schedule.min_active[b : b + 1],
            )
    return [tuple(torch.cat(part) for part in zip(*layer, strict=True)) for layer in trace if layer]
