"""What benchmarks measure with: wall time, token-forwards, peak memory of a fresh process, and the machine."""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import platform
import resource
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ebft.assemble.config import processor


def seconds(run: Callable[[], Any], device: torch.device) -> tuple[float, Any]:
    """Wall time of one call, the device's queue empty before and after, and what it returned."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    result = run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start, result


@contextmanager
def token_forwards(embedding: nn.Module) -> Iterator[list[int]]:
    """A list that gets the number of token ids of every call of the input embedding."""
    calls: list[int] = []
    handle = embedding.register_forward_hook(lambda module, args, out: calls.append(args[0].numel()))
    try:
        yield calls
    finally:
        handle.remove()


def peak_increase(run: Callable[[], Any], device: torch.device) -> int:
    """Bytes by which memory rises at most above what was held before `run`. Meant for a fresh process.

    On CUDA what the allocator gave out; otherwise the resident set, whose high-water mark is set back first where the
    system can (Linux). There the mark is read from /proc: a process starts its `ru_maxrss` at that of its parent. What
    the C library keeps of freed memory is given back first, or `run` would be served from it unseen.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    _give_back_freed_memory()
    if Path("/proc/self/clear_refs").exists():
        Path("/proc/self/clear_refs").write_text("5")
    before = peak_of_process()
    run()
    return peak_of_process() - before


def _give_back_freed_memory() -> None:
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc
    if trim is not None:
        trim(0)


def peak_of_process() -> int:
    """The most bytes that this process has held since its mark was last set back."""
    status = Path("/proc/self/status")
    if status.exists():
        (line,) = (line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def in_fresh_process(function: Callable[..., Any], *args: Any, limit: float | None = None) -> Any:
    """`function(*args)` in a new interpreter; None when the system killed it, which it does when memory runs out.

    What this process keeps of freed memory is given back first, so that the new one can have it.

    Raises:
        TimeoutError: it took longer than `limit` seconds, and was killed.
    """
    gc.collect()
    _give_back_freed_memory()
    others = set(multiprocessing.active_children())
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        try:
            return pool.submit(function, *args).result(limit)
        except BrokenProcessPool:
            return None
        except TimeoutError:
            for process in set(multiprocessing.active_children()) - others:
                process.kill()
            raise


def machine(device: torch.device) -> dict[str, Any]:
    """Where and with what a benchmark ran."""
    return {
        "platform": platform.platform(),
        "python": platform.python_version(),
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "versions": {name: version(name) for name in ("ebft", "torch", "transformers", "peft")},
    }
