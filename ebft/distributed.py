"""Several processes that train one policy together, as `torchrun` starts them; everything is a no-op for one alone.

Data parallelism over the rows of a batch. Every process holds the whole policy (unless it is sharded, see
`ebft.sharding`) and goes through the same batches; of the costly parts (sampling, embedding, scoring) it computes its
own rows alone. What other rows need to be known for (baselines, whitening, metrics) is computed by all processes alike
from the gathered rollouts and features, so nothing of it can differ from what one process computes. Gradients are
summed, and all processes make the same update.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import timedelta
from math import prod
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from ebft.errors import UsageError

# Long enough for whatever one process does alone (a report, a checkpoint): one that ends is noticed at once.
_TIMEOUT = timedelta(hours=1)
_PATIENCE = 2.0  # seconds
_BUCKET = 64 * 2**20  # bytes of gradients that travel together

_alone: ContextVar[bool] = ContextVar("alone", default=False)

Value = TypeVar("Value")


class ProcessLost(UsageError):
    """Another process of the run ended in the middle; what it said itself, or torchrun, tells why."""


def started() -> int:
    """How many processes `torchrun` started, 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def number() -> int:
    """The number of this process among them, from 0."""
    return int(os.environ.get("RANK", "0")) if started() > 1 else 0


def local_number() -> int:
    """Its number among those on this machine: the number of its GPU."""
    return int(os.environ.get("LOCAL_RANK", "0")) if started() > 1 else 0


def is_first() -> bool:
    """Whether this is the process that writes files and speaks."""
    return number() == 0


def size() -> int:
    """How many processes work together: those that have joined; 1 outside `joined`, and inside `alone`."""
    return dist.get_world_size() if dist.is_initialized() and not _alone.get() else 1


def rank() -> int:
    """The number of this process among them."""
    return dist.get_rank() if dist.is_initialized() and not _alone.get() else 0


@contextmanager
def alone() -> Iterator[None]:
    """Inside, this process works as if there were no others: on all rows that it is given, and nothing is sent."""
    before = _alone.set(True)
    try:
        yield
    finally:
        _alone.reset(before)


@contextmanager
def joined() -> Iterator[None]:
    """All processes that `torchrun` started work together inside; nothing happens for one alone.

    A `UsageError` that the first process has raised as well is marked as `told` in the others.

    Raises:
        ProcessLost: they cannot reach each other.
    """
    if started() == 1 or dist.is_initialized():
        yield
        return
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    with _clear_errors():
        store, own, processes = next(rendezvous("env://", timeout=_TIMEOUT))
        dist.init_process_group(
            backend, store=dist.PrefixStore("work", store), rank=own, world_size=processes, timeout=_TIMEOUT
        )
    try:
        with lost_processes():
            yield
    except UsageError as error:  # the others may be gone, and the process is about to end: the group is left as it is
        error.told = (isinstance(error, ProcessLost) and own != 0) or _told(dist.PrefixStore("errors", store), error)
        raise
    dist.destroy_process_group()


def said_by_first() -> bool:
    """Whether an error comes from before the processes joined: each finds the same, so one need say it."""
    return started() > 1 and not dist.is_initialized() and not is_first()


def share(count: int, *, process: int | None = None) -> slice:
    """The rows out of `count` that are this process's own: contiguous, in order of the processes, as even as can be."""
    process, processes = rank() if process is None else process, size()
    if processes == 1:
        return slice(0, count)
    return slice(-(-count * process // processes), -(-count * (process + 1) // processes))


def by_rows(function: Callable[..., Any], *inputs: Any, **options: Any) -> Any:
    """Call a function whose rows are independent; each process computes its own rows, and all get the results of all.

    Args:
        function: of tensors [B,...], to a tensor [B,...] or a tuple of such, without gradient.
        inputs: the first one is a tensor [B,...]. Of all tensors among inputs and options that have B rows, the
            function is given this process's own.

    Raises:
        ProcessLost: another process ended.
    """
    if size() == 1:
        return function(*inputs, **options)
    rows = len(inputs[0])
    own = share(rows)

    def cut(value: Any) -> Any:
        return value[own] if isinstance(value, Tensor) and value.ndim and len(value) == rows else value

    out = None
    if own.start < own.stop:
        out = function(*map(cut, inputs), **{name: cut(value) for name, value in options.items()})
    single = from_first(isinstance(out, Tensor))
    parts = None if out is None else [out] if isinstance(out, Tensor) else list(out)
    gathered = _gather(parts, rows, inputs[0].device)
    return gathered[0] if single else tuple(gathered)


def by_items(function: Callable[..., Any], *inputs: Sequence[Any]) -> Tensor:
    """The same for sequences of M items each, to M numbers: [M], on the CPU."""
    if size() == 1:
        return torch.as_tensor(function(*inputs))
    count = len(inputs[0])
    own = share(count)
    out = [torch.as_tensor(function(*(x[own] for x in inputs)))] if own.start < own.stop else None
    return _gather(out, count, torch.device("cpu"))[0]


def sum_gradients(parameters: Sequence[torch.nn.Parameter]) -> None:
    """Sum the gradients over the processes, in float32 or finer; one that no process has stays None."""
    if size() == 1 or not parameters:
        return
    device = parameters[0].device
    there = torch.tensor([p.grad is not None for p in parameters], dtype=torch.int32, device=device)
    _sum_(there)
    used = [p for p, count in zip(parameters, there.tolist(), strict=True) if count]
    for bucket in _buckets(used):
        compute = torch.promote_types(bucket[0].dtype, torch.float32)
        flat = torch.cat([_gradient(p).to(compute).flatten() for p in bucket])
        _sum_(flat)
        for parameter, summed in zip(bucket, flat.split([p.numel() for p in bucket]), strict=True):
            parameter.grad = summed.view_as(parameter).to(parameter.dtype)


def sum_numbers(values: Tensor) -> Tensor:
    """The sum of `values` over the processes."""
    if size() > 1:
        values = values.clone()
        _sum_(values)
    return values


def any_process(flag: bool) -> bool:
    """Whether `flag` is true in any process."""
    return flag if size() == 1 else bool(sum_numbers(torch.tensor(int(flag))))


def from_first(value: Value) -> Value:
    """What the first process gave; the values of the others do not count."""
    if size() == 1:
        return value
    found = [value]
    with _clear_errors():
        dist.broadcast_object_list(found, src=0)
    return found[0]


def from_all(value: Value) -> list[Value]:
    """What every process gave, in order."""
    if size() == 1:
        return [value]
    found: list[Any] = [None] * size()
    with _clear_errors():
        dist.all_gather_object(found, value)
    return found


def check_same(tensors: Iterable[Tensor], count: int, *, what: str) -> None:
    """Check that all processes have the same bits in `tensors`, and the same `count`.

    Raises:
        UsageError: they do not; names `what` differs, and the processes.
    """
    if size() == 1:
        return
    words = [tensor.detach().contiguous().view(torch.uint8).sum(dtype=torch.int64) for tensor in tensors]
    found = from_all((count, torch.stack(words).tolist() if words else []))
    different = [str(process) for process, own in enumerate(found) if own != found[0]]
    if different:
        raise UsageError(
            f"{what} are not the same in process {', '.join(different)} as in process 0: all machines have to see the"
            " same files, and run the same versions"
        )


def check_seen(folder: Path) -> None:
    """Whether every process sees the folder of the first one, and not one of its own machine by the same name.

    Raises:
        UsageError: some do not.
    """
    if size() == 1:
        return
    mark = from_first(folder / f".{os.urandom(8).hex()}")
    if is_first():
        mark.touch()
    from_first(None)  # it is there
    blind = [process for process, seen in enumerate(from_all(mark.exists())) if not seen]
    if is_first():
        mark.unlink()
    if blind:
        raise UsageError(
            f"--out {folder}: {len(blind)} of {size()} processes do not see this folder (the first of them is number"
            f" {blind[0]}). All of them read and write checkpoints there: give a folder that all machines share"
        )


def _gather(parts: Sequence[Tensor] | None, rows: int, device: torch.device) -> list[Tensor]:
    """Every process's own rows of some tensors (None: it has none), as tensors of all `rows`.

    The first process has rows whenever there are any, and knows the shapes; bytes travel, so any dtype will do.
    """
    shapes = from_first(None if parts is None else [(part.shape[1:], part.dtype) for part in parts])
    assert shapes is not None
    counts = [share(rows, process=p).stop - share(rows, process=p).start for p in range(size())]
    found = []
    for place, (shape, dtype) in enumerate(shapes):
        width = prod(shape) * dtype.itemsize
        sent = torch.zeros(max(counts), width, dtype=torch.uint8, device=device)
        if parts is not None:
            part = parts[place].to(device, dtype).contiguous()  # a score may give another without any anchor
            sent[: len(part)] = part.view(len(part), -1).view(torch.uint8).view(len(part), width)
        received = [torch.empty_like(sent) for _ in counts]
        with _clear_errors():
            dist.all_gather(received, sent)
        whole = torch.cat([r[:count] for r, count in zip(received, counts, strict=True)])
        found.append(whole.view(dtype).view(rows, *shape))
    return found


def _gradient(parameter: torch.nn.Parameter) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


def _buckets(parameters: Sequence[torch.nn.Parameter]) -> Iterator[list[torch.nn.Parameter]]:
    """Neighbours of one dtype and device, about `_BUCKET` bytes at a time."""
    bucket: list[torch.nn.Parameter] = []
    filled = 0
    for parameter in parameters:
        fits = not bucket or (parameter.dtype, parameter.device) == (bucket[0].dtype, bucket[0].device)
        if bucket and (filled >= _BUCKET or not fits):
            yield bucket
            bucket, filled = [], 0
        bucket.append(parameter)
        filled += parameter.numel() * parameter.element_size()
    if bucket:
        yield bucket


def _sum_(values: Tensor) -> None:
    with _clear_errors():
        dist.all_reduce(values)


def _told(store: dist.Store, error: UsageError) -> bool:
    """Whether the first process says the same; it is given a moment to run into it."""
    try:
        if is_first():
            store.set("first", str(error))
            return False
        until = time.monotonic() + _PATIENCE
        while not store.check(["first"]) and time.monotonic() < until:
            time.sleep(0.05)
        return store.check(["first"]) and store.get("first").decode() == str(error)
    except RuntimeError:  # it has taken the store with it
        return False


@contextmanager
def lost_processes() -> Iterator[None]:
    """`ProcessLost` for a connection that breaks inside, among much else that may go wrong there."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, dist.DistError) or "gloo" in str(error):  # which raises errors of no kind of their own
            with _clear_errors():
                raise
        raise


@contextmanager
def _clear_errors() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # of every backend, when a connection breaks
        said = re.sub(r"^\[\S*\] ", "", str(error)).partition(" [")[0].partition("\n")[0]  # without source and address
        raise ProcessLost(f"another process of this run ended ({said})") from error
