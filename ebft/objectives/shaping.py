"""What one may do to advantages before they meet the policy gradient. Every one of these trades bias for variance."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from tensordict import TensorDictBase
from torch import Tensor

from ebft import schema
from ebft.errors import UsageError

Stage = Callable[[TensorDictBase], TensorDictBase]


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


def shape(
    gain: Tensor,
    real: Tensor,
    same: Tensor,
    anchor_mask: Tensor,
    *,
    drop_zero_spread: bool = False,
    normalize_advantage: bool = False,
    clip_advantage: float | None = None,
) -> Tensor:
    """:func:`keep_groups` of the groups with a spread, :func:`standardise` and :func:`clip`, in this order.

    Args:
        gain: [B,K,N] or [B,K,N,G] advantages; real: the same shape, True on what counts.
        same: [B,K] bool, True on groups without a spread of rewards; anchor_mask: [B,K] bool.

    Returns:
        Advantage of the same shape.
    """
    if drop_zero_spread:
        gain = keep_groups(gain, same, anchor_mask)
        real = real & ~_widen(same, real)
    if normalize_advantage:
        gain = standardise(gain, real)
    return gain if clip_advantage is None else clip(gain, clip_advantage)


def shaped(
    stage: Stage,
    *,
    drop_zero_spread: bool = False,
    normalize_advantage: bool = False,
    clip_advantage: float | None = None,
) -> Stage:
    """A reward stage whose advantages [B,K,N] go through :func:`shape`, as those of ``component.objective`` do.

    It adds the metric ``zero_advantage_groups`` [B,K], whether all advantages of an anchor are 0.

    Raises:
        UsageError: a limit out of range, at once; when run with `drop_zero_spread`, a stage that does not write the
            metric ``zero_spread_groups``.
    """
    if clip_advantage is not None:
        check_limit(clip_advantage)

    def run(td: TensorDictBase) -> TensorDictBase:
        td = stage(td)
        anchor_mask, gain = td[schema.ANCHOR_MASK], td[schema.ADVANTAGE]
        flags = td.get(schema.metric("zero_spread_groups"), None)
        if flags is None and drop_zero_spread:
            raise UsageError(
                "drop_zero_spread wants the metric 'zero_spread_groups' of the reward stage, which wrote none"
            )
        td[schema.ADVANTAGE] = gain = shape(
            gain,
            anchor_mask[..., None].expand_as(gain),
            torch.zeros_like(anchor_mask) if flags is None else flags > 0,
            anchor_mask,
            drop_zero_spread=drop_zero_spread,
            normalize_advantage=normalize_advantage,
            clip_advantage=clip_advantage,
        )
        td[schema.metric("zero_advantage_groups")] = ((gain == 0).all(-1) & anchor_mask).to(gain.dtype)
        return td

    return run


def check_limit(limit: float) -> None:
    """Check the bound of :func:`clip`."""
    if not (math.isfinite(limit) and limit > 0):
        raise UsageError(f"clip_advantage={limit!r}: expected a finite number above 0")


def _widen(groups: Tensor, like: Tensor) -> Tensor:
    """[B,K] to [B,K,1,...] with as many axes as `like`."""
    return groups.view(*groups.shape, *[1] * (like.ndim - groups.ndim))
