"""The exit loop of inference on the CPU, all layers in one op: for small batches Python's share of
`tokenexit.encoder` would be as long as theirs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from tokenexit.costs import costs
from tokenexit.layers import ExitHead, ExitLayer, is_hooked
from tokenexit.ops import check_bias, check_vector, compiled_devices
from tokenexit.packing import Packed

_DEVICES = compiled_devices("exit_loop")


def applies(
    layers: Sequence[nn.Module], heads: Sequence[nn.Module], h: torch.Tensor, schedule
) -> bool:
    """Whether `exit_loop` would do what `tokenexit.encoder.ExitEncoder` does.

    That is fp32 states on a CPU without gradients; layers for `tokenexit.ops.exit_layer`, all fp32
    or all int8; classifiers as they are made; no hooks on either; a policy with copy "post_norm"
    and neighbors "frozen".
    """
    return (
        h.device.type in _DEVICES
        and not schedule.pre_norm
        and not schedule.recompute
        and all(type(layer) is ExitLayer and layer.is_compiled(h) for layer in layers)
        and all(
            type(head) is ExitHead and not head.training and head.weight.dtype == torch.float32
            for head in heads
        )
        and not is_hooked((*layers, *heads))
        and len({layer.is_int8 for layer in layers}) == 1
    )


def exit_loop(
    layers: Sequence[nn.Module],
    heads: Sequence[nn.Module],
    h: torch.Tensor,
    packed: Packed,
    schedule,
    bias: torch.Tensor | None = None,
    exit_layer: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What `encoder.last_of` makes of the trace of `ExitEncoder` for these arguments, to the bit.

    Step by step what `tokenexit.ops.exit_layer`, `linear`, `exit_decision` and `compact_active` do,
    by the same code.

    Args:
        layers, heads, h, packed, schedule, bias, exit_layer: see `reference.exit_forward`, within
            what `applies` says.

    Returns:
        Logits `[T, C]` and layers `[T]` int64 that tokens left with. If any layer's logits have a
        NaN, all logits are NaN, and layers are not set.

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
        check_vector(name, getattr(packed, name), len(h), h.device)
    if exit_layer is not None:
        check_vector("exit_layer", exit_layer, len(packed.first_token), h.device)
    if bias is not None:
        check_bias(bias, packed.positions, h.new_empty(len(h), first.num_heads, 0))
    weights, scales = [], []
    for layer in layers:
        parts = layer.tensors(h)
        weights += parts[0]
        scales += parts[1]
    return torch.ops.tokenexit.exit_loop(
        h,
        packed.positions,
        packed.cu_tokens,
        packed.cu_words,
        packed.word_of_token,
        packed.word_at,
        weights,
        scales,
        [x for head in heads for x in head._parameters.values()],  # weight, bias
        costs(h.shape[1], len(weights[9]), first.num_heads, first.is_int8),
        first.num_heads,
        (h.shape[1] // first.num_heads) ** -0.5,
        [layer._modules["output_norm"].eps for layer in layers],
        schedule.window,
        schedule.min_active,
        schedule.threshold,
        schedule.max_prob,
        bias,
        exit_layer,
    )


if _DEVICES:

    @torch.library.register_fake("tokenexit::exit_loop")
    def _(h, positions, cu_tokens, cu_words, word_of_token, word_at, weights, scales, heads, *_):
        return h.new_empty(len(h), len(heads[1])), torch.empty_like(positions)
