"""CUDA graphs of all that a model does for padded batches, each for a bucket of sizes."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache

import torch

from tokenexit.loops.gpu import MOST_SENTENCES, fell_back
from tokenexit.ops import float32_precision
from tokenexit.schedule import Schedule

MOST_GRAPHS, MOST_TRIES = 64, 3
# One at a time in a process: each waits for the device, which a recording beside it forbids.
_RECORDING = threading.Lock()


def bucket(size: int, least: int = 16) -> int:
    """The capacity for that many: at most a quarter more, so that few graphs serve all sizes."""
    step = max(least, 1 << max(size.bit_length() - 3, 0))
    return -(-size // step) * step


@cache
def _stream_beside(device: int) -> torch.cuda.Stream:
    """On which all graphs of a device are recorded: those that share memory want the same."""
    return torch.cuda.Stream(device)


def record(run: Callable, pool=None) -> tuple[torch.cuda.CUDAGraph, object]:
    """A CUDA graph of `run()`, and its results, which each replay computes anew.

    It is of the current device. A replay reads what run read, where it lay: that has to be kept as
    long as the graph is.

    Args:
        pool: of another graph, whose memory it shares; None: one of its own.
    """
    device, current = torch.cuda.current_device(), torch.cuda.current_stream()
    stream, pool = _stream_beside(device), pool or torch.cuda.graph_pool_handle()
    with _RECORDING:
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            run()  # compiles the kernels
        current.wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # thread_local: other threads may allocate meanwhile.
        how = {"pool": pool, "stream": stream, "capture_error_mode": "thread_local"}
        try:
            with torch.cuda.graph(graph, **how):
                results = run()
        except BaseException:
            with suppress(RuntimeError):  # which a recording that fails may leave open for ever
                torch._C._cuda_endAllocateToPool(device, pool)
            raise
        finally:
            torch.cuda.set_stream(current)  # torch.cuda.graph leaves its own where recording fails
    return graph, results


class Inputs:
    """Rows and a schedule that a graph reads, with room for so many sentences and tokens of each.

    The schedule has room for one more sentence, as the layout of the GPU's loop has it.

    Args:
        size: of the rows.
        rows, schedule: of which kind they are.
    """

    @torch.inference_mode(False)  # else they could be filled in that mode only
    def __init__(self, size: tuple[int, int], rows: dict, schedule: Schedule):
        self.rows = {name: v if v is None else v.new_zeros(size) for name, v in rows.items()}
        self.schedule = schedule.like(size[0] + 1)
        self._shape = self._schedule = None  # that they were filled with

    def fill(self, rows: dict, schedule: Schedule):
        """Copy these into them; what is there beyond these rows is masked."""
        b, n = shape = rows["attention_mask"].shape
        if shape != self._shape:
            self.rows["attention_mask"].zero_()
            self._shape = shape
        given = {name: value for name, value in rows.items() if value is not None}
        # One launch, of rows of one dtype that fill the buffers.
        larger = [self.rows[name][:b, :n] for name in given]
        torch._foreach_copy_(larger, [*given.values()])
        if schedule is not self._schedule:  # which nobody writes into
            for larger, value in zip(self.schedule.tensors, schedule.tensors, strict=True):
                larger[..., :b].copy_(value)
            self._schedule = schedule


@dataclass
class Recorded:
    """A graph, the inputs that it reads and the results that it writes."""

    graph: torch.cuda.CUDAGraph
    inputs: Inputs
    results: Sequence[torch.Tensor]

    def replay(self, rows: dict, schedule: Schedule) -> tuple[torch.Tensor, ...]:
        """The results for these, that the next replay does not overwrite."""
        self.inputs.fill(rows, schedule)
        self.graph.replay()
        *padded, last = self.results
        b, n = rows["attention_mask"].shape
        return *(result[:b, :n].clone() for result in padded), last.clone()


class Graphs:
    """What is done for padded batches, recorded as a CUDA graph for each bucket of sizes.

    A graph belongs to B and N, each rounded up, to which rows there are, and to options of the
    policy: of others, a new one is recorded, and the oldest of 64 forgotten. All belong to the
    addresses of all weights and to constants: where one has changed, they are recorded anew. Where
    recording fails, which is tried three times, or within torch.compile, all is run directly.
    Buffers are shared by calls, so those on another stream wait for those before. Copies and
    pickles start without graphs.

    To look over a model takes the host as long as a sentence takes the GPU. So a caller may have a
    graph replayed `ahead`, and look whether it still is the model's while the GPU is at it. What
    it reads is kept meanwhile, even where the model has other tensors by now.
    """

    def __init__(self):
        self._graphs, self._lock, self._failed = {}, threading.Lock(), Counter()
        self._weights, self._addresses, self._stream = [], [], None

    def __reduce__(self):
        return type(self), ()

    def forget(self):
        """Free all graphs, and what they read."""
        with self._lock:
            self._forget()

    def ahead(self, rows: dict, schedule: Schedule) -> tuple[Recorded, tuple] | None:
        """What a graph for such rows and its replay give; None without one.

        Args:
            rows, schedule: see `__call__`, which decides whether they may be taken.
        """
        if not self._graphs or _is_traced():
            return None
        with self._lock:
            recorded = self._graphs.get(_key(rows, schedule))
            if recorded is None:  # rows that are on no GPU, for one
                return None
            with torch.cuda.device(rows["attention_mask"].device):
                self._take_turns()
                return recorded, recorded.replay(rows, schedule)

    def __call__(
        self,
        run: Callable,
        rows: dict,
        schedule: Schedule,
        weights: Callable[[], Sequence[torch.Tensor]],
        ahead: tuple[Recorded, tuple] | None = None,
        constants: Sequence[object] = (),
    ) -> tuple[torch.Tensor, ...]:
        """`run(rows, schedule)`.

        Args:
            run: gives tensors `[B, N, ..]` and a last one of another shape; it must not wait for
                the host, nor look at where "attention_mask" is 0.
            rows: by name `[B, N]` or None, on the GPU.
            schedule: of B sentences; a recorded run has room for one more.
            weights: gives all parameters and buffers that run reads.
            ahead: what `ahead` gave for these.
            constants: numbers and functions that run reads of modules.
        """
        if _is_traced():
            return run(rows, schedule)
        key, weights = _key(rows, schedule), weights()
        addresses = [*map(torch.Tensor.data_ptr, weights), *constants]
        with self._lock, torch.cuda.device(rows["attention_mask"].device):
            if addresses != self._addresses:
                self._forget()
                # By tensors of ours: those of the module may be given other memory.
                self._weights = [weight.detach() for weight in weights]
                self._addresses = addresses
            if ahead is not None and self._graphs.get(key) is ahead[0]:
                return ahead[1]
            self._take_turns()
            if self._graphs.get(key) is None and self._failed[key] < MOST_TRIES:
                if len(self._graphs) >= MOST_GRAPHS:
                    del self._graphs[next(iter(self._graphs))]
                recorded = self._record(run, rows, schedule)
                self._failed[key] += recorded is None
                self._graphs[key] = recorded
            recorded = self._graphs.get(key)
            return run(rows, schedule) if recorded is None else recorded.replay(rows, schedule)

    def _forget(self):
        self._graphs.clear()
        self._failed.clear()
        self._weights, self._addresses = [], []

    def _take_turns(self):
        stream = torch.cuda.current_stream()
        if self._stream not in (None, stream):
            stream.wait_stream(self._stream)
        self._stream = stream

    def _record(self, run, rows, schedule):
        try:
            inputs = Inputs(_size(rows), rows, schedule)
            inputs.fill(rows, schedule)
            # One that no graph has any more may not be asked for again.
            pool = next((made.graph.pool() for made in self._graphs.values() if made), None)
            graph, results = record(lambda: run(inputs.rows, inputs.schedule), pool)
            return Recorded(graph, inputs, results)
        except RuntimeError as error:
            if isinstance(error, torch.OutOfMemoryError):
                self._graphs.clear()  # the others' memory may be what a direct run wants
            fell_back("not recorded", f"the model runs without a CUDA graph: {error}")
            return None


def _is_traced():
    return torch.compiler.is_compiling() or torch.cuda.is_current_stream_capturing()


def _size(rows):
    b, n = rows["attention_mask"].shape
    # Of few sentences not the double, which a lone one would wait for.
    sentences = bucket(b, 8) if b > 8 else 1 << (b - 1).bit_length()
    return max(b, min(sentences, MOST_SENTENCES)), bucket(n)


def _key(rows, schedule):
    """What a graph serves."""
    given = [(name, x.dtype, x.device) for name, x in rows.items() if x is not None]
    options = schedule.decides, schedule.max_prob, schedule.pre_norm, schedule.recompute
    return (*_size(rows), *given, *options, float32_precision())
