"""What one may do to advantages before they meet the policy gradient. Every one of these trades bias for variance."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ebft.errors import UsageError


def keep_groups(advantage: Tensor, drop: Tensor, mask: Tensor) -> Tensor:
    """Take groups out of the average over groups: zeros for them, more weight for the rest.

    The advantages of the kept groups are multiplied by (real groups) / (kept groups), so that a loss that divides by
    the number of real anchors gives the mean over the kept ones, and terms next to the policy gradient (divergence,
    entropy) keep their own averages. Biased: which groups are dropped depends on the rollouts.

    Args:
        advantage: [B,K,N] or [B,K,N,G]; drop: [B,K] bool; mask: [B,K] bool, True on real anchors.

    Returns:
        Advantage of the same shape; all zeros when nothing is kept.
    """
    kept = mask & ~drop
    factor = mask.sum() / kept.sum().clamp(min=1)
    return torch.where(_widen(kept, advantage), advantage * factor.to(advantage.dtype), 0.0)


def standardise(advantage: Tensor, mask: Tensor) -> Tensor:
    """(A - mean) / standard deviation over all entries of the batch that count.

    Biased: mean and scale contain every rollout. The direction of the batch's update changes by the mean only, which
    an unbiased estimator has near 0; the scale makes the step independent of the rewards' unit.

    Args:
        advantage: [...]; mask: the same shape, bool, True on the entries that count.

    Returns:
        Advantage of the same shape, 0 where masked; all zeros where there is no spread or a single entry.
    """
    count = mask.sum().clamp(min=1)
    mean = torch.where(mask, advantage, 0.0).sum() / count
    centred = torch.where(mask, advantage - mean, 0.0)
    variance = centred.square().sum() / (count - 1).clamp(min=1)
    largest = torch.where(mask, advantage.abs(), 0.0).max() if advantage.numel() else variance
    flat = variance.sqrt() <= 4 * torch.finfo(advantage.dtype).eps * largest
    return torch.where(flat, 0.0, centred / torch.where(flat, 1.0, variance.sqrt()))


def clip(advantage: Tensor, limit: float) -> Tensor:
    """Advantages no larger than `limit` in size. Biased towards 0 for the rollouts that stand out.

    Raises:
        UsageError: a limit that is not a number above 0.
    """
    check_limit(limit)
    return advantage.clamp(-limit, limit)


def check_limit(limit: float) -> None:
    """Check the bound of :func:`clip`."""
    if not (math.isfinite(limit) and limit > 0):
        raise UsageError(f"clip_advantage={limit!r}: expected a finite number above 0")


def _widen(groups: Tensor, like: Tensor) -> Tensor:
    """[B,K] to [B,K,1,...] with as many axes as `like`."""
    return groups.view(*groups.shape, *[1] * (like.ndim - groups.ndim))
