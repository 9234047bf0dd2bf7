"""Where the time of a step goes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Clock:
    """Time of the named stages of one step, without ever waiting for a GPU before the step is over.

    On a GPU a stage lasts from when the device reaches its begin to when it reaches its end: the host runs ahead, and
    what it has the device wait for is in the stage that it belongs to.
    """

    def __init__(self) -> None:
        self._start, self._seconds = time.perf_counter(), dict[str, float]()
        self._on_gpu = torch.cuda.is_available()
        self._marks: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        if self._on_gpu:
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            yield
            end.record()
            self._marks.append((name, begin, end))
            return
        start = time.perf_counter()
        yield
        self._book(name, time.perf_counter() - start)

    def times(self) -> dict[str, float]:
        """`time_<stage>` and `time_step`, in seconds; waits until all of it is done."""
        if self._on_gpu:
            torch.cuda.synchronize()
        for name, begin, end in self._marks:
            self._book(name, begin.elapsed_time(end) / 1000)
        self._marks.clear()
        step = time.perf_counter() - self._start
        return {**{f"time_{name}": seconds for name, seconds in self._seconds.items()}, "time_step": step}

    def _book(self, name: str, seconds: float) -> None:
        self._seconds[name] = self._seconds.get(name, 0.0) + seconds
