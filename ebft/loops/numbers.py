"""From tensors on the device to the numbers that are logged: one transfer for many, summed over the processes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from tensordict import TensorDictBase
from torch import Tensor

from ebft.distributed import rank, share, size, sum_numbers
from ebft.objectives.diagnostics import signal_to_noise_of_sums


def read(values: Mapping[str, Tensor]) -> dict[str, float]:
    """Scalars as numbers, in one transfer."""
    if not values:
        return {}
    return dict(zip(values, torch.stack([value.detach().double() for value in values.values()]).tolist(), strict=True))


def own_parts(td: TensorDictBase, micro_batch: int, *, alike: bool = False) -> list[tuple[TensorDictBase, bool]]:
    """This process's rows of a batch, in parts of `micro_batch`, and whether they count.

    None where there are fewer rows than processes. With `alike` every process has as many parts as the others: one
    that has fewer gets the first row again, which does not count.
    """
    own, count = td[share(len(td))], len(td)
    parts = [(part, True) for part in own.split(micro_batch)] if len(own) else []
    most = -(-len(range(count)[share(count, process=0)]) // micro_batch)
    return parts + [(td[:1], False) for _ in range(most - len(parts)) if alike]


def part_shares(rows: int, micro_batch: int, *, alike: bool = False) -> list[list[float]]:
    """For each process, the share of a batch of `rows` in its parts up to the end of each of them.

    Empty if the batch is one part. With `alike`, where gradients are summed over the processes after every part, the
    share in the parts of all of them so far, as the only entry.
    """
    counts = [len(range(rows)[share(rows, process=p)]) for p in range(size())]
    ends = range(micro_batch, counts[0] + micro_batch, micro_batch)
    if alike:
        shares = [[sum(min(end, count) for count in counts) / rows for end in ends]]
    else:
        shares = [[min(done + micro_batch, count) / rows for done in range(0, count, micro_batch)] for count in counts]
    return shares if sum(map(len, shares)) > 1 else []


def of_update(
    terms: Mapping[str, Tensor],
    norm: Tensor,
    sums: Sequence[Tensor],
    *,
    names: Sequence[str],
    shares: Sequence[Sequence[float]],
    alike: bool = False,
) -> dict[str, float]:
    """What is logged of one update, in one transfer.

    Args:
        terms: scalars, this process's parts of the terms called `names`; a process without rows has none.
        norm: of the whole gradient.
        sums: squared norms of this process's own gradient after each of its parts.
        shares: of :func:`part_shares`; empty where `sums` are not wanted.
        alike: `sums` are of this process's share of the gradient of all processes.

    Returns:
        The terms of the whole batch, gradient_norm, and gradient_signal_to_noise where there are parts to compare.
    """
    zero = torch.zeros((), dtype=torch.float64, device=norm.device)
    own = [terms.get(name, zero).double() for name in names]
    for process, division in enumerate(shares):
        own += sums if alike or process == rank() else [zero] * len(division)
    whole = sum_numbers(torch.stack(own)) if own else norm.new_empty(0)
    *values, total = torch.cat([whole, norm.double()[None]]).tolist()
    found = dict(zip(names, values, strict=False))
    each = [f for division in shares for f in division]
    apart = [(square, f) for square, f in zip(values[len(names) :], each, strict=True) if f < 1]
    if apart:
        squares, parts = zip(*apart, strict=True)
        found["gradient_signal_to_noise"] = signal_to_noise_of_sums([*squares, total**2], [*parts, 1.0])
    return {**found, "gradient_norm": total}
