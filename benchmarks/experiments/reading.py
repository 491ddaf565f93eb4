"""What a tagger is worth at each speed: policies chosen on development data, read once on test."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence

import torch
from datasets import Dataset

from experiments.thresholds import SCALES, learn_thresholds, scaled
from tokenexit.calibrate import Point, Sweep
from tokenexit.evaluate import Evaluation, evaluate, time_policies
from tokenexit.models.tagger import Tagger
from tokenexit.policy import ExitPolicy
from tokenexit.text.decoding import broken, decode
from tokenexit.text.encoding import merge
from tokenexit.text.scoring import score

TARGETS = (2.0, 3.0, 4.0, 6.0)
THRESHOLDS = (
    *(0.001, 0.002, 0.004, 0.007, 0.01, 0.015, 0.02, 0.03, 0.04, 0.055, 0.07, 0.085, 0.1, 0.125),
    *(0.15, 0.175, 0.2, 0.225, 0.25, 0.275, 0.3, 0.35, 0.4, 0.45, 0.5, 0.55, 0.6, 0.7, 0.8, 0.9),
)

BOLDER = tuple(2 ** (i / 16) for i in range(12))  # of thresholds, for the clock


def choose(
    tagger: Tagger,
    dev: Dataset,
    sweep: Sweep,
    bases: Sequence[ExitPolicy],
    targets: Sequence[float] = TARGETS,
    tries: int = 6,
) -> dict[float, Evaluation]:
    """For each speed-up in multiply-adds the policy with the best score on development data.

    Exits are simulated first; then, base by base, the threshold at which real exits are just fast
    enough is looked for from the simulated one on.

    Args:
        sweep: of `dev`.
        bases: policies, of which each gets every threshold; the second layer's, where they grow.
        tries: real runs over `dev` for each target and base.

    Returns:
        By target, the real evaluation on `dev`; targets that no policy reaches are left out.
    """
    found: dict[float, Evaluation] = {}
    for base in bases:
        policies = [base.replace(threshold=t / base.growth) for t in THRESHOLDS]
        known: dict[int, Evaluation] = {}
        points = [sweep.point(policy) for policy in policies]
        for target in targets:
            mine = _just_fast_enough(tagger, dev, policies, points, known, target, tries)
            best = found.get(target)
            if mine is not None and (best is None or mine.score > best.score):
                found[target] = mine
    return found


def choose_per_layer(
    tagger: Tagger,
    dev: Dataset,
    sweep: Sweep,
    constant: Mapping[float, Evaluation],
    tries: int = 6,
) -> dict[float, Evaluation]:
    """`learn_thresholds` from what `choose` gave; all of them then just as high as has to be."""
    found = {}
    for target, start in constant.items():
        learned = learn_thresholds(sweep, start.policy)
        policies = [scaled(learned, factor) for factor in SCALES]
        points = [sweep.point(policy) for policy in policies]
        mine = _just_fast_enough(tagger, dev, policies, points, {}, target, tries)
        if mine is not None:
            found[target] = mine
    return found


def choose_by_clock(
    tagger: Tagger, dev: Dataset, chosen: Mapping[float, ExitPolicy]
) -> dict[float, Evaluation]:
    """Thresholds just as much higher as the clock wants for the same speed-up.

    Multiply-adds leave out what a call costs beside them. Of a machine that does nothing else.

    Args:
        chosen: policies that reach a speed-up in multiply-adds, by that.

    Returns:
        As `choose` does.
    """
    found = {}
    for target, start in chosen.items():
        for factor in BOLDER:
            policy = scaled(start, factor)
            if wall_speedups(tagger, dev, [policy])[0] >= target:
                found[target] = evaluate(tagger, dev, policy)
                break
    return found


def _just_fast_enough(
    tagger: Tagger,
    dev: Dataset,
    policies: Sequence[ExitPolicy],
    points: Sequence[Point],
    known: dict[int, Evaluation],
    target: float,
    tries: int,
) -> Evaluation | None:
    """The real evaluation of the first of ever faster policies that reaches the target, if any.

    Args:
        points: what simulation says of them.
        known: real evaluations by their number, to which those made are added.
    """
    at = next((i for i, p in enumerate(points) if p.speedup >= target), len(points) - 1)
    low, high = -1, len(points)  # too slow up to here; fast enough from here
    for _ in range(tries):
        if at not in known:
            known[at] = evaluate(tagger, dev, policies[at])
        if known[at].flops_speedup >= target:
            high, at = at, at - 1
        else:
            low, at = at, at + 1
        if high - low <= 1 or not low < at < high:
            break
    return known.get(high)


def read_layers(tagger: Tagger, data: Dataset) -> list[dict]:
    """The scores of each layer's labels at full depth."""
    windows = tagger.windows(data["words"])
    names = tagger.model.config.id2label
    labels = [[None] * len(windows) for _ in tagger.model.exit_heads]
    for indices, output, firsts in tagger.run(
        windows, ExitPolicy.never(), output_layer_logits=True
    ):
        best = output.layer_logits.argmax(-1)  # [L, B, N]
        for row, index in enumerate(indices):
            for layer, chosen in enumerate(best[:, row, firsts[row]].tolist()):
                labels[layer][index] = [names[i] for i in chosen]
    return [score(list(data["labels"]), merge(windows, layer)) for layer in labels]


def wall_speedups(
    tagger: Tagger, data: Dataset, policies: Sequence[ExitPolicy], runs: int = 3
) -> list[float]:
    """Of each policy the speed-up in wall clock over full depth, in alternation.

    On the first 500 sentences.
    """
    windows = tagger.windows(data["words"][:500])
    full, *others = time_policies(tagger, windows, [ExitPolicy.never(), *policies], runs)
    ratios = ([a / b for a, b in zip(full, mine, strict=True)] for mine in others)
    return [round(statistics.median(each), 3) for each in ratios]


def layer_speedup(result: Evaluation) -> float:
    """Layers of full depth over the mean layer that words leave at."""
    return len(result.exits_per_layer) / result.mean_exit_layer


def both_decodings(tagger: Tagger, data: Dataset, policy: ExitPolicy) -> dict:
    """What decoding under constraints makes of a policy's labels, and the time that it takes.

    One pass gives the scores that both decodings go by.

    Returns:
        Of each decoding the `score` and the labels that cannot stand, `broken`; `tag_s`, of the
        model, and `decode_ms`, of what constrained decoding does beside it.
    """
    names, windows = tagger.label_names, tagger.windows(data["words"])
    labels, scores, clock = [None] * len(windows), [None] * len(windows), time.perf_counter
    decode_s, start = 0.0, clock()
    for indices, output, firsts in tagger.run(windows, policy):
        for index, (its_labels, _) in zip(indices, tagger.words(output, firsts), strict=True):
            labels[index] = its_labels
        before = clock()
        for index, its_scores in zip(indices, tagger.scores(output, firsts), strict=True):
            scores[index] = its_scores
        decode_s += clock() - before
    tag_s, free = clock() - start - decode_s, merge(windows, labels)
    before = clock()
    found = decode(merge(windows, scores), names, free)
    decode_s += clock() - before
    result = {"tag_s": round(tag_s, 2), "decode_ms": round(1000 * decode_s, 1)}
    for name, its in (("argmax", free), ("constrained", found)):
        its_score = score(list(data["labels"]), its)["score"]
        result[name] = {"score": its_score, "broken": broken(its, names)}
    return result


def device_of(tagger: Tagger) -> str:
    """Name of what computes."""
    device = tagger.model.device
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
