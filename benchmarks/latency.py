"""What does a caller of a server wait for: one sentence, alone and among others?

Part of `cpu`, which hands its systems over. Sentences come one by one. Each system gets a stretch
of them at a time, in alternation, and a first call that does not count. Peers have one caller.
"""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import harness
import peers
import texts
import torch
from apart import Apart

THREADS, CALLERS = (1, 2), 4
PEERS = ("ONNX Runtime", "ONNX Runtime int8", "OpenVINO int8")
STRETCH = 25  # sentences
Call = Callable[[], object]


def rows(
    models: Mapping[str, torch.nn.Module],
    exits: Mapping[str, Callable[[texts.Batch], dict]],
    sentences: Sequence[texts.Sentence],
    folder: Path,
    failed: Mapping[str, str],
    skip: Sequence[str] = (),
) -> list[dict]:
    """Rows of each system, number of threads and number of callers.

    Args:
        models: ours, by dtype.
        exits: by name, the arguments that make them, see `cpu.Exits`.
        folder, failed: of `peers.export`.
        skip: peers.
    """
    batches = [texts.batch([s]) for s in sentences]
    facts, calls = {}, {}
    for dtype, model in models.items():
        for name, arguments in exits.items():
            system = "tokenexit" if dtype == "fp32" else f"tokenexit {dtype}"
            facts[system, name] = {"system": system, "dtype": dtype, "exits": name}
            calls[system, name] = [_call(model, b, arguments(b)) for b in batches]
    found, before = [], torch.get_num_threads()
    try:
        for threads in THREADS:
            torch.set_num_threads(threads)
            with ExitStack() as stack:
                timed = {key: _clocks(mine) for key, mine in calls.items()}
                for name in PEERS:
                    if name in skip:
                        continue
                    peer = stack.enter_context(Apart(name, folder, failed))
                    try:
                        peer.wait()
                    except peers.Unavailable:
                        continue  # `cpu` has said so
                    facts[name, ""] = {"system": name, "dtype": peers.PEERS[name][0]}
                    inputs = [peer.prepare(b) for b in batches]
                    timed[name, ""] = [lambda i=i, p=peer: p.time_ms([i]) for i in inputs]
                times = alone(timed)
            for key, mine in times.items():
                around = share_around(calls[key]) if key in calls else {}
                row = {**facts[key], "callers": 1, **summary(mine), **around}
                found.append({**row, **harness.origin()})
            for key, mine in calls.items():
                waited, seconds = together(mine, CALLERS)
                row = {**facts[key], "callers": CALLERS, **summary(waited)}
                row["sentences_per_s"] = round(len(waited) / seconds, 1)
                found.append({**row, **harness.origin()})
    finally:
        torch.set_num_threads(before)
    return found


def _call(model, b, arguments) -> Call:
    inputs = {"attention_mask": b.attention_mask, "word_ids": b.word_ids, **arguments}
    return lambda: model(b.input_ids, **inputs)


def _clocks(calls: Sequence[Call]) -> list[Callable[[], float]]:
    return [lambda call=call: harness.time_ms(call) for call in calls]


def alone(timed: Mapping[object, Sequence[Callable[[], float]]]) -> dict[object, list[float]]:
    """Milliseconds of each system's calls, one after the other; each is run by its clock."""
    times = {key: [] for key in timed}
    count = len(next(iter(timed.values())))
    for start in range(0, count, STRETCH):
        for key, clocks in timed.items():
            clocks[start]()
            times[key] += [clock() for clock in clocks[start : start + STRETCH]]
    return times


def together(calls: Sequence[Call], callers: int) -> tuple[list[float], float]:
    """Milliseconds of each call, shared out among callers in threads of their own, and the seconds
    that all took."""
    waited, errors, ready = [], [], threading.Barrier(callers + 1)

    @torch.inference_mode()
    def work(mine: Sequence[Call]):
        try:
            mine[0]()  # a thread's first call makes its own
            ready.wait()
            waited.extend([harness.time_ms(call) for call in mine])
        except Exception as error:
            errors.append(error)
            ready.abort()

    workers = [
        threading.Thread(target=work, args=(calls[i::callers],), daemon=True)
        for i in range(callers)
    ]
    for worker in workers:
        worker.start()
    try:
        ready.wait()
    except threading.BrokenBarrierError:
        pass  # the error of which is raised below
    start = time.perf_counter()
    for worker in workers:
        worker.join()
    if errors:
        raise errors[0]
    return waited, time.perf_counter() - start


def share_around(calls: Sequence[Call]) -> dict:
    """What a call takes without the one op of all layers: Python, checks, packing, embeddings.

    {} where there is no such op, or it did not run.
    """
    with watched("exit_loop") as spent:
        times = [harness.time_ms(call) for call in calls]
    if len(spent) != len(calls):
        return {}
    around = [t - s for t, s in zip(times, spent, strict=True)]
    share = statistics.median(a / t for a, t in zip(around, times, strict=True))
    return {"around_ms": round(statistics.median(around), 3), "around": round(share, 3)}


@contextmanager
def watched(op: str) -> Iterator[list[float]]:
    """Milliseconds of each call of `torch.ops.tokenexit.OP`, as they come."""
    spent, space = [], torch.ops.tokenexit
    inner = getattr(space, op, None)

    def run(*args):
        start = time.perf_counter()
        result = inner(*args)
        spent.append((time.perf_counter() - start) * 1e3)
        return result

    if inner is None:
        yield spent
        return
    setattr(space, op, run)
    try:
        yield spent
    finally:
        setattr(space, op, inner)


def summary(times: Sequence[float]) -> dict:
    """Median and 99th percentile of calls."""
    ordered = sorted(times)
    p99 = ordered[min(len(ordered) - 1, len(ordered) * 99 // 100)]
    p50 = statistics.median(times)
    return {"calls": len(times), "p50_ms": round(p50, 3), "p99_ms": round(p99, 3)}
