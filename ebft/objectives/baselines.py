"""Advantages: rewards minus a baseline that lowers the variance of the policy gradient."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from ebft.errors import UsageError
from ebft.objectives.kernels import check_values, kernel_score_reward, mean_over_others

ESTIMATORS = ("rloo", "rloo_tuned", "mean", "group_norm", "none")


def advantage(
    k_target: Tensor,
    k_rollouts: Tensor,
    *,
    estimator: str = "rloo",
    diversity: float = 1.0,
    mask: Tensor | None = None,
) -> Tensor:
    """Advantage of every rollout over the other rollouts of its anchor.

    With r_j the reward of ``kernels.kernel_score_reward``:

    * ``rloo``: r_j minus the mean over the other rollouts of the reward they would have had without rollout j
      (arXiv 2603.12248, (94)). The baseline does not depend on rollout j, so the policy gradient is unbiased for every
      kernel and every `diversity`. It needs 3 rollouts; with 2 there is nothing left to compare for the diversity
      part, which then goes without a baseline (still unbiased) and a warning says so.
    * ``rloo_tuned``: the baseline of ``rloo`` times a coefficient of :func:`cross_fitted_coefficient`, which the other
      groups of the call determine. Unbiased as ``rloo`` is, since groups are drawn independently. The few rollouts
      that a baseline is made of make it noisy: at N = 3 or 4 that of ``rloo`` can cost more variance than it saves,
      and this one is then shrunk towards none.
    * ``mean``: r_j minus the mean reward of the others. That reward contains rollout j, so the gradient of the
      diversity part is too small: its expectation is (N-2)/(N-1) of the true one (nothing is left of it at N = 2).
      The alignment part is unbiased.
    * ``group_norm``: (r_j - mean) / standard deviation over the rollouts of one anchor (with N-1), 0 where the
      rewards do not differ beyond rounding. Biased: the scale depends on the rollouts, and mean and scale on rollout j.
    * ``none``: r_j. Unbiased, with the largest variance where rewards have a large mean.

    Args:
        k_target: [...,N] kernel values of the rollouts with their target (``moments.moment_values`` or
            ``kernels.kernel_values``).
        k_rollouts: [...,N,N] kernel values among the rollouts of one anchor, symmetric; the diagonal is not used.
        estimator: one of the above.
        diversity: weight α ≥ 0 of the diversity term, as in the reward.
        mask: [...] bool, True on real groups; ``rloo_tuned`` leaves the others out of its coefficients. None: all.

    Returns:
        Advantage [...,N]. Anchors do not mix, but for the coefficients of ``rloo_tuned``.

    Raises:
        UsageError: unknown estimator, shapes that disagree, or too few rollouts for the estimator or for `diversity`.
    """
    if estimator not in ESTIMATORS:
        raise UsageError(f"estimator={estimator!r} is not known; expected one of {', '.join(ESTIMATORS)}")
    count = k_target.shape[-1] if k_target.ndim else 0
    if count == 1 and estimator != "none":
        raise UsageError(
            f"estimator={estimator!r} with 1 rollout per anchor: there are no other rollouts to compare with;"
            " sample 3 or more rollouts, or set estimator='none' and diversity=0"
        )
    check_values(k_target, k_rollouts, diversity=diversity)
    reward = kernel_score_reward(k_target, k_rollouts, diversity=diversity)
    if estimator == "none":
        return reward
    if estimator == "mean":
        return reward - _mean_of_others(reward)
    if estimator == "group_norm":
        return _group_norm(reward, scale=reward_scale(k_target, k_rollouts, diversity=diversity))
    if diversity > 0 and count == 2:
        warnings.warn(
            f"estimator={estimator!r} with 2 rollouts per anchor: the diversity part of the reward has no baseline"
            " (3 or more rollouts give it one)",
            stacklevel=2,
        )
    baseline = _leave_one_out(k_target, k_rollouts, diversity)
    if estimator == "rloo_tuned":
        baseline = cross_fitted_coefficient(reward, baseline, mask)[..., None] * baseline
    return reward - baseline


def cross_fitted_coefficient(reward: Tensor, baseline: Tensor, mask: Tensor | None = None) -> Tensor:
    """How much of its baseline a group should use, judged by the other groups: a number in [0, 1] for each.

    c_g = Σ r b / Σ b² over the rollouts of all groups but g: the c of least mean square of r - c b, which stands for
    the variance of the policy gradient (it is that variance up to a factor where the scores ∇log p of different
    rollouts are orthogonal and of equal length). No group's own rollouts enter its coefficient, so the baseline stays
    independent of the rollout that it corrects. A single group uses all of its baseline.

    Args:
        reward: [...,N]; baseline: [...,N]; mask: [...] bool, True on groups that exist. None: all.

    Returns:
        Coefficient [...].

    Raises:
        UsageError: a mask whose shape disagrees.
    """
    if mask is not None and mask.shape != reward.shape[:-1]:
        raise UsageError(f"mask has shape {list(mask.shape)}, expected one entry per group {list(reward.shape[:-1])}")
    product, square = (reward * baseline).double().sum(-1), baseline.double().square().sum(-1)
    if mask is not None:
        product, square = torch.where(mask, product, 0.0), torch.where(mask, square, 0.0)
    product, square = product.sum() - product, square.sum() - square
    known = square > 0
    coefficient = torch.where(known, product / torch.where(known, square, 1.0), 1.0)
    return coefficient.clamp(0.0, 1.0).to(reward.dtype)


def zero_spread(reward: Tensor, *, scale: Tensor) -> Tensor:
    """Groups [...] whose rewards [...,N] differ by no more than the rounding of terms of size `scale` [...]."""
    return reward.amax(-1) - reward.amin(-1) <= rounding(reward, scale)


def rounding(values: Tensor, scale: Tensor) -> Tensor:
    """What rounding may do to sums and differences, over an axis of N, of terms of size `scale`."""
    return 4 * values.shape[-1] * torch.finfo(values.dtype).eps * scale


def reward_scale(k_target: Tensor, k_rollouts: Tensor, *, diversity: float) -> Tensor:
    """Size [...] of the terms that a reward is the difference of, from values [...,N] and [...,N,N]."""
    return 2 * k_target.abs().amax(-1) + 2 * diversity * k_rollouts.abs().amax((-2, -1))


def _leave_one_out(k_target: Tensor, k_rollouts: Tensor, diversity: float) -> Tensor:
    """(94): mean over the other rollouts of the reward they would have had without rollout j, [...,N]."""
    count = k_target.shape[-1]
    baseline = 2 * _mean_of_others(k_target)
    if diversity > 0 and count > 2:
        similarity = 2 * mean_over_others(k_rollouts)
        # mean over the ordered pairs of rollouts of which neither is j
        without = (similarity.sum(-1, keepdim=True) - 2 * similarity) / (count - 2)
        baseline = baseline - diversity * without
    return baseline


def _mean_of_others(values: Tensor) -> Tensor:
    """Mean of the other entries along the last axis: [...,N] to [...,N]."""
    return (values.sum(-1, keepdim=True) - values) / (values.shape[-1] - 1)


def _group_norm(reward: Tensor, *, scale: Tensor) -> Tensor:
    """Standard score over the last axis; 0 where the spread [...] is within the rounding of terms of size `scale`."""
    centred = reward - reward.mean(-1, keepdim=True)
    flat = zero_spread(reward, scale=scale)[..., None]
    deviation = torch.where(flat, 1.0, reward.std(-1, keepdim=True))
    return torch.where(flat, 0.0, centred / deviation)
