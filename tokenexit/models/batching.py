"""Calls of several threads at about the same time, done as one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from threading import Condition
from typing import Generic, TypeVar

_In, _Out = TypeVar("_In"), TypeVar("_Out")


class Job(Generic[_In, _Out]):
    """What one caller wants done.

    Attributes:
        wanted: the caller's.
        size: how much it is.
        result, error: what came of it; both None until then.
    """

    def __init__(self, wanted: _In, size: int):
        self.wanted, self.size = wanted, size
        self.result: _Out | None = None
        self.error: Exception | None = None

    @property
    def done(self) -> bool:
        return self.result is not None or self.error is not None


class MicroBatcher(Generic[_In, _Out]):
    """Lets the thread that comes first do the work of all that come within a window.

    There is no thread of its own: whoever finds nobody at work waits for the window to pass, takes
    what has come, does it, and hands on to one that came meanwhile.

    Args:
        work: gives the results of several wants, each not None; if it raises, they are done one by
            one, so that an error is only its caller's.
        window: seconds; 0: no wait, what comes while others are at work is done together.
        most: size at which the wait ends early.
    """

    def __init__(
        self, work: Callable[[Sequence[_In]], Sequence[_Out]], window: float, most: int
    ) -> None:
        self._work, self._window, self._most = work, window, most
        self._changed = Condition()
        self._waiting: list[Job] = []
        self._busy = False

    def __reduce__(self):
        """Copies and pickles start with nobody waiting."""
        return type(self), (self._work, self._window, self._most)

    def __call__(self, wanted: _In, size: int = 1) -> _Out:
        """The result of `work` for one caller, from any thread."""
        job, jobs, leads = Job(wanted, size), [], False
        with self._changed:
            self._waiting.append(job)
            self._changed.notify_all()
            try:
                self._changed.wait_for(lambda: job.done or not self._busy)
                if not job.done:
                    leads = self._busy = True
                    self._changed.wait_for(self._is_full, self._window)
                    jobs, self._waiting = self._waiting, []
            except BaseException:  # as ^C: another does the rest
                if job in self._waiting:
                    self._waiting.remove(job)
                self._busy = self._busy and not leads
                self._changed.notify_all()
                raise
        if leads:
            try:
                self._do(jobs)
            finally:
                with self._changed:
                    self._busy = False
                    self._waiting[:0] = [x for x in jobs if not x.done and x is not job]
                    self._changed.notify_all()
        if job.error is not None:
            raise job.error
        return job.result

    def _is_full(self) -> bool:
        return sum(job.size for job in self._waiting) >= self._most

    def _do(self, jobs: list[Job]):
        try:
            results = self._work([job.wanted for job in jobs])
        except Exception as error:
            if len(jobs) == 1:
                jobs[0].error = error
                return
            for job in jobs:
                self._do([job])
            return
        for job, result in zip(jobs, results, strict=True):
            job.result = result
