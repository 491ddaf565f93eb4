import math
import random

import pytest
import torch

from tokenexit.ops import extension_available, extension_error
from tokenexit.ops.exit_decision import exit_decision

BACKENDS = ["auto", "reference"]
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
LENGTHS = [[1], [63], [129], [1, 1, 1], [5, 0, 129, 1, 63, 2], [0, 0]]
UNBOUNDED = 2**63 - 1

compiled = pytest.mark.skipif(not extension_available(), reason=str(extension_error()))


def tolerance(dtype):
    """Of an uncertainty; it is computed in fp32 from the same logits for all dtypes but fp64."""
    return 1e-12 if dtype == torch.float64 else 2e-6


def make_args(lengths, labels=9, dtype=torch.float32, seed=0, max_prob=False):
    """Sentences of these lengths after layer 3: some words left, rows in any order, some void."""
    g = torch.Generator().manual_seed(seed)
    acc = torch.promote_types(dtype, torch.float32)
    num_words, num_sentences = sum(lengths), len(lengths)
    exit_layer = torch.randint(0, 3, (num_words,), generator=g)
    words = torch.full((num_words + 5,), -1)
    asked = (exit_layer == 0).nonzero()[:, 0]
    words[torch.randperm(len(words), generator=g)[: len(asked)]] = asked
    sharpness = 6 * torch.rand(len(words), 1, generator=g)
    logits = sharpness * torch.randn(len(words), labels, generator=g)
    window = torch.tensor([0, 1, 2, 9, UNBOUNDED]).repeat(num_sentences)[:num_sentences]
    return {
        "logits": logits.to(dtype),
        "words": words,
        "uncertainty": torch.rand(num_words, generator=g).to(acc),
        "exit_layer": exit_layer,
        "cu_words": torch.tensor([0, *lengths]).cumsum(0),
        "window": window,
        "threshold": (0.2 + 0.7 * torch.rand(num_sentences, generator=g)).to(acc),
        "layer": 3,
        "max_prob": max_prob,
    }


def decide_by_loop(
    logits,
    words,
    uncertainty,
    exit_layer,
    cu_words,
    window,
    threshold,
    layer,
    max_prob,
    min_active=None,
):
    """What the op does, a number at a time; also the margin of each word's decision."""
    u, labels = uncertainty.tolist(), logits.shape[1]
    for x, w in zip(logits.tolist(), words.tolist(), strict=True):
        if w < 0:
            continue
        top = max(x)
        if any(map(math.isnan, x)) or math.isinf(top):
            u[w] = math.nan
            continue
        e = [math.exp(value - top) for value in x]
        p = [value / sum(e) for value in e]
        if labels == 1:
            u[w] = 0.0
        elif max_prob:
            u[w] = (1 - max(p)) / (1 - 1 / labels)
        else:
            u[w] = sum(-q * math.log(q) for q in p if q > 0) / math.log(labels)
    left, margin = exit_layer.tolist(), [math.inf] * len(u)
    for b, (k, limit) in enumerate(zip(window.tolist(), threshold.tolist(), strict=True)):
        first, last = cu_words[b].item(), cu_words[b + 1].item()
        for w in range(first, last):
            near = [u[v] for v in range(first, last) if abs(v - w) <= k]
            largest = math.nan if any(map(math.isnan, near)) else max(near)
            if left[w] == 0 and (largest < limit or limit == math.inf):
                left[w] = layer
            if math.isfinite(largest) and math.isfinite(limit):
                margin[w] = abs(largest - limit)
        rest = [w for w in range(first, last) if left[w] == 0]
        if min_active is not None and len(rest) < min(int(min_active[b]), last - first):
            for w in rest:
                left[w] = layer
    u, margin = torch.tensor([u, margin], dtype=torch.float64)
    return u, torch.tensor(left, dtype=torch.int64), margin


def assert_decides_right(args, backend):
    if len(args["window"]) > 1:
        args["min_active"] = torch.arange(len(args["window"])) % 4 + 1
    u, left = exit_decision(**args, backend=backend)
    u_loop, left_loop, margin = decide_by_loop(**args)
    tol = tolerance(args["logits"].dtype)
    torch.testing.assert_close(u.double(), u_loop, atol=tol, rtol=0, equal_nan=True)
    assert u.dtype == args["uncertainty"].dtype
    assert ((u >= 0) & (u <= 1 + tol) | u.isnan()).all()
    clear = margin > tol
    assert torch.equal(left[clear], left_loop[clear])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("max_prob", [False, True], ids=["entropy", "max_prob"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_matches_a_loop(lengths, dtype, max_prob, backend):
    assert_decides_right(make_args(lengths, 9, dtype, max_prob=max_prob), backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("max_prob", [False, True], ids=["entropy", "max_prob"])
@pytest.mark.parametrize("labels", [1, 2, 9, 50])
def test_number_of_labels(labels, max_prob, backend):
    assert_decides_right(make_args([7, 63, 1], labels, seed=1, max_prob=max_prob), backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_too_few_active_words_leave_once_some_have_left(backend):
    words = torch.arange(10)
    unsure = torch.tensor([0.9, 0.1, 0.9, 0.9, 0.9, 0.9, 0.1, 0.1, 0.9, 0.9])
    args = {
        "logits": torch.zeros(0, 3),
        "words": words[:0],
        "uncertainty": unsure,
        "exit_layer": torch.tensor([0, 0, 0, 0, 0, 0, 1, 0, 0, 0]),
        "cu_words": torch.tensor([0, 3, 5, 5, 8, 10]),
        "window": torch.zeros(5, dtype=torch.int64),
        "threshold": torch.full((5,), 0.5),
        "layer": 2,
    }
    left = [0, 2, 0, 0, 0, 0, 1, 2, 0, 0]
    assert exit_decision(**args, backend=backend)[1].tolist() == left
    for least, changes in (
        ([1] * 5, {}),
        ([2, 2, 2, 1, 9], {}),  # two of the first sentence stay; none of the last has left
        ([3, 9, 9, 2, 1], {0: 2, 2: 2, 5: 2}),
    ):
        expected = [changes.get(w, layer) for w, layer in enumerate(left)]
        got = exit_decision(**args, min_active=torch.tensor(least), backend=backend)[1]
        assert got.tolist() == expected


@compiled
@pytest.mark.parametrize("max_prob", [False, True], ids=["entropy", "max_prob"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("seed", range(5))
def test_compiled_matches_reference(seed, dtype, max_prob):
    args = make_args([40, 1, 129, 0, 3], 9, dtype, seed, max_prob)
    u, left = exit_decision(**args)
    u_reference, left_reference = exit_decision(**args, backend="reference")
    tol = tolerance(dtype)
    torch.testing.assert_close(u, u_reference, atol=tol, rtol=0)
    clear = decide_by_loop(**args)[2] > tol
    assert torch.equal(left[clear], left_reference[clear])


@pytest.mark.parametrize("backend", BACKENDS)
def test_windows_and_thresholds_exactly(backend):
    """No row is asked and every number is a multiple of 1/4, so that nothing is rounded."""
    rng = random.Random(0)
    for _ in range(100):
        lengths = [rng.choice([0, 1, 2, 3, 8, 20]) for _ in range(rng.randint(1, 6))]
        args = make_args(lengths)
        num_words = sum(lengths)
        quarters = [0.0, 0.25, 0.25, 0.5, 0.75, math.nan]
        args["words"].fill_(-1)
        args["uncertainty"] = torch.tensor([rng.choice(quarters) for _ in range(num_words)])
        args["exit_layer"] = torch.tensor([rng.choice([0, 0, 2]) for _ in range(num_words)]).long()
        args["window"] = torch.tensor([rng.choice([0, 1, 2, 7, 20, UNBOUNDED]) for _ in lengths])
        args["threshold"] = torch.tensor(
            [rng.choice([0.0, 0.25, 0.5, 1.0, math.inf, -math.inf, math.nan]) for _ in lengths]
        )
        u, left = exit_decision(**args, backend=backend)
        assert torch.equal(u.nan_to_num(9), args["uncertainty"].nan_to_num(9))
        assert torch.equal(left, decide_by_loop(**args)[1])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("max_prob", [False, True], ids=["entropy", "max_prob"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_infinite_logits(dtype, max_prob, backend):
    inf = math.inf
    rows = [
        [0.0, -inf, -inf],  # certain
        [1.0, 1.0, -inf],
        [0.0, 0.0, 0.0],  # uniform
        [-inf, -inf, -inf],  # no distribution: NaN
        [inf, 0.0, 0.0],
        [math.nan, 0.0, 0.0],
    ]
    args = make_args([len(rows)], 3, dtype, max_prob=max_prob)
    args["logits"], args["words"] = torch.tensor(rows, dtype=dtype), torch.arange(len(rows))
    args["window"].zero_()
    assert_decides_right(args, backend)
    u, _ = exit_decision(**args, backend=backend)
    assert u[0] == 0 and 0.5 < u[1] < 0.8 and u[2] == pytest.approx(1)
    assert u[3:].isnan().all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("value", "expected"), [(3.0, 0.0), (-math.inf, math.nan)])
def test_one_label_is_certain(value, expected, backend):
    args = make_args([1], 1)
    args["logits"], args["words"] = torch.tensor([[value]]), torch.tensor([0])
    u, _ = exit_decision(**args, backend=backend)
    assert u.tolist() == pytest.approx([expected], nan_ok=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_keeps_its_neighbors_but_not_at_the_last_layer(backend):
    args = make_args([7, 7])
    args["words"].fill_(-1)
    args["exit_layer"].zero_()
    args["exit_layer"][0] = 1
    args["uncertainty"].zero_()
    args["uncertainty"][[3, 10]] = math.nan
    args["window"].fill_(1)
    args["threshold"] = torch.tensor([0.5, math.inf])
    _, left = exit_decision(**args, backend=backend)
    assert left.tolist() == [1, 3, 0, 0, 0, 3, 3] + [3] * 7


@pytest.mark.parametrize("backend", BACKENDS)
def test_decisions_are_simultaneous(backend):
    """A word's exit does not depend on its neighbor's exit at the same layer."""
    args = make_args([3])
    args["words"].fill_(-1)
    args["exit_layer"].zero_()
    args["uncertainty"] = torch.tensor([0.1, 0.1, 0.9])
    args["window"].fill_(1)
    args["threshold"].fill_(0.5)
    _, left = exit_decision(**args, backend=backend)
    assert left.tolist() == [3, 0, 0]


@pytest.mark.parametrize("backend", BACKENDS)
def test_arguments_stay_as_they_are_and_results_have_no_gradient(backend):
    args = make_args([5, 9])
    args["logits"].requires_grad_()
    before = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in args.items()}
    u, left = exit_decision(**args, backend=backend)
    assert not u.requires_grad
    u.fill_(-1)
    left.fill_(-1)
    for name, value in before.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, args[name]), name


@compiled
def test_strided_arguments():
    args = make_args([5, 9])
    strided = dict(args)
    for name, value in args.items():
        if isinstance(value, torch.Tensor):
            strided[name] = torch.stack([value, value], -1)[..., 0]
            assert not strided[name].is_contiguous()
    for ours, expected in zip(exit_decision(**strided), exit_decision(**args), strict=True):
        assert torch.equal(ours, expected)


@compiled
def test_same_result_on_any_number_of_threads():
    args = make_args([129] * 30, 50)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            results.append(exit_decision(**args))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(one, two) for one, two in zip(*results, strict=True))


@compiled
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck(dtype):
    args = make_args([5, 0, 9], dtype=dtype)
    torch.library.opcheck(torch.ops.tokenexit.exit_decision.default, tuple(args.values()))


@compiled
def test_traced_without_graph_breaks():
    args = make_args([5, 0, 9])
    traced = torch.compile(exit_decision, fullgraph=True, backend="aot_eager")
    for ours, expected in zip(traced(**args), exit_decision(**args), strict=True):
        assert torch.equal(ours, expected)


def changed(**values):
    return make_args([5, 9]) | values


@pytest.mark.parametrize(
    ("args", "error", "message"),
    [
        (changed(logits=torch.zeros(19, 9, dtype=torch.int64)), TypeError, "logits of torch.int64"),
        (changed(logits=torch.zeros(19)), ValueError, r"logits \[19\]; expected \[R, C\]"),
        (changed(logits=torch.zeros(19, 0)), ValueError, r"logits \[19, 0\]; expected \[R, C\]"),
        (changed(words=torch.zeros(3).long()), ValueError, r"words \[3\]; expected \[19\]"),
        (changed(words=torch.zeros(19).int()), TypeError, "words of torch.int32; expected torch.i"),
        (changed(uncertainty=torch.zeros(14).double()), TypeError, "uncertainty of torch.float64"),
        (changed(exit_layer=torch.zeros(13).long()), ValueError, r"exit_layer \[13\]"),
        (changed(cu_words=torch.zeros(2).long()), ValueError, r"cu_words \[2\]; expected \[3\]"),
        (changed(window=torch.zeros(2)), TypeError, "window of torch.float32"),
        (changed(threshold=torch.zeros(2, 1)), ValueError, r"threshold \[2, 1\]; expected \[2\]"),
        (changed(threshold=torch.zeros(2, device="meta")), ValueError, "on meta; expected cpu"),
        (changed(layer=0), ValueError, "got layer 0; expected 1 or more"),
        (changed(backend="cuda"), ValueError, "got backend 'cuda'"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_wrong_arguments(args, error, message):
    with pytest.raises(error, match=message):
        exit_decision(**args)


@compiled
@pytest.mark.parametrize(
    ("args", "message"),
    [
        (changed(words=torch.full((19,), 14)), "got word 14 of 14"),
        (changed(cu_words=torch.tensor([0, 5, 15])), "cu_words ends at 15; expected 14"),
        (changed(cu_words=torch.tensor([0, 15, 14])), "falls from 15 to 14 at sentence 1"),
        (changed(cu_words=torch.tensor([-1, 5, 14])), "starts at -1; expected 0"),
        (changed(window=torch.tensor([2, -1])), "got window -1 at sentence 1"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_numbers_out_of_range(args, message):
    with pytest.raises(RuntimeError, match=message):
        exit_decision(**args)
