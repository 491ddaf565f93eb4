"""The exit loop layer by layer in PyTorch: with autograd, and a trace of what was computed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from tokenexit.conditions import passable
from tokenexit.ops.compact_active import compact_active
from tokenexit.ops.exit_decision import exit_decision
from tokenexit.packing import Active, Packed
from tokenexit.schedule import Schedule

# A layer's outcome: the tokens computed in it, ascending [A], and their logits [A, C].
Trace = list[tuple[torch.Tensor, torch.Tensor]]


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
        exits: torch.Tensor | None = None,
    ) -> Trace:
        """Arguments and result of `tokenexit.reference.exit_forward`, active tokens only.

        Args:
            exits: its `exit_layer`.
        """
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
            if exits is None and not schedule.decides[number - 1]:
                continue  # the next layer that decides asks all active words anew

            if exits is not None:
                left = torch.where(exits <= number, exits, 0)
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
