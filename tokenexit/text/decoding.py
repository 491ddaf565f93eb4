"""Which labels can stand where they do, and the best of those that can."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from tokenexit.text.scoring import detect_metric, iobes, shown

DECODINGS = ("argmax", "constrained")
_MOST_PAIRS = 2**22  # pairs of labels that are weighed at a time: 32 MiB
_FARTHEST = 1e100  # in place of infinity, so that what is forbidden is worse than any score


def check_decoding(decoding: str):
    """Raise ValueError unless it is a known one."""
    if decoding not in DECODINGS:
        raise ValueError(f"decoding is {decoding!r}; expected one of {DECODINGS}")


def transitions(label_names: Sequence[str]) -> np.ndarray:
    """Which labels can stand beside which, by the scheme that they are of.

    A chunk begins with B- and goes on with I- of its type. Where its type has E-, it ends with
    that; where the scheme has S-, a chunk of one word is that. What there is no label for is not
    asked for: without a B- of its type any label begins a chunk, without an E- any ends one,
    without S- a B- may stand alone. So there is a sequence of any length that can stand. In other
    letters (BMES, BILOU) and without types it is the same; labels of no chunks stand anywhere.

    IOB1, where I- begins most chunks, cannot be told from IOB2: it is read as that.

    Args:
        label_names: all labels that there can be.

    Returns:
        `[C + 1, C + 1]` bool, whether the second can follow the first; the last row and column are
        what is before a sentence and after it.

    Raises:
        ValueError: no labels.
    """
    return _transitions(tuple(label_names))


@lru_cache
def _transitions(names: tuple[str, ...]) -> np.ndarray:
    allowed = np.ones((len(names) + 1, len(names) + 1), bool)
    scheme = detect_metric(names)
    if scheme != "accuracy":
        parts = [*(iobes(name, scheme) for name in names), ("O", "")]
        has_s = any(tag == "S" for tag, _ in parts)
        begins = [tag in "OBS" or ("B", kind) not in parts for tag, kind in parts]
        ends = [
            tag in "OES" or ("E", kind) not in parts or (tag == "B" and not has_s)
            for tag, kind in parts
        ]
        goes_on = [
            [a in "BI" and b in "IE" and kind == other for b, other in parts] for a, kind in parts
        ]
        allowed = np.outer(ends, begins) | np.array(goes_on)
    allowed.flags.writeable = False  # it is everybody's
    return allowed


def broken(sentences: Sequence[Sequence[str]], label_names: Sequence[str]) -> int:
    """How many labels cannot stand where they do, after the one before or at the sentence's end.

    Args:
        sentences: the labels of each.
        label_names: as for `transitions`.

    Raises:
        ValueError: no `label_names`; a label that is none of them.
    """
    return int(_broken(sentences, label_names).sum())


def _broken(sentences: Sequence[Sequence[str]], label_names: Sequence[str]) -> np.ndarray:
    """`broken` of each sentence."""
    allowed = transitions(label_names)
    number = {name: i for i, name in enumerate(label_names)}
    try:
        path = [-1]  # what is around sentences
        for labels in sentences:
            path += [number[label] for label in labels]
            path.append(-1)
    except KeyError as error:
        raise ValueError(f"got the label {error}; expected one of {shown([*number])}") from None
    path = np.array(path)
    starts = np.cumsum([0, *(len(labels) + 1 for labels in sentences)])[:-1]
    wrong = ~allowed[path[:-1], path[1:]]
    return np.add.reduceat(wrong, starts, dtype=np.int64) if len(starts) else np.zeros(0, np.int64)


def decode(
    scores: Sequence[Sequence[np.ndarray] | np.ndarray],
    label_names: Sequence[str],
    labels: Sequence[Sequence[str]] | None = None,
) -> list[list[str]]:
    """Of each sentence the labels that can stand with the greatest sum of scores.

    That is Viterbi's algorithm, in fp64, with `transitions` and no others: what can follow costs
    nothing. A sentence whose words' best labels can stand keeps these, and costs a look. Of equal
    sums, the last word has the label that comes first in the list, then the last but one, ...

    Args:
        scores: of each sentence `[words, C]`, or a list of `[C]`: log-probabilities, or logits, as
            what is added to all scores of a word changes nothing. An infinite one is a very large
            one.
        label_names: the C labels.
        labels: the best label of each word, where they are known: scores of sentences in which
            these can stand are not looked at.

    Raises:
        ValueError: scores of another shape, or NaN; as `broken`.

    Source: Viterbi, Error bounds for convolutional codes, 1967.
    """
    names = list(label_names)
    if labels is None:
        labels = [
            [names[i] for i in _checked(each, number, names).argmax(-1).tolist()]
            for number, each in enumerate(scores)
        ]
    found = [list(each) for each in labels]
    wrong = np.flatnonzero(_broken(found, names)).tolist()
    wrong.sort(key=lambda i: -len(found[i]))
    most = max(1, _MOST_PAIRS // len(names) ** 2)
    for start in range(0, len(wrong), most):
        mine = wrong[start : start + most]
        paths = _viterbi([_checked(scores[i], i, names) for i in mine], transitions(names))
        for i, path in zip(mine, paths, strict=True):
            found[i] = [names[label] for label in path.tolist()]
    return found


def _checked(scores: Sequence[np.ndarray] | np.ndarray, number: int, names: list) -> np.ndarray:
    scores = np.asarray(scores)
    if not len(scores):
        return np.empty((0, len(names)))
    if scores.ndim != 2 or scores.shape[1] != len(names):
        raise ValueError(
            f"sentence {number}: got scores of shape {scores.shape}; expected one for each word "
            f"and each of {len(names)} labels"
        )
    if np.isnan(scores).any():
        raise ValueError(f"sentence {number}: got scores that are NaN; expected numbers")
    return scores


def _viterbi(scores: Sequence[np.ndarray], allowed: np.ndarray) -> list[np.ndarray]:
    """The best path of each of some sentences, the longest first: all at a time, word by word."""
    counts = np.array([len(each) for each in scores])
    starts = np.cumsum([0, *counts])[:-1]
    flat = np.clip(np.concatenate(scores).astype(np.float64), -_FARTHEST, _FARTHEST)
    weights = np.where(allowed, 0.0, -np.inf)
    longer = [int((counts > t).sum()) for t in range(counts[0])]  # sentences that have a word t
    total = flat[starts] + weights[-1, :-1]
    before = []
    for t in range(1, counts[0]):
        k = longer[t]
        reached = total[:k, :, None] + weights[:-1, :-1]  # [k, label before, label]
        before.append(reached.argmax(1))
        total[:k] = reached.max(1) + flat[starts[:k] + t]
    label = (total + weights[:-1, -1]).argmax(1)
    path = np.empty(len(flat), np.int64)
    for t in reversed(range(counts[0])):
        k = longer[t]
        path[starts[:k] + t] = label[:k]
        if t:
            label[:k] = before[t - 1][np.arange(k), label[:k]]
    return np.split(path, starts[1:])
