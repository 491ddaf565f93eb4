"""How long does the host take for a call that a CUDA graph serves? No GPU is wanted.

    PYTHONPATH=benchmarks python -m gpu_host [--sizes 1x32 64x128] [--rounds 3000]

On a CPU, with a graph whose replay does nothing and results that are always the same: all that the
host does for a call of a BERT-base (12 layers; their widths cost the host nothing, so they are
small), in microseconds, before the replay, beside it (while a GPU would be busy), and after the
wait. Launches are those of a CPU; on a GPU each takes the host some microseconds more.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from contextlib import ExitStack, nullcontext
from itertools import pairwise
from unittest import mock

import gpu
import torch

from tokenexit import ExitPolicy
from tokenexit.loops import gpu as gpu_loop
from tokenexit.loops import graphs
from tokenexit.models import modeling

WIDTHS = dict(hidden_size=64, num_attention_heads=2, intermediate_size=128, vocab_size=1000)


class Graph:
    """A replay tells when it was."""

    def __init__(self, marks: list[float]):
        self.replay = lambda: marks.append(time.perf_counter())
        self.pool = lambda: 1


def measure(model, sentences: int, tokens: int, rounds: int) -> dict[str, list[float]]:
    """Microseconds of each round, by part."""
    marks, inner, stream = [], modeling.run, mock.Mock()
    ids = torch.randint(5, 900, (sentences, tokens), generator=torch.Generator().manual_seed(0))
    call = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    result = model(**call)

    def record(run, pool=None):
        shape = graphs.bucket(sentences), graphs.bucket(tokens)
        padded = result.logits.new_zeros(*shape, result.logits.shape[-1])
        return Graph(marks), (padded, ids.new_ones(shape), torch.tensor(True))

    def run(*args, **kwargs):
        found = inner(*args, **kwargs)
        marks.append(time.perf_counter())
        return found

    parts = {"before": [], "beside": [], "after": []}
    with ExitStack() as stack:
        for where, name, new in (
            (graphs, "record", record),
            (modeling, "run", run),
            (gpu_loop, "_DEVICES", {"cpu"}),
            (gpu_loop, "lacks", lambda device: None),
            (torch.cuda, "device", lambda device: nullcontext()),
            (torch.cuda, "current_stream", lambda *_: stream),
            (torch.cuda, "is_current_stream_capturing", lambda: False),
        ):
            stack.enter_context(mock.patch.object(where, name, new))
        for number in range(-20, rounds):  # the first are a warm-up
            marks.clear()
            start = time.perf_counter()
            model(**call)
            times = start, *marks, time.perf_counter()
            for part, (a, b) in zip(parts, pairwise(times), strict=True):
                if number >= 0:
                    parts[part].append((b - a) * 1e6)
    model._graphs.forget()
    return parts


def main(arguments=None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", nargs="+", type=gpu.size_of, default=[(1, 32), (64, 128)])
    parser.add_argument("--rounds", type=int, default=3000)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    model = gpu.base(**WIDTHS).ours.half()
    model.mark_untrained(())
    model.policy = ExitPolicy(threshold=0.1)
    with torch.inference_mode():
        for sentences, tokens in options.sizes:
            parts = measure(model, sentences, tokens, options.rounds)
            told = ", ".join(f"{name} {statistics.median(us):.0f}" for name, us in parts.items())
            print(f"{sentences} x {tokens}, us of the host: {told}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
