"""The contract as a loop over sentences, words, tokens and heads, one number at a time.

Written from the definition of an exit alone; it shares no code with the package but the policy's
fields. Slow, and the judge of `tokenexit.reference`.
"""

import math

import torch


def _linear(linear, x):
    out = linear.weight @ x
    return out if linear.bias is None else out + linear.bias


def _norm(norm, x):
    centred = x - x.mean()
    scaled = centred / (centred.pow(2).mean() + norm.eps).sqrt() * norm.weight
    return scaled if norm.bias is None else scaled + norm.bias


def _softmax(values):
    top = max(values)
    exps = [math.exp(v - top) for v in values]
    return [e / sum(exps) for e in exps]


def _uncertainty(logits, criterion):
    p = _softmax(logits.tolist())
    if len(p) == 1:
        return 0.0
    if criterion == "max_prob":
        return (1 - max(p)) / (1 - 1 / len(p))
    return -sum(x * math.log(x) for x in p if x > 0) / math.log(len(p))


def _threshold(policy, layer, num_layers):
    if isinstance(policy.threshold, tuple):
        return policy.threshold[layer - 1]
    if policy.schedule == "doubling" and layer > num_layers / 2:
        return min(2 * policy.threshold, 0.5)
    threshold = policy.threshold
    for _ in range(1, layer):
        threshold = min(1.0, threshold * policy.growth)
    return threshold


def _of_distance(layer, state, which):
    """Key or query of the state of a distance, by a product of its own, or that of tokens."""
    own = getattr(layer, f"position_{which}")
    if own is not None:
        return _linear(own, state)
    if which == "query":
        return _linear(layer.query, state)
    return _linear(layer.key_value, state)[: len(state)]


def _attend(layer, states, i, bias):
    """New sum of token i, before the output LayerNorm."""
    d = len(states[0])
    size = d // layer.num_heads
    query = _linear(layer.query, states[i])
    pairs = [_linear(layer.key_value, state) for state in states]
    context = []
    far, terms = {}, 0
    if callable(bias):
        has_key, has_query = layer.terms
        terms = has_key + has_query
        for j in range(len(states)):
            state = bias(i - j)
            far[j] = [_of_distance(layer, state, "key")] if has_key else [None]
            far[j] += [_of_distance(layer, state, "query")] if has_query else [None]
    for head in range(layer.num_heads):
        part = slice(head * size, (head + 1) * size)
        scores = []
        for j, pair in enumerate(pairs):
            score = float(query[part] @ pair[:d][part])
            if callable(bias):
                its_key, its_query = far[j]
                if its_key is not None:
                    score += float(query[part] @ its_key[part])
                if its_query is not None:
                    score += float(its_query[part] @ pair[:d][part])
            score /= math.sqrt(size * (1 + terms))
            if bias is not None and not callable(bias):
                reach = bias.shape[1] // 2
                score += float(bias[head, max(-reach, min(reach, j - i)) + reach])
            scores.append(score)
        weights = _softmax(scores)
        context.append(sum(w * pair[d:][part] for w, pair in zip(weights, pairs, strict=True)))
    middle = _linear(layer.attention_output, torch.cat(context)) + states[i]
    middle = _norm(layer.attention_norm, middle)
    total = middle + _linear(layer.down, layer.activation(_linear(layer.up, middle)))
    if not layer.convolves:
        return total
    near = _convolved(layer.convolution, states, i)
    return _norm(layer.inner_norm, total) + layer.convolved(near)


def _convolved(convolution, states, i):
    """Of token i and its neighbours, group by group of features."""
    weight, result = convolution.weight, convolution.bias.clone()
    size, half = weight.shape[1], weight.shape[2] // 2
    of_group = len(result) // convolution.groups
    for feature in range(len(result)):
        first = feature // of_group * size
        for j in range(max(0, i - half), min(len(states), i + half + 1)):
            part = states[j][first : first + size]
            result[feature] += weight[feature, :, j - i + half] @ part
    return result


def _turned(head, position, theta):
    """A head's key or query: coordinates p and p + D/2 turned by position * theta ** (-2p / D)."""
    half = len(head) // 2
    result = head.clone()
    for p in range(half):
        angle = position * theta ** (-p / half)
        x, y = float(head[p]), float(head[p + half])
        result[p] = x * math.cos(angle) - y * math.sin(angle)
        result[p + half] = y * math.cos(angle) + x * math.sin(angle)
    return result


def _attend_norm_first(layer, sums, i, is_first):
    """New sum of token i of a layer that normalises what it reads."""
    d = len(sums[0])
    size = d // layer.num_heads
    seen = [x if is_first else _norm(layer.attention_norm, x) for x in sums]
    query = _linear(layer.query, seen[i])
    context = []
    near = [j for j in range(len(sums)) if layer.reach is None or abs(i - j) <= layer.reach]
    pairs = {j: _linear(layer.key_value, seen[j]) for j in near}
    for head in range(layer.num_heads):
        part = slice(head * size, (head + 1) * size)
        mine = _turned(query[part], i, layer.theta)
        its = [float(mine @ _turned(pairs[j][:d][part], j, layer.theta)) for j in near]
        weights = _softmax([score / math.sqrt(size) for score in its])
        context.append(sum(w * pairs[j][d:][part] for w, j in zip(weights, near, strict=True)))
    middle = sums[i] + _linear(layer.attention_output, torch.cat(context))
    inner = _linear(layer.up, _norm(layer.inner_norm, middle))
    half = len(inner) // 2
    return middle + _linear(layer.down, layer.activation(inner[:half]) * inner[half:])


@torch.no_grad()
def loop_forward(states, layers, heads, word_of, policy, bias=None, neck=None, hears=0):
    """One sentence.

    Args:
        states: list of n embeddings [d]; word_of: list of n word numbers, None for special tokens.
        bias: [H, 2R+1] of relative positions; or, of disentangled attention, a function that gives
            the state [d] of the distance from a key to a query.
        neck: what comes before the heads of layers that normalise first: these layers' states are
            sums, and what is copied of a token that left is its sum, whatever the policy's `copy`.
        hears: so many heads, from the first, also say what a token tells the one after it and the
            one before it; a token that left said it with the head of its last layer.

    Returns:
        logits (list of n tensors [C]), exit layers (list of n ints), and the smallest distance of
        any U to its threshold: how far the decisions are from a tie.
    """
    n, num_layers = len(states), len(layers)
    words = sorted({w for w in word_of if w is not None})
    first = {w: word_of.index(w) for w in words}
    left_at = {}  # word -> layer
    own = {}  # word -> its last known uncertainty
    logits, exits, stored = [None] * n, [None] * n, [None] * n
    told = {}  # token -> what it told last
    margin = math.inf

    def ask(head, state):
        if neck is not None:
            state = _norm(neck.final_norm, state)
            state = _norm(neck.norm, neck.activation(_linear(neck.dense, state)))
        return _linear(head, state)

    for number, (layer, head) in enumerate(zip(layers, heads, strict=True), 1):
        if len(left_at) == len(words):
            break
        active = [i for i in range(n) if word_of[i] not in left_at]
        if neck is not None:
            fresh = {i: _attend_norm_first(layer, states, i, number == 1) for i in active}
            states = [fresh.get(i, states[i]) for i in range(n)]
        else:
            fresh = {i: _attend(layer, states, i, bias) for i in active}
            if policy.copy == "pre_norm":
                stored = [fresh.get(i, stored[i]) for i in range(n)]
                states = [_norm(layer.output_norm, s) for s in stored]
            else:
                normed = {i: _norm(layer.output_norm, x) for i, x in fresh.items()}
                states = [normed.get(i, states[i]) for i in range(n)]
        said = {i: ask(head, states[i]) for i in range(n)}
        if number <= hears:
            thirds = {i: said[i].view(3, -1) for i in range(n)}
            told.update({i: thirds[i][1:] for i in active})
            for i in range(n):
                said[i] = thirds[i][0]
                if i > 0:
                    said[i] = said[i] + told[i - 1][0]
                if i < n - 1:
                    said[i] = said[i] + told[i + 1][1]
        for i in active:
            logits[i] = said[i]
            exits[i] = number
        for w in words:
            if w not in left_at or policy.neighbors == "recompute":
                own[w] = _uncertainty(said[first[w]], policy.criterion)
        if number == num_layers:
            break
        leaving = []
        for w in words:
            if w in left_at:
                continue
            if policy.level == "sentence":
                window = words
            else:
                window = [x for x in words if abs(x - w) <= policy.window]
            largest = max(own[x] for x in window)
            threshold = _threshold(policy, number, num_layers)
            margin = min(margin, abs(largest - threshold))
            if largest < threshold:
                leaving.append(w)
        left_at.update({w: number for w in leaving})
        rest = [w for w in words if w not in left_at]
        if left_at and len(rest) < policy.min_active:
            left_at.update({w: number for w in rest})
    return logits, exits, margin
