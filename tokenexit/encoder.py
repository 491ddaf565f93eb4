"""The exit loop: layer by layer, only what is still active."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from tokenexit import reference
from tokenexit.conditions import passable
from tokenexit.ops.compact_active import compact_active
from tokenexit.ops.exit_decision import exit_decision
from tokenexit.packing import Active, Packed
from tokenexit.policy import ExitPolicy
from tokenexit.reference import too_few, window_max

# A layer's outcome: the tokens computed in it, ascending [A], and their logits [A, C].
Trace = list[tuple[torch.Tensor, torch.Tensor]]


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

        Raises:
            TypeError: what is no policy.
            ValueError: not one policy a sentence; policies that differ in criterion, copy or
                neighbors; a list of thresholds that is not one per layer.
        """
        shared = not isinstance(policies, Sequence)
        policies = [policies] if shared else policies
        if not all(isinstance(policy, ExitPolicy) for policy in policies):
            raise TypeError(f"got policies {policies!r}; expected an ExitPolicy for each sentence")
        if len(policies) != num_sentences and not shared:
            raise ValueError(f"got {len(policies)} policies for {num_sentences} sentences")
        kinds = {(p.criterion, p.copy, p.neighbors) for p in policies}
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
                for x in (p.reach, p.min_active, *column)]  # fmt: skip
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


@passable
class ExitEncoder(nn.Module):
    """Layers with a head each, run on the tokens that are still active.

    Args:
        layers: L `ExitLayer`.
        heads: L classifiers, `[n, d] -> [n, C]`.
    """

    def __init__(self, layers: Sequence[nn.Module], heads: Sequence[nn.Module]):
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.heads = nn.ModuleList(heads)

    def forward(
        self,
        h: torch.Tensor,
        packed: Packed,
        schedule: Schedule,
        bias: torch.Tensor | None = None,
        exit_layer: torch.Tensor | None = None,
        backend: str = "auto",
    ) -> Trace:
        """Arguments and result of `tokenexit.reference.exit_forward`, active tokens only.

        Args:
            backend: "reference": by that function itself.
        """
        if backend == "reference":
            return reference.exit_forward(
                h, self.layers, self.heads, packed, schedule, bias, exit_layer
            )
        active = Active.all(packed)
        stored = h  # what tokens that left are copied from
        left = torch.zeros_like(packed.first_token)
        uncertainty = schedule.threshold.new_zeros(left.shape)
        thresholds = schedule.threshold.unbind()
        trace = []
        for number, (layer, head) in enumerate(zip(self.layers, self.heads, strict=True), 1):
            fresh = layer(h, active, bias, schedule.pre_norm)
            if fresh.device != h.device:  # what PyTorch makes of weights that are not loaded
                raise ValueError(
                    f"layer {number} gave states on {fresh.device} for those on {h.device}; "
                    "expected its weights there"
                )
            stored = _store(stored, active, fresh)
            h = layer.output_norm(stored) if schedule.pre_norm else stored
            logits = head(active.rows(h) if schedule.pre_norm else fresh)
            trace.append((active.tokens, logits))
            if number == len(self.layers):
                break
            if exit_layer is None and not schedule.decides[number - 1]:
                continue  # the next layer that decides asks all active words anew

            if exit_layer is not None:
                left = torch.where(exit_layer <= number, exit_layer, 0)
            else:
                asked, words = logits, packed.word_at[active.tokens]
                if schedule.recompute:
                    keys, _ = active.keys
                    asked, words = head(h), packed.word_at
                    if keys is not None:
                        asked, words = asked[keys], words[keys]
                uncertainty, left = exit_decision(
                    asked.detach(),
                    words,
                    uncertainty,
                    left,
                    packed.cu_words,
                    schedule.window,
                    thresholds[number - 1],
                    number,
                    schedule.max_prob,
                    schedule.min_active,
                )
            tokens, cu_tokens = compact_active(
                active.tokens, active.cu_tokens, packed.word_of_token, left
            )
            count = int(cu_tokens[-1])
            if not count:
                break
            active = Active(packed, tokens[:count], cu_tokens)
        return trace


def last_of(trace: Trace, num_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What each token left with: logits `[T, C]` and layer `[T]`, int64."""
    active, logits = trace[0]
    result = logits.new_zeros(num_tokens, logits.shape[-1])
    layers = active.new_zeros(num_tokens)
    for number, (active, logits) in enumerate(trace, 1):
        result[active] = logits
        layers[active] = number
    return result, layers


def _store(values: torch.Tensor, active: Active, rows: torch.Tensor) -> torch.Tensor:
    """`values` with the active tokens' `rows`, without a copy where those are all."""
    if rows.shape[0] == values.shape[0]:
        return rows
    if torch.is_grad_enabled():
        return values.index_copy(0, active.tokens, rows)
    return values.index_copy_(0, active.tokens, rows)


def simulate_exits(
    uncertainty: torch.Tensor, cu_words: torch.Tensor, schedule: Schedule
) -> torch.Tensor:
    """Exits `[W]` that uncertainties `[L, W]` of a full-depth pass would lead to.

    The approximation: later layers' uncertainties are taken as if nobody had left before.
    """
    known = uncertainty[0]
    left = torch.zeros_like(known, dtype=torch.int64)
    for number, fresh in enumerate(uncertainty, 1):
        known = fresh if schedule.recompute else torch.where(left == 0, fresh, known)
        limit = schedule.threshold[number - 1].repeat_interleave(cu_words.diff())
        sure = window_max(known, cu_words, schedule.window) < limit
        left = left.masked_fill((left == 0) & (sure | (limit == math.inf)), number)
        left = left.masked_fill(too_few(left, cu_words, schedule.min_active), number)
    return left
