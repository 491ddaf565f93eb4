"""How fast a tagger goes: policies from cautious to bold, what each gives and what is promised."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, fields
from numbers import Real

from tokenexit.policy import ExitPolicy

NAMES = ("full", "promised", "fastest")
_WALL = " wall"


@dataclass(frozen=True)
class Speed:
    """A policy, and what it gave on the text that the dial was made with.

    Attributes:
        policy: when words leave.
        speedup: over full depth, in multiply-adds.
        disagreement: share of a sentence's words that get another label than at full depth, or than
            the dial's reference gives, in the mean over sentences.
        bound: what that is below on more such text, with the dial's confidence; of this policy by
            itself.
        mean_exit_layer: over words.
        wall_speedup: over full depth, in the time of the machine that measured it, or None.
        score: on annotated sentences, in the dial's metric, or None.
        by_type: for each type of the dial's promise, the disagreement of words of that type.
    """

    policy: ExitPolicy
    speedup: float
    disagreement: float
    bound: float
    mean_exit_layer: float
    wall_speedup: float | None = None
    score: float | None = None
    by_type: dict[str, float] | None = field(default=None, hash=False)


@dataclass(frozen=True)
class Dial:
    """The speeds of a tagger, and how far a promise goes.

    Attributes:
        speeds: from full depth, the first, to the boldest.
        promised: index of the last one that the promise covers: of it and of all before, the
            expected disagreement is below `max_disagreement`, with probability `confidence` over
            the choice of the text. None: not even of full depth, held against another model.
        max_disagreement, confidence: of the promise.
        sentences: that it was tested on.
        dtype: of the weights that it was tested with: "float32", "int8", ...; None: not known.
        metric: of the speeds' scores, or None.
        reference: whose labels count as right: "full depth" or "the original".
        per_layer: whether it is promised of the words that left by each layer by themselves, too.
        per_type: types of which it is promised each by itself, too: "PER" of "B-PER".
    """

    speeds: tuple[Speed, ...]
    promised: int | None
    max_disagreement: float
    confidence: float
    sentences: int
    dtype: str | None = None
    metric: str | None = None
    reference: str = "full depth"
    per_layer: bool = False
    per_type: tuple[str, ...] = ()

    @property
    def promise(self) -> str:
        """What is promised, in words."""
        kinds = ["the words that left by each layer"] if self.per_layer else []
        if self.per_type:
            kinds.append(f"the words of each type by itself ({', '.join(self.per_type)})")
        return (
            f"with a confidence of {percent(self.confidence, 0)}, the labels of fewer than "
            f"{percent(self.max_disagreement, 2)} of a sentence's words, in the mean over such "
            f"sentences, are not those of {self.reference}"
            + (f", which holds of {' and of '.join(kinds)}, too" if kinds else "")
            + f"; tested on {self.sentences} sentences"
        )

    def at(self, speed: float | str) -> Speed:
        """The one that is asked for.

        Args:
            speed: "full"; "promised", the fastest within the promise; "fastest"; or a number, the
                most cautious that is at least so many times as fast as full depth in multiply-adds;
                or a text as "2.5 wall", so many times as fast on the machine that timed them.

        Raises:
            TypeError: neither a name nor a number.
            ValueError: another name; a number below 1, or beyond the fastest; "promised" where
                nothing is; "wall" where nothing was timed.
        """
        speed = parse_speed(speed)
        if speed == "promised" and self.promised is None:
            raise ValueError("speed is 'promised', but nothing is; expected another")
        if speed in NAMES:
            where = {"full": 0, "promised": self.promised, "fastest": len(self.speeds) - 1}
            return self.speeds[where[speed]]
        times, wanted = [one.speedup for one in self.speeds], speed
        if isinstance(speed, str):
            times = [one.wall_speedup for one in self.speeds]
            wanted = float(speed.removesuffix(_WALL))
            if None in times:
                raise ValueError(
                    f"speed is {speed!r}, but speeds were not timed; expected one calibrated with "
                    "timing_runs, or a number of times in multiply-adds"
                )
        for one, its in zip(self.speeds, times, strict=True):
            if its >= wanted:
                return one
        raise ValueError(
            f"speed is {speed if isinstance(speed, str) else format(speed, 'g')}; expected at most "
            f"{rounded_down(max(times))}, the fastest that was calibrated"
        )

    def to_dict(self) -> dict:
        """Fields as JSON-ready values."""
        speeds = [{**asdict(one), "policy": one.policy.to_dict()} for one in self.speeds]
        return {**asdict(self), "speeds": speeds}

    @classmethod
    def from_dict(cls, values: dict) -> Dial:
        """The dial `to_dict` wrote.

        Raises:
            ValueError: not its fields.
        """
        try:
            speeds = tuple(
                Speed(**{**one, "policy": ExitPolicy.from_dict(one["policy"])})
                for one in values["speeds"]
            )
            per_type = tuple(values.get("per_type", ()))
            dial = cls(**{**values, "speeds": speeds, "per_type": per_type})
            if not speeds or dial.promised not in (None, *range(len(speeds))):
                raise ValueError(f"promised is {dial.promised} of {len(speeds)} speeds")
        except (TypeError, KeyError, ValueError) as error:
            names = [one.name for one in fields(cls)]
            raise ValueError(f"the dial is {values!r:.60} ({error}); expected {names}") from error
        return dial


def percent(share: float, digits: int) -> str:
    """A share with so many digits behind the point, or more where that would be another number."""
    text = f"{share:.{digits}%}"
    return text if abs(float(text[:-1]) / 100 - share) < 1e-12 else f"{100 * share:.6g}%"


def rounded_down(speedup: float) -> str:
    """A speed with two digits, not rounded up: who asks for it as shown gets it."""
    return f"{math.floor(speedup * 100 + 1e-9) / 100:.2f}"


def parse_speed(speed: float | str) -> float | str:
    """A speed as `Dial.at` takes it, checked without a dial; a number may come as text.

    Raises:
        TypeError, ValueError: see there.
    """
    given, wall = speed, False
    if isinstance(speed, str) and speed not in NAMES:
        wall = speed.endswith(_WALL)
        try:
            speed = float(speed.removesuffix(_WALL).removesuffix("x"))
        except ValueError:
            raise ValueError(
                f"speed is {given!r}; expected a number or one of {NAMES}, or as '2.5 wall'"
            ) from None
    if isinstance(speed, str):
        return speed
    if not isinstance(speed, Real) or isinstance(speed, bool):
        raise TypeError(f"speed is {speed!r}; expected a number or one of {NAMES}")
    if not 1 <= speed < math.inf:
        raise ValueError(f"speed is {given}; expected 1 or more, or one of {NAMES}")
    return f"{float(speed)!r}".removesuffix(".0") + _WALL if wall else speed
