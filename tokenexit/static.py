"""The exit loop with static shapes: no wait for the host, so that a CUDA graph can hold it.

What `tokenexit.encoder` does with lists of as many tokens as are active is done here in buffers for
all tokens, whose first rows count; the count stays on the device. A layer is seven launches:

    query_key_value   queries of active tokens, keys and values of all in sentences not finished
    exit_attention
    linear            output, with the residual
    linear            LayerNorm, up, GELU
    linear            down, with the residual
    exit_step_        LayerNorm, store, head, decision, what tokens leave with
    compact_active    the new list, after a memset of its tickets

A relative-position bias adds one, a gather of the queries' positions. Before the first layer lie a
copy of the states and seven fills. `is_sound` is one wait, after the last.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import threading
import warnings
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from tokenexit.ops import compiled_devices, float32_precision
from tokenexit.ops.compact_active import compact_active

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MOST_LABELS = 256  # that exit_step_ takes
MOST_GRAPHS = 64
_PARTS = (
    *("query", "key_value", "attention_output", "attention_norm", "up", "down", "output_norm"),
)
_OF_TOKENS = ("positions", "sentence_of_token", "word_of_token", "word_at")
_OFFSETS = ("cu_tokens", "cu_words")
_OF_SENTENCES = ("window", "min_active")
_DEVICES = compiled_devices("compact_active") & {"cuda"}


def applies(layers: Sequence[nn.Module], heads: Sequence[nn.Module], h, schedule) -> bool:
    """Whether the loop can do what the eager one would.

    That is inference on a GPU that has Triton and the compiled `compact_active`, in fp16, bf16
    or fp32 throughout, with contiguous weights, exact GELU, plain linear layers and at most 256
    labels; and a policy with copy "post_norm" and neighbors "frozen".
    """
    return (
        h.device.type in _DEVICES
        and h.dtype in DTYPES
        and not torch.is_grad_enabled()
        and not schedule.pre_norm
        and not schedule.recompute
        and importlib.util.find_spec("triton") is not None
        and all(layer.activation is F.gelu and not layer.training for layer in layers)
        and all(type(layer.up) is nn.Linear for layer in layers)
        and all(isinstance(head, nn.Linear) and head.out_features <= MOST_LABELS for head in heads)
        and all(head.bias is not None for head in heads)
        and all(w.dtype == h.dtype and w.is_contiguous() for w in weights(layers, heads))
    )


def weights(layers: Sequence[nn.Module], heads: Sequence[nn.Module]) -> list[torch.Tensor]:
    """All that the loop reads of its modules, fast: they are asked at every call."""
    modules = [layer._modules[name] for layer in layers for name in _PARTS]
    return [value for part in (*modules, *heads) for value in part._parameters.values()]


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
    left, layer_of_token = torch.zeros_like(active), torch.zeros_like(active)
    logits = h.new_zeros(h.shape[0], heads[0].out_features)
    uncertainty = torch.zeros_like(active, dtype=torch.float32)
    arrived = torch.zeros_like(schedule.window, dtype=torch.int32)
    split = scratch(h)
    bias = None if bias is None else bias.contiguous()
    positions = None if bias is None else packed.positions
    if exit_layer is not None:
        left_by = torch.where(exit_layer <= numbers[:, None], exit_layer, 0)

    for number, (layer, head) in enumerate(zip(layers, heads, strict=True), 1):
        count, heads_of = cu_active[-1:], (layer.num_heads, -1)
        q, kv = query_key_value(
            *(h, layer.query.weight, layer.query.bias),
            *(layer.key_value.weight, layer.key_value.bias),
            *(active, cu_active, packed.sentence_of_token, precision),
        )
        k, v = kv.unflatten(-1, (2, *heads_of)).unbind(1)
        context, _ = exit_attention(
            *(q.unflatten(-1, heads_of), k, v, cu_active, packed.cu_tokens),
            (h.shape[1] // layer.num_heads) ** -0.5,
            *(bias, positions),
            max_length=packed.shape[1],
            precision=precision,
        )
        out, norm = layer.attention_output, layer.attention_norm
        beside = {"residual": h, "residual_gather": active, "want_stats": True}
        common = {"count": count, "split": split, "precision": precision}
        x, stats = linear(context.flatten(1), out.weight, out.bias, **beside, **common)
        common |= {"norm_weight": norm.weight, "norm_bias": norm.bias, "eps": norm.eps}
        common["norm_stats"] = stats
        up, down = layer.up, layer.down
        inner = linear(x, up.weight, up.bias, norm_on="x", activation="gelu", **common)
        beside = {"residual": x, "want_stats": True}
        x, stats = linear(inner, down.weight, down.bias, norm_on="residual", **beside, **common)

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
            active, cu_active = compact_active(active, cu_active, packed.word_of_token, left)
            positions = None if bias is None else packed.positions[active]
    return logits, layer_of_token


def is_sound(heads: Sequence[nn.Module], logits: torch.Tensor) -> bool:
    """Whether surely no layer's logits had a NaN; `logits` are those tokens left with.

    A state that is NaN stays so, and its token leaves with NaN. Only a head whose own weights are
    not finite makes NaN of a sound state, which a later head may hide.
    """
    sizes = torch.stack(torch._foreach_norm([w for head in heads for w in head.parameters()]))
    return bool(sizes.isfinite().all() & ~logits.isnan().any())


def bucket(size: int, least: int = 16) -> int:
    """The capacity for that many: at most a quarter more, so that few graphs serve all sizes."""
    step = max(least, 1 << max(size.bit_length() - 3, 0))
    return -(-size // step) * step


class GraphedLoop:
    """`exit_loop`, recorded as one CUDA graph for each bucket of sizes, then replayed.

    A graph belongs to sizes (tokens, sentences, longest sentence, each rounded up), dtype, options
    of the policy and addresses of weights: of others, a new one is recorded, and the oldest of 64
    forgotten. Where recording fails, or within another graph or torch.compile, the loop runs
    directly. Buffers are shared by calls, so calls on several streams must not overlap.
    Copies and pickles start without graphs.
    """

    def __init__(self):
        self._graphs, self._pool, self._lock = {}, None, threading.Lock()

    def __reduce__(self):
        return type(self), ()

    def __call__(self, layers, heads, h, packed, schedule, bias=None, exit_layer=None):
        """Arguments and results of `exit_loop`."""
        arguments = (layers, heads, h, packed, schedule, bias, exit_layer)
        if torch.compiler.is_compiling() or torch.cuda.is_current_stream_capturing():
            return exit_loop(*arguments)
        sizes = (bucket(len(h)), bucket(packed.num_sentences + 1, 8), bucket(packed.shape[1]))
        options = (schedule.decides, schedule.max_prob, bias is None, exit_layer is None)
        options += (h.dtype, h.device, float32_precision())
        key = (*sizes, *options, *(weight.data_ptr() for weight in weights(layers, heads)))
        with self._lock, torch.cuda.device(h.device):
            if key not in self._graphs:
                if len(self._graphs) >= MOST_GRAPHS:
                    del self._graphs[next(iter(self._graphs))]
                self._graphs[key] = self._record(arguments, sizes)
            if self._graphs[key] is None:
                return exit_loop(*arguments)
            graph, inputs, results, _ = self._graphs[key]
            fill(inputs, *arguments[2:])
            graph.replay()
            return tuple(result[: len(h)].clone() for result in results)

    def _record(self, arguments, sizes):
        layers, heads = arguments[:2]
        inputs = buffers(*sizes, *arguments[2:])
        fill(inputs, *arguments[2:])
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            exit_loop(layers, heads, *inputs)  # compiles the kernels
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        try:
            with torch.cuda.graph(graph, pool=self._pool):
                results = exit_loop(layers, heads, *inputs)
        except RuntimeError as error:
            warnings.warn(f"layers run without a CUDA graph: {error}", stacklevel=2)
            return None
        # The weights too: their memory must not go to others while the graph may read it.
        return graph, inputs, results, weights(layers, heads)


def buffers(num_tokens, num_sentences, longest, h, packed, schedule, bias, exit_layer):
    """Arguments `h, ..., exit_layer` of `exit_loop`, for so many; zeros."""

    def zeros(like, *size):
        return None if like is None else like.new_zeros(size)

    tokens = {name: zeros(packed.slots, num_tokens) for name in _OF_TOKENS}
    offsets = {name: zeros(packed.slots, num_sentences + 1) for name in _OFFSETS}
    settings = {name: zeros(schedule.window, num_sentences) for name in _OF_SENTENCES}
    threshold = zeros(schedule.threshold, len(schedule.threshold), num_sentences)
    return (
        zeros(h, num_tokens, h.shape[1]),
        dataclasses.replace(packed, shape=(num_sentences, longest), **tokens, **offsets),
        dataclasses.replace(schedule, **settings, threshold=threshold),
        None if bias is None else bias.new_empty(bias.shape),
        zeros(exit_layer, num_tokens),
    )


def fill(inputs, h, packed, schedule, bias, exit_layer):
    """Copy arguments into larger `buffers`; tokens to spare go to sentences that have no tokens."""
    to_h, to_packed, to_schedule, to_bias, to_exit_layer = inputs
    num_tokens, num_sentences = len(h), packed.num_sentences
    pairs = [(to_h, h), (to_bias, bias), (to_exit_layer, exit_layer)]
    pairs += [(getattr(to_packed, n), getattr(packed, n)) for n in (*_OF_TOKENS, *_OFFSETS)]
    pairs += [(getattr(to_schedule, n), getattr(schedule, n)) for n in _OF_SENTENCES]
    pairs = [(to[: len(value)], value) for to, value in pairs if value is not None]
    pairs.append((to_schedule.threshold[:, :num_sentences], schedule.threshold))
    torch._foreach_copy_(*map(list, zip(*pairs, strict=True)))
    to_packed.sentence_of_token[num_tokens:] = len(to_schedule.window) - 1
    to_packed.cu_tokens[num_sentences + 1 :] = num_tokens
    to_packed.cu_words[num_sentences + 1 :] = len(packed.first_token)
