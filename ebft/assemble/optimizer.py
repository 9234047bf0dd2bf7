"""From options to what changes the weights: the optimiser, its learning rate over the run, their average."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from ebft.components import choose
from ebft.components.optimizers import NOT_OF_SHARES
from ebft.errors import UsageError
from ebft.loops.average import Average, check_decay
from ebft.policy import CausalPolicy


def build_optimizer(
    parameters: Iterable[torch.Tensor], options: Mapping[str, Any], resolved: Mapping[str, Mapping]
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """The optimiser of --optimizer over `parameters`, and --lr-schedule over --steps.

    Raises:
        UsageError: a value that the optimiser refuses.
    """
    make = choose("optimizer", options["optimizer"]).build
    optimizer = make(parameters, lr=options["lr"], **resolved["optimizer"])
    factor = choose("lr_schedule", options["lr_schedule"]).build(steps=options["steps"], **resolved["lr_schedule"])
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def check_optimizer_options(options: Mapping[str, Any], resolved: Mapping[str, Mapping]) -> None:
    """What can be known to be wrong without weights.

    Raises:
        UsageError: as `build_optimizer` and `build_average`.
    """
    build_optimizer([torch.zeros(1, 1)], options, resolved)
    if options["shard"] and options["optimizer"] in NOT_OF_SHARES:
        raise UsageError(
            f"--optimizer {options['optimizer']} with --shard: torch's does not take weights in shares; choose"
            " another, as adamw"
        )
    if options["ema"] is not None:
        check_decay(options["ema"])


def build_average(policy: CausalPolicy, options: Mapping[str, Any]) -> Average | None:
    """The average of --ema, None without it."""
    return None if options["ema"] is None else Average(policy, options["ema"])
