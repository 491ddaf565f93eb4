"""From padded rows to padded results: the one way that every call of a model goes.

rows = Rows.of(...)  ->  loop = choose(...)  ->  tag(rows, loop)  ->  loss
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import nn

from tokenexit.conditions import Reads
from tokenexit.int8 import Int8Embedding
from tokenexit.loops import LOOPS, Call, Loop, cannot, choose
from tokenexit.loops.eager import Trace, Unmet, explain_nan
from tokenexit.loops.gpu import fell_back
from tokenexit.models.assembly import check_depth
from tokenexit.models.configuration import settings_of
from tokenexit.models.embeddings import (
    ExitEmbeddings,
    Projection,
    positions_of,
    relative_buckets,
)
from tokenexit.models.relative import rotary_of
from tokenexit.models.rows import Rows, limits_of
from tokenexit.ops import pack_tokens
from tokenexit.ops.pack_rows import pack_rows, takes
from tokenexit.packing import Packed
from tokenexit.schedule import Schedule

_LOOKED_UP = ("input_ids", "token_type_ids", "position_ids")


class Found(NamedTuple):
    """What a call found, padded: `[B, N, C]`, `[B, N]`, and `[]` bool, whether all was sound.

    The layout and the trace are there but of a loop that keeps no trace; the states if asked for.
    """

    logits: torch.Tensor
    exit_layers: torch.Tensor
    sound: torch.Tensor
    packed: Packed | None = None
    trace: Trace | None = None
    states: list[torch.Tensor] | None = None


def call_of(model, schedule: Schedule, rows: Rows | None = None, **wants: bool) -> Call:
    """What conditions are asked of, see `tokenexit.loops.Call`; without rows, of any."""
    width = settings_of(model.config)["hidden_size"]
    like = model.embeddings.norm.weight.new_empty(1, width)

    def is_recordable():
        given = () if rows is None else rows.tensors.values()
        within = all(value is None or value.device == like.device for value in given)
        return within and (rows is None or rows.inputs_embeds is None)

    return Call(
        encoder=vars(model)["_modules"]["encoder"],  # itself: torch.export has stand-ins
        like=like,
        schedule=schedule,
        around=lambda: _around(model),
        is_recordable=is_recordable,
        memory=lambda: model._memory.of(model),
        **wants,
    )


def _around(model) -> Reads:
    """What a recorded loop does not call anew, besides layers and heads."""
    kinds = {model.embeddings: ExitEmbeddings}
    classes = {"norm": nn.LayerNorm, "dropout": nn.Dropout, "projection": Projection}
    if model.config.int8_embeddings:
        classes["word"] = Int8Embedding
    for name, part in model.embeddings.named_children():
        kinds[part] = classes.get(name, nn.Embedding)
    if model.relative_bias is not None:
        kinds[model.relative_bias] = nn.Embedding
    return Reads([*kinds], [*kinds.values()])


def run(model, rows: Rows, schedule: Schedule, **wants: bool) -> Found:
    """What the chosen loop makes of the rows.

    Args:
        wants: see `tokenexit.loops.Call`.

    Raises:
        ValueError: rows that are not sound; NaN in logits, but in training; a CUDA graph of the
            caller's is being recorded.
    """
    if torch.compiler.is_compiling() or not _is_on_gpu(model):
        return _run(model, rows, schedule, wants)
    if torch.cuda.is_current_stream_capturing():
        raise ValueError(
            "got a call within a CUDA graph that is being recorded; expected one outside, as it "
            "waits for the GPU (the model records graphs of its own)"
        )
    with torch.cuda.device(model.device):  # where kernels are launched
        return _run(model, rows, schedule, wants)


def _is_on_gpu(model):
    return model.embeddings.norm.weight.is_cuda


def _run(model, rows, schedule, wants) -> Found:
    ahead = None if any(wants.values()) else _ahead(model, rows, schedule)
    call = call_of(model, schedule, rows, **wants)
    check_depth(call.layers, call.heads, settings_of(model.config)["num_hidden_layers"])
    loop = choose(model.backend, call)
    try:
        if loop.waits:
            if ahead is not None:  # nor is it to be replayed in vain next time
                model._graphs.forget()
            found = tag(model, rows, call, loop)
        else:
            found = _recorded(model, rows, call, loop, ahead)
    except Unmet as failed:
        if model.backend != "auto":
            raise cannot(model.backend, str(failed)) from None
        loop = LOOPS["eager"]
        found = tag(model, rows, call, loop)
    if model.training or torch.compiler.is_exporting() or found.sound:
        return found
    if not loop.waits:
        fell_back(
            "unsound",
            "the GPU loop met a NaN or a value out of range: the slower one looks for it",
        )
        if error := _explain(model, rows):
            raise error
    if found.trace is None:
        found = tag(model, rows, call, LOOPS["eager"])
        if found.sound:
            return found
    raise explain_nan(found.trace, found.packed, model)


def _ahead(model, rows, schedule):
    """Have the GPU at work, by a graph that is there, while the host asks what has to run."""
    asked = model.cuda_graphs and model.backend in ("auto", "gpu") and not torch.is_grad_enabled()
    return model._graphs.ahead(rows.tensors, schedule) if asked else None


def _recorded(model, rows, call, loop, ahead) -> Found:
    """`tag` by a loop that waits for nothing, in a CUDA graph where there are to be any."""

    def tag_padded(rows, schedule):
        with torch.autocast(call.like.device.type, enabled=False):  # all is in the weights' dtype
            return tag(model, Rows(**rows), replace(call, schedule=schedule), loop)[:3]

    if not model.cuda_graphs:
        return Found(*tag_padded(rows.tensors, call.schedule))
    weights = lambda: call.held.tensors  # noqa: E731
    given = tag_padded, rows.tensors, call.schedule, weights, ahead
    return Found(*model._graphs(*given, constants=_constants(model, call)))


def _constants(model, call) -> list[object]:
    """What a recorded loop takes of modules beside their tensors."""
    constants = [model.embeddings.norm.eps]
    for layer in call.layers:
        norms = [layer._modules[name].eps for name in ("attention_norm", "output_norm")]
        constants += [layer.activation, layer.num_heads, layer.scale, *norms]
    return constants


def tag(model, rows: Rows, call: Call, loop: Loop) -> Found:
    """From padded rows to padded results: the one way there is, in which loops differ."""
    config = model.config
    packed, ids, types, positions, sound = _packed(model, rows, loop)
    # An exported program looks at no value: those out of range are clamped.
    looks, exits = loop.waits and not torch.compiler.is_exporting(), None
    if rows.exit_layers is not None:
        given = packed.pack(rows.exit_layers)[packed.first_token]
        exits = given.clamp(1, config.num_hidden_layers)
        if looks:
            sound = sound and torch.equal(exits, given)
        elif not loop.waits:
            is_word = torch.arange(given.shape[0], device=given.device) < packed.cu_words[-1]
            sound = sound & ((exits == given) | ~is_word).all()
    if looks and not sound:
        raise _explain(model, rows)
    if positions is None:
        positions = positions_of(config, packed, ids)
    words = rows.inputs_embeds
    words = None if words is None else packed.pack(words).to(model.embeddings.norm.weight.dtype)
    h = loop.embed(call, model.embeddings, packed, ids, positions, types, words)
    bias = None
    if model.relative_bias is not None:
        bias = model.relative_bias(relative_buckets(h.device)).T
    elif model.relative_states is not None:
        bias = model.relative_states(packed.shape[1])
    elif settings_of(config)["norm_first"]:
        bias = rotary_of(config, positions, h.dtype)
    outcome = loop.run(call, h, packed, call.schedule.to(h), bias, exits)
    results = loop.unpack(call, packed, outcome, sound)
    return Found(*results, packed, outcome.trace, outcome.states)


def _packed(model, rows, loop):
    """The layout; ids, and types and positions as given, packed; and whether they are sound."""
    limits, most, kinds = limits_of(model.config), model.config.max_tokens, model.token_kinds
    mask, ids, words = rows.attention_mask, rows.input_ids, rows.word_ids
    types, positions = rows.token_type_ids, rows.position_ids
    if "token_type_ids" not in limits:
        types = None
    asked = mask, ids, words, kinds, types, positions
    ends = [limits.get(name, (0, 0))[1] + 1 for name in _LOOKED_UP]
    if loop.pack is not None:
        packed, given, sound = loop.pack(*asked, *ends, most)
    elif loop.waits and takes(*asked):
        if (layout := pack_rows(*asked, *ends, most)) is None:
            raise _explain(model, rows)
        packed, given, sound = Packed.of(mask.shape, *layout), [*layout[0].unbind()[5:]], True
    else:
        inside, sound = rows.clamped(limits, most)
        packed = pack_tokens.pack(inside.attention_mask, inside.words(kinds))
        lists = inside.input_ids, None if types is None else inside.token_type_ids
        given = [packed.pack(x) for x in (*lists, inside.position_ids) if x is not None]
    ids = given.pop(0)
    types = None if types is None else given.pop(0)
    return packed, ids, types, given[0] if given else None, sound


def _explain(model, rows):
    return rows.explain(limits_of(model.config), model.config, model.token_kinds)
