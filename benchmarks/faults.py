"""Killing this process at a chosen file-system operation: before it, after it, or with half of its content written."""

from __future__ import annotations

import io
import json
import os
import re
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ebft.loops import checkpoint, history

_SAVE = torch.save  # patched below
WHEN = ("before", "half", "after")


@dataclass(frozen=True)
class Plan:
    """Die at an operation: the one with this number, or the first one whose name has this text in it.

    `when` is one of `WHEN`; half of an operation that is not a write is taken as before it.
    """

    operation: int | str
    when: str


class Faults:
    """Counts the file-system operations under a folder and dies at the planned one.

    What they were is in `log`, and the one died at is written to the file descriptor `report`.
    """

    def __init__(self, folder: Path, plan: Plan | None, report: int):
        self.log: list[str] = []
        self._folder, self._plan, self._report = str(folder), plan, report

    def install(self) -> None:
        """Patch what writes, renames and removes. For a child process, which never takes it back."""
        for name in ("replace", "rename"):
            self._patch(os, name, lambda source, target: (source, target))
        for name in ("unlink", "rmdir", "mkdir"):
            self._patch(os, name, lambda path, *mode, dir_fd=None: (_joined(path, dir_fd),))
        self._patch(os, "fsync", lambda descriptor: (_joined("", descriptor),))
        self._patch(checkpoint, "save_file", lambda weights, path: (path,), half=_half_of_weights)
        self._patch(torch, "save", lambda state, file: (file.name,), half=_half_of_states)
        self._patch(history, "_append", lambda path, line: (path,), half=_half_of_a_line)

    def _patch(self, module: Any, name: str, concerned: Callable[..., tuple], half: Callable | None = None) -> None:
        function = getattr(module, name)

        def patched(*args: Any, **more: Any):
            paths = [os.path.normpath(path) for path in concerned(*args, **more)]
            if not paths[0].startswith(self._folder):
                return function(*args, **more)
            names = " -> ".join(
                os.path.basename(path) if path != self._folder else "the run's folder" for path in paths
            )
            label = f"{name} {re.sub(r'[.][0-9]+[.]tmp', '.tmp', names)}"  # without the number of the process
            planned, when = self._planned(len(self.log), label)
            self.log.append(label)
            if planned and when == "half" and half is not None:
                half(*args)
                self._die(f"half {label}")
            if planned and when != "after":
                self._die(f"before {label}")
            result = function(*args, **more)
            if planned:
                self._die(f"after {label}")
            return result

        setattr(module, name, patched)

    def _planned(self, number: int, label: str) -> tuple[bool, str]:
        if self._plan is None:
            return False, ""
        wanted = self._plan.operation
        return (wanted in label if isinstance(wanted, str) else wanted == number), self._plan.when

    def _die(self, label: str) -> None:
        os.write(self._report, json.dumps(label).encode())
        os.kill(os.getpid(), signal.SIGKILL)


def _joined(path: Any, folder: int | None) -> str:
    """A path relative to an open folder, or as it is."""
    return os.fspath(path) if folder is None else os.path.join(os.readlink(f"/proc/self/fd/{folder}"), path)


def _half_of_weights(weights: Any, path: Path) -> None:
    from safetensors.torch import save

    content = save(weights)
    path.write_bytes(content[: len(content) // 2])


def _half_of_states(state: Any, file: Any) -> None:
    content = io.BytesIO()
    _SAVE(state, content)
    file.write(content.getvalue()[: len(content.getvalue()) // 2])
    file.flush()


def _half_of_a_line(path: Path, line: list) -> None:
    content = ",".join(map(str, line)).encode()
    with open(path, "ab") as file:
        file.write(content[: len(content) // 2])
