"""What the host does with rollouts, done to some of a batch while the device draws the others."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import copy_context
from functools import cache

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase

from ebft import schema
from ebft.distributed import alone
from ebft.loops.stages import Stage, write_by_rows

Marked = tuple[TensorDictBase, "torch.cuda.Event | None"]


def overlapped(
    place: Stage, draw: Sequence[TensorDictModuleBase], host: Sequence[TensorDictModuleBase], *, parts: int
) -> Stage:
    """A stage that draws a batch in `parts`; a thread puts each through `host` while the next one is drawn.

    It writes what its stages write one after the other, but for rounding. On a GPU the thread has a stream of its own.
    Of several processes each does so with its own rows; all write all of them.

    Args:
        place: places anchors, in the whole batch: how many a row has room for depends on the others.
        draw: what draws rollouts from them, row by row.
        host: stages that keep the host busy, row by row: they decode and embed texts, or judge them. None of them may
            run the policy, or a network that shares its weights.
        parts: as even as can be; of fewer rows there are fewer parts.
    """
    keys = [key for stage in (*draw, *host) for key in stage.out_keys]

    def work(td: TensorDictBase) -> TensorDictBase:
        with alone():
            return _in_parts(td, draw, host, parts)

    def run(td: TensorDictBase) -> TensorDictBase:
        td = place(td)
        write_by_rows(td, keys, work)
        return td

    return run


def sizes(rows: int, parts: int) -> list[int]:
    """How many of `rows` rows each part has: as even as can be, none without a row."""
    parts = min(parts, rows)
    return [rows // parts + (number < rows % parts) for number in range(parts)]


def _in_parts(td: TensorDictBase, draw: Iterable[Stage], host: Iterable[Stage], parts: int) -> TensorDictBase:
    device = td[schema.TOKENS].device
    worker = ThreadPoolExecutor(1)
    try:
        pending: list[Future[Marked]] = []
        for part in td.split(sizes(len(td), parts)):
            for stage in draw:
                part = stage(part)
            pending.append(worker.submit(copy_context().run, _work, part, _mark(device), host))
        done = [future.result() for future in pending]
    finally:
        worker.shutdown(cancel_futures=True)  # of an error or an interrupt: waits for what runs, begins nothing
    for _, mark in done:
        _wait_for(mark, device)
    return torch.cat([part for part, _ in done])  # type: ignore[call-overload]


def _work(td: TensorDictBase, drawn: torch.cuda.Event | None, host: Iterable[Stage]) -> Marked:
    """In the thread. What it reads and writes is held until the other stream has waited for its mark."""
    device = td[schema.TOKENS].device
    with _on_the_side(device):
        _wait_for(drawn, device)
        for stage in host:
            td = stage(td)
        return td, _mark(device)


@contextmanager
def _on_the_side(device: torch.device) -> Iterator[None]:
    """What a GPU is told inside goes to a stream of its own; the current device is one of each thread."""
    if device.type != "cuda":
        yield
        return
    with torch.cuda.device(device), torch.cuda.stream(_stream(device)):
        yield


@cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """One for all batches: memory is kept for each stream apart."""
    return torch.cuda.Stream(device)


def _mark(device: torch.device) -> torch.cuda.Event | None:
    """Where the current stream is now; None on a CPU, which is there already."""
    if device.type != "cuda":
        return None
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(device))
    return event


def _wait_for(mark: torch.cuda.Event | None, device: torch.device) -> None:
    if mark is not None:
        torch.cuda.current_stream(device).wait_event(mark)
