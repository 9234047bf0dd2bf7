"""Stages of a pipeline, and the batch that enters them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from tensordict import TensorDictBase

from ebft import schema

Stage = Callable[[TensorDictBase], TensorDictBase]


def at_step(td: TensorDictBase, *, seed: int, step: int) -> TensorDictBase:
    """The batch with the seed of this step, which together with the sequence ids keys its random numbers."""
    mixed = hash((seed, step)) & (2**62 - 1)
    return td.set(schema.SEED, torch.full((len(td),), mixed, dtype=torch.int64, device=td[schema.TOKENS].device))
