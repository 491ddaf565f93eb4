import math

import pytest
import torch
import torch.nn.functional as F
from assertions import assert_as_exact
from tokenexit.kernels.decision import exit_decision, exit_step_
from tokenexit.kernels.linear import linear

from tokenexit import reference

DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * torch.cuda.is_available()
LENGTHS = [[1], [63], [129], [1, 1, 1], [5, 0, 129, 1, 31, 2]]
UNBOUNDED = 2**62
NAN, INF = math.nan, math.inf


def make_words(lengths, device, seed=0):
    """What is known of the words after layer 2: some left, each sentence has its own policy."""
    g = torch.Generator().manual_seed(seed)
    num_words, num_sentences = sum(lengths), len(lengths)
    words = {
        "uncertainty": torch.rand(num_words, generator=g),
        "exit_layer": torch.randint(0, 3, (num_words,), generator=g),
        "cu_words": F.pad(torch.tensor(lengths).cumsum(0), (1, 0)),
        "window": torch.tensor([1, 0, UNBOUNDED, 2, 40] * num_sentences)[:num_sentences],
        "threshold": 0.3 + 0.7 * torch.rand(num_sentences, generator=g),
    }
    return {name: value.to(device) for name, value in words.items()}


def make_logits(rows, labels, dtype, device, seed=0):
    g = torch.Generator().manual_seed(seed)
    sharpness = 8 * torch.rand(rows, 1, generator=g)
    return (sharpness * torch.randn(rows, labels, generator=g)).to(device, dtype)


def make_args(lengths, labels=9, dtype=torch.float32, device="cpu", seed=0, max_prob=False):
    """Arguments of exit_decision; rows in any order, some of them void."""
    args = make_words(lengths, device, seed)
    asked = (args["exit_layer"] == 0).nonzero()[:, 0].cpu()
    words = torch.full((len(args["exit_layer"]) + 5,), -1)
    places = torch.randperm(len(words), generator=torch.Generator().manual_seed(seed))
    words[places[: len(asked)]] = asked
    logits = make_logits(len(words), labels, dtype, device, seed)
    return {"logits": logits, "words": words.to(device), **args, "layer": 3, "max_prob": max_prob}


def assert_decides_right(ours, args, min_active=None):
    """Against the reference in fp64, exactly where rounding cannot have a say."""
    wide = {
        name: a.double() if torch.is_tensor(a) and a.is_floating_point() else a
        for name, a in args.items()
    }
    wide["uncertainty_"] = wide.pop("uncertainty")
    tolerance = 1e-12 if args["uncertainty"].dtype == torch.float64 else 2e-6
    u, left = (t.cpu() for t in ours)
    u_exact, left_exact = (t.cpu() for t in reference.exit_decision(**wide))
    torch.testing.assert_close(u.double(), u_exact, atol=tolerance, rtol=0, equal_nan=True)
    cu_words, window = args["cu_words"].cpu(), args["window"].cpu()
    largest = reference.window_max(u_exact, cu_words, window)
    limit = args["threshold"].cpu().repeat_interleave(cu_words.diff())
    clear = ~((largest - limit).abs() <= tolerance)
    assert clear.double().mean() > 0.9
    if min_active is not None:
        for b, (first, last) in enumerate(zip(cu_words[:-1], cu_words[1:], strict=True)):
            mine = left_exact[first:last]
            if (mine == 0).sum() < min(min_active[b], len(mine)):
                mine[mine == 0] = args["layer"]
    assert torch.equal(left[clear], left_exact[clear])


def test_vectors_with_gaps(device):
    args = make_args([5, 9], device=device)
    apart = {
        name: torch.stack([x, x + 1], -1)[..., 0] if torch.is_tensor(x) and x.dim() == 1 else x
        for name, x in args.items()
    }
    apart["window"] = args["window"][:1].expand(2)
    args["window"] = apart["window"].clone()
    assert all(map(torch.equal, exit_decision(**apart), exit_decision(**args)))


@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES], ids=str)
@pytest.mark.parametrize("max_prob", [False, True], ids=["entropy", "max_prob"])
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_exit_decision(lengths, max_prob, dtype, device):
    args = make_args(lengths, 9, dtype, device, max_prob=max_prob)
    if dtype == torch.float64:
        args["uncertainty"], args["threshold"] = (
            args["uncertainty"].double(),
            args["threshold"].double(),
        )
    u, left = exit_decision(**args)
    assert u.dtype == args["uncertainty"].dtype
    assert_decides_right((u, left), args)


@pytest.mark.parametrize("max_prob", [False, True], ids=["entropy", "max_prob"])
@pytest.mark.parametrize("labels", [1, 2, 44, 130])
def test_number_of_labels(labels, max_prob, device):
    args = make_args([7, 40, 1], labels, device=device, seed=1, max_prob=max_prob)
    assert_decides_right(exit_decision(**args), args)


@pytest.mark.parametrize("window", [0, 1, 31, 32, 33, 64, 99, 2**31, UNBOUNDED, 2**63 - 1])
@pytest.mark.parametrize("lonely", [0, 31, 50, 99])
def test_one_word_that_is_not_sure_keeps_its_window(window, lonely, device):
    args = make_args([100, 3], device=device)
    args["words"].fill_(-1)
    args["exit_layer"].zero_()
    args["uncertainty"].zero_()
    args["uncertainty"][lonely] = 0.9
    args["window"].fill_(window)
    args["threshold"].fill_(0.5)
    _, left = exit_decision(**args)
    near = (torch.arange(100) - lonely).abs() <= window
    assert left.tolist() == [0 if n else 3 for n in near.tolist()] + [3] * 3


@pytest.mark.parametrize("max_prob", [False, True], ids=["entropy", "max_prob"])
def test_nan_and_infinite_logits(max_prob, device):
    """NaN stays, but for an infinite threshold; a label that is ruled out adds nothing."""
    rows = [[NAN, 0, 0], [INF, 0, 0], [-INF, 0, 0], [-INF, -INF, 0], [-INF] * 3, [NAN] * 3, [0] * 3]
    args = make_args([7, 7], device=device, max_prob=max_prob)
    args["logits"] = torch.tensor(rows * 2, dtype=torch.float32, device=device)
    args["words"] = torch.arange(14, device=device)
    args["exit_layer"].zero_()
    args["window"].zero_()
    args["threshold"] = torch.tensor([1.5, INF], device=device)
    u, left = exit_decision(**args)
    half = 0.5 / (1 - 1 / 3) if max_prob else math.log(2) / math.log(3)
    expected = torch.tensor([NAN, NAN, half, 0, NAN, NAN, 1] * 2)
    torch.testing.assert_close(u.cpu(), expected, equal_nan=True)
    assert left.tolist() == [0, 0, 3, 3, 0, 0, 3] + [3] * 7


@pytest.mark.parametrize("seed", range(5))
def test_sentences_with_few_active_words_are_finished(seed, device):
    args = make_args([5, 0, 40, 1, 31, 2], device=device, seed=seed)
    none = torch.ones(6, dtype=torch.int64, device=device)
    for ours, expected in zip(
        exit_decision(**args, min_active=none), exit_decision(**args), strict=True
    ):
        assert torch.equal(ours, expected)
    few = torch.tensor([2, 3, 20, 5, 8, 1], device=device)
    assert_decides_right(exit_decision(**args, min_active=few), args, few.tolist())


def test_rows_beyond_the_count_are_not_read(device):
    args = make_args([5, 9], device=device)
    expected = exit_decision(**args)
    args["logits"] = F.pad(args["logits"], (0, 0, 0, 50), value=NAN)
    args["words"] = F.pad(args["words"], (0, 50), value=10**9)  # a store there would crash
    count = torch.tensor([len(args["words"]) - 50], device=device)
    for ours, other in zip(exit_decision(**args, count=count), expected, strict=True):
        assert torch.equal(ours, other)


def test_strided_logits_and_no_words(device):
    args = make_args([5, 9], device=device)
    expected = exit_decision(**args)
    args["logits"] = torch.stack([args["logits"]] * 2, -1)[..., 0]
    for ours, other in zip(exit_decision(**args), expected, strict=True):
        assert torch.equal(ours, other)
    u, left = exit_decision(**make_args([0, 0], device=device))
    assert len(u) == len(left) == 0


def make_step(lengths, d, labels, dtype, device, seed=0, first_layer=False, hears=False):
    """A layer's end: sentences of one to three pieces a word, between special tokens.

    Args:
        hears: the head tells neighbours; those that left have told them something before.
    """
    g = torch.Generator().manual_seed(seed)
    words = make_words(lengths, "cpu", seed)
    word_of_token, starts, sentence, w = [], [], [], 0
    for b, length in enumerate(lengths):
        pieces = [-1]
        for _ in range(length):
            pieces += [w] * int(torch.randint(1, 4, (), generator=g))
            w += 1
        pieces.append(-1)
        starts += [p != q for p, q in zip(pieces, [-1, *pieces], strict=False)]
        word_of_token += pieces
        sentence += [b] * len(pieces)
    word, sentence = torch.tensor(word_of_token), torch.tensor(sentence)
    left = words["exit_layer"]
    if first_layer:
        left.zero_()
        words["uncertainty"].zero_()
    for b, (first, last) in enumerate(
        zip(words["cu_words"][:-1], words["cu_words"][1:], strict=True)
    ):
        if b % 4 == 3:
            left[first:last] = 1  # a finished sentence
    stays = (word >= 0) & (left[word.clamp(min=0)] == 0)
    open_ = torch.zeros(len(lengths)).index_add_(0, sentence, stays.float()) > 0
    active = (stays | (word < 0) & open_[sentence]).nonzero()[:, 0]
    counts = torch.bincount(sentence[active], minlength=len(lengths))
    num_tokens, outputs = len(word), 3 * labels if hears else labels
    step = {
        "x": torch.randn(num_tokens, d, generator=g).to(dtype),
        "norm_weight": torch.randn(d, generator=g).to(dtype),
        "norm_bias": torch.randn(d, generator=g).to(dtype),
        "head_weight": (8 * d**-0.5 * torch.randn(outputs, d, generator=g)).to(dtype),
        "head_bias": torch.randn(outputs, generator=g).to(dtype),
        "active": F.pad(active, (0, num_tokens - len(active)), value=-(10**9)),
        "cu_active": F.pad(counts.cumsum(0), (1, 0)),
        "word_at": word.masked_fill(~torch.tensor(starts), -1),
        "max_length": int(torch.bincount(sentence).max()),
    }
    step["x"][len(active) :] = NAN
    if hears:
        step["said"] = torch.randn(num_tokens, outputs, generator=g).to(dtype)
        step["said"][:, :labels] = NAN  # of themselves they say nothing more
        step["said"][active] = NAN
        step["cu_tokens"] = F.pad(torch.bincount(sentence).cumsum(0), (1, 0))
    return {k: v.to(device) if torch.is_tensor(v) else v for k, v in (step | words).items()}


def run_step(step, **options):
    """The step with poisoned outputs; what it wrote, by name."""
    x, device = step["x"], step["x"].device
    num_tokens, d = x.shape
    hears = "said" in step
    _, stats = linear(
        x, torch.eye(d, device=device, dtype=x.dtype), count=step["cu_active"][-1:],
        want_stats=True, precision="ieee",
    )  # fmt: skip
    made = {
        "h": torch.full_like(x, NAN),
        "logits": x.new_full((num_tokens, len(step["head_weight"]) // (3 if hears else 1)), NAN),
        "token_layer": torch.full((num_tokens,), -1, device=device),
        "arrived": torch.zeros(len(step["window"]), dtype=torch.int32, device=device),
        "uncertainty": step["uncertainty"].clone(),
        "exit_layer": step["exit_layer"].clone(),
    }
    if hears:
        made["said"] = step["said"].clone()
    options = {"min_active": None, "layer": 3} | options
    exit_step_(norm_stats=stats, eps=1e-5, **(step | made | options))
    return made


def step_by_reference(step, dtype):
    """The same by name, in another dtype, with the uncertainties' kept."""
    wide = torch.promote_types(dtype, torch.float32)
    known = {"uncertainty", "threshold"}
    given = {
        name: value.to(wide if name in known else dtype)
        if torch.is_tensor(value) and value.is_floating_point()
        else value
        for name, value in step.items()
    }
    rows, labels = len(given["x"]), len(given["head_weight"]) // (3 if "said" in given else 1)
    given["uncertainty_"] = given.pop("uncertainty")
    del given["max_length"]
    made = reference.exit_step(
        **given,
        eps=1e-5,
        h=torch.full_like(given["x"], NAN),
        logits=given["x"].new_full((rows, labels), NAN),
        token_layer=torch.full((rows,), -1, device=given["x"].device),
        min_active=None,
        layer=3,
    )
    names = ("h", "logits", "token_layer", "uncertainty", "exit_layer")
    return dict(zip(names, made, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "labels, hears", [(1, False), (9, False), (44, False), (9, True), (85, True)]
)
@pytest.mark.parametrize(("lengths", "d"), [([1], 16), ([5, 0, 60, 20, 1], 40), ([7, 30], 150)])
def test_exit_step(lengths, d, labels, hears, dtype, device):
    step = make_step(lengths, d, labels, dtype, device, hears=hears)
    made = run_step(step)
    mine = step["active"][: step["cu_active"][-1]]
    truth, plain = step_by_reference(step, torch.float64), step_by_reference(step, dtype)
    for name in ("h", "logits"):
        assert_as_exact(made[name][mine], truth[name][mine], plain[name][mine], name=name)
    assert torch.equal(made["token_layer"], truth["token_layer"])
    others = torch.ones(len(step["x"]), dtype=torch.bool, device=device)
    others[mine] = False
    assert made["h"][others].isnan().all() and made["logits"][others].isnan().all()
    assert torch.equal(made["token_layer"], torch.where(others, -1, 3))
    assert not made["arrived"].any()
    names = ("uncertainty", "exit_layer", "cu_words", "window", "threshold")
    known = {name: step[name] for name in names}
    asked = {"logits": made["logits"][mine], "words": step["word_at"][mine]}
    # An empty or finished sentence has nothing to decide.
    assert_decides_right((made["uncertainty"], made["exit_layer"]), known | asked | {"layer": 3})


@pytest.mark.parametrize("hears", [False, True], ids=["", "hears"])
@pytest.mark.parametrize("max_prob", [False, True], ids=["entropy", "max_prob"])
def test_exit_step_decides_as_exit_decision(max_prob, hears, device):
    step = make_step([5, 0, 60, 20, 1], 40, 9, torch.float32, device, seed=2, hears=hears)
    few = torch.tensor([3, 1, 30, 1, 1], device=device)
    made = run_step(step, max_prob=max_prob, min_active=few)
    mine = step["active"][: step["cu_active"][-1]]
    u, left = exit_decision(
        made["logits"][mine], step["word_at"][mine], step["uncertainty"], step["exit_layer"],
        step["cu_words"], step["window"], step["threshold"], 3, max_prob, few,
    )  # fmt: skip
    torch.testing.assert_close(made["uncertainty"], u)
    assert torch.equal(made["exit_layer"], left)


def test_exit_step_decides_when_all_rows_are_known(device):
    """By the uncertainties of before, every word of a long sentence would leave."""
    step = make_step([60, 40], 40, 9, torch.float32, device, first_layer=True)
    step["window"].fill_(0)
    limit = run_step(step)["uncertainty"].median()
    step["threshold"].fill_(limit)
    made = run_step(step)
    assert ((made["exit_layer"] == 3) == (made["uncertainty"] < limit)).all()
    assert 0 < (made["exit_layer"] == 3).sum() < 100


@pytest.mark.parametrize("hears", [False, True], ids=["", "hears"])
def test_exit_step_without_a_decision(hears, device):
    step = make_step([5, 9], 16, 9, torch.float32, device, hears=hears)
    made, decided = run_step(step, decide=False), run_step(step)
    for name in ("uncertainty", "exit_layer"):
        assert torch.equal(made[name], step[name])
        assert not torch.equal(decided[name], step[name])
    for name in ("h", "logits", "token_layer"):
        torch.testing.assert_close(made[name], decided[name], equal_nan=True, atol=0, rtol=0)


def test_exit_step_where_no_token_can_leave(device):
    """The states, and nothing else."""
    step = make_step([5, 9], 16, 9, torch.float32, device)
    made, answered = run_step(step, decide=False, answer=False), run_step(step)
    torch.testing.assert_close(made["h"], answered["h"], equal_nan=True, atol=0, rtol=0)
    assert made["logits"].isnan().all() and (made["token_layer"] == -1).all()
    for name in ("uncertainty", "exit_layer"):
        assert torch.equal(made[name], step[name])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("hears", [False, True], ids=["", "hears"])
def test_exit_step_is_the_same_in_every_run(hears, device):
    step = make_step([200] * 64, 768, 44, torch.float16, device, hears=hears)
    first = run_step(step)
    for _ in range(50):
        for name, value in run_step(step).items():
            torch.testing.assert_close(value, first[name], equal_nan=True, atol=0, rtol=0)


def test_too_many_labels(device):
    step = make_step([3], 16, 257, torch.float32, device)
    with pytest.raises(ValueError, match="got 257 outputs of a head; expected at most 256"):
        run_step(step)
    step = make_step([3], 16, 9, torch.float32, device, hears=True)
    step["head_weight"], step["head_bias"] = step["head_weight"][:9], step["head_bias"][:9]
    made = {"logits": torch.zeros(len(step["x"]), 9, device=device)}
    with pytest.raises(ValueError, match="got 9 outputs of a head for 9 labels; .* three times"):
        run_step(step, **made)
