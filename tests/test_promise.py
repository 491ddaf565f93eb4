"""The promise holds as often as it says, and planted bugs are found to break it."""

import math

import numpy as np
import pytest

from tokenexit import promise
from tokenexit.calibrate import by_type
from tokenexit.promise import fixed_sequence, holds, least, needed, upper_bound

DRAWS, DELTA = 1000, 0.1
# Three standard deviations of how often what fails with probability DELTA fails in DRAWS.
TOO_OFTEN = DELTA + 3 * math.sqrt(DELTA * (1 - DELTA) / DRAWS)


def all_or_nothing(rng, risk, count):
    return (rng.random(count) < risk).astype(float)


def sentences(rng, risk, count):
    """Shares of words: 1 to 20 of them, each wrong with the same probability."""
    words = rng.integers(1, 21, count)
    return rng.binomial(words, risk) / words


def clusters(rng, risk, count):
    """A few sentences are very wrong, the others never: half of the words of every so many."""
    return 0.5 * all_or_nothing(rng, 2 * risk, count)


def spread(rng, risk, count):
    """Many values, none of them 0 or 1."""
    return rng.beta(0.5, 0.5 * (1 - risk) / risk, count)


KINDS = (all_or_nothing, sentences, clusters, spread)


def share_of_failures(kind, bound_of, risk=0.02, count=300):
    """How often the bound is not above what the losses were drawn with."""
    rng = np.random.default_rng(0)
    return sum(bound_of(kind(rng, risk, count)) < risk for _ in range(DRAWS)) / DRAWS


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("risk", [0.01, 0.1])
def test_the_bound_fails_as_seldom_as_promised(kind, risk):
    """By the test that the bound is made of: it holds just where the bound is below the risk."""
    rng = np.random.default_rng(1)
    failed = sum(holds(kind(rng, risk, 400), risk, 1 - DELTA) for _ in range(DRAWS))
    assert failed / DRAWS <= TOO_OFTEN


def test_bound_and_test_are_one():
    rng = np.random.default_rng(2)
    for kind in KINDS:
        losses = kind(rng, 0.03, 500)
        bound = upper_bound(losses, 0.9)
        assert losses.mean() < bound < 0.2
        assert holds(losses, bound + 1e-5, 0.9) and not holds(losses, bound - 1e-5, 0.9)
        assert upper_bound(losses, 0.99) > bound > upper_bound(losses, 0.5)


@pytest.mark.parametrize(
    "bug",
    [
        lambda losses: losses.mean(),
        lambda losses: losses.mean() + losses.std() / math.sqrt(len(losses)),
        lambda losses: upper_bound(losses, 1 - 5 * DELTA),
        lambda losses: upper_bound(losses, 1 - DELTA) / 2,
        lambda losses: upper_bound(np.sort(losses), 1 - DELTA),
    ],
    ids=["the mean", "a standard error above it", "another delta", "half of it", "sorted losses"],
)
def test_planted_bugs_fail_too_often(bug):
    assert share_of_failures(all_or_nothing, bug) > TOO_OFTEN


def share_passed(confidence, draws=5000):
    """How often a mean of 1/2 passes for less, by losses for which the bets are nearly exact."""
    rng = np.random.default_rng(8)
    losses = (rng.random((draws, 1000)) < 0.5).astype(float)
    return np.mean([holds(row, 0.5, confidence) for row in losses])


def test_a_doubled_delta_is_found():
    """It fails about twice as often: more often than promised, which the right one does not."""
    most = DELTA + 3 * math.sqrt(DELTA * (1 - DELTA) / 5000)
    assert DELTA / 3 < share_passed(1 - DELTA) <= most < share_passed(1 - 2 * DELTA)


def test_a_capital_of_one_over_delta_is_what_is_asked():
    """By the paper's formulas, one loss after the other: at 1 / delta it holds, below it does not.

    So no factor of delta, nor of a stake, can change without a test that tells.
    """
    rng = np.random.default_rng(9)
    for kind in KINDS:
        for count, confidence in ((60, 0.8), (300, 0.9)):
            losses, delta = kind(rng, 0.05, count), 1 - confidence
            total, squares, capital, most = 0.5, 0.25, 1.0, 0.0
            bound = upper_bound(losses, confidence)
            for seen, loss in enumerate(losses):
                stake = min(1, math.sqrt(2 * math.log(1 / delta) * (1 + seen) / (count * squares)))
                capital *= 1 + stake * (bound - loss)
                most = max(most, capital)
                total += loss
                squares += (loss - total / (2 + seen)) ** 2
            assert most == pytest.approx(1 / delta, rel=0.02)


def test_stakes_that_look_ahead_are_found(monkeypatch):
    rng = np.random.default_rng(3)
    monkeypatch.setattr(promise, "_stakes", lambda losses, confidence: 1 - losses)
    failed = sum(holds(all_or_nothing(rng, 0.5, 60), 0.5, 1 - DELTA) for _ in range(DRAWS))
    assert failed / DRAWS > TOO_OFTEN


def test_stakes_are_by_the_losses_before_them():
    rng = np.random.default_rng(7)
    losses = all_or_nothing(rng, 0.5, 200)
    stakes = promise._stakes(losses, 0.9)
    other = promise._stakes(np.append(losses[:100], 0.3 * losses[100:] + 0.2), 0.9)
    assert (stakes[:101] == other[:101]).all() and stakes[101] != other[101]
    assert stakes.min() > 0 and stakes.max() <= 1


RISKS = (0.002, 0.005, 0.008, 0.0201, 0.0201, 0.0201, 0.0201, 0.0201, 0.0201, 0.0201)


def wrongly_promised(choose):
    """How often a policy beyond the bound of 0.02 is promised, on a path of known risks."""
    rng = np.random.default_rng(4)
    wrong = 0
    for _ in range(DRAWS):
        path = [all_or_nothing(rng, risk, 400) for risk in RISKS]
        wrong += any(RISKS[i] > 0.02 for i in choose(path))
    return wrong / DRAWS


def test_a_path_is_walked_to_its_first_failure():
    assert wrongly_promised(lambda path: range(fixed_sequence(path, 0.02, 0.9))) <= TOO_OFTEN
    on = lambda path: [i for i, x in enumerate(path) if holds(x, 0.02, 0.9)]  # noqa: E731
    assert wrongly_promised(on) > TOO_OFTEN  # a test that goes on after it is found
    asked = []

    def path():
        for step in ([0.0] * 500, [1.0] * 500, [0.0] * 500):
            asked.append(step)
            yield step

    assert fixed_sequence(path(), 0.02, 0.9) == 1 and len(asked) == 2


def test_each_of_several_kinds_has_to_hold():
    """What left early is wrong too often, in a fifth of the sentences: all together hide it."""
    rng, found = np.random.default_rng(10), np.zeros(2)
    for _ in range(DRAWS):
        every = all_or_nothing(rng, 0.004, 800)
        early = all_or_nothing(rng, 0.0201, 160)
        found += [fixed_sequence([x], 0.02, 0.9) for x in (every, (every, early))]
    assert found[0] / DRAWS > 0.8 and found[1] / DRAWS <= TOO_OFTEN
    assert fixed_sequence([([0.0] * 500, [0.0] * 500), ([0.0] * 500, [1.0] * 500)], 0.02, 0.9) == 1


TYPES = {"B-PER": "PER", "I-PER": "PER", "B-LOC": "LOC"}
# Of words of LOC, which a third of the sentences have: in the second step beyond the bound of 0.02.
PATH_OF_TYPES = ((0.001, 0.001), (0.002, 0.0205))


def typed_step(rng, of_per, of_loc, count=700):
    """Labels as they should be, and with known shares of each type's words wrong."""
    whole, labels = [], []
    for rare in rng.random(count) < 1 / 3:
        names = ["O"] * int(rng.integers(3, 9)) + ["B-PER", "I-PER"] * int(rng.integers(0, 3))
        names += ["B-LOC"] * int(rng.integers(1, 4)) * bool(rare)
        risks = [{"P": of_per, "L": of_loc}.get(x[2:3], 0.0) for x in names]
        whole.append(names)
        labels.append(np.where(rng.random(len(names)) < risks, "O", names).tolist())
    return labels, whole


def types_wrongly_promised(kinds, test=fixed_sequence, draws=120):
    """How often the second step is promised, where words of LOC change too often."""
    rng, wrong = np.random.default_rng(11), 0
    for _ in range(draws):
        path = [kinds(*typed_step(rng, *risks)) for risks in PATH_OF_TYPES]
        wrong += test(path, 0.02, 0.9) > 1
    return wrong / draws


def each_type(labels, whole):
    return tuple(by_type(labels, whole, TYPES).values())


def test_each_type_keeps_the_bound_without_a_correction_for_their_number():
    most = DELTA + 3 * math.sqrt(DELTA * (1 - DELTA) / 120)
    assert types_wrongly_promised(each_type) <= most
    rng, passed = np.random.default_rng(12), 0  # and it is not that nothing ever passes
    for _ in range(20):
        passed += fixed_sequence([each_type(*typed_step(rng, 0.001, 0.001))], 0.02, 0.9)
    assert passed > 10


def pooled(labels, whole):
    """Of all words that have a type."""
    return tuple(by_type(labels, whole, dict.fromkeys(TYPES, "any")).values())


def of_all_words(labels, whole):
    """The share of a type's wrong words among all words of the sentence."""
    rows = list(zip(labels, whole, strict=True))
    return tuple(
        np.array([np.mean([a != b and TYPES.get(b) == kind for a, b in zip(*r)]) for r in rows])  # noqa: B905
        for kind in ("PER", "LOC")
    )


def sentences_without(labels, whole):
    """A sentence without the type counts as one without a fault."""
    return tuple(np.pad(x, (0, len(whole) - len(x))) for x in each_type(labels, whole))


def any_type(path, bound, confidence):
    """A step passes if one of its types does."""
    return max(fixed_sequence(x, bound, confidence) for x in zip(*path, strict=True))


@pytest.mark.parametrize(
    ("kinds", "test"),
    [
        (pooled, fixed_sequence),
        (of_all_words, fixed_sequence),
        (sentences_without, fixed_sequence),
        (each_type, any_type),
    ],
    ids=["all types together", "of all words", "sentences without", "any type"],
)
def test_bugs_in_the_promise_of_types_are_found(kinds, test):
    assert types_wrongly_promised(kinds, test, draws=25) > 0.3


def test_power():
    """At half the bound, 500 sentences do about half of the time, and 1,000 nearly always."""
    rng = np.random.default_rng(5)

    def share(count, risk=0.005):
        return np.mean([holds(sentences(rng, risk, count), 0.01, 0.9) for _ in range(200)])

    assert 0.4 < share(500) and share(1000) > 0.8 and share(200) == 0


def test_how_many_would_do():
    few = needed(0.01, 0.9)
    assert holds(np.zeros(few), 0.01, 0.9) and not holds(np.zeros(few - 1), 0.01, 0.9)
    assert math.log(0.1) / math.log(0.99) <= few < 320  # what no test can do with less
    rng = np.random.default_rng(6)
    some = sentences(rng, 0.005, 20_000)
    number = needed(0.01, 0.9, some)
    assert few < number < 1000
    share = np.mean([holds(rng.choice(some, number), 0.01, 0.9) for _ in range(200)])
    assert 0.2 < share < 0.95
    assert needed(0.01, 0.9, sentences(rng, 0.02, 20_000)) is None
    assert needed(0.01, 0.9, np.full(10, 0.01 - 1e-9)) is None


def test_what_a_million_would_not_show_is_told():
    assert least(0.01, 0.9) == needed(0.01, 0.9)
    with pytest.raises(ValueError, match="got 1e-07 to promise with a confidence of 0.9; expected"):
        least(1e-7, 0.9)


def test_all_lost_is_no_evidence():
    assert not holds(np.ones(50), 0.5, 0.9)
    assert upper_bound(np.ones(50), 0.9) == 1
    assert upper_bound([0.0], 0.9) > 0.8
    assert holds([*[0.0] * 300, 1.0, *[0.0] * 300], 0.02, 0.9)  # a loss of 1 takes not all


@pytest.mark.parametrize(
    ("losses", "bound", "message"),
    [
        ([], 0.1, "at least one"),
        ([[0.1]], 0.1, r"shape \(1, 1\)"),
        ([0.1, 1.5], 0.1, "from 0.1 to 1.5"),
        ([-0.1], 0.1, "expected values in"),
        ([math.nan], 0.1, "nan"),
        ([0.1], 0.0, "bound is 0.0; expected a number between 0 and 1"),
        ([0.1], 1, "bound is 1"),
        ([0.1], math.nan, "bound is nan"),
    ],
)
def test_what_no_losses_are_is_refused(losses, bound, message):
    with pytest.raises(ValueError, match=message):
        holds(losses, bound, 0.9)
    if losses == [0.1]:
        with pytest.raises(ValueError, match="confidence is"):
            upper_bound(losses, bound)
