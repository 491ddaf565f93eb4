"""Which policy: thresholds from a target speed, from a largest loss, or from a promise."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import count
from operator import attrgetter
from pathlib import Path
from statistics import fmean, median
from typing import TYPE_CHECKING

import numpy as np
import torch

from tokenexit import flops, promise
from tokenexit.dial import Dial, Speed, percent
from tokenexit.evaluate import (
    Outcome,
    check_annotated,
    check_timing_runs,
    evaluate,
    tag_windows,
    time_policies,
)
from tokenexit.int8 import dtype_of
from tokenexit.models.tagger import Tagger
from tokenexit.policy import ExitPolicy
from tokenexit.reference import uncertainty
from tokenexit.schedule import Schedule, simulate_exits
from tokenexit.text.encoding import Window, merge
from tokenexit.text.scoring import score, shown, types

if TYPE_CHECKING:
    from datasets import Dataset

THRESHOLDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.04, 0.07, 0.1,
              0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.7)  # fmt: skip
WINDOWS = (0, 1, 2, 4)
GROWTHS = (1.0, 1.5, 2.0)
CRITERIA = ("entropy", "max_prob")
CHEAP = 1_000_000  # words to be tagged with real exits, all policies together
# Finer ones, and more cautious, as a promise is kept by the last step of a path before it breaks.
FINE = tuple(float(f"{t:.2g}") for t in np.geomspace(1e-4, 0.7, 30))
STEPS = 24  # of a path, at most
TIMED_SENTENCES = 200
_MOST_FOR_PATH = 600

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Point:
    """A policy, its score and its speed-up in multiply-adds."""

    policy: ExitPolicy
    score: float
    speedup: float

    def to_dict(self) -> dict:
        """JSON-ready."""
        return {
            "policy": self.policy.to_dict(),
            "name": str(self.policy),
            "score": self.score,
            "speedup": self.speedup,
        }


@dataclass(frozen=True)
class Calibration:
    """Result of `calibrate`.

    Attributes:
        metric: what the scores are, e.g. "entity_f1".
        full_depth: the point of no exits.
        simulated: every policy tried, by speed-up, its exits told from full-depth logits.
        verified: those run with real exits, by speed-up.
        chosen: the one of `verified` that was asked for.
        dial: of a promise, the speeds and what was promised.
        needed: of a promise that no exits could be given, about how many sentences would do; None
            if no number would, or exits are promised.
        original: score of the tagger that the loss is measured against; None: of full depth.
    """

    metric: str
    full_depth: Point
    simulated: list[Point]
    verified: list[Point]
    chosen: Point
    dial: Dial | None = None
    needed: int | None = None
    original: float | None = None

    def to_dict(self) -> dict:
        """All of it, JSON-ready."""
        return {
            "metric": self.metric,
            **({} if self.original is None else {"original": self.original}),
            "full_depth": self.full_depth.to_dict(),
            "chosen": self.chosen.to_dict(),
            "verified": [p.to_dict() for p in self.verified],
            "simulated": [p.to_dict() for p in self.simulated],
            **({} if self.dial is None else {"dial": self.dial.to_dict()}),
        }


def policy_grid(
    base: ExitPolicy | None = None,
    windows: Iterable[int] = WINDOWS,
    thresholds: Iterable[float] = THRESHOLDS,
    sentence: bool = True,
    growths: Iterable[float] = GROWTHS,
    criteria: Iterable[str] | None = None,
) -> list[ExitPolicy]:
    """Policies to try: every window with every threshold, and sentence exit with every one.

    Args:
        base: its schedule, copy and neighbors are those of all.
        thresholds: of the second layer, where they grow.
        growths: see `ExitPolicy`; not used where the schedule of `base` is "doubling".
        criteria: None: that of `base`.
    """
    base = (base or ExitPolicy()).replace(threshold=0.0, growth=1.0)
    growths, thresholds = (growths if base.schedule == "constant" else (1.0,)), [*thresholds]
    bases = [base.replace(level="token", window=window) for window in windows]
    bases += [base.replace(level="sentence")] if sentence else []
    return [
        each.replace(threshold=t / growth, growth=growth, criterion=criterion)
        for criterion in criteria or (base.criterion,)
        for growth in growths
        for each in bases
        for t in thresholds
    ]


def promise_grid(
    base: ExitPolicy | None = None,
    growths: Iterable[float] = GROWTHS,
    criteria: Iterable[str] = CRITERIA,
) -> list[ExitPolicy]:
    """Policies to take the path of a promise from; arguments are those of `policy_grid`.

    Words leave by themselves, with a window of 1 or more. Without one, and as whole sentences, they
    look better on text that classifiers learnt from than they are, and one step that comes out
    badly ends the promise.
    """
    windows = [window for window in WINDOWS if window]
    return policy_grid(base, windows, FINE, False, growths, criteria)


def _to_try(policies: Iterable[ExitPolicy] | None, grid=policy_grid) -> list[ExitPolicy]:
    """The policies, or those of a grid."""
    policies = grid() if policies is None else list(policies)
    if not policies:
        raise ValueError("got no policies; expected at least one")
    return policies


def calibrate(
    tagger: Tagger,
    data: Dataset,
    *,
    target_speedup: float | None = None,
    max_loss: float | None = None,
    policies: Sequence[ExitPolicy] | None = None,
    verify: int | None = None,
    metric: str = "auto",
    progress: Progress = lambda what, done, total: None,
    max_disagreement: float | None = None,
    confidence: float = 0.9,
    timing_runs: int = 0,
    original: Tagger | None = None,
    per_layer: bool = False,
    per_type: bool | Sequence[str] = False,
) -> Calibration:
    """Sweep policies on development data and pick one.

    One full-depth pass gives every layer's logits; from these each policy's exits are simulated
    (as if tokens that left went on to be computed). Then policies are run with real exits, and the
    best of these is chosen: all of them where that is cheap, which it is up to `CHEAP` words in
    all; else those that no other beats in simulation, and after them every one that would be better
    than the best so far if simulation was as wrong about it as about any before.

    Args:
        tagger: its model's policy is not changed.
        data: annotated sentences that the model was not trained on.
        target_speedup: pick the best score among policies at least this fast (multiply-adds).
        max_loss: pick the fastest policy that loses at most this much of the full-depth score,
            in the score's units: 0.005 is half a point of F1. The default, with 0.005.
        policies: to try; None for `policy_grid` with both criteria.
        verify: at most so many run with real exits, the likeliest first. None: no limit.
        metric: see `tokenexit.text.scoring.score`.
        progress: called with (what, done, total).
        max_disagreement, confidence, per_layer, per_type, timing_runs: in place of the targets, a
            promise for text without labels, see `make_dial`, which says how it is found. Full depth
            is chosen where every policy with exits disagrees too much.
        original: the tagger that this one was before it was trained to exit: a loss is of its
            score, a promise about its labels, at full depth. None: full depth of this one.

    Raises:
        ValueError: several targets; what is of a promise without its bound, or a metric with it; a
            target that no policy reaches; no sentences or labels, or no entity among them;
            classifiers that were never trained; too few sentences for the promise; an original and
            a target speed-up.
    """
    targets = {
        "target_speedup": target_speedup,
        "max_loss": max_loss,
        "max_disagreement": max_disagreement,
    }
    if len(given := [name for name, value in targets.items() if value is not None]) > 1:
        raise ValueError(f"got both {' and '.join(given)}; expected one of them")
    if original is not None and target_speedup is not None:
        raise ValueError("got original with target_speedup; expected a loss or a disagreement")
    if max_disagreement is None and (per_layer or per_type is not False or timing_runs):
        raise ValueError(
            "got per_layer, per_type or timing_runs without max_disagreement, whose promise they "
            "are of"
        )
    if max_disagreement is not None:
        if verify is not None:
            raise ValueError(f"got verify {verify} with max_disagreement, which runs all of a path")
        if metric != "auto":
            raise ValueError(f"got metric {metric!r} with max_disagreement, which counts labels")
        found = make_dial(
            tagger,
            data["words"],
            max_disagreement,
            confidence,
            reference=original and _whole(original, data["words"]),
            policies=policies,
            per_layer=per_layer,
            per_type=per_type,
            timing_runs=timing_runs,
            progress=progress,
        )
        if found.needed is not None:
            raise ValueError(
                f"{len(data['words'])} sentences are too few to promise that fewer than "
                f"{percent(max_disagreement, 2)} of the labels change with a confidence of "
                f"{confidence:g}; about {found.needed} would do, if they are as these"
            )
        return found
    if target_speedup is None and max_loss is None:
        max_loss = 0.005
    if target_speedup is not None and not target_speedup >= 1:  # NaN neither
        raise ValueError(f"target_speedup is {target_speedup}; expected 1 or more")
    if max_loss is not None and not max_loss >= 0:
        raise ValueError(f"max_loss is {max_loss}; expected 0 or more")
    if verify is not None and verify < 1:
        raise ValueError(f"verify is {verify}; expected 1 or more")
    metric = check_annotated(tagger, data, metric)
    if metric == "entity_f1" and not any(x != "O" for labels in data["labels"] for x in labels):
        raise ValueError(
            "the data has no entity, only the label 'O': its F1 is 0 whatever leaves where; "
            "expected sentences with entities, or the metric accuracy"
        )
    _check_trained(tagger)
    known, found = tagger.model.config.id2label.values(), {x for row in data["labels"] for x in row}
    if not found.intersection(known):
        raise ValueError(
            f"the data has the labels {shown(sorted(found, key=str))}, of which the tagger knows "
            f"none; expected some of {shown([*known])}"
        )
    policies = _to_try(policies, partial(policy_grid, criteria=CRITERIA))

    sweep = Sweep(tagger, data, metric)
    full, theirs = sweep.point(ExitPolicy.never()), None
    if tagger.decoding != "argmax":  # of which simulation knows nothing
        result = evaluate(tagger, data, ExitPolicy.never(), metric=metric)
        full = Point(result.policy, result.score, 1.0)
    if original is not None:
        labels = _whole(original, data["words"])
        theirs = score(sweep.gold, labels, sweep.metric)["score"]
    simulated = []
    for number, policy in enumerate(policies, 1):
        simulated.append(sweep.point(policy))
        progress("simulate", number, len(policies))
    simulated.sort(key=lambda p: p.speedup)

    verified: dict[ExitPolicy, Point] = {}

    def meets(point: Point) -> bool:
        if target_speedup is not None:
            return point.speedup >= target_speedup
        return point.score >= (full.score if theirs is None else theirs) - max_loss

    def preference(point: Point) -> tuple[float, float]:
        if target_speedup is not None:
            return point.score, point.speedup
        return point.speedup, point.score

    def likely(point: Point) -> tuple:
        """What meets the target by preference, what does not by how near it comes."""
        met, wanted = meets(point), preference(point)
        return met, wanted if met else wanted[::-1]

    def good() -> list[Point]:
        return [point for point in (full, *verified.values()) if meets(point)]

    def expected(summary: Callable[[list[float]], float]) -> list[Point]:
        """What is not verified, moved by as much as simulation was wrong so far."""
        pairs = [(p, verified[p.policy]) for p in simulated if p.policy in verified]
        score = summary([0.0, *(real.score - p.score for p, real in pairs)])
        speed = summary([1.0, *(real.speedup / p.speedup for p, real in pairs)])
        return [
            Point(p.policy, p.score + score, p.speedup * speed)
            for p in simulated
            if p.policy not in verified
        ]

    def better() -> list[Point]:
        """What could be chosen if simulation was as wrong about it as about any so far."""
        best = max(map(preference, good()), default=(0.0, 0.0))
        return [p for p in expected(max) if meets(p) and preference(p) > best]

    cheap = len(policies) * sum(map(len, data["words"])) <= CHEAP
    first = {p.policy for p in (simulated if cheap else pareto_front(simulated))}
    most = len(policies) if verify is None else verify
    while len(verified) < most:
        queue = [p for p in expected(fmean) if p.policy in first] or better()
        if not queue:
            break
        policy = max(queue, key=likely).policy
        real = evaluate(tagger, data, policy, metric=metric)
        verified[policy] = Point(policy, real.score, real.flops_speedup)
        progress("verify", len(verified), min(most, len(verified) + len(queue) - 1))
    if not good() and target_speedup is None:
        best = max((*verified.values(), full), key=lambda p: p.score)
        raise ValueError(
            f"no policy scores {theirs - max_loss:.4f}, {max_loss:g} below the original; the best "
            f"verified is {best.policy} with {best.score:.4f}"
        )
    if not good():
        fastest = max((*verified.values(), full), key=lambda p: p.speedup)
        raise ValueError(
            f"no policy reaches a speed-up of {target_speedup:g}; the fastest verified is "
            f"{fastest.policy} with {fastest.speedup:.2f} at a score of {fastest.score:.4f}"
        )
    return Calibration(
        metric=sweep.metric,
        full_depth=full,
        simulated=simulated,
        verified=sorted(verified.values(), key=lambda p: p.speedup),
        chosen=max(good(), key=preference),
        original=theirs,
    )


def make_dial(
    tagger: Tagger,
    sentences: Sequence[Sequence[str]],
    max_disagreement: float = 0.01,
    confidence: float = 0.9,
    *,
    reference: Sequence[Sequence[str]] | None = None,
    known: Sequence[Sequence[str]] | None = None,
    known_reference: Sequence[Sequence[str]] | None = None,
    policies: Sequence[ExitPolicy] | None = None,
    per_layer: bool = False,
    per_type: bool | Sequence[str] = False,
    timing_runs: int = 0,
    seed: int = 0,
    progress: Progress = lambda what, done, total: None,
) -> Calibration:
    """Find a path of policies from cautious to bold, and how far it may be promised; no labels.

    The sentences are shuffled. On three tenths of them (600 at most) policies are simulated, and
    the best are run: this gives the path. Then each step of it is run on all the others, which
    nothing was chosen by. The loss of a sentence is the share of its words whose label differs from
    that of full depth. The steps are tested in their order, up to the first that fails: with
    probability `confidence`, of all that pass the expected loss is below `max_disagreement`, for
    sentences from the source that these are independent draws from.

    Args:
        tagger: its model's policy is not changed.
        sentences: lists of words that the model was not trained on; those without a word are left
            out.
        reference: for each sentence the labels that count as right, as those of another model.
            None: the tagger's own at full depth.
        known, known_reference: sentences to find the path with, and their labels, such as those
            that classifiers learnt from; then all others test it. None: three tenths, as above.
        policies: to take the path from: of those that share criterion, copy and neighbors with the
            fastest that may keep the bound. None: `promise_grid`.
        per_layer: promise the same of the words that left at or before each layer by themselves, so
            that bad exits that come early do not hide behind good ones that come late (Ringel et
            al., arXiv 2402.00857). Layers by which words of too few sentences left are not held to
            it; theirs count at the next.
        per_type: promise the same of the words of each type by themselves, by the labels that count
            as right: of "PER", of those that are "B-PER" or "I-PER" there. True: of each type that
            the tagger knows; or the names of some. Each is tested at the full confidence, at each
            step of the path: for a step to be promised wrongly, one type that is wrong there has to
            pass, which it does with probability 1 - confidence at most, however many there are.
        timing_runs: measure the wall clock of each step, over 200 sentences, so often.
        seed: of the shuffling.
        progress: called with (what, done, total).

    Returns:
        The calibration, with its `dial`. The score of a point is one minus its mean loss. Chosen is
        the fastest that is promised, else full depth; then `needed` says how many sentences would
        do.

    Raises:
        ValueError: a bound or a confidence that is not between 0 and 1; so few sentences, or so few
            with a type, that nothing could be promised even if no label changed; a type that the
            tagger does not know; classifiers never trained.
    """
    promise.check_share("max_disagreement", max_disagreement)
    check_timing_runs(timing_runs)
    if (known is not None and reference is not None) != (known_reference is not None):
        raise ValueError("expected known_reference if known and reference are given, and only then")
    for its, labels in ((sentences, reference), (known, known_reference)):
        if labels is not None and len(labels) != len(its):
            raise ValueError(f"got labels of {len(labels)} sentences for {len(its)} of them")
    least = promise.least(max_disagreement, confidence)
    _check_trained(tagger)
    type_of = chosen_types(tagger, per_type)
    kept = [i for i, words in enumerate(sentences) if len(words)]

    def given(tested: int) -> int:
        """Of how many sentences so many test the path."""
        return next(n for n in count(tested) if n - used(n) >= tested)

    used = for_path if known is None else lambda count: 0
    if len(kept) - used(len(kept)) < least:
        enough = given(least)
        raise ValueError(
            f"got {len(kept)} sentences with words; expected at least {enough}: fewer do not show, "
            f"with a confidence of {confidence:g}, that less than {percent(max_disagreement, 2)} "
            "of labels change, even if none does"
        )
    order = torch.randperm(len(kept), generator=torch.Generator().manual_seed(seed), device="cpu")
    kept = [kept[i] for i in order.tolist()]
    words, cut = [list(sentences[i]) for i in kept], for_path(len(kept))
    labels = None if reference is None else [list(reference[i]) for i in kept]
    if known is not None:
        first = [i for i, its_words in enumerate(known) if len(its_words)][:_MOST_FOR_PATH]
        if not first:
            raise ValueError("known has no sentence with words; expected one or more, or None")
        words, cut = [list(known[i]) for i in first] + words, len(first)
        if labels is not None:
            labels = [list(known_reference[i]) for i in first] + labels
    policies = _to_try(policies, promise_grid)
    whole = labels or _whole(tagger, words)
    check_types(whole[cut:], type_of, max_disagreement, confidence, given)
    data = {"words": words[:cut], "labels": whole[:cut]}
    sweep = Sweep(tagger, data, "accuracy")
    simulated = []
    for number, policy in enumerate(policies, 1):
        simulated.append(sweep.point(policy))
        progress("simulate", number, len(policies))
    simulated.sort(key=lambda p: p.speedup)
    # Sentences at several speeds go through the model together, so these share the best's kind.
    good = [point for point in simulated if point.score >= 1 - max_disagreement]
    best = (good or simulated)[-1].policy
    simulated = [p for p in simulated if p.policy.kind == best.kind]
    plain = {"level": "token", "schedule": "constant", "min_active": 1, "growth": 1.0}
    full = best.replace(threshold=0.0, **plain)
    likely = _by_speed([p for p in simulated if p.score >= 1 - max(0.1, 10 * max_disagreement)])
    tried = []
    for number, point in enumerate(likely, 1):
        losses, real = _run(tagger, sweep.windows, point.policy, whole[:cut])
        tried.append(Point(point.policy, 1 - losses.mean(), real.speedup))
        progress("find the path", number, len(likely))
    path = [full, *(p.policy for p in _rising(tried, max_disagreement / 2) if p.speedup > 1)]

    windows, tested, losses = tagger.windows(words[cut:]), [], []
    for number, policy in enumerate(path, 1):
        its_losses, real = _run(tagger, windows, policy, whole[cut:])
        of_types = by_type(real.labels, whole[cut:], type_of)
        kinds = (its_losses, *(_by_layer(real, whole[cut:], least) if per_layer else ()))
        kinds += tuple(of_types.values())
        losses.append(kinds)
        itself = reference is None and policy == full  # which agrees by definition
        tested.append(
            Speed(
                policy=policy,
                speedup=real.speedup,
                disagreement=float(its_losses.mean()),
                bound=0.0 if itself else max(promise.upper_bound(x, confidence) for x in kinds),
                mean_exit_layer=fmean(layer for exits in real.exits for layer in exits),
                by_type={name: float(x.mean()) for name, x in of_types.items()} or None,
            )
        )
        progress("test the path", number, len(path))
    passed = promise.fixed_sequence(losses, max_disagreement, confidence)
    needed = None
    if passed <= 1 and len(path) > 1:  # the first two have to pass for the second to be promised
        kinds = [x for its in losses[:2] for x in its]
        each = [promise.needed(max_disagreement, confidence, x) for x in kinds]
        if None not in each:  # words leave early in a part of the sentences only
            scaled = zip(each, kinds, strict=True)
            needed = given(max(math.ceil(n * len(losses[0][0]) / len(x)) for n, x in scaled))
    if timing_runs:
        some = [window for window in windows if window.sentence < TIMED_SENTENCES]
        times = time_policies(tagger, some, path, timing_runs)
        tested = [
            replace(one, wall_speedup=median(a / b for a, b in zip(times[0], its, strict=True)))
            for one, its in zip(tested, times, strict=True)
        ]
    points = [Point(one.policy, 1 - one.disagreement, one.speedup) for one in tested]
    return Calibration(
        metric="agreement",
        full_depth=points[0],
        simulated=simulated,
        verified=points[1:],
        chosen=points[max(passed - 1, 0)],
        dial=Dial(
            speeds=tuple(tested),
            promised=passed - 1 if passed else None,
            max_disagreement=max_disagreement,
            confidence=confidence,
            sentences=len(words) - cut,
            dtype=dtype_of(tagger.model),
            reference="full depth" if reference is None else "the original",
            per_layer=per_layer,
            per_type=tuple(dict.fromkeys(type_of.values())),
        ),
        needed=needed,
    )


def _whole(tagger: Tagger, sentences: Sequence[Sequence[str]]) -> list[list[str]]:
    """Labels at full depth, of an original that has to know them."""
    if heads := tagger.model.untrained_heads(ExitPolicy.never()):
        raise ValueError(
            f"the original's classifier, after layer {heads[-1]}, was never trained; expected the "
            "tagger that this one was made from"
        )
    return tag_windows(tagger, tagger.windows(sentences), ExitPolicy.never()).labels


def _check_trained(tagger: Tagger):
    if heads := tagger.model.untrained_heads():
        raise ValueError(
            f"the classifiers of layers {', '.join(map(str, heads))} were never trained; expected "
            "a tagger with all of them trained (`tokenexit train`, `tokenexit adapt`)"
        )


def for_path(sentences: int) -> int:
    """How many of the sentences the path is chosen by."""
    return max(1, min(3 * sentences // 10, _MOST_FOR_PATH))


def _run(
    tagger: Tagger, windows: Sequence[Window], policy: ExitPolicy, whole: Sequence[Sequence[str]]
) -> tuple[np.ndarray, Outcome]:
    """Of each sentence the share of words with another label than they should have."""
    outcome = tag_windows(tagger, windows, policy)
    losses = [
        fmean(a != b for a, b in zip(labels, wanted, strict=True))
        for labels, wanted in zip(outcome.labels, whole, strict=True)
    ]
    return np.array(losses), outcome


def _by_layer(outcome: Outcome, whole: Sequence[Sequence[str]], least: int) -> Iterator[np.ndarray]:
    """For each layer below the last: of the words that left by it, as `_run`; where any did.

    Layers with fewer than `least` such sentences are left out.
    """
    for layer in range(1, max(map(max, outcome.exits))):
        losses = []
        for labels, wanted, exits in zip(outcome.labels, whole, outcome.exits, strict=True):
            rows = zip(labels, wanted, exits, strict=True)
            if wrong := [a != b for a, b, left in rows if left <= layer]:
                losses.append(fmean(wrong))
        if len(losses) >= least:
            yield np.array(losses)


def chosen_types(tagger: Tagger, per_type: bool | Sequence[str]) -> dict[str, str]:
    """Of labels their types, see `make_dial`; empty for False.

    Raises:
        TypeError: neither a truth value nor names.
        ValueError: a type that the tagger's labels do not tell of.
    """
    if per_type is False:
        return {}
    known = types(tagger.model.config.id2label.values())
    if per_type is True:
        return known
    if isinstance(per_type, str) or not isinstance(per_type, Sequence):
        raise TypeError(f"per_type is {per_type!r}; expected True, False or a list of types")
    if odd := [name for name in per_type if name not in known.values()]:
        raise ValueError(
            f"per_type has {shown(odd)}; expected types that the tagger's labels tell of: "
            f"{shown(sorted(set(known.values())), 20)}"
        )
    return {label: name for label, name in known.items() if name in per_type}


def check_types(
    whole: Sequence[Sequence[str]],
    type_of: Mapping[str, str],
    max_disagreement: float,
    confidence: float,
    given: Callable[[int], int],
):
    """Raise ValueError unless each type stands in as many sentences as its promise wants at least.

    Args:
        whole: labels that count as right, of the sentences that test the path.
        type_of: of `chosen_types`.
        given: of how many sentences so many would test the path.
    """
    least = promise.least(max_disagreement, confidence)
    found = {name: len(losses) for name, losses in by_type(whole, whole, type_of).items()}
    few = []
    for name in sorted(set(type_of.values())):
        if (its := found.get(name, 0)) < least:
            enough = f", about {given(math.ceil(least * len(whole) / its))} would do" if its else ""
            few.append(f"{name} ({its}{enough})")
    if few:
        raise ValueError(
            f"got too few sentences with a word of {', '.join(few)}; expected at least {least} of "
            f"the {len(whole)} that are tested, for a promise of that type below "
            f"{percent(max_disagreement, 2)} with a confidence of {confidence:g}, even if no label "
            "changes; give more text, or name the types that are to be promised"
        )


def by_type(
    labels: Sequence[Sequence[str]], whole: Sequence[Sequence[str]], type_of: Mapping[str, str]
) -> dict[str, np.ndarray]:
    """For each type, of the words that have it by `whole`, the share with another label.

    One number for each sentence that has such words; a type that none has is left out.
    """
    losses = {}
    for its_labels, wanted in zip(labels, whole, strict=True):
        wrong = {}
        for a, b in zip(its_labels, wanted, strict=True):
            if b in type_of:
                wrong.setdefault(type_of[b], []).append(a != b)
        for name, its in wrong.items():
            losses.setdefault(name, []).append(fmean(its))
    return {name: np.array(losses[name]) for name in sorted(losses)}


def _rising(points: Iterable[Point], margin: float) -> list[Point]:
    """By speed-up; without those that a faster one beats by more than chance, a margin of score."""
    kept, best = [], -np.inf
    for point in sorted(points, key=lambda p: (p.speedup, p.score), reverse=True):
        if point.score >= best - margin:
            kept.append(point)
        best = max(best, point.score)
    return kept[::-1]


def _by_speed(points: Iterable[Point]) -> list[Point]:
    """The best of each of `STEPS` ranges of speed-up above 1, equal in ratio; at most so many.

    Not only those that none beats: on little text many cautious ones look no better than a bold
    one, and a promise may need them.
    """
    points = [point for point in points if point.speedup > 1.01]
    if not points:
        return []
    width = math.log(max(point.speedup for point in points)) / STEPS
    best = {}
    for point in points:
        step = min(int(math.log(point.speedup) / width), STEPS - 1)
        rank = point.score, point.speedup
        if step not in best or rank > (best[step].score, best[step].speedup):
            best[step] = point
    return [best[step] for step in sorted(best)]


def pareto_front(points: Iterable, speed: str = "speedup") -> list:
    """Points that no other beats in both score and speed-up, by speed-up.

    Args:
        points: with a `score`, and the speed-up by that name.
    """
    front = []
    for point in sorted(points, key=attrgetter(speed, "score"), reverse=True):
        if not front or point.score > front[-1].score:
            front.append(point)
    return front[::-1]


class Sweep:
    """Full-depth logits of all words, and what a policy would make of them."""

    def __init__(self, tagger: Tagger, data: Mapping[str, Sequence], metric: str):
        self.config = tagger.model.config
        self.gold = list(data["labels"])
        self.metric = metric
        self.windows: list[Window] = tagger.windows(data["words"])
        self.names = [self.config.id2label[i] for i in range(self.config.num_labels)]
        found = [None] * len(self.windows)
        for indices, output, firsts in tagger.run(
            self.windows, ExitPolicy.never(), output_layer_logits=True
        ):
            for row, index in enumerate(indices):
                logits = output.layer_logits[:, row, firsts[row]].cpu()  # [L, n, C]
                unsure = [uncertainty(logits, criterion == "max_prob") for criterion in CRITERIA]
                found[index] = (logits.argmax(-1), *unsure)
        self.best, *unsure = (torch.cat(each, 1) for each in zip(*found, strict=True))  # [L, W]
        self.uncertainty = dict(zip(CRITERIA, unsure, strict=True))
        counts = torch.tensor([w.n_words for w in self.windows], device="cpu")
        self.cu_words = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
        self.window_of_word = torch.arange(len(counts), device="cpu").repeat_interleave(counts)
        self.tokens = torch.tensor([len(w.input_ids) for w in self.windows], device="cpu")
        self.pieces = torch.cat([_pieces(w) for w in self.windows])

    def exits(self, policy: ExitPolicy) -> torch.Tensor:
        """The layer `[W]` that each word of each window would leave at."""
        unsure, layers = self.uncertainty[policy.criterion], self.config.num_hidden_layers
        schedule = Schedule.of(policy, layers, len(self.windows), unsure)
        return simulate_exits(unsure, self.cu_words, schedule)

    def labels(self, exits: torch.Tensor) -> torch.Tensor:
        """The numbers `[W]` of the labels that words have there."""
        return self.best.gather(0, exits[None] - 1)[0]

    def speedup(self, exits: torch.Tensor) -> float:
        """In multiply-adds over full depth."""
        layers = torch.arange(1, self.config.num_hidden_layers + 1, device="cpu")
        active = torch.zeros_like(self.tokens)[:, None].repeat(1, len(layers))
        still = (exits[:, None] >= layers).long()  # [W, L]
        active.index_add_(0, self.window_of_word, still * self.pieces[:, None])
        special = self.tokens.clone().index_add_(0, self.window_of_word, -self.pieces)
        active += (active > 0) * special[:, None]
        empty = self.cu_words.diff() == 0  # of a token that stands in as a word nothing is known
        active[empty] = self.tokens[empty, None]
        return flops.speedup(active, self.tokens, self.config)

    def point(self, policy: ExitPolicy) -> Point:
        """The policy's simulated score and speed-up."""
        exits = self.exits(policy)
        of_windows = self.labels(exits).split(self.cu_words.diff().tolist())
        labels = [[self.names[i] for i in chosen.tolist()] for chosen in of_windows]
        result = score(self.gold, merge(self.windows, labels), self.metric)
        return Point(policy, result["score"], self.speedup(exits))


def _pieces(window: Window) -> torch.Tensor:
    """Tokens of each word of a window."""
    ids = torch.tensor(window.word_ids, device="cpu")
    return (ids[ids >= 0] - window.first_word).bincount(minlength=window.n_words)


def plot(
    calibration: Calibration,
    path: str | Path,
    title: str = "",
    test: Sequence[Point] = (),
):
    """Draw score against speed-up as a PNG (or any suffix that matplotlib knows).

    Args:
        test: points of test data, drawn beside those of development data.
    """
    from matplotlib.figure import Figure  # pyplot and its backend are the user's

    figure = Figure(figsize=(9, 4.8), dpi=150, layout="constrained")
    axes = figure.subplots()
    full = calibration.full_depth

    def draw(points, style, color, label, **look):
        front = pareto_front(points)
        xs, ys = [p.speedup for p in front], [p.score for p in front]
        axes.plot(xs, ys, style, color=color, label=label, **look)

    levels = {"token": ("#1f6f8b", "token exit"), "sentence": ("#d1495b", "sentence exit")}
    for level, (color, name) in levels.items():
        groups = (
            (calibration.simulated, "-", "simulated (best)", {"lw": 1, "alpha": 0.45}),
            (calibration.verified, "o", "real", {"ms": 5}),
            (test, "^--", "test data", {"ms": 6, "lw": 0.8, "mfc": "white"}),
        )
        for points, style, what, look in groups:
            mine = [p for p in points if p.policy.level == level or p.speedup == 1]
            if mine:
                draw(mine, style, color, f"{name}, {what}", **look)
    chosen = calibration.chosen
    axes.plot(
        [chosen.speedup], [chosen.score], "*", color="#edae49", ms=16, mec="k", label="chosen"
    )
    axes.axhline(full.score, color="gray", lw=0.8, ls=":", label="full depth")
    shown = [full.score, *(p.score for p in (*calibration.verified, *test))]
    low, high = min(shown), max(shown)
    axes.set_ylim(low - 0.15 * (high - low) - 0.002, high + 0.1 * (high - low) + 0.002)
    axes.set_xlim(left=0.95)
    axes.set_xlabel("speed-up in multiply-adds over full depth")
    axes.set_ylabel(calibration.metric.replace("_", " ").replace("f1", "F1"))
    axes.set_title(title)
    axes.grid(alpha=0.25)
    figure.legend(fontsize=8, loc="outside right center")
    figure.savefig(path)
