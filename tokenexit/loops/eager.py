"""The exit loop layer by layer in PyTorch: with autograd, and a trace of what was computed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from tokenexit import reference
from tokenexit.conditions import check_loaded, passable
from tokenexit.ops.compact_active import compact_active
from tokenexit.ops.exit_decision import exit_decision
from tokenexit.packing import Active, Packed, same_length
from tokenexit.schedule import Schedule

# A layer's outcome: the tokens computed in it, ascending [A], and their logits [A, C].
Trace = list[tuple[torch.Tensor, torch.Tensor]]


@passable
class ExitEncoder(nn.Module):
    """Layers with a head each, run on the tokens that are still active.

    Args:
        layers: L `ExitLayer`.
        heads: L classifiers, `[n, d] -> [n, C]`.
        neck: what comes before each of them, `[n, d] -> [n, d]`, or None.
        neighbor_heads: how many heads, from the first, are `[n, d] -> [n, 3C]`: see
            `tokenexit.layers.NeighborHead`. None, L - 1 or all.
    """

    def __init__(
        self,
        layers: Sequence[nn.Module],
        heads: Sequence[nn.Module],
        neck: nn.Module | None = None,
        neighbor_heads: int = 0,
    ):
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.heads = nn.ModuleList(heads)
        self.neck = neck
        self.neighbor_heads = neighbor_heads
        self.gradient_checkpointing = False  # as Hugging Face's models switch it on

    def forward(
        self,
        h: torch.Tensor,
        packed: Packed,
        schedule: Schedule,
        bias: torch.Tensor | None = None,
        exits: torch.Tensor | None = None,
        states: list[torch.Tensor] | None = None,
    ) -> Trace:
        """Arguments and result of `tokenexit.reference.exit_forward`, active tokens only.

        Args:
            exits: its `exit_layer`.
            states: to which those of all tokens `[T, d]` are added after each layer that is
                reached, as the next one sees them.
        """
        active = Active.all(packed)
        stored = h  # what tokens that left are copied from
        told = None  # [T, 2C], by each token to its neighbours
        left = torch.zeros_like(packed.first_token)
        uncertainty = schedule.threshold.new_zeros(left.shape)
        trace = []
        for number, (layer, head) in enumerate(zip(self.layers, self.heads, strict=True), 1):
            if self.gradient_checkpointing and self.training:
                checkpoint = self._gradient_checkpointing_func
                fresh = checkpoint(layer.__call__, h, active, bias, schedule.pre_norm)
            else:
                fresh = layer(h, active, bias, schedule.pre_norm)
            keep = states is not None or torch.is_grad_enabled()
            stored = _store(stored, active, fresh, keep)
            h = layer.output_norm(stored) if schedule.pre_norm else stored
            if states is not None:
                states.append(h)
            said = self.logits(head, active.rows(h) if schedule.pre_norm else fresh)
            if number <= self.neighbor_heads:
                tells = said[:, said.shape[1] // 3 :]
                told = tells if number == 1 else _store(told, active, tells, keep)
            else:
                told = None
            logits = _hear(said, told, active)
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
                    asked = _hear(self.logits(head, h), told, Active.all(packed))
                    words = packed.word_at
                    if keys is not None:
                        asked, words = asked[keys], words[keys]
                uncertainty, left = exit_decision(
                    asked.detach(),
                    words,
                    uncertainty,
                    left,
                    packed.cu_words,
                    **schedule.at(number),
                )
            tokens, cu_tokens = compact_active(
                active.tokens, active.cu_tokens, packed.word_of_token, left
            )
            count = cu_tokens[-1].item()
            if torch.compiler.is_exporting():  # a program has all layers
                torch._check(0 <= count)
                torch._check(count <= tokens.shape[0])
            elif not count:
                break
            active = Active(packed, tokens.narrow(0, 0, count), cu_tokens)
        return trace

    def logits(self, head: nn.Module, h: torch.Tensor) -> torch.Tensor:
        """What a classifier gives for states: `[n, d] -> [n, C]`, or `[n, 3C]`."""
        return head(h if self.neck is None else self.neck(h))


def _hear(said, told, active):
    """Logits `[A, C]` of what heads gave and what tokens told their neighbours last, if they do."""
    if told is None:
        return said
    own = said[:, : told.shape[1] // 2]
    return reference.heard(own, told, active.tokens, active.packed.positions)


class Unmet(Exception):
    """A condition that a loop found out late not to be met, in words."""


@dataclass(frozen=True)
class Outcome:
    """What tokens leave a loop with.

    Attributes:
        logits: `[T, C]`.
        layers: `[T]` int64, from 1; 0 of tokens that are in no sentence.
        trace: what was computed in each layer; None of a loop that does not keep it.
        states: before the first layer and after each, `[T, d]`, where they are asked for.
        no_nan: `[]` bool, whether surely no layer's logits had a NaN; None: the trace tells.
    """

    logits: torch.Tensor
    layers: torch.Tensor
    trace: Trace | None = None
    states: list[torch.Tensor] | None = None
    no_nan: torch.Tensor | None = None

    def is_sound(self) -> torch.Tensor:
        """`no_nan`, by the trace where the loop did not say."""
        if self.no_nan is not None:
            return self.no_nan
        return ~torch.stack([logits.isnan().any() for _, logits in self.trace]).any()


def embed(call, embeddings, packed, ids, *given) -> torch.Tensor:
    """See `tokenexit.loops.Loop`."""
    check_loaded(embeddings, ids.device)
    return embeddings(ids, *given)


def unpack(call, packed, outcome, sound) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See `tokenexit.loops.Loop`; in training nobody asks whether there was a NaN."""
    if not call.encoder.training:
        no_nan = outcome.is_sound()
        sound = no_nan if sound is True else sound & no_nan
    return packed.unpack(outcome.logits), packed.unpack(outcome.layers), sound


def run(call, h, packed, schedule, bias, exits) -> Outcome:
    """See `tokenexit.loops.Loop`."""
    check_loaded(call.encoder, h.device)
    if not call.wants_states:
        trace = call.encoder(h, packed, schedule, bias, exits)
        return Outcome(*last_of(trace, h.shape[0]), trace)
    states = [h]
    trace = call.encoder(h, packed, schedule, bias, exits, states)
    states += states[-1:] * (1 + len(call.encoder.layers) - len(states))  # all have left
    return Outcome(*last_of(trace, h.shape[0]), trace, states)


def run_reference(call, h, packed, schedule, bias, exits) -> Outcome:
    """See `tokenexit.loops.Loop`."""
    encoder = call.encoder
    check_loaded(encoder, h.device)
    heads = [partial(encoder.logits, head) for head in encoder.heads]
    trace = reference.exit_forward(
        h, encoder.layers, heads, packed, schedule, bias, exits, encoder.neighbor_heads
    )
    return Outcome(*last_of(trace, len(h)), trace)


def last_of(trace: Trace, num_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What each token left with: logits `[T, C]` and layer `[T]`, int64."""
    active, logits = trace[0]
    result = logits.new_zeros(num_tokens, logits.shape[-1])
    layers = active.new_zeros(num_tokens)
    for number, (active, logits) in enumerate(trace, 1):
        if number < len(trace) and trace[number][0] is active:
            continue  # where nobody left, the next layer has an answer for all
        result[active] = logits
        layers[active] = number
    return result, layers


def padded_logits(trace: Trace, packed: Packed, num_layers: int) -> torch.Tensor:
    """Each layer's logits `[L, B, N, C]`; NaN for tokens that were not computed in it."""
    _, some = trace[0]
    shape = num_layers, packed.shape[0] * packed.shape[1], some.shape[-1]
    result = some.new_full(shape, math.nan)
    for layer, (active, values) in enumerate(trace):
        result[layer, packed.slots[active]] = values
    return result.unflatten(1, packed.shape)


def explain_nan(trace: Trace, packed: Packed, model: nn.Module) -> ValueError:
    """The error for a trace that has a NaN: where it is first, and which weights have one."""
    number, active, values = next(
        (number, active, values)
        for number, (active, values) in enumerate(trace, 1)
        if values.isnan().any()
    )
    bad = values.isnan().any(-1)
    sentence = int(packed.sentence_of_token[active[bad][0]])
    weights = [name for name, p in model.named_parameters() if p.isnan().any()]
    cause = f"NaN in the weights {weights[:3]}" if weights else "no weight is NaN (an overflow?)"
    return ValueError(
        f"{int(bad.sum())} of {len(bad)} tokens have NaN logits at layer {number}, first in "
        f"sentence {sentence}; expected finite logits; {cause}"
    )


def _store(values: torch.Tensor, active: Active, rows: torch.Tensor, keep: bool) -> torch.Tensor:
    """`values` with the active tokens' `rows`, without a copy where those are all.

    Args:
        keep: leave `values` as they are.
    """
    if same_length(rows, values.shape[0]):
        return rows
    if keep:
        return values.index_copy(0, active.tokens, rows)
    return values.index_copy_(0, active.tokens, rows)
