"""When a word leaves: the exit policy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from numbers import Real

__all__ = ["ExitPolicy", "UNBOUNDED"]

UNBOUNDED = 2**62  # a window wider than any sentence

_CHOICES = {
    "level": ("token", "sentence"),
    "criterion": ("entropy", "max_prob"),
    "schedule": ("constant", "doubling"),
    "copy": ("post_norm", "pre_norm"),
    "neighbors": ("frozen", "recompute"),
}


@dataclass(frozen=True)
class ExitPolicy:
    """The rule by which words leave a model, layer by layer.

    At layer l an active word leaves when the largest uncertainty within its window is
    below the layer's threshold. Uncertainty lies in [0, 1]; 0 is certain.

    Args:
        level: "token" (each word on its own window) or "sentence" (all words of a
            sentence leave together, when the least certain of them is certain enough).
        window: words looked at on each side, at level "token". 0 is the word alone.
        criterion: "entropy" (`H(p) / ln C`) or "max_prob" (`(1 - max p) / (1 - 1/C)`).
        threshold: in [0, 1]; one number, or one per layer. 0 means no word leaves early.
            The last layer's is not used: there every word leaves.
        schedule: with one number, how it goes over the layers. "constant", or "doubling":
            the number up to half the layers, then `min(2 * threshold, 0.5)`.
        copy: what later layers see of a token that left. "post_norm": its state as it was.
            "pre_norm": the sum before the output LayerNorm, under each later layer's LayerNorm.
        neighbors: the uncertainty of words that left, in the windows of others. "frozen": that
            of the layer where they left. "recompute": each later layer's head on their state.
        min_active: words that make a further layer worth its while. A sentence some of whose words
            have left, with fewer than this many still active, is finished: those leave too, sure
            or not. 1: no effect. For small batches, whose late layers take about as long for one
            word as for eight; the price is the label of words that were not sure.
        growth: with one number, how many times the threshold of the layer before each layer's is,
            from 1 to 100; the first layer's is the number, and none is above 1. The first layers,
            whose classifiers are most often sure of what is wrong, then ask for more.

    Raises:
        ValueError: a value outside the above.
        TypeError: a window or min_active that is not an int, a threshold or growth that is not a
            number.

    Source: Li et al. 2021 (arXiv 2105.13878), sections 3.2 and 3.3.
    """

    level: str = "token"
    window: int = 2
    criterion: str = "entropy"
    threshold: float | tuple[float, ...] = 0.1
    schedule: str = "constant"
    copy: str = "post_norm"
    neighbors: str = "frozen"
    min_active: int = 1
    growth: float = 1.0

    def __post_init__(self):
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(
                    f"ExitPolicy.{name} is {getattr(self, name)!r}; expected one of {choices}"
                )
        for name, least in (("window", 0), ("min_active", 1)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool):
                raise TypeError(f"ExitPolicy.{name} is {value!r}; expected an int")
            if value < least:
                raise ValueError(f"ExitPolicy.{name} is {value}; expected {least} or more")
        per_layer = isinstance(self.threshold, Sequence) and not isinstance(self.threshold, str)
        values = tuple(self.threshold) if per_layer else (self.threshold,)
        if not all(isinstance(v, Real) and not isinstance(v, bool) for v in values):
            raise TypeError(
                f"ExitPolicy.threshold is {self.threshold!r}; expected a number or one per layer"
            )
        values = tuple(map(float, values))
        if not values:
            raise ValueError("ExitPolicy.threshold has no values; expected one per layer")
        for value in values:
            if not 0.0 <= value <= 1.0:
                raise ValueError(f"ExitPolicy.threshold has {value}; expected values in [0, 1]")
        if per_layer and self.schedule != "constant":
            raise ValueError(
                f"ExitPolicy.schedule is {self.schedule!r} beside one threshold per layer; "
                "expected 'constant', or a single threshold"
            )
        growth = self.growth
        if not isinstance(growth, Real) or isinstance(growth, bool):
            raise TypeError(f"ExitPolicy.growth is {growth!r}; expected a number")
        if not 1.0 <= growth <= 100.0:
            raise ValueError(f"ExitPolicy.growth is {growth}; expected 1 to 100")
        if growth != 1 and (per_layer or self.schedule != "constant"):
            raise ValueError(
                f"ExitPolicy.growth is {growth} beside "
                + ("one threshold per layer" if per_layer else f"schedule {self.schedule!r}")
                + "; expected a single threshold and schedule 'constant', or a growth of 1"
            )
        object.__setattr__(self, "growth", float(growth))
        object.__setattr__(self, "threshold", values if per_layer else values[0])

    @classmethod
    def paper(cls, threshold: float | Sequence[float] = 0.1, window: int = 2) -> ExitPolicy:
        """Token-level exit as the paper describes it."""
        return cls(threshold=threshold, window=window)

    @classmethod
    def authors_code(cls, threshold: float = 0.1, window: int = 2) -> ExitPolicy:
        """Token-level exit as the authors' code does it (their `win_size` is `2 * window + 1`)."""
        return cls(
            threshold=threshold,
            window=window,
            schedule="doubling",
            copy="pre_norm",
            neighbors="recompute",
        )

    @classmethod
    def sentence(cls, threshold: float | Sequence[float] = 0.1) -> ExitPolicy:
        """Sentence-level exit: all words of a sentence leave together."""
        return cls(level="sentence", threshold=threshold)

    @classmethod
    def never(cls) -> ExitPolicy:
        """Full depth: every word leaves at the last layer."""
        return cls(threshold=0.0)

    @property
    def kind(self) -> tuple[str, str, str]:
        """What policies of one batch share: criterion, copy and neighbors."""
        return self.criterion, self.copy, self.neighbors

    @property
    def reach(self) -> int:
        """Words on each side that a decision looks at."""
        return UNBOUNDED if self.level == "sentence" else min(self.window, UNBOUNDED)

    def thresholds(self, num_layers: int) -> list[float]:
        """The threshold of each layer 1..L; inf at the last, where every word leaves.

        Raises:
            ValueError: one threshold per layer was given, for another number of layers.
        """
        if isinstance(self.threshold, tuple):
            if len(self.threshold) != num_layers:
                raise ValueError(
                    f"ExitPolicy.threshold has {len(self.threshold)} values; "
                    f"expected one per layer, {num_layers}"
                )
            values = list(self.threshold)
        else:
            most = math.inf if self.growth == 1 else 700 / math.log(self.growth)  # or it overflows
            values = [
                min(1.0, self.threshold * self.growth ** min(i, most)) for i in range(num_layers)
            ]
            if self.schedule == "doubling":
                late = min(2 * self.threshold, 0.5)
                values = [v if 2 * i <= num_layers else late for i, v in enumerate(values, 1)]
        return [*values[:-1], math.inf]

    def replace(self, **changes) -> ExitPolicy:
        """A policy with some fields changed."""
        return replace(self, **changes)

    def to_dict(self) -> dict:
        """Fields as JSON-ready values."""
        values = asdict(self)
        if isinstance(self.threshold, tuple):
            values["threshold"] = list(self.threshold)
        return values

    @classmethod
    def from_dict(cls, values: dict) -> ExitPolicy:
        """The policy `to_dict` wrote.

        Raises:
            TypeError: not a dict.
            ValueError: a field this version does not know.
        """
        if not isinstance(values, dict):
            raise TypeError(f"exit policy is {values!r:.60}; expected a dict of its fields")
        known = {field.name for field in fields(cls)}
        if unknown := sorted(set(values) - known):
            raise ValueError(f"exit policy has unknown fields {unknown}; expected {sorted(known)}")
        return cls(**values)

    def __str__(self) -> str:
        if self.threshold == 0:
            return "full depth"
        where = "sentence" if self.level == "sentence" else f"token, window {self.window}"
        if isinstance(self.threshold, tuple):
            limit = "[" + ", ".join(f"{t:.3g}" for t in self.threshold) + "]"
        else:
            limit = f"{self.threshold:.3g}"
        default = ExitPolicy()
        rest = [
            f", {getattr(self, name)}"
            for name in ("criterion", "schedule", "copy", "neighbors")
            if getattr(self, name) != getattr(default, name)
        ]
        if self.growth != 1:
            rest.insert(0, f" x {self.growth:g} a layer")
        if self.min_active != 1:
            rest.append(f", at least {self.min_active} active")
        return f"{where}, threshold {limit}{''.join(rest)}"
