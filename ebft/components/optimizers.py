"""Optimisers of `torch.optim` by name, and what the learning rate does over a run."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch

from ebft.components.component import Component
from ebft.errors import UsageError, flag

# LBFGS wants to compute the loss several times a step, SparseAdam gradients that are sparse.
_UNUSABLE = ("Optimizer", "LBFGS", "SparseAdam")
# Those of torch that do not take sharded weights: two look at whole matrices, one indexes in place.
NOT_OF_SHARES = ("adafactor", "muon", "rprop")
# What of torch's signatures is an option here; each optimiser has some of them. `eps` where it is one number.
_OPTIONS = ("momentum", "nesterov", "betas", "weight_decay", "eps")
# The paper's (Tables 2 to 5) and its code's, where torch's are others.
_OWN: dict[str, dict[str, Any]] = {"AdamW": {"betas": "0.9,0.95", "weight_decay": 0.0}, "Adam": {"betas": "0.9,0.95"}}

Schedule = Callable[[int], float]


def _optimizer(kind: type[torch.optim.Optimizer]) -> Component:
    known = inspect.signature(kind).parameters
    options: dict[str, Any] = {name: known[name].default for name in _OPTIONS if name in known}
    if isinstance(options.get("eps"), tuple):
        del options["eps"]
    if "betas" in options:
        options["betas"] = ",".join(f"{beta:g}" for beta in options["betas"])
    return Component(f"torch.optim.{kind.__name__}", {**options, **_OWN.get(kind.__name__, {})}, partial(_build, kind))


def _build(
    kind: Callable[..., torch.optim.Optimizer], parameters: Iterable[torch.Tensor], *, lr: float, **options: Any
) -> torch.optim.Optimizer:
    if "betas" in options:
        options["betas"] = parse_betas(options["betas"])
    try:
        return kind(parameters, lr=lr, **options)
    except ValueError as error:
        raise UsageError(f"torch's optimizer refuses lr={lr}, {options}: {error}") from error


def parse_betas(text: str) -> tuple[float, float]:
    """`0.9,0.95`: the decay of the first and of the second moment, each in [0, 1)."""
    try:
        first, second = map(float, text.split(","))
    except ValueError:
        first = second = math.nan
    if not (0 <= first < 1 and 0 <= second < 1):
        raise UsageError(f"betas {text!r}: expected two numbers in [0, 1) with a comma between them, as 0.9,0.95")
    return first, second


def warm_up_steps(share: float, steps: int) -> int:
    """Steps over which the learning rate rises to its full value; 0 for none."""
    return math.ceil(share * steps)


def _constant(*, steps: int, warm_up: float) -> Schedule:
    return _schedule(lambda passed: 1.0, steps=steps, warm_up=warm_up, lr_end=1.0)


def _linear(*, steps: int, warm_up: float, lr_end: float) -> Schedule:
    return _schedule(lambda passed: 1 - passed, steps=steps, warm_up=warm_up, lr_end=lr_end)


def _cosine(*, steps: int, warm_up: float, lr_end: float) -> Schedule:
    return _schedule(lambda passed: (1 + math.cos(math.pi * passed)) / 2, steps=steps, warm_up=warm_up, lr_end=lr_end)


def _schedule(shape: Callable[[float], float], *, steps: int, warm_up: float, lr_end: float) -> Schedule:
    """Factor of the learning rate at a step (0-based): up in a straight line, then from 1 to `lr_end` along `shape`.

    The first step has a rate above 0 and the last one `lr_end`.
    """
    for name, value in (("warm_up", warm_up), ("lr_end", lr_end)):
        if not 0 <= value <= 1:
            raise UsageError(f"{flag(name)} {value}: expected a share, a number in [0, 1]")
    rising = warm_up_steps(warm_up, steps)

    def factor(step: int) -> float:
        if step < rising:
            return (step + 1) / rising
        passed = min(1.0, (step - rising) / max(1, steps - 1 - rising))
        return lr_end + (1 - lr_end) * shape(passed)

    return factor


OPTIMIZERS = {
    kind.__name__.lower(): _optimizer(kind)
    for kind in vars(torch.optim).values()
    if isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer) and kind.__name__ not in _UNUSABLE
}
LR_SCHEDULES = {
    "constant": Component("after warm-up the learning rate stays", {"warm_up": 0.1}, _constant),
    "linear": Component("then in a straight line to LR_END of it", {"warm_up": 0.1, "lr_end": 0.05}, _linear),
    "cosine": Component("then along half a cosine to LR_END of it", {"warm_up": 0.1, "lr_end": 0.1}, _cosine),
}
