"""The exit loop with static shapes: no wait for the host, so that a CUDA graph can hold it.

What `tokenexit.encoder` does with lists of as many tokens as are active is done here in buffers for
all tokens, whose first rows count; the count stays on the device. A layer is seven launches:

    query_key_value   queries of active tokens, keys and values of all in sentences not finished
                      (the seen ones), and what LayerNorm makes of `up`
    exit_attention
    linear            output, with the residual
    linear            LayerNorm, up, GELU
    linear            down, with the residual
    exit_step_        LayerNorm, store, head, decision, what tokens leave with
    compact_active    the new lists of active and of seen tokens

A relative-position bias adds one, a gather of the queries' positions. Before the first layer lie a
copy of the states and eight fills. `Graphs` records the loop with all that a model does before and
after it.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import nn

from tokenexit.conditions import CALLS, TENSORS, unmet
from tokenexit.int8 import Int8Linear
from tokenexit.layers import reads
from tokenexit.ops import compiled_devices, extension_error, float32_precision
from tokenexit.ops.compact_active import compact_active
from tokenexit.packing import Packed

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MOST_LABELS = 256  # that exit_step_ takes
MOST_GRAPHS = 64
_DEVICES = compiled_devices("compact_active") & {"cuda"}
# How often a GPU was served by a slower path, by reason.
FALLBACKS = Counter()


def fell_back(reason: str, message: str) -> None:
    """Count a call for `FALLBACKS`, and warn of the first one with that reason."""
    FALLBACKS[reason] += 1
    if FALLBACKS[reason] == 1:
        warnings.warn(message, stacklevel=3)


def lacks(device: str = "cuda") -> str | None:
    """What the loop wants and is not installed, in words; None if all is there."""
    if device not in _DEVICES:
        why = extension_error() or "the compiled ops were built without CUDA"
        return f"the CUDA op compact_active ({why})"
    if importlib.util.find_spec("triton") is None:
        return "triton (pip install triton)"
    return None


def applies(
    layers: Sequence[nn.Module],
    heads: Sequence[nn.Module],
    h: torch.Tensor,
    others: Sequence[nn.Module] = (),
    kinds: Sequence[type] = (),
) -> bool:
    """Whether the loop can do what the eager one would for states like h.

    That is inference on a GPU that has Triton and the compiled `compact_active`, in fp16, bf16
    or fp32 throughout, with exact GELU and at most 256 labels, of modules that may be passed over
    (`tokenexit.conditions`); so may `others`, see `layers.reads`. Schedules have to be post_norm,
    without recompute. Where Triton or the op is all that is missing, there is a warning.
    """
    device = h.device.type
    fits = (
        device in {"cuda", *_DEVICES}
        and h.dtype in DTYPES
        and not torch.is_grad_enabled()
        and unmet((*CALLS, *TENSORS), reads(layers, heads, h, others, kinds)) is None
        and all(type(part) is not Int8Linear for part in layers[0].parts())
        and all(layer.activation is F.gelu for layer in layers)
        and not any(layer.training or layer.drops() for layer in layers)
        and heads[0].weight.shape[0] <= MOST_LABELS
    )
    if fits and (what := lacks(device)):
        fell_back("not installed", f"slow on this GPU: {what} is missing; see `tokenexit info`")
        return False
    return fits


def pack(real: torch.Tensor, word_ids: torch.Tensor) -> tuple[Packed, torch.Tensor]:
    """The layout of a padded batch, with room for all its cells and a last, empty sentence.

    Args:
        real: `[B, N]` bool, true at real tokens; word_ids: `[B, N]` int64.

    Returns:
        The layout, see `reference.pack_static` for what it has in excess; and `[B, N]` int64, the
        packed index of each real token.
    """
    from tokenexit.kernels.pack_static import pack_static

    *layout, place = pack_static(real, word_ids)
    return Packed.of((len(real) + 1, real.shape[1]), *layout), place


def weights(layers: Sequence[nn.Module], heads: Sequence[nn.Module]) -> list[torch.Tensor]:
    """All that the loop reads of its modules, fast: they are asked at every call."""
    return [w for part in (*_parts(layers), *heads) for w in part._parameters.values()]


def _parts(layers: Sequence[nn.Module]) -> list[nn.Module]:
    return [part for layer in layers for part in layer.parts()]


def exit_loop(
    layers: Sequence[nn.Module],
    heads: Sequence[nn.Module],
    h: torch.Tensor,
    packed,
    schedule,
    bias: torch.Tensor | None = None,
    exit_layer: torch.Tensor | None = None,
    precision: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What `encoder.last_of` makes of the trace of `encoder.ExitEncoder` for these arguments.

    Args:
        layers, heads, h, packed, schedule, bias, exit_layer: see `reference.exit_forward`. Tokens
            beyond `packed.cu_tokens[B]` are in no sentence, and nothing is computed of them.
        precision: of fp32 products, "ieee" or "tf32"; None: what PyTorch is set to. Heads and
            decisions are "ieee".

    Returns:
        Logits `[T, C]` and layers `[T]` int64 that tokens left with; 0 for those in no sentence.
    """
    from tokenexit.kernels.attention import exit_attention
    from tokenexit.kernels.decision import exit_step_
    from tokenexit.kernels.linear import linear, query_key_value, scratch

    precision = precision or float32_precision()
    numbers = torch.arange(1, len(layers), device=h.device)
    h, active, cu_active = h.clone(), torch.arange(h.shape[0], device=h.device), packed.cu_tokens
    seen, cu_seen = active, cu_active
    left, layer_of_token = torch.zeros_like(active), torch.zeros_like(active)
    logits = h.new_zeros(h.shape[0], heads[0].out_features)
    uncertainty = torch.zeros_like(active, dtype=torch.float32)
    arrived = torch.zeros_like(schedule.window, dtype=torch.int32)
    split, places = scratch(h), cu_active.new_zeros(len(cu_active) // 8 + 3)
    bias = None if bias is None else bias.contiguous()
    positions = None if bias is None else packed.positions
    if exit_layer is not None:
        left_by = torch.where(exit_layer <= numbers[:, None], exit_layer, 0)

    for number, (layer, head) in enumerate(zip(layers, heads, strict=True), 1):
        count, heads_of = cu_active[-1:], (layer.num_heads, -1)
        norm, up, down = layer.attention_norm, layer.up, layer.down
        q, kv, folded = query_key_value(
            *(h, layer.query.weight, layer.query.bias),
            *(layer.key_value.weight, layer.key_value.bias),
            *(active, cu_active, seen, cu_seen),
            *(norm.weight, norm.bias, up.weight, up.bias, precision),
        )
        k, v = kv.unflatten(-1, (2, *heads_of)).unbind(1)
        context, _ = exit_attention(
            *(q.unflatten(-1, heads_of), k, v, cu_active, cu_seen),
            (h.shape[1] // layer.num_heads) ** -0.5,
            *(bias, positions),
            max_length=packed.shape[1],
            precision=precision,
        )
        out, common = layer.attention_output, dict(count=count, split=split, precision=precision)
        common |= dict(norm_weight=norm.weight, norm_bias=norm.bias, eps=norm.eps)
        beside = dict(residual=h, residual_gather=active, want_stats=True, norm_on="out")
        x, stats = linear(context.flatten(1), out.weight, out.bias, **beside, **common)
        common["norm_stats"] = stats
        inner = linear(x, up.weight, norm_on="x", folded=folded, activation="gelu", **common)
        beside = dict(residual=x, want_stats=True, norm_on="residual")
        x, stats = linear(inner, down.weight, down.bias, **beside, **common)

        norm, last = layer.output_norm, number == len(layers)
        asks = exit_layer is None and not last and schedule.decides[number - 1]
        exit_step_(
            *(x, stats, norm.weight, norm.bias, norm.eps, head.weight, head.bias),
            *(active, cu_active, packed.word_at, h, logits, layer_of_token, uncertainty, left),
            *(packed.cu_words, schedule.window, schedule.threshold[number - 1]),
            *(schedule.min_active, arrived, number, packed.shape[1], schedule.max_prob, asks),
        )
        if exit_layer is not None and not last:
            left, asks = left_by[number - 1], True
        if asks:
            lists = active, cu_active, packed.word_of_token, left, packed.cu_tokens, places
            active, cu_active, seen, cu_seen = compact_active(*lists)
            positions = None if bias is None else packed.positions[active]
    return logits, layer_of_token


def is_sound(heads: Sequence[nn.Module], logits: torch.Tensor) -> torch.Tensor:
    """Whether surely no layer's logits had a NaN, `[]` bool; `logits` are those tokens left with.

    A state that is NaN stays so, and its token leaves with NaN. Only a head whose own weights are
    not finite makes NaN of a sound state, which a later head may hide.
    """
    sizes = torch.stack(torch._foreach_norm([w for head in heads for w in head.parameters()]))
    return sizes.isfinite().all() & ~logits.isnan().any()


def bucket(size: int, least: int = 16) -> int:
    """The capacity for that many: at most a quarter more, so that few graphs serve all sizes."""
    step = max(least, 1 << max(size.bit_length() - 3, 0))
    return -(-size // step) * step


def record(run: Callable, pool=None) -> tuple[torch.cuda.CUDAGraph, object]:
    """A CUDA graph of `run()`, and its results, which each replay computes anew."""
    current, stream = torch.cuda.current_stream(), torch.cuda.Stream()
    stream.wait_stream(current)
    with torch.cuda.stream(stream):
        run()  # compiles the kernels
    current.wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    try:
        # thread_local: other threads may allocate meanwhile.
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            results = run()
    finally:
        torch.cuda.set_stream(current)  # torch.cuda.graph leaves its own where recording fails
    return graph, results


def held(module: nn.Module) -> list[torch.Tensor]:
    """All parameters and buffers of a module and those within it, fast: every call asks."""
    found, parts = [], [module]
    for part in parts:
        if part is None:
            continue
        own = part.__dict__
        for name, into in (("_parameters", found), ("_buffers", found), ("_modules", parts)):
            if got := own[name]:
                into += got.values()
    return [tensor for tensor in found if tensor is not None]


class Graphs:
    """What is done for padded batches, recorded as a CUDA graph for each bucket of sizes.

    A graph belongs to B and N, each rounded up, to which rows there are, and to options of the
    policy: of others, a new one is recorded, and the oldest of 64 forgotten. All belong to the
    addresses of all that the module holds: where one has changed, they are recorded anew. Where
    recording fails, or within another graph or torch.compile, all is run directly. Buffers are
    shared by calls, so those on another stream wait for those before. Copies and pickles start
    without graphs.
    """

    def __init__(self):
        self._graphs, self._pool, self._lock = {}, None, threading.Lock()
        self._weights, self._addresses, self._stream = [], [], None

    def __reduce__(self):
        return type(self), ()

    def __call__(self, run: Callable, rows: dict, schedule, module: nn.Module):
        """`run(rows, schedule)`.

        Args:
            run: gives tensors `[B, N, ..]` and a last one of another shape; it must not wait for
                the host, nor look at where "attention_mask" is false.
            rows: by name `[B, N]` or None, on the GPU; "attention_mask" is bool.
            schedule: of B sentences.
            module: holds all parameters and buffers that run reads.
        """
        if torch.compiler.is_compiling() or torch.cuda.is_current_stream_capturing():
            return run(rows, schedule)
        mask = rows["attention_mask"]
        size = bucket(len(mask), 8), bucket(mask.shape[1])
        given = tuple((name, value.dtype) for name, value in rows.items() if value is not None)
        key = (*size, given, schedule.decides, schedule.max_prob, mask.device, float32_precision())
        weights = held(module)
        addresses = [weight.data_ptr() for weight in weights]
        with self._lock, torch.cuda.device(mask.device):
            stream = torch.cuda.current_stream()
            if self._stream not in (None, stream):
                stream.wait_stream(self._stream)
            self._stream = stream
            if addresses != self._addresses:
                self._graphs.clear()
                # Kept, as their memory must not go to others while a graph may read it.
                self._weights, self._addresses = weights, addresses
            if key not in self._graphs:
                if len(self._graphs) >= MOST_GRAPHS:
                    del self._graphs[next(iter(self._graphs))]
                self._graphs[key] = self._record(run, size, rows, schedule)
            if self._graphs[key] is None:
                return run(rows, schedule)
            graph, inputs, results = self._graphs[key]
            fill(*inputs, rows, schedule)
            graph.replay()
            *padded, last = results
            b, n = mask.shape
            return *(result[:b, :n].clone() for result in padded), last.clone()

    def _record(self, run, size, rows, schedule):
        try:
            inputs = buffers(size, rows, schedule)
            fill(*inputs, rows, schedule)
            self._pool = self._pool or torch.cuda.graph_pool_handle()
            graph, results = record(lambda: run(*inputs), self._pool)
        except RuntimeError as error:
            if isinstance(error, torch.OutOfMemoryError):
                self._graphs.clear()  # the others' memory may be what a direct run wants
            fell_back("not recorded", f"the model runs without a CUDA graph: {error}")
            return None
        return graph, inputs, results


@torch.inference_mode(False)  # else they could be filled in that mode only
def buffers(size: tuple[int, int], rows: dict, schedule) -> tuple:
    """Rows and schedule like these, for so many sentences and tokens of each; zeros."""
    larger = {name: v if v is None else v.new_zeros(size) for name, v in rows.items()}
    tensors = {name: getattr(schedule, name) for name in ("window", "min_active", "threshold")}
    tensors = {name: v.new_zeros(*v.shape[:-1], size[0]) for name, v in tensors.items()}
    return larger, dataclasses.replace(schedule, **tensors)


def fill(to_rows: dict, to_schedule, rows: dict, schedule):
    """Copy into larger `buffers`; what is there beyond these rows is masked."""
    to_rows["attention_mask"].zero_()
    b, n = rows["attention_mask"].shape
    pairs = [(to_rows[name][:b, :n], value) for name, value in rows.items() if value is not None]
    for name in ("window", "min_active", "threshold"):
        pairs.append((getattr(to_schedule, name)[..., :b], getattr(schedule, name)))
    torch._foreach_copy_(*map(list, zip(*pairs, strict=True)))
