"""Weights of the horizons 1..G in a loss that matches features at each of them, Σ_g w_g L_g."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ebft.errors import UsageError

HORIZONS = ("uniform", "last", "geometric:RATIO")


def horizon_weights(text: str, count: int) -> Tensor:
    """w_1..w_G [G], float64: a loss of its own for every choice, exactly matched by the gradient of weighted rewards.

    Args:
        text: "uniform" (1 at every horizon), "last" (whole rollouts only, the paper's) or "geometric:RATIO" with
            w_g = RATIO^(g-1): a ratio below 1 stresses the first tokens, whose rewards fewer others blur.
        count: G.

    Raises:
        UsageError: another text, or a ratio that is not a number above 0.
    """
    name, _, value = text.partition(":")
    if text == "uniform":
        return torch.ones(count, dtype=torch.float64)
    if text == "last":
        return torch.eye(count, dtype=torch.float64)[-1]
    try:
        ratio = float(value)
    except ValueError:
        ratio = math.nan
    if name != "geometric" or not (math.isfinite(ratio) and ratio > 0):
        raise UsageError(
            f"horizons={text!r}: expected uniform, last, or geometric:RATIO with a number above 0 (geometric:0.5)"
        )
    return ratio ** torch.arange(count, dtype=torch.float64)
