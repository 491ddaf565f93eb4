"""How good a tagger is under a policy, and how much it saves."""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING

import torch

from tokenexit import flops
from tokenexit.models.tagger import Tagger
from tokenexit.policy import ExitPolicy
from tokenexit.text.data import label_lists
from tokenexit.text.decoding import broken, decode
from tokenexit.text.encoding import Window, merge
from tokenexit.text.scoring import check_metric, choose_metric, score, shown, warn_once

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass(frozen=True)
class Evaluation:
    """Result of `evaluate`.

    Attributes:
        policy: the one evaluated.
        scores: of `tokenexit.text.scoring.score`: "metric", "score", ...
        mean_exit_layer: over words.
        exits_per_layer: words that left at each layer, L numbers.
        flops_speedup: multiply-adds of full depth over those spent; `tokenexit.flops` has the
            formula, in which tokens that left still cost their keys and values.
        wall_speedup: time of full depth over time, medians of alternating runs on this machine;
            None if not measured.
        words_per_second: likewise.
        broken_labels: those that cannot stand where they do, see `tokenexit.text.decoding.broken`.
    """

    policy: ExitPolicy
    scores: dict
    mean_exit_layer: float
    exits_per_layer: list[int]
    flops_speedup: float
    wall_speedup: float | None = None
    words_per_second: float | None = None
    broken_labels: int = 0

    @property
    def score(self) -> float:
        return self.scores["score"]

    def to_dict(self) -> dict:
        """All of it, JSON-ready."""
        return {**asdict(self), "policy": self.policy.to_dict()}


def evaluate(
    tagger: Tagger,
    data: Dataset,
    policy: ExitPolicy | None = None,
    *,
    metric: str = "auto",
    timing_runs: int = 0,
) -> Evaluation:
    """Tag annotated sentences under a policy, by the tagger's decoding, and score the result.

    Args:
        data: sentences with `words` and `labels`.
        policy: None for the model's.
        metric: see `tokenexit.text.scoring.score`.
        timing_runs: how often to measure the time; 0 for not at all.

    Raises:
        ValueError: no sentences; no labels; a metric that does not fit them.
    """
    config = tagger.model.config
    check_timing_runs(timing_runs)
    metric = check_annotated(tagger, data, metric)
    policy = tagger.model.policy if policy is None else policy
    outcome = tag_windows(tagger, tagger.windows(data["words"]), policy)
    gold, names = list(data["labels"]), tagger.label_names
    if tagger.decoding == "constrained":
        if wrong := broken(gold, sorted({*names, *(x for labels in gold for x in labels)})):
            warn_once(
                f"{wrong} annotated labels cannot stand where they do, as in IOB1, which is read "
                "as IOB2; constrained decoding gives none like them"
            )
    exits = torch.tensor([x for sentence in outcome.exits for x in sentence], device="cpu")
    result = Evaluation(
        policy=policy,
        scores=score(gold, outcome.labels, metric),
        mean_exit_layer=float(exits.double().mean()),
        exits_per_layer=exits.bincount(minlength=config.num_hidden_layers + 1)[1:].tolist(),
        flops_speedup=outcome.speedup,
        broken_labels=broken(outcome.labels, names),
    )
    if not timing_runs:
        return result
    return time_evaluations(tagger, data, [result], timing_runs)[0]


@dataclass(frozen=True)
class Outcome:
    """What a policy makes of sentences.

    Attributes:
        labels, exits: of the words of each sentence.
        speedup: in multiply-adds, see `Evaluation`.
    """

    labels: list[list[str]]
    exits: list[list[int]]
    speedup: float


def tag_windows(tagger: Tagger, windows: Sequence[Window], policy: ExitPolicy) -> Outcome:
    """Tag sentences, given as all their windows, under a policy, by the tagger's decoding."""
    config, constrained = tagger.model.config, tagger.decoding == "constrained"
    labels, layers, scores = ([None] * len(windows) for _ in range(3))
    active, tokens = [], []
    for indices, output, firsts in tagger.run(windows, policy):
        for index, words in zip(indices, tagger.words(output, firsts), strict=True):
            labels[index], layers[index] = words
        if constrained:
            for index, its_scores in zip(indices, tagger.scores(output, firsts), strict=True):
                scores[index] = its_scores
        active.append(flops.active_tokens(output.exit_layers, config.num_hidden_layers).cpu())
        tokens.append((output.exit_layers > 0).sum(1).cpu())
    labels = merge(windows, labels)
    if constrained:
        labels = decode(merge(windows, scores), tagger.label_names, labels)
    return Outcome(
        labels=labels,
        exits=merge(windows, layers),
        speedup=flops.speedup(torch.cat(active), torch.cat(tokens), config),
    )


def check_annotated(tagger: Tagger, data: Dataset, metric: str = "auto") -> str:
    """The metric to score `data` by.

    Words with labels that the model does not know count as wrong; a warning says how many.

    Raises:
        ValueError: no sentences; no labels; a metric that does not fit them.
    """
    check_metric(metric)
    counts = Counter(label for labels in label_lists(data) for label in labels)
    if not len(data):
        raise ValueError("the data has no sentences; expected at least one")
    known = set(tagger.model.config.id2label.values())
    if unknown := sorted(set(counts) - known):
        words = sum(counts[label] for label in unknown)
        warn_once(
            f"{words} of {counts.total()} words have labels that the model does not know and count "
            f"as wrong: {shown(unknown)}"
        )
    return choose_metric(metric, known.union(counts))


def check_wanted(name: str, given: bool, other: str, there: bool):
    """Raise ValueError for an option that is given without the other, which it is of."""
    if given and not there:
        raise ValueError(f"got {name} without {other}; expected both or neither")


def check_timing_runs(runs: int):
    """Raise ValueError unless something can be timed so often."""
    if runs < 0:
        raise ValueError(f"timing_runs is {runs}; expected 0 or more")


def time_evaluations(
    tagger: Tagger, data: Dataset, results: Sequence[Evaluation], runs: int
) -> list[Evaluation]:
    """The evaluations with their times filled in, all measured in alternation with full depth.

    Only the model is timed, not tokenization.
    """
    windows = tagger.windows(data["words"])
    full, *others = time_policies(
        tagger, windows, [ExitPolicy.never(), *(r.policy for r in results)], runs
    )
    words = sum(map(len, data["words"]))
    return [
        replace(
            result,
            wall_speedup=statistics.median(a / b for a, b in zip(full, times, strict=True)),
            words_per_second=words / statistics.median(times),
        )
        for result, times in zip(results, others, strict=True)
    ]


def time_policies(
    tagger: Tagger, windows: Sequence[Window], policies: Sequence[ExitPolicy], runs: int
) -> list[list[float]]:
    """Seconds that the model takes over all windows, `[policy][run]`, policies in alternation.

    The first round warms up and is not returned.
    """
    seconds = [[] for _ in policies]
    for _ in range(runs + 1):
        for policy, times in zip(policies, seconds, strict=True):
            start = time.perf_counter()
            for _, output, _ in tagger.run(windows, policy):
                output.logits[0, 0, 0].item()  # wait for the device
            times.append(time.perf_counter() - start)
    return [times[1:] for times in seconds]
