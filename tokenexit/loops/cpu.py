"""The exit loop of inference on the CPU, all layers in one op: for small batches Python's share of
`tokenexit.loops.eager` would be as long as theirs."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from tokenexit.conditions import CALLS, Reads, check_loaded, refused, unmet
from tokenexit.layers import costs_of, labels_of
from tokenexit.loops.eager import Outcome, Unmet
from tokenexit.loops.eager import embed as embed_by_calls
from tokenexit.ops import check_bias, check_vector, compiled_devices, register_fake
from tokenexit.ops.bias_gelu import gelu_tanh
from tokenexit.ops.embed import embed as sum_of_embeddings
from tokenexit.packing import Packed
from tokenexit.prepacking import prepacked
from tokenexit.schedule import Schedule

_DEVICES = compiled_devices("exit_loop")


def embed(call, embeddings, packed, ids, positions, types=None, words=None) -> torch.Tensor:
    """A call of `ExitEmbeddings`, to the bit: what is plain is looked up and summed by one op."""
    call_it = partial(embed_by_calls, call, embeddings, packed, ids, positions, types, words)
    if words is not None or torch.compiler.is_compiling():
        return call_it()
    if call.met("embeddings", lambda: unmet(CALLS, call.outer)):
        return call_it()
    read = embeddings.tensors(ids.device)
    if read is None:
        return call_it()
    *tables, scale, weight, bias = read
    try:
        h = sum_of_embeddings(ids, positions, types, *tables, scale)
    except RuntimeError:  # the module tells what does not fit
        return call_it()
    parts = embeddings._modules
    if (projection := parts.get("projection")) is not None:
        check_loaded(projection, ids.device)
        return embeddings.finished(h)
    norm = parts["norm"]
    return F.layer_norm(h, norm.normalized_shape, weight, bias, norm.eps)


def run(call, h, packed, schedule, bias, exits) -> Outcome:
    """See `tokenexit.loops.Loop`."""
    if (h.dtype, h.device) != (call.like.dtype, call.like.device):
        raise Unmet("states of the dtype and on the device of the embeddings' weights")
    try:
        logits, layers, no_nan = exit_loop(
            *(call.layers, call.reads, h, packed, schedule, bias, exits),
            neighbor_heads=call.encoder.neighbor_heads,
        )
    except (RuntimeError, ValueError):
        raise Unmet(refused(call.reads)) from None
    return Outcome(logits, layers, no_nan=no_nan)


def exit_loop(
    layers: Sequence[nn.Module],
    found: Reads,
    h: torch.Tensor,
    packed: Packed,
    schedule: Schedule,
    bias: torch.Tensor | None = None,
    exits: torch.Tensor | None = None,
    neighbor_heads: int = 0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What `eager.last_of` makes of the trace of `ExitEncoder` for these arguments, to the bit.

    Step by step what `tokenexit.ops.exit_layer`, `linear`, `exit_decision` and `compact_active` do,
    by the same code.

    Args:
        layers: L `ExitLayer`.
        found: what `layers.reads` gave for them and their heads.
        h, packed, schedule, bias, exits, neighbor_heads: see `ExitEncoder`.

    Returns:
        Logits `[T, C]` and layers `[T]` int64 that tokens left with, and `[]` bool, whether no
        layer's logits had a NaN. Else all logits are NaN, and all layers 0.

    Raises:
        TypeError: indices that are not int64.
        ValueError: shapes that do not fit each other.
        RuntimeError: indices or offsets out of range; weights of another shape, dtype or layout.

    Source: Li et al. 2021 (arXiv 2105.13878), section 3.3.
    """
    first = layers[0]
    if h.dim() != 2 or h.shape[1] % first.num_heads:
        raise ValueError(f"got h {tuple(h.shape)}, {first.num_heads} heads; expected [T, d], H | d")
    for name in ("positions", "word_of_token", "word_at"):
        check_vector(name, getattr(packed, name), h.shape[0], h.device)
    if exits is not None:
        check_vector("exits", exits, packed.first_token.shape[0], h.device)
    if bias is not None:
        check_bias(bias, packed.positions, h.new_empty(h.shape[0], first.num_heads, 0))
        bias = bias.float()
    return torch.ops.tokenexit.exit_loop(
        h,
        packed.positions,
        packed.cu_tokens,
        packed.cu_words,
        packed.word_of_token,
        packed.word_at,
        found.weights,
        found.scales,
        prepacked(found),
        found.classifiers,
        neighbor_heads,
        costs_of(found, first),
        first.num_heads,
        first.scale,
        [layer._modules["output_norm"].eps for layer in layers],
        schedule.window,
        schedule.min_active,
        schedule.threshold,
        schedule.max_prob,
        first.activation is gelu_tanh,
        bias,
        exits,
    )


if _DEVICES:

    @register_fake("exit_loop")
    def _(h, positions, cu_tokens, cu_words, word_of_token, word_at, *lists):
        # Behind weights, scales and copies.
        labels = labels_of(len(lists[3][-1]), lists[4], len(lists[3]) // 2)
        results = h.new_empty(h.shape[0], labels), torch.empty_like(positions)
        return *results, h.new_empty((), dtype=torch.bool)
