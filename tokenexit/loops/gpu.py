"""The exit loop with static shapes: no wait for the host, so that a CUDA graph can hold it.

What `tokenexit.loops.eager` does with lists of as many tokens as are active is done here in buffers
for all tokens, whose first rows count; the count stays on the device. A layer is seven launches:

    query_key_value   queries of active tokens, keys and values of all in sentences not finished
                      (the seen ones), and what LayerNorm makes of `up`
    exit_attention
    linear            output, with the residual
    linear            LayerNorm, up, GELU
    linear            down, with the residual
    exit_step_        LayerNorm, store, head, decision, what tokens leave with
    compact_active    the new lists of active and of seen tokens

A relative-position bias adds one, a gather of the queries' positions. Before the first layer lie a
few fills. `tokenexit.loops.graphs` records the loop with all that a model does before and after it.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from tokenexit.conditions import check_loaded
from tokenexit.int8 import Int8Linear
from tokenexit.layers import labels_of
from tokenexit.loops.eager import Outcome, Unmet
from tokenexit.loops.eager import embed as embed_by_calls
from tokenexit.ops import compiled_devices, extension_error, float32_precision
from tokenexit.ops.bias_gelu import GELUS, gelu_tanh
from tokenexit.ops.compact_active import compact_active
from tokenexit.packing import Packed
from tokenexit.schedule import Schedule

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MOST_OUTPUTS = 256  # of a head, that exit_step_ takes
MOST_SENTENCES = 2**16 - 2  # the third dimension of a grid, less the empty one that pack adds
_DEVICES = compiled_devices("compact_active") & {"cuda"}
# How often a GPU was served by a slower path, by reason.
FALLBACKS = Counter()


def fell_back(reason: str, message: str) -> None:
    """Count a call for `FALLBACKS`, and warn of the first one with that reason."""
    FALLBACKS[reason] += 1
    if FALLBACKS[reason] == 1:
        warnings.warn(message, stacklevel=3)


def devices() -> set[str]:
    """The types of device that the loop is for."""
    return {"cuda", *_DEVICES}


def lacks(device: str = "cuda") -> str | None:
    """What the loop wants and is not installed, in words; None if all is there."""
    if device not in _DEVICES:
        why = extension_error() or "the compiled ops were built without CUDA"
        return f"the CUDA op compact_active ({why})"
    if importlib.util.find_spec("triton") is None:
        return "triton (pip install triton)"
    return None


# What the loop needs of states, layers and heads, see `tokenexit.loops`.
STATES = [
    ("states on a GPU", lambda h: h.device.type in devices()),
    ("states in fp16, bf16 or fp32", lambda h: h.dtype in DTYPES),
    ("no gradients", lambda h: not torch.is_grad_enabled()),
]
LAYERS = [
    (
        "weights that are not of 8 bits",
        lambda layers: all(type(part) is not Int8Linear for part in layers[0].parts()),
    ),
    ("GELU, exact or by tanh", lambda layers: all([x.activation in GELUS for x in layers])),
    ("no dropout to be done", lambda layers: not any([layer.drops() for layer in layers])),
]
HEADS = [
    (
        f"at most {MOST_OUTPUTS} outputs of a classifier",
        lambda heads: len(heads[0].weight) <= MOST_OUTPUTS,
    )
]
INSTALLED = "triton and the CUDA op compact_active"


@dataclass(frozen=True)
class Roomy(Packed):
    """A layout with room for all cells of the padded batch and a last, empty sentence.

    See `reference.pack_static` for what it has in excess.

    Attributes:
        place: `[B, N]` int64, the packed index of each real token, and of one in no sentence for
            padding.
    """

    place: torch.Tensor = None


def pack(mask, ids, *given) -> tuple[Roomy, list[torch.Tensor], torch.Tensor]:
    """The layout of a padded batch, without a wait for the host.

    Args:
        mask, ids, given: see `tokenexit.ops.pack_rows.pack_rows`.

    Returns:
        It, its ids and what else is given, packed; and `[]` bool, whether all was sound.

    Raises:
        Unmet: more than `MOST_SENTENCES`.
    """
    from tokenexit.kernels.pack_rows import pack_rows

    if len(ids) > MOST_SENTENCES:
        raise Unmet(f"at most {MOST_SENTENCES} sentences in a call")
    by_token, offsets, first_token, place, sound = pack_rows(mask, ids, *given)
    shape = len(ids) + 1, ids.shape[1]
    packed = Roomy.of(shape, by_token, offsets, first_token, place=place)
    return packed, [*by_token[5:].unbind()], sound


def embed(call, embeddings, packed, ids, positions, types=None, words=None) -> torch.Tensor:
    """A call of `ExitEmbeddings`, by one launch if all is plain; but for tokens in no sentence."""
    from tokenexit.kernels.embed import embed as launch

    projection, read = embeddings.projection, embeddings.tensors(ids.device)
    projects = projection is None or embeddings.projects_last
    if words is not None or not projects or read is None or read[-1] is None:
        return embed_by_calls(call, embeddings, packed, ids, positions, types, words)
    if projection is not None:
        check_loaded(projection, ids.device)
    count = packed.cu_tokens[-1:]
    *tables, _, weight, bias = read
    h = launch(ids, positions, types, *tables, weight, bias, embeddings.norm.eps, count)
    return h if projection is None else projection(h)


def run(call, h, packed, schedule, bias, exits) -> Outcome:
    """See `tokenexit.loops.Loop`."""
    layers, heads = call.encoder.layers, call.encoder.heads
    schedule = schedule.padded(packed.num_sentences)
    logits, left_at = exit_loop(
        *(layers, heads, h, packed, schedule, bias, exits),
        neighbor_heads=call.encoder.neighbor_heads,
        keep=False,
    )
    return Outcome(logits, left_at)


def exit_loop(
    layers: Sequence[nn.Module],
    heads: Sequence[nn.Module],
    h: torch.Tensor,
    packed: Packed,
    schedule: Schedule,
    bias: torch.Tensor | None = None,
    exits: torch.Tensor | None = None,
    precision: str | None = None,
    keep: bool = True,
    neighbor_heads: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What `eager.last_of` makes of the trace of `eager.ExitEncoder` for these arguments.

    Args:
        layers, heads, h, packed, schedule, bias, exits, neighbor_heads: see there. Tokens beyond
            `packed.cu_tokens[B]` are in no sentence, and nothing is computed of them.
        precision: of fp32 products, "ieee" or "tf32"; None: what PyTorch is set to. Heads and
            decisions are "ieee".
        keep: leave h as it is.

    Returns:
        Logits `[T, C]` and layers `[T]` int64 that tokens left with; 0 for those in no sentence.
    """
    from tokenexit.kernels.attention import exit_attention
    from tokenexit.kernels.decision import exit_step_
    from tokenexit.kernels.linear import linear, query_key_value

    precision = precision or float32_precision()
    h, size, cu_active = h.clone() if keep else h, h.shape[0], packed.cu_tokens
    active = torch.arange(size, device=h.device)
    seen, cu_seen, all_rows = active, cu_active, True  # until some have left
    sizes = size, size, cu_active.shape[0] // 8 + 3
    left, layer_of_token, places = active.new_zeros(sum(sizes)).split(sizes)
    labels = labels_of(heads[-1].out_features, neighbor_heads, len(layers))
    logits = h.new_zeros(size, labels)
    said = h.new_empty(size, 3 * labels) if neighbor_heads else None  # what tokens tell others
    uncertainty = torch.empty_like(active, dtype=torch.float32)  # all are asked at first
    arrived = torch.zeros_like(schedule.window, dtype=torch.int32)
    bias = None if bias is None else bias.contiguous()
    positions = None if bias is None else packed.positions
    if exits is not None:
        numbers = torch.arange(1, len(layers), device=h.device)
        left_by = torch.where(exits <= numbers[:, None], exits, 0)

    for number, (layer, head) in enumerate(zip(layers, heads, strict=True), 1):
        count, heads_of = cu_active[-1:], (layer.num_heads, -1)
        query, key_value, out = layer.query, layer.key_value, layer.attention_output
        norm, up, down = layer.attention_norm, layer.up, layer.down
        q, kv, folded = query_key_value(
            h,
            query_weight=query.weight,
            query_bias=query.bias,
            key_value_weight=key_value.weight,
            key_value_bias=key_value.bias,
            active=None if all_rows else active,
            cu_active=cu_active,
            seen=None if all_rows else seen,
            cu_seen=cu_seen,
            norm_weight=norm.weight,
            norm_bias=norm.bias,
            up_weight=up.weight,
            up_bias=up.bias,
            precision=precision,
        )
        k, v = kv.unflatten(-1, (2, *heads_of)).unbind(1)
        context, _ = exit_attention(
            q.unflatten(-1, heads_of),
            k,
            v,
            cu_q=cu_active,
            cu_k=cu_seen,
            scale=layer.scale,
            bias=bias,
            positions=positions,
            max_length=packed.shape[1],
            precision=precision,
        )
        product = partial(linear, count=count, eps=norm.eps, precision=precision)
        product = partial(product, norm_weight=norm.weight, norm_bias=norm.bias)
        x, stats = product(
            context.flatten(1),
            out.weight,
            out.bias,
            residual=h,
            residual_gather=None if all_rows else active,
            want_stats=True,
            norm_on="out",
        )
        inner = product(
            x,
            up.weight,
            norm_on="x",
            norm_stats=stats,
            folded=folded,
            activation="gelu_tanh" if layer.activation is gelu_tanh else "gelu",
        )
        x, stats = product(
            inner,
            down.weight,
            down.bias,
            residual=x,
            want_stats=True,
            norm_on="residual",
            norm_stats=stats,
        )

        norm, last = layer.output_norm, number == len(layers)
        asks = exits is None and not last and schedule.decides[number - 1]
        exit_step_(
            x,
            norm_stats=stats,
            norm_weight=norm.weight,
            norm_bias=norm.bias,
            eps=norm.eps,
            head_weight=head.weight,
            head_bias=head.bias,
            active=active,
            cu_active=cu_active,
            word_at=packed.word_at,
            h=h,
            logits=logits,
            token_layer=layer_of_token,
            uncertainty=uncertainty,
            exit_layer=left,
            cu_words=packed.cu_words,
            arrived=arrived,
            max_length=packed.shape[1],
            decide=asks,
            answer=asks or last or exits is not None,
            said=said if number <= neighbor_heads else None,
            cu_tokens=packed.cu_tokens,
            **schedule.at(number),
        )
        if exits is not None and not last:
            left, asks = left_by[number - 1], True
        if asks:
            all_rows = False
            active, cu_active, seen, cu_seen = compact_active(
                active,
                cu_active,
                packed.word_of_token,
                exit_layer=left,
                cu_tokens=packed.cu_tokens,
                scratch=places,
            )
            positions = None if bias is None else packed.positions[active]
    return logits, layer_of_token


def unpack(call, packed, outcome, sound) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See `tokenexit.loops.Loop`.

    A state that is NaN stays so, and its token leaves with NaN. Only a head whose own weights are
    not finite makes NaN of a sound state, which a later head may hide.
    """
    from tokenexit.kernels.unpack import unpack_

    sizes = torch._foreach_norm([w for head in call.heads for w in head.parameters()])
    padded = unpack_(outcome.logits, outcome.layers, packed.place, torch.stack(sizes), sound)
    return *padded, sound
