"""Policy gradients by name: options -> terms of the loss."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from ebft.components.component import Component
from ebft.errors import UsageError
from ebft.objectives import policy_gradient


def _reinforce() -> Callable[..., torch.Tensor]:
    return policy_gradient.reinforce


def _clipping(function: Callable[..., torch.Tensor]) -> Callable[..., Any]:
    def build(*, clip: str) -> Callable[..., torch.Tensor]:
        return partial(function, clip=parse_clip(clip))

    return build


def parse_clip(text: str) -> policy_gradient.Clip:
    """`0.2` for both sides of the ratio, or `0.2,0.28` (below, above)."""
    try:
        bounds = tuple(map(float, text.split(",")))
    except ValueError:
        bounds = ()
    if len(bounds) not in (1, 2):
        raise UsageError(f"clip {text!r}: expected one number (0.2), or two for below and above (0.2,0.28)")
    clip = bounds[0] if len(bounds) == 1 else (bounds[0], bounds[1])
    policy_gradient.check_clip(clip)
    return clip


POLICY_GRADIENTS = {
    "reinforce": Component("the paper's (91): on-policy, one update per batch of rollouts", {}, _reinforce),
    "clipped": Component(
        "PPO and GRPO: token ratios within 1 ± CLIP", {"clip": "0.2"}, _clipping(policy_gradient.clipped)
    ),
    "sequence_clipped": Component(
        "GSPO: one ratio per rollout within 1 ± CLIP", {"clip": "0.01"}, _clipping(policy_gradient.sequence_clipped)
    ),
    "cispo": Component(
        "CISPO: clipped ratios as weights, which stop no token", {"clip": "1,0.28"}, _clipping(policy_gradient.cispo)
    ),
}
