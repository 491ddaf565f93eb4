"""CUDA graphs of all that a model does for padded batches, each for a bucket of sizes."""

from __future__ import annotations

import threading
from collections.abc import Callable

import torch
from torch import nn

from tokenexit.loops.gpu import fell_back
from tokenexit.ops import float32_precision
from tokenexit.schedule import Schedule

MOST_GRAPHS = 64


def bucket(size: int, least: int = 16) -> int:
    """The capacity for that many: at most a quarter more, so that few graphs serve all sizes."""
    step = max(least, 1 << max(size.bit_length() - 3, 0))
    return -(-size // step) * step


def record(run: Callable, pool=None) -> tuple[torch.cuda.CUDAGraph, object]:
    """A CUDA graph of `run()`, and its results, which each replay computes anew.

    A replay reads what run read, where it lay: that has to be kept as long as the graph is.

    Args:
        pool: of another graph, whose memory it shares; None: one of its own.
    """
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
        self._graphs, self._lock = {}, threading.Lock()
        self._weights, self._addresses, self._stream = [], [], None

    def __reduce__(self):
        return type(self), ()

    def __call__(self, run: Callable, rows: dict, schedule: Schedule, module: nn.Module):
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
            # One that no graph has any more may not be asked for again.
            pool = next((made[0].pool() for made in self._graphs.values() if made), None)
            graph, results = record(lambda: run(*inputs), pool)
        except RuntimeError as error:
            if isinstance(error, torch.OutOfMemoryError):
                self._graphs.clear()  # the others' memory may be what a direct run wants
            fell_back("not recorded", f"the model runs without a CUDA graph: {error}")
            return None
        return graph, inputs, results


@torch.inference_mode(False)  # else they could be filled in that mode only
def buffers(size: tuple[int, int], rows: dict, schedule: Schedule) -> tuple[dict, Schedule]:
    """Rows and schedule like these, for so many sentences and tokens of each; zeros."""
    larger = {name: v if v is None else v.new_zeros(size) for name, v in rows.items()}
    return larger, schedule.like(size[0])


def fill(to_rows: dict, to_schedule: Schedule, rows: dict, schedule: Schedule):
    """Copy into larger `buffers`; what is there beyond these rows is masked."""
    to_rows["attention_mask"].zero_()
    b, n = rows["attention_mask"].shape
    pairs = [(to_rows[name][:b, :n], value) for name, value in rows.items() if value is not None]
    for larger, value in zip(to_schedule.tensors, schedule.tensors, strict=True):
        pairs.append((larger[..., :b], value))
    torch._foreach_copy_(*map(list, zip(*pairs, strict=True)))
