"""A threshold for each layer, learned: for comparison with thresholds that grow."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from tokenexit.calibrate import Sweep
from tokenexit.policy import ExitPolicy

SCALES = tuple(2 ** (i / 8) for i in range(-12, 13))  # of learned thresholds, all together


def annotated(sweep: Sweep) -> torch.Tensor:
    """The numbers `[W]` of the labels that words should have; -1: the model knows none such."""
    ids = {name: i for i, name in enumerate(sweep.names)}
    labels = (
        ids.get(label, -1)
        for w in sweep.windows
        for label in sweep.gold[w.sentence][w.first_word : w.first_word + w.n_words]
    )
    return torch.tensor([*labels], device="cpu")


def scaled(policy: ExitPolicy, factor: float) -> ExitPolicy:
    """All thresholds times that, at most 1."""
    given = policy.threshold
    if not isinstance(given, tuple):
        return policy.replace(threshold=min(1.0, given * factor))
    return policy.replace(threshold=tuple(min(1.0, t * factor) for t in given))


def learn_thresholds(
    sweep: Sweep,
    policy: ExitPolicy,
    rounds: int = 2,
    factors: Sequence[float] = (0.25, 0.5, 0.7, 1.4, 2.0, 4.0),
) -> ExitPolicy:
    """A threshold for each layer in place of a policy's, as fast in simulation, with fewer errors.

    Coordinate descent: in turn each layer's threshold is multiplied by each factor, and all by a
    common one, so that the speed-up stays. What labels most words as annotated is kept.

    Args:
        sweep: of annotated data.
        rounds: times that each layer has its turn.

    Returns:
        The policy with a tuple of thresholds; itself, if no other makes fewer errors.
    """
    depth, gold = sweep.config.num_hidden_layers, annotated(sweep)

    def right(exits: torch.Tensor) -> int:
        return int((sweep.labels(exits) == gold).sum())

    def found(thresholds: np.ndarray) -> tuple[int, ExitPolicy]:
        mine = plain.replace(threshold=(*thresholds.tolist(), 0.0))
        exits = sweep.exits(mine)
        return (right(exits) if sweep.speedup(exits) >= fastest else -1), mine

    def as_fast(thresholds: np.ndarray, low: float = -3.0, high: float = 3.0):
        """With the least common factor, of powers of two, that is fast enough."""
        for _ in range(7):
            middle = (low + high) / 2
            count, _ = found(np.clip(thresholds * 2**middle, 0, 1))
            low, high = (low, middle) if count >= 0 else (middle, high)
        thresholds = np.clip(thresholds * 2**high, 0, 1)
        return thresholds, *found(thresholds)

    exits = sweep.exits(policy)
    fastest, best = sweep.speedup(exits), (right(exits), policy)
    thresholds = np.array(policy.thresholds(depth)[:-1])
    plain = policy.replace(threshold=0.0, schedule="constant", growth=1.0)
    for _ in range(rounds):
        before = best
        for layer in range(depth - 1):
            tried = []
            for factor in factors:
                other = thresholds.copy()
                other[layer] *= factor
                tried.append(as_fast(other))
            chosen, count, mine = max(tried, key=lambda found: found[1])
            if count > best[0]:
                thresholds, best = chosen, (count, mine)
        if best == before:
            break
    return best[1]
