"""Stages of a pipeline, and the batch that enters them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from tensordict import TensorDictBase
from tensordict.utils import NestedKey

from ebft import schema
from ebft.distributed import by_rows, share

Stage = Callable[[TensorDictBase], TensorDictBase]


def at_step(td: TensorDictBase, *, seed: int, step: int) -> TensorDictBase:
    """The batch with the seed of this step, which together with the sequence ids keys its random numbers."""
    mixed = hash((seed, step)) & (2**62 - 1)
    return td.set(schema.SEED, torch.full((len(td),), mixed, dtype=torch.int64, device=td[schema.TOKENS].device))


def write_by_rows(td: TensorDictBase, keys: Sequence[NestedKey], work: Stage) -> None:
    """Write the entries `keys`, without gradient, which `work` writes into the rows that it is given.

    Of several processes each works on its own rows (`ebft.distributed`); all write all of them.
    """
    rows = share(len(td))

    def own(tokens: torch.Tensor) -> tuple[torch.Tensor, ...]:
        done = work(td[rows])
        return tuple(done[key] for key in keys)

    for key, value in zip(keys, by_rows(own, td[schema.TOKENS]), strict=True):
        td[key] = value
