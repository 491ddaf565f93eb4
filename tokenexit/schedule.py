"""The policies of a batch as tensors, and the exits that they would lead to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from tokenexit.ops.exit_decision import exit_decision
from tokenexit.policy import UNBOUNDED, ExitPolicy

_TENSORS = ("window", "min_active", "threshold")


@dataclass(frozen=True)
class Schedule:
    """The policy of each sentence of a batch, as tensors.

    Attributes:
        window: `[B]` int64, words on each side.
        min_active: `[B]` int64, words below which a sentence is finished.
        threshold: `[L, B]`, in the dtype of uncertainties; the last row is inf.
        max_prob, pre_norm, recompute: the policy's criterion, copy and neighbors.
        decides: of each layer, whether any word may leave there; none does below a threshold of 0.
    """

    window: torch.Tensor
    min_active: torch.Tensor
    threshold: torch.Tensor
    max_prob: bool
    pre_norm: bool
    recompute: bool
    decides: tuple[bool, ...]

    @classmethod
    def of(
        cls,
        policies: ExitPolicy | Sequence[ExitPolicy],
        num_layers: int,
        num_sentences: int,
        like: torch.Tensor,
    ) -> Schedule:
        """The schedule of one policy for all, or of one for each sentence.

        Those of one policy are kept: to make them takes as long as a layer. So nobody writes into a
        schedule.

        Raises:
            TypeError: what is no policy.
            ValueError: not one policy a sentence; policies that differ in criterion, copy or
                neighbors; a list of thresholds that is not one per layer.
        """
        may_keep = isinstance(policies, ExitPolicy) and _is_plain(like)
        key = (policies, num_layers, num_sentences, like.dtype, like.device) if may_keep else None
        if may_keep and (kept := _KEPT.get(key)) is not None:  # others may clear it meanwhile
            return kept
        with torch.inference_mode(False):  # else it could be used in that mode only
            made = cls._made(policies, num_layers, num_sentences, like)
        if may_keep and _is_plain(made.threshold):
            if like.is_cuda:  # for those who take it on another stream
                torch.cuda.current_stream(like.device).synchronize()
            if len(_KEPT) >= _MOST_KEPT:  # nothing of one by one, beside other threads
                _KEPT.clear()
            _KEPT[key] = made
        return made

    @classmethod
    def _made(cls, policies, num_layers, num_sentences, like):
        shared = not isinstance(policies, Sequence)
        policies = [policies] if shared else policies
        if not all(isinstance(policy, ExitPolicy) for policy in policies):
            raise TypeError(f"got policies {policies!r}; expected an ExitPolicy for each sentence")
        if len(policies) != num_sentences and not shared:
            raise ValueError(f"got {len(policies)} policies for {num_sentences} sentences")
        kinds = {p.kind for p in policies}
        if len(kinds) != 1:
            raise ValueError(
                "policies of one batch must share criterion, copy and neighbors; "
                f"got {sorted(kinds)}"
            )
        dtype = torch.promote_types(like.dtype, torch.float32)
        thresholds = {p: p.thresholds(num_layers) for p in set(policies)}
        columns = [thresholds[p] for p in policies]
        criterion, copy, neighbors = kinds.pop()
        # One copy for all, which the host does not wait for: a GPU's copies of other memory wait.
        flat = [x for p, column in zip(policies, columns, strict=True)
                for x in (p.reach, min(p.min_active, UNBOUNDED), *column)]  # fmt: skip
        values = torch.tensor(flat, dtype=torch.float64, device="cpu", pin_memory=like.is_cuda)
        values = values.view(len(policies), -1).to(like.device, non_blocking=True).T

        def each(values, dtype=torch.int64):
            values = values.to(dtype)
            return values.expand(*values.shape[:-1], num_sentences).contiguous()

        return cls(
            window=each(values[0]),
            min_active=each(values[1]),
            threshold=each(values[2:], dtype),
            max_prob=criterion == "max_prob",
            pre_norm=copy == "pre_norm",
            recompute=neighbors == "recompute",
            decides=tuple(any(row) for row in zip(*columns, strict=True)),
        )

    def at(self, layer: int) -> dict[str, object]:
        """What a decision at that layer, from 1, hangs on: arguments of `exit_decision`."""
        return {
            "window": self.window,
            "threshold": self.threshold[layer - 1],
            "layer": layer,
            "max_prob": self.max_prob,
            "min_active": self.min_active,
        }

    def to(self, states: torch.Tensor) -> Schedule:
        """This one, where states are and for decisions in their dtype."""
        dtype = torch.promote_types(states.dtype, torch.float32)
        if (self.threshold.dtype, self.threshold.device) == (dtype, states.device):
            return self
        moved = self._with(x.to(states.device) for x in self.tensors)
        return replace(moved, threshold=moved.threshold.to(dtype))

    def padded(self, num_sentences: int) -> Schedule:
        """This one, with sentences without words behind its own."""
        more = num_sentences - self.window.shape[0]
        return self._with(F.pad(x, (0, more)) for x in self.tensors) if more else self

    def like(self, num_sentences: int) -> Schedule:
        """One of this kind with room for so many sentences, all zeros."""
        return self._with(x.new_zeros(*x.shape[:-1], num_sentences) for x in self.tensors)

    @property
    def tensors(self) -> list[torch.Tensor]:
        """All that is there for each sentence, `[..., B]`."""
        return [getattr(self, name) for name in _TENSORS]

    def _with(self, tensors):
        return replace(self, **dict(zip(_TENSORS, tensors, strict=True)))


_KEPT: dict[tuple, Schedule] = {}
_MOST_KEPT = 256


def _is_plain(tensor):
    """With values, and not only traced or recorded."""
    if type(tensor) is not torch.Tensor or torch.compiler.is_compiling():
        return False
    if tensor.is_cuda:
        return not torch.cuda.is_current_stream_capturing()
    return tensor.device.type == "cpu"


def simulate_exits(
    uncertainty: torch.Tensor, cu_words: torch.Tensor, schedule: Schedule
) -> torch.Tensor:
    """Exits `[W]` that uncertainties `[L, W]` of a full-depth pass would lead to.

    The approximation: later layers' uncertainties are taken as if nobody had left before.
    """
    known = uncertainty[0]
    left = torch.zeros_like(known, dtype=torch.int64)
    # The rule itself, of rows that are not asked: uncertainties are there.
    nobody = known.new_empty(0, 1), left.new_empty(0)
    for number, fresh in enumerate(uncertainty, 1):
        known = fresh if schedule.recompute else torch.where(left == 0, fresh, known)
        _, left = exit_decision(*nobody, known, left, cu_words, **schedule.at(number))
    return left
