"""disentangled_attention against its definition, number by number, and the fp64 reference."""

import math

import pytest
import torch
from assertions import assert_as_exact

from tokenexit import reference
from tokenexit.ops.disentangled_attention import disentangled_attention

# (active, all) tokens of each sentence
SHAPES = {
    "one token": [(1, 1)],
    "ragged": [(5, 17), (1, 63), (129, 129), (2, 2)],
    "finished sentences": [(0, 9), (3, 7), (0, 1), (0, 0), (1, 30)],
    "nothing active": [(0, 5), (0, 3)],
    "long": [(40, 513)],
}
TERMS = {
    "both": (True, True),
    "keys": (True, False),
    "queries": (False, True),
    "none": (False,) * 2,
}


def inputs(shape, dtype=torch.float64, terms=(True, True), heads=3, dim=8, buckets=7, seed=0):
    """Arguments of the op; relative positions beyond 6 share a bucket."""
    g = torch.Generator().manual_seed(seed)

    def rand(n):
        return torch.randn(n, heads, dim, generator=g, dtype=torch.float64).to(dtype)

    active, all_ = (sum(n) for n in zip(*shape, strict=True))
    q, k, v = rand(active), rand(all_), rand(all_)
    offsets = [
        torch.tensor([0, *torch.tensor(n).cumsum(0).tolist()]) for n in zip(*shape, strict=True)
    ]
    positions = torch.cat([torch.randperm(n, generator=g)[:a].sort()[0] for a, n in shape])
    of_distance = torch.randint(buckets, (13,), generator=g)
    states = [rand(buckets) if has else None for has in terms]
    return [q, k, v, *offsets, 0.3, of_distance, positions, *states]


def by_definition(q, k, v, cu_q, cu_k, scale, buckets, positions, keys, queries):
    out = torch.zeros_like(q)
    reach = len(buckets) // 2
    for b in range(len(cu_q) - 1):
        for i in range(cu_q[b], cu_q[b + 1]):
            for head in range(q.shape[1]):
                scores = []
                for j in range(cu_k[b], cu_k[b + 1]):
                    after = int(j - cu_k[b]) - int(positions[i])
                    p = buckets[min(max(after, -reach), reach) + reach]
                    score = float(q[i, head] @ k[j, head])
                    if keys is not None:
                        score += float(q[i, head] @ keys[p, head])
                    if queries is not None:
                        score += float(queries[p, head] @ k[j, head])
                    scores.append(scale * score)
                weights = [math.exp(score - max(scores)) for score in scores]
                for j, weight in zip(range(cu_k[b], cu_k[b + 1]), weights, strict=True):
                    out[i, head] += weight / sum(weights) * v[j, head]
    return out


@pytest.mark.parametrize("terms", TERMS.values(), ids=TERMS)
def test_the_reference_is_the_definition(terms):
    values = inputs([(2, 9), (0, 4), (3, 3)], terms=terms)
    torch.testing.assert_close(reference.disentangled_attention(*values), by_definition(*values))


def run(function, values, grad):
    leaves = [x.clone().requires_grad_() for x in values if x is not None and torch.is_tensor(x)
              and x.is_floating_point()]  # fmt: skip
    given = iter(leaves)
    floats = [torch.is_tensor(x) and x.is_floating_point() for x in values]
    out = function(*(next(given) if f else x for f, x in zip(floats, values, strict=True)))
    out.backward(grad.to(out.dtype))
    return out.detach(), [leaf.grad for leaf in leaves]


@pytest.mark.parametrize("terms", TERMS.values(), ids=TERMS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_equals_the_reference(shape, terms):
    exact = inputs(shape, terms=terms)
    rough = [x.float() if torch.is_tensor(x) and x.is_floating_point() else x for x in exact]
    grad = torch.randn(exact[0].shape, generator=torch.Generator().manual_seed(1))
    truth, truth_grads = run(reference.disentangled_attention, exact, grad)
    near, near_grads = run(reference.disentangled_attention, rough, grad)
    got, got_grads = run(disentangled_attention, rough, grad)
    assert_as_exact(got, truth, near, scale=exact[2].abs().max() if len(exact[2]) else 1)
    for mine, its, plain in zip(got_grads, truth_grads, near_grads, strict=True):
        if mine is None:
            assert its is None or not its.any()
        elif mine.numel():
            assert_as_exact(mine, its, plain, "backward", scale=10 * its.abs().max().clamp(min=1))


def test_gradcheck():
    values = inputs([(2, 4), (0, 2), (1, 3)])
    floats = [x.requires_grad_() for x in values if torch.is_tensor(x) and x.is_floating_point()]
    assert len(floats) == 5
    assert torch.autograd.gradcheck(disentangled_attention, values)


def test_dropout_is_the_reference_s_and_follows_the_seed():
    values = inputs([(5, 17), (3, 3)])
    results = [disentangled_attention(*values, dropout_p=0.5, seed=seed) for seed in (0, 0, 1)]
    assert torch.equal(results[0], results[1]) and not torch.equal(results[0], results[2])
    # The weights that fall out are those of exit_attention.
    q, k, v, cu_q, cu_k, scale, *_ = values
    plain = disentangled_attention(*values[:8], None, None, 0.5, 3)
    torch.testing.assert_close(
        plain, reference.exit_attention(q, k, v, cu_q, cu_k, scale, dropout_p=0.5, seed=3)
    )


def test_opcheck():
    """Of what programs call."""
    for terms in ((True, True), (False, True), (False, False)):
        values = inputs([(2, 4), (0, 2), (1, 3)], terms=terms)
        torch.library.opcheck(torch.ops.tokenexit.disentangled_attention.default, tuple(values))


@pytest.mark.parametrize(
    "at, value, message",
    [
        (1, torch.zeros(9, 3, 4), r"expected \[A, H, D\], \[K, H, D\], \[K, H, D\]"),
        (3, torch.tensor([0, 5]), "got 2 offsets of queries and 3 of keys"),
        (6, torch.zeros(4, dtype=torch.int64), r"buckets \(4,\); expected \[5\], \[2R\+1\]"),
        (7, torch.zeros(4, dtype=torch.int64), r"positions \(4,\)"),
        (8, torch.zeros(7, 3, 4), r"position_keys \(7, 3, 4\); expected \[P, 3, 8\]"),
        (9, torch.zeros(7, 3), r"position_queries \(7, 3\); expected \[P, 3, 8\]"),
    ],
)
def test_refuses(at, value, message):
    values = inputs([(2, 9), (3, 3)])
    values[at] = value
    with pytest.raises(ValueError, match=message):
        disentangled_attention(*values)


def test_refuses_options():
    values = inputs([(2, 9)])
    with pytest.raises(ValueError, match="dropout_p=1"):
        disentangled_attention(*values, dropout_p=1.0)
    with pytest.raises(ValueError, match="got backend 'fast'"):
        disentangled_attention(*values, backend="fast")
