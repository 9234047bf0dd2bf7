"""Writing files and folders so that a reader, or a run that was killed, never meets half of one.

What is written is on the disk (fsync of the files and of the folders that name them) before it gets its name, so that
a power failure leaves the old content or the new one as well.
"""

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
            sync(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """`write_atomically` of indented JSON."""
    write_atomically(path, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


def write_folder_atomically(path: Path, fill: Callable[[Path], None]) -> None:
    """Let `fill` write into a temporary sibling, then rename it to `path`, replacing a folder that was there.

    Killed between the two renames of a replacement, it leaves the old folder for `clean_up` to put back.

    Raises:
        UsageError: the disk is full or may not be written.
    """
    beside, old = temporary(path), path.with_name(f".{path.name}.old")
    with clear_disk_errors(path):
        try:
            shutil.rmtree(beside, ignore_errors=True)
            make_folder(beside)
            fill(beside)
            for part in (*beside.rglob("*"), beside):
                sync(part)
            if path.exists():
                shutil.rmtree(old, ignore_errors=True)
                path.rename(old)
            try:
                beside.rename(path)
            except OSError:
                if old.exists():
                    old.rename(path)
                raise
            sync(path.parent)
        finally:
            shutil.rmtree(beside, ignore_errors=True)
            if path.exists():
                shutil.rmtree(old, ignore_errors=True)


def remove_folder(path: Path) -> None:
    """Remove a folder that has a meaning while it has its name: it loses the name first, then its content."""
    beside = temporary(path)
    shutil.rmtree(beside, ignore_errors=True)
    path.rename(beside)
    shutil.rmtree(beside)


def make_folder(path: Path) -> None:
    """Make a folder and its parents, each on the disk with its name."""
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for folder in missing:
        sync(folder.parent)


def sync(path: Path) -> None:
    """Wait until a file's content, or the names in a folder, are on the disk."""
    if path.is_dir() and os.name == "nt":  # which cannot open folders
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if not (path.is_dir() and error.errno == errno.EINVAL):  # a file system without fsync of folders
            raise
    finally:
        os.close(descriptor)


_LEFT_OVER = re.compile(r"\.(?P<name>.+?)(\.\d+)?\.(?P<kind>tmp|old)")


def left_overs(folder: Path) -> list[Path]:
    """What writers that were killed left in `folder`; none where there is no such folder."""
    return sorted(path for path in folder.glob(".*") if _LEFT_OVER.fullmatch(path.name))


def clean_up(folder: Path) -> None:
    """Remove what killed writers left in `folder`, and put back what one of them was about to replace.

    Nobody else may be writing there: hold its `exclusive` lock.
    """
    for path in left_overs(folder):
        match = _LEFT_OVER.fullmatch(path.name)
        assert match is not None
        if match["kind"] == "old" and not (folder / match["name"]).exists():
            path.rename(folder / match["name"])
        elif path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


@contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Keep other processes out of `folder`; the lock leaves no file and ends with the process, however that ends.

    Raises:
        UsageError: another process holds it.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UsageError(
                f"{folder} is in use by another process that runs there: wait for it, or stop it"
            ) from error
        except OSError:  # a file system without locks of folders
            pass
        yield
    finally:
        os.close(descriptor)


def temporary(path: Path) -> Path:
    """Where a folder is written before it gets the name `path`."""
    return path.with_name(f".{path.name}.tmp")
