"""In place of CUDA graphs, where there is no GPU: what was recorded is run again."""

import contextlib
import weakref
from collections import Counter

import torch
from torch.nn.utils.stateless import _reparametrize_module

from tokenexit.loops import gpu, graphs


class Graph:
    """A replay reads the weights that the module had, and writes into the first results."""

    def __init__(self, run, module, pool):
        self.run, self.module, self.results = run, module, run()
        self.pool = lambda: pool
        self.held = {**dict(module.named_parameters()), **dict(module.named_buffers())}

    def replay(self):
        with _reparametrize_module(self.module, self.held):
            for old, new in zip(self.results, self.run(), strict=True):
                old.copy_(new)


class Recordings(list):
    """The pools of the graphs so far, of that module; and those graphs that are not forgotten."""

    module = None

    def __init__(self):
        self.alive = weakref.WeakSet()


class Stream:
    """Knows for whom it waited."""

    def __init__(self):
        self.waited = []

    def wait_stream(self, other):
        self.waited.append(other)


def pretend(monkeypatch) -> Recordings:
    """Have `Graphs` record on a CPU; set the result's module."""
    made, stream = Recordings(), Stream()

    def record(run, pool=None):
        if pool is not None and pool not in [graph.pool() for graph in made.alive]:
            raise RuntimeError("use_count > 0 INTERNAL ASSERT FAILED")  # as PyTorch does
        made.append(pool or len(made) + 1)
        made.alive.add(graph := Graph(run, made.module, made[-1]))
        return graph, graph.results

    monkeypatch.setattr(graphs, "record", record)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(gpu, "FALLBACKS", Counter())
    return made
