"""A peer in a process of its own, which stands still while others are timed.

Threads that wait by spinning, allocators and thread pools of one system would else take from the
times of the next.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import signal
from collections.abc import Sequence
from pathlib import Path

import harness
import peers
import texts
import torch


class Apart:
    """A peer of `peers.PEERS`, in its own process until it is closed; a context manager.

    Whatever the peer raises is raised here, too.

    Args:
        folder, failed: of `peers.export`.
    """

    def __init__(self, name: str, folder: Path, failed: dict[str, str]):
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        arguments = (theirs, name, folder, failed, torch.get_num_threads())
        self._process = context.Process(target=_serve, args=arguments, daemon=True)
        self._process.start()
        theirs.close()

    def wait(self):
        """Until it is loaded; raises `peers.Unavailable` if it cannot be."""
        self._answer()

    def prepare(self, b: texts.Batch) -> int:
        """Hand over a batch; returns what `run` and `time_ms` know it by."""
        return self._ask("prepare", b)

    def run(self, batches: Sequence[int]) -> list[torch.Tensor]:
        """Logits of each batch."""
        return self._ask("run", batches)

    def time_ms(self, batches: Sequence[int]) -> float:
        """Milliseconds that it takes over the batches, by its own clock."""
        return self._ask("time_ms", batches)

    def __enter__(self) -> Apart:
        return self

    def __exit__(self, *_):
        self._process.kill()
        self._process.join()

    def _ask(self, *request):
        os.kill(self._process.pid, signal.SIGCONT)
        _send(self._pipe, request)
        return self._answer()

    def _answer(self):
        try:
            answer = _receive(self._pipe)
        except EOFError:
            raise RuntimeError(f"its process ended: {self._process.exitcode}") from None
        os.kill(self._process.pid, signal.SIGSTOP)
        os.waitid(os.P_PID, self._process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
        if isinstance(answer, Exception):
            raise answer
        return answer


# By value: torch would send a handle of shared memory, to ask a process that stands still for.
def _send(pipe, value):
    pipe.send_bytes(pickle.dumps(value))


def _receive(pipe):
    return pickle.loads(pipe.recv_bytes())


@torch.inference_mode()
def _serve(pipe, name, folder, failed, threads):
    torch.set_num_threads(threads)
    prepared = []

    def prepare(b):
        prepared.append(peer.prepare(b))
        return len(prepared) - 1

    def run(batches):
        return [torch.as_tensor(peer.run(prepared[i])) for i in batches]

    def time_ms(batches):
        return harness.time_ms(lambda: [peer.run(prepared[i]) for i in batches])

    answers = {"prepare": prepare, "run": run, "time_ms": time_ms}
    with contextlib.suppress(EOFError):
        try:
            peer = peers.load(name, folder, failed)
        except peers.Unavailable as error:
            return _send(pipe, error)
        _send(pipe, None)
        while True:
            question, argument = _receive(pipe)
            try:
                answer = answers[question](argument)
            except Exception as error:  # whoever asked is to know
                answer = RuntimeError(f"{type(error).__name__}: {error}")
            _send(pipe, answer)
