"""Bounds on a mean that hold with a stated confidence, for losses between 0 and 1.

A bet against the claim that the mean is at least m changes a capital at each loss x by the factor
`1 - stake * (x - m)`. If the claim is true, the capital is not expected to grow, whatever stake is
chosen before the loss is seen: that it ever grows 1 / delta times has a probability of at most
delta (Ville). So a large capital is evidence that the mean is below m.

Losses are independent draws from one source, in an order that does not depend on them; nothing is
assumed of how they are distributed.

Source: Waudby-Smith and Ramdas 2024 (arXiv 2010.09686), predictable plug-in bets; Bates et al. 2021
(arXiv 2101.02703) for the bound of one side; Angelopoulos et al. 2021, Learn then Test (arXiv
2110.01052), for fixed-sequence testing.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterable

import numpy as np
from numpy.typing import ArrayLike

__all__ = ["check_share", "fixed_sequence", "holds", "least", "needed", "upper_bound"]

_MOST = 1_000_000  # losses that anybody could be asked for


def holds(losses: ArrayLike, bound: float, confidence: float) -> bool:
    """Whether the losses show a mean below `bound`; if it is not, with probability 1 - confidence.

    Args:
        losses: `[n]` in [0, 1].
        bound, confidence: in (0, 1).

    Raises:
        ValueError: no losses, or a value outside these.
    """
    losses = _checked(losses)
    check_share("bound", bound)
    check_share("confidence", confidence)
    return _log_capital(losses, bound, confidence) >= -math.log1p(-confidence)


def upper_bound(losses: ArrayLike, confidence: float) -> float:
    """What the mean is below, with probability `confidence`; 1 where the losses say nothing.

    Args:
        losses: `[n]` in [0, 1].
        confidence: in (0, 1).

    Raises:
        ValueError: no losses, or a value outside these.
    """
    losses = _checked(losses)
    check_share("confidence", confidence)
    wanted = -math.log1p(-confidence)
    low, high = float(losses.mean()), 1.0  # the capital grows with the bound
    while high - low > 1e-6:
        middle = (low + high) / 2
        if _log_capital(losses, middle, confidence) >= wanted:
            high = middle
        else:
            low = middle
    return high


def fixed_sequence(
    path: Iterable[ArrayLike | tuple[ArrayLike, ...]], bound: float, confidence: float
) -> int:
    """How many of a path, from its start, have a mean loss below `bound`.

    With probability `confidence` all of these have: they are tested in turn up to the first that
    fails, so for a wrong one to be among them, the first wrong one has to be passed.

    Args:
        path: for each of its steps the losses, or a tuple of several kinds, each of which has to
            have such a mean; the order was fixed before these were looked at. To claim it of all
            kinds, each is tested at the full confidence: one that is wrong has to pass.

    Raises:
        ValueError: as above.
    """
    number = 0
    for losses in path:
        kinds = losses if isinstance(losses, tuple) else (losses,)
        if not all(holds(kind, bound, confidence) for kind in kinds):
            break
        number += 1
    return number


def needed(bound: float, confidence: float, losses: ArrayLike = (0.0,)) -> int | None:
    """About how many losses would show a mean below `bound`, if they go on as these do.

    None: these do not have such a mean, or a million would not show it.
    """
    losses = _checked(losses)
    check_share("bound", bound)

    def enough(number: int) -> bool:
        return holds(np.resize(losses, number), bound, confidence)

    high = 1
    while not enough(high):
        if high > _MOST or losses.mean() >= bound:
            return None
        high *= 2
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high


def least(bound: float, confidence: float) -> int:
    """How many losses, all of them 0, show a mean below `bound`.

    Raises:
        ValueError: a million would not.
    """
    number = needed(bound, confidence)
    if number is None:
        raise ValueError(
            f"got {bound:g} to promise with a confidence of {confidence:g}; expected more, as a "
            "million losses of nothing would not show that"
        )
    return number


def check_share(name: str, value: float):
    """Raise ValueError unless a value lies between 0 and 1."""
    if not isinstance(value, numbers.Real) or not 0 < value < 1:
        raise ValueError(f"{name} is {value!r}; expected a number between 0 and 1")


def _stakes(losses: np.ndarray, confidence: float) -> np.ndarray:
    """Each by the losses before it alone: large where these vary little. At most all, at 1."""
    count = np.arange(1, len(losses) + 1)
    means = (0.5 + losses.cumsum()) / (1 + count)
    variances = (0.25 + ((losses - means) ** 2).cumsum()) / (1 + count)
    before = np.concatenate([[0.25], variances[:-1]])
    return np.minimum(1, np.sqrt(-2 * math.log1p(-confidence) / (len(losses) * before)))


def _log_capital(losses: np.ndarray, bound: float, confidence: float) -> float:
    """Logarithm of the largest capital on the way."""
    return float(np.log1p(_stakes(losses, confidence) * (bound - losses)).cumsum().max())


def _checked(losses: ArrayLike) -> np.ndarray:
    losses = np.asarray(losses, dtype=np.float64)
    if losses.ndim != 1 or not losses.size:
        raise ValueError(f"got losses of shape {losses.shape}; expected [n], at least one")
    if not ((losses >= 0) & (losses <= 1)).all():
        raise ValueError(
            f"got losses from {losses.min()} to {losses.max()}; expected values in [0, 1]"
        )
    return losses
