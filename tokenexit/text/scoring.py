"""How good predicted labels are: entity F1, word F1 of a segmentation, or accuracy."""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import lru_cache

logger = logging.getLogger(__name__)

METRICS = ("entity_f1", "word_f1", "accuracy")

# BMES and BILOU in the letters of IOBES.
_TO_IOBES = {"M": "I", "L": "E", "U": "S"}
_LABEL = {
    "entity_f1": re.compile(r"O|[BIESMLU](-.+)?", re.DOTALL),
    "word_f1": re.compile(r"[BIMES]"),
}
_EXAMPLE = {"entity_f1": "O or one like B-PER", "word_f1": "B, M, I, E or S"}


def detect_metric(label_names: Iterable[str]) -> str:
    """Tell from a set of labels what to score.

    Args:
        label_names: all labels of the task, or of its gold data.

    Returns:
        `entity_f1` for chunks, of types (`B-PER`, `I-PER`, ..., with or without `O`) or without
        (`B`, `I` and `O`); `word_f1` for a segmentation (only letters of BMES or BIES, no `O`);
        else `accuracy`. `O` beside part-of-speech tags is one of them.

    Raises:
        ValueError: no labels.
    """
    labels = set(label_names)
    if not labels:
        raise ValueError("got no labels; expected at least one")
    for metric in ("word_f1", "entity_f1"):
        if all(_LABEL[metric].fullmatch(label) for label in labels):
            return metric
    return "accuracy"


def choose_metric(metric: str, label_names: Iterable[str]) -> str:
    """The metric to score these labels by, checked before there is anything to score.

    Args:
        metric: one of `METRICS`, or `auto`: `detect_metric`, with a warning where a few odd labels
            turn what would be F1 into accuracy.
        label_names: all labels that can be met, gold or predicted.

    Raises:
        ValueError: an unknown metric; labels that do not fit it.
    """
    check_metric(metric)
    labels = set(label_names)
    auto = metric == "auto"
    if auto:
        metric = detect_metric(labels)
        if metric != "accuracy":
            return metric
        # Nearly all tags of chunks: was F1 expected?
        has_types = any("-" in label or label == "O" for label in labels)
        likely = "entity_f1" if has_types else "word_f1"
    else:
        likely = metric
    if likely == "accuracy":
        return metric
    odd = sorted(label for label in labels if not _LABEL[likely].fullmatch(label))
    which = f"{shown(odd)} ({len(odd)} of {len(labels)} labels); expected {_EXAMPLE[likely]}"
    if not auto and odd:
        raise ValueError(f"the metric {metric} does not fit the labels: got {which}")
    if auto and 2 * len(odd) <= len(labels - {"O"}):
        warn_once(f"scoring accuracy, as {likely} does not fit the labels: got {which}")
    return metric


def types(label_names: Iterable[str]) -> dict[str, str]:
    """Of each label the type that it tells of: "PER" of "B-PER", "_" of a "B" without one.

    "O" beside labels of chunks tells of none, and is left out. Other labels, such as parts of
    speech, are types themselves.
    """
    names = list(label_names)
    if detect_metric(names) != "entity_f1":
        return {name: name for name in names}
    return {name: name.partition("-")[2] or "_" for name in names if name != "O"}


def check_metric(metric: str):
    """Raise ValueError unless it is a known one."""
    if metric not in ("auto", *METRICS):
        raise ValueError(f"metric is {metric!r}; expected 'auto' or one of {METRICS}")


def shown(labels: Sequence[str], most: int = 8) -> str:
    """Labels for a message: the first few, and how many more there are."""
    rest = len(labels) - most
    text = ", ".join(f"{label!r:.60}" for label in labels[:most])
    return f"{text} and {rest} more" if rest > 0 else text


@lru_cache
def warn_once(text: str):
    """Log a warning, unless this process has done so."""
    logger.warning(text)


def score(
    gold: Sequence[Sequence[str]],
    predicted: Sequence[Sequence[str]],
    metric: str = "auto",
) -> dict[str, str | float | dict[str, float]]:
    """Score predicted labels.

    Chunks are read as CoNLL's own script does (and seqeval by default), whether IOB1, IOB2, BIOES,
    BMES or BILOU; one that breaks the rules counts as far as it goes. The words of a segmentation
    are chunks that together cover the sentence.

    Args:
        gold, predicted: the labels of each sentence.
        metric: `entity_f1`, `word_f1`, `accuracy`, or `auto`: `detect_metric` of the gold labels.

    Returns:
        `metric`; `score`, which is F1 or the accuracy; `precision` and `recall` of chunks (the
        accuracy, where that is the metric); `accuracy` of labels; for `entity_f1` also `types`,
        the F1 of each type (`_` for chunks without one). All from 0 to 1; F1 is 0 where there
        are no chunks.

    Raises:
        ValueError: an unknown metric; unequal numbers of sentences or labels; no label at all; a
            label that does not fit the metric. The message names the sentence, from 0.
    """
    check_metric(metric)
    if len(gold) != len(predicted):
        raise ValueError(f"got {len(predicted)} predicted sentences; expected {len(gold)}")
    for number, (wanted, got) in enumerate(zip(gold, predicted, strict=True)):
        if len(wanted) != len(got):
            raise ValueError(
                f"sentence {number}: got {len(got)} predicted labels; expected {len(wanted)}"
            )
    if metric == "auto":
        metric = detect_metric({label for labels in gold for label in labels})
    total = sum(map(len, gold))
    if not total:
        raise ValueError("got no labels; expected at least one")

    same = sum(
        a == b for pair in zip(gold, predicted, strict=True) for a, b in zip(*pair, strict=True)
    )
    accuracy = same / total
    if metric == "accuracy":
        return {
            "metric": metric,
            "score": accuracy,
            "precision": accuracy,
            "recall": accuracy,
            "accuracy": accuracy,
        }

    wanted, got = set(_chunks(gold, metric)), set(_chunks(predicted, metric))
    found = len(wanted & got)
    result = {
        "metric": metric,
        "score": _f1(found, len(wanted), len(got)),
        "precision": found / len(got) if got else 0.0,
        "recall": found / len(wanted) if wanted else 0.0,
        "accuracy": accuracy,
    }
    if metric == "entity_f1":
        counts = [Counter(chunk[0] for chunk in chunks) for chunks in (wanted & got, wanted, got)]
        types = sorted(counts[1].keys() | counts[2].keys())
        result["types"] = {name: _f1(*(count[name] for count in counts)) for name in types}
    return result


def spans(labels: Sequence[str], scheme: str) -> list[tuple[str, int, int]]:
    """Type, first and last word of each chunk of a sentence, in their order.

    Args:
        scheme: `detect_metric` of the labels that there can be. Of what is `accuracy`, each word
            whose label is not `O` is one; the words of a segmentation have the type `_`.

    Raises:
        ValueError: a label that does not fit the scheme.
    """
    if scheme == "accuracy":
        return [(label, i, i) for i, label in enumerate(labels) if label != "O"]
    return _chunks([labels], scheme)


def _chunks(sentences: Sequence[Sequence[str]], metric: str) -> list[tuple[str, int, int]]:
    """Return (type, first, last) of each chunk, in positions of all sentences together."""
    chunks, place = [], 0
    for number, labels in enumerate(sentences):
        last, last_kind = "O", ""
        for label in labels:
            tag, kind = iobes(label, metric, number)
            if tag != "O" and (tag in "BS" or last in "ESO" or kind != last_kind):
                chunks.append([kind, place, place])
            elif tag != "O":
                chunks[-1][2] = place
            last, last_kind, place = tag, kind, place + 1
    return [tuple(chunk) for chunk in chunks]


def iobes(label: str, metric: str, sentence: int = 0) -> tuple[str, str]:
    """Letter of IOBES and type of a label of chunks; `_` without one.

    Raises:
        ValueError: a label that does not fit the metric.
    """
    if not _LABEL[metric].fullmatch(label):
        raise ValueError(
            f"sentence {sentence}: got the label {label!r}; expected {_EXAMPLE[metric]}"
        )
    return _TO_IOBES.get(label[0], label[0]), label[2:] or "_"


def _f1(found: int, wanted: int, got: int) -> float:
    return 2 * found / (wanted + got) if wanted + got else 0.0
