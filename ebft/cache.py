"""The cache directory: folders that are built once, and are there completely or not at all.

A folder is built beside its final place under a lock and published by one rename.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

from filelock import AcquireReturnProxy, FileLock, Timeout
from rich.console import Console

from ebft.errors import UsageError


def cache_dir() -> Path:
    """The folder of what was downloaded or built: `EBFT_CACHE` if set, else `ebft` in the user's cache directory."""
    if own := os.environ.get("EBFT_CACHE"):
        return Path(own).expanduser().absolute()
    if base := os.environ.get("XDG_CACHE_HOME"):
        return Path(base) / "ebft"
    if sys.platform == "win32" and (base := os.environ.get("LOCALAPPDATA")):
        return Path(base) / "ebft" / "Cache"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "ebft"
    return Path.home() / ".cache" / "ebft"


def published(folder: str, build: Callable[[Path], Path], *, what: str, needs: int, instead: str) -> Path:
    """The folder of that name in the cache directory, built on first use.

    Two processes that ask for the same folder at the same time build it once: the second waits for the first.

    Args:
        build: makes the content below a staging folder that it is given, and returns the folder to publish.
        what: the content's name, for messages.
        needs: bytes of disk to build it.
        instead: what the user can do if it cannot be built, for errors.

    Raises:
        UsageError: the cache directory cannot be written, or has no room; or what `build` raises.
    """
    cache = cache_dir()
    place = cache / folder
    if place.is_dir():
        return place
    try:
        cache.mkdir(parents=True, exist_ok=True)
        lock = _locked(cache / f".{folder}.lock", what)
    except OSError as error:
        raise UsageError(f"cannot write to the cache directory {cache}: {error}; {instead}") from error
    with lock:
        if not place.is_dir():  # else another process published it while this one waited
            _publish(place, build, what=what, needs=needs, instead=instead)
    return place


def _locked(path: Path, what: str) -> AcquireReturnProxy:
    """Acquire the lock, to be released by a `with`; say so when another process has it."""
    lock = FileLock(path)
    try:
        return lock.acquire(timeout=0)
    except Timeout:
        Console(stderr=True).print(f"another process is fetching {what}; waiting for it")
        return lock.acquire()


def _publish(place: Path, build: Callable[[Path], Path], *, what: str, needs: int, instead: str) -> None:
    """Build in a sibling of `place` and rename it. The caller holds the lock."""
    staging = place.with_name(f".{place.name}.partial")
    shutil.rmtree(staging, ignore_errors=True)  # what a killed process may have left
    free = shutil.disk_usage(place.parent).free
    if free < needs:
        raise UsageError(
            f"{what} needs {needs / 1e6:.0f} MB in the cache directory {place.parent}, which has"
            f" {free / 1e6:.0f} MB free; make room, or {instead}"
        )
    try:
        staging.mkdir()
        build(staging).rename(place)
    except OSError as error:
        raise UsageError(f"cannot build {what} in {place.parent}: {error}; {instead}") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
