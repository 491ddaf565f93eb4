"""What says when tokens leave: a model's policy and dial, and which classifiers know nothing."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterable, Mapping
from types import MappingProxyType

import torch
from torch import nn

from tokenexit.dial import Dial, Speed, parse_speed
from tokenexit.int8 import dtype_of
from tokenexit.models.configuration import TokenExitConfig, settings_of
from tokenexit.policy import ExitPolicy

logger = logging.getLogger(__name__)


class Steered:
    """Policy, dial and untrained classifiers of a model; what is saved is in its configuration.

    Attributes:
        config: says the policy, the dial and, when it is saved, which classifiers are untrained.
        exit_heads: L classifiers.
    """

    config: TokenExitConfig
    exit_heads: nn.ModuleList
    _policy = _dial = None, None  # what the configuration said, and what was made of it
    _new_heads: Mapping[int, torch.Tensor] = MappingProxyType({})  # never trained, by layer
    _warned = False

    @property
    def policy(self) -> ExitPolicy:
        """When tokens leave. Assigning one takes effect at the next call; it is saved along.

        It is what `config.exit_policy` says, which may be assigned as well.

        Raises:
            TypeError, ValueError: `config.exit_policy` is not the fields of a policy for the model.
        """
        (known, policy), said = self._policy, settings_of(self.config)["exit_policy"]
        if policy is None or said != known:
            if isinstance(said, ExitPolicy):
                said = self.config.exit_policy = said.to_dict()  # as JSON has it
            policy = ExitPolicy.never() if said is None else ExitPolicy.from_dict(said)
            policy.thresholds(self.config.num_hidden_layers)  # a list of the wrong length
            self._policy = copy.deepcopy(said), policy
        return policy

    @policy.setter
    def policy(self, policy: ExitPolicy):
        if not isinstance(policy, ExitPolicy):
            raise TypeError(f"policy is a {type(policy).__name__}; expected an ExitPolicy")
        policy.thresholds(self.config.num_hidden_layers)  # a list of the wrong length
        self.config.exit_policy = policy.to_dict()
        self.warn_of_untrained_heads()

    @property
    def dial(self) -> Dial | None:
        """The speeds that calibration with a promise found; None before. Saved along."""
        said, dial = self._dial
        if said != self.config.dial:
            said = copy.deepcopy(self.config.dial)
            dial = None if said is None else Dial.from_dict(said)
            self._dial = said, dial
        return dial

    @dial.setter
    def dial(self, dial: Dial | None):
        if not isinstance(dial, (Dial, type(None))):
            raise TypeError(f"dial is a {type(dial).__name__}; expected a Dial or None")
        self.config.dial = None if dial is None else dial.to_dict()

    def speed(self, speed: float | str) -> Speed:
        """What the dial has for a speed: "full", "promised", "fastest", or a number as 2.5.

        Raises:
            TypeError, ValueError: see `Dial.at`; no dial; "promised" of weights in another dtype
                than those that the promise was tested with.
        """
        speed, dial = parse_speed(speed), self.dial
        if dial is None:
            raise ValueError(
                f"speed is {speed!r}, but the tagger has no dial; expected one calibrated with "
                "max_disagreement (`tokenexit calibrate --max-disagreement`, `tokenexit adapt`)"
            )
        if speed == "promised" and dial.dtype not in (None, (now := dtype_of(self))):
            raise ValueError(
                f"speed is 'promised', tested in {dial.dtype}, but the tagger is in {now}; "
                "expected it as it was tested, or calibrated anew, or another speed"
            )
        return dial.at(speed)

    def set_speed(self, speed: float | str):
        """Assign the policy of a speed; at any time, also while other threads call the model.

        Args:
            speed: as of `speed`. Each call goes by the policy that it found at its start.
        """
        self.policy = self.speed(speed).policy

    def untrained_heads(self, policy: ExitPolicy | None = None) -> list[int]:
        """Layers, from 1, whose classifiers are as they were initialised: they know nothing yet.

        Whatever changes a classifier trains it: a Trainer, a loop of one's own, an assignment. Of
        a tagger saved by a version that did not keep count, all are trained.

        Args:
            policy: only those that decide labels under it. None: all.
        """
        there = (number for number in self._new_heads if number <= len(self.exit_heads))
        weights = {number: self.exit_heads[number - 1].weight for number in there}
        heads = [
            number
            for number, weight in weights.items()
            if not weight.is_meta and _same(self._new_heads[number], weight)
        ]
        if policy is None:
            return heads
        thresholds = policy.thresholds(self.config.num_hidden_layers)
        return [number for number in heads if thresholds[number - 1] > 0]

    def mark_untrained(self, heads: Iterable[int]):
        """Take the classifiers of these layers, from 1, for untrained as they are now."""
        self._new_heads = {n: self.exit_heads[n - 1].weight.detach().clone() for n in heads}
        self.config.untrained_heads = list(self._new_heads)

    def warn_of_untrained_heads(self):
        """Say once that the policy reads what nobody trained."""
        if not self._new_heads or self._warned:
            return
        heads = self.untrained_heads(self.policy)
        if heads and heads[0] < self.config.num_hidden_layers:
            self._warned = True
            logger.warning(
                "the policy is to let words leave at classifiers that were never trained, those of "
                "layers %s: labels mean nothing there; train them first",
                ", ".join(map(str, heads)),
            )


def _same(before: torch.Tensor, now: torch.Tensor) -> bool:
    """Whether weights are as before, but for what a stay in half precision rounds."""
    kept = before.to(now)
    halves = (kept.to(dtype).to(now.dtype) for dtype in (torch.bfloat16, torch.float16))
    return any(torch.equal(one, now) for one in (kept, *halves))
