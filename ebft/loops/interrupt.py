"""Stopping a run from the keyboard without losing anything."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from ebft.distributed import any_process, size


class Interrupted(Exception):
    """The run was asked to stop; what it had reached is saved."""


@contextmanager
def stop_requests() -> Iterator[Callable[[], bool]]:
    """Turn the first Ctrl-C (or SIGTERM) into a request that the yielded function reports; a second stops at once.

    Of several processes all report it as soon as one is asked, so all have to call the function equally often. There a
    second does nothing: torchrun passes on what the processes have had already, and ends them itself if they take long.
    Nor does one that comes after an error: it is what torchrun sends as soon as one process has ended, and the others
    would die of it before they have said why they end.
    """
    asked: list[int] = []
    several = size() > 1  # asked here: a signal may come where a process works by itself

    def ask(signum, frame):
        if asked and not several:
            raise KeyboardInterrupt
        asked.append(signum)

    previous = {}
    for number in (signal.SIGINT, signal.SIGTERM):
        try:
            previous[number] = signal.signal(number, ask)
        except ValueError:  # not in the main thread: whoever called us handles signals
            continue
    try:
        yield lambda: any_process(bool(asked))
    except Exception:
        if several:
            previous.clear()
        raise
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextmanager
def stop_after(minutes: float | None) -> Iterator[None]:
    """Ask the process to stop, as Ctrl-C does, after so many minutes; None: never."""
    if minutes is None:
        yield
        return
    before = signal.getsignal(signal.SIGINT)
    if before is signal.SIG_IGN:  # as a shell starts what runs in the background
        signal.signal(signal.SIGINT, signal.default_int_handler)
    timer = threading.Timer(60 * minutes, os.kill, (os.getpid(), signal.SIGINT))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        if before is signal.SIG_IGN:
            signal.signal(signal.SIGINT, before)
