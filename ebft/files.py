"""Writing files and folders so that a reader, or a run that was killed, never meets half of one."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from ebft.errors import UsageError


@contextmanager
def clear_disk_errors(path: Path) -> Iterator[None]:
    """Turn 'no space left', 'read-only' and 'permission denied' while writing `path` into one clear UsageError."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        reasons = {
            errno.ENOSPC: "no space is left on the device: free some, or choose another --out",
            errno.EDQUOT: "the disk quota is used up: free some space, or choose another --out",
            errno.EROFS: "the file system is read-only: choose another --out",
            errno.EACCES: "permission denied: choose another --out",
            errno.ENOTDIR: "a part of that path is a file, not a folder: choose another --out",
        }
        number = _error_number(error)
        if number not in reasons:
            raise
        raise UsageError(f"{path} could not be written: {reasons[number]}") from error


def _error_number(error: Exception) -> int | None:
    """The errno behind an error: safetensors says it in words, torch.save while it handles the file's own OSError."""
    for cause in (error, error.__context__):
        if isinstance(cause, OSError):
            return cause.errno
    words = re.search(r"os error (\d+)", str(error))
    return int(words[1]) if words else None


def write_atomically(path: Path, content: bytes) -> None:
    """Write beside the file, then rename: a reader sees the old content or the new, never a part.

    Raises:
        UsageError: the disk is full or may not be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with clear_disk_errors(path):
        try:
            with open(temporary, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """`write_atomically` of indented JSON."""
    write_atomically(path, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


def write_folder_atomically(path: Path, fill: Callable[[Path], None]) -> None:
    """Let `fill` write into a temporary sibling, then rename it to `path`, replacing a folder that was there.

    Raises:
        UsageError: the disk is full or may not be written.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    old = path.with_name(f".{path.name}.old")
    with clear_disk_errors(path):
        try:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
            fill(temporary)
            if path.exists():
                shutil.rmtree(old, ignore_errors=True)
                path.rename(old)
            try:
                temporary.rename(path)
            except OSError:
                if old.exists():
                    old.rename(path)
                raise
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
            shutil.rmtree(old, ignore_errors=True)
