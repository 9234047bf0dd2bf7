"""Where the time of a step goes."""

from __future__ import annotations

import time
from contextlib import contextmanager

import torch


class Clock:
    """Wall time of the named stages of one step; waits for the GPU, so that time is booked where it was spent."""

    def __init__(self):
        self._start, self._seconds = time.perf_counter(), {}

    @contextmanager
    def __call__(self, name: str):
        begin = time.perf_counter()
        yield
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - begin

    def total(self) -> float:
        """Seconds since the clock was made."""
        return time.perf_counter() - self._start

    def times(self) -> dict[str, float]:
        """`time_<stage>` and `time_step`, in seconds."""
        return {**{f"time_{name}": seconds for name, seconds in self._seconds.items()}, "time_step": self.total()}
