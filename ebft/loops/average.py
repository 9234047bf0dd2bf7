"""A running average of the policy's weights, as a state of its own beside the weights that are trained."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from ebft.errors import UsageError
from ebft.policy import CausalPolicy


class Average:
    """Exponential moving average of the trained weights: average ← decay · average + (1 - decay) · weights.

    It starts as the weights are now, so there is no bias towards 0 to correct. Kept in float32 or the weights' own
    dtype, whichever is finer: in bfloat16 a step of 1 - decay would be lost in rounding.

    Args:
        policy: whose `trainable()` weights are averaged.
        decay: in [0, 1).

    Raises:
        UsageError: a decay outside [0, 1).
    """

    def __init__(self, policy: CausalPolicy, decay: float):
        check_decay(decay)
        self.decay, self._weights = decay, policy.trainable()
        self._average = {
            name: w.detach().to(torch.promote_types(w.dtype, torch.float32), copy=True)
            for name, w in self._weights.items()
        }

    @torch.no_grad()
    def update(self) -> None:
        """Take the weights as they are now into the average."""
        for name, average in self._average.items():
            average.lerp_(self._weights[name].to(average.dtype), 1 - self.decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The policy has the averaged weights inside, and its own ones again after."""
        own = {name: weight.detach().clone() for name, weight in self._weights.items()}
        self._put(self._average)
        try:
            yield
        finally:
            self._put(own)

    def state_dict(self) -> dict[str, Any]:
        return dict(self._average)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, average in self._average.items():
            average.copy_(state[name])

    @torch.no_grad()
    def _put(self, weights: dict[str, torch.Tensor]) -> None:
        for name, weight in self._weights.items():
            weight.copy_(weights[name])


def check_decay(decay: float) -> None:
    if not 0 <= decay < 1:
        raise UsageError(f"ema {decay}: expected a decay in [0, 1), as 0.99")
