"""Show running moments a few batches before training, so that no rollout is scored by a moment that it is part of."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from tensordict import TensorDictBase

from ebft.data.packing import batches
from ebft.loops.stages import Stage, at_step
from ebft.policy import CausalPolicy

_BEFORE_TRAINING = -10  # steps from here downwards are of calibration: training has 0, 1, ... and evaluation -1


def calibrate(
    policy: CausalPolicy,
    pipeline: Mapping[str, Stage],
    data: TensorDictBase,
    observe: Callable[[TensorDictBase], None],
    *,
    count: int,
    batch_size: int,
    seed: int,
) -> None:
    """Sample and embed `count` batches of rollouts and show them to `observe`; nothing is trained.

    Args:
        pipeline: its stages "sample" and "embed" are run.
        data: rows of batch size [M].
    """
    order = batches(data, batch_size=batch_size, seed=seed)
    for number in range(count):
        td = at_step(next(order).to(policy.device), seed=seed, step=_BEFORE_TRAINING - number)
        observe(pipeline["embed"](pipeline["sample"](td)))
