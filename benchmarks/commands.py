"""Running the project's commands for a benchmark, which is stopped together with the one that it waits for."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]


def command(*arguments: str) -> None:
    """`python cli.py ARGUMENTS`, see `run_to_its_end`."""
    run_to_its_end([sys.executable, str(ROOT / "cli.py"), *arguments])


def run_to_its_end(arguments: Sequence[str]) -> None:
    """Run a program. Ctrl-C and SIGTERM are passed on to it as they come, and its end is waited for: runs save then.

    Raises:
        subprocess.CalledProcessError: the program failed.
        KeyboardInterrupt: it was asked to stop, and has ended.
    """
    asked: list[int] = []
    told = 0
    numbers = (signal.SIGINT, signal.SIGTERM)
    previous = {number: signal.signal(number, lambda number, frame: asked.append(number)) for number in numbers}
    try:
        # a group of its own, for a terminal sends Ctrl-C to all of a group: it would be told twice, which means at once
        child = subprocess.Popen(arguments, process_group=0)
        while (status := child.poll()) is None:
            for number in asked[told:]:
                child.send_signal(number)
                told += 1
            time.sleep(0.1)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    if asked:
        raise KeyboardInterrupt
    if status:
        raise subprocess.CalledProcessError(status, list(arguments))
