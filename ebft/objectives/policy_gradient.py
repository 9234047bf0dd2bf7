"""Policy-gradient terms, one per rollout token; the caller sums or averages them.

All functions take ``log_prob`` [...,N,G] with gradient, an ``advantage`` [...,N] (one per rollout) or [...,N,G] (one
per token) and a bool ``mask`` [...,N,G], and return terms [...,N,G] to be *minimised*. Advantages and old log-probs
get no gradient. Masked entries are 0 and pass no gradient, whatever they held. Where the policy still is the one that
sampled (``old_log_prob == log_prob``), all of them have the gradient of :func:`reinforce`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ebft.errors import UsageError

Clip = float | tuple[float, float]


def reinforce(log_prob: Tensor, advantage: Tensor, mask: Tensor) -> Tensor:
    """-A log p, the estimator of arXiv 2603.12248, (91): strictly on-policy, no ratio.

    Summed over the tokens of a rollout and averaged over rollouts, its expected gradient is that of the conditional
    feature-matching loss when the advantage is unbiased.

    The log-probs have to be of the distribution that was sampled, temperature included. With another temperature the
    expected update is E[A ∇log p'(ŷ)] with p' ≠ p, which is the gradient of nothing: E[∇log p'] is not 0, so that a
    constant advantage moves the policy and a baseline changes the expected update. For temperatures below 1 and
    log-probs at 1 most of it is a matter of scale (about the temperature); the rest grows with the length of rollouts
    and as the temperature falls.

    Args:
        log_prob: [...,N,G]; advantage: [...,N] or [...,N,G]; mask: [...,N,G].

    Returns:
        Terms [...,N,G].

    Raises:
        UsageError: shapes that disagree.
    """
    log_prob, advantage = _prepare(log_prob, advantage, mask)
    return -advantage * log_prob


def clipped(log_prob: Tensor, old_log_prob: Tensor, advantage: Tensor, mask: Tensor, *, clip: Clip) -> Tensor:
    """-min(ρ A, clamp(ρ, 1-low, 1+high) A) with the token's ratio ρ = p/p_old (PPO, arXiv 1707.06347, (7)).

    With group-normalised advantages this is GRPO's surrogate (arXiv 2402.03300); with ``high`` above ``low`` DAPO's
    (arXiv 2503.14476).

    Args:
        log_prob: [...,N,G]; old_log_prob: [...,N,G]; advantage: [...,N] or [...,N,G]; mask: [...,N,G].
        clip: one number for both sides, or (low, high).

    Returns:
        Terms [...,N,G].

    Raises:
        UsageError: shapes that disagree, or a `clip` out of range.
    """
    log_ratio, advantage = _log_ratio(log_prob, old_log_prob, advantage, mask)
    return _clipped_surrogate(log_ratio.exp(), advantage, clip)


def sequence_clipped(log_prob: Tensor, old_log_prob: Tensor, advantage: Tensor, mask: Tensor, *, clip: Clip) -> Tensor:
    """As :func:`clipped` with one ratio per rollout, the geometric mean of its tokens' (GSPO, arXiv 2507.18071).

    Written token by token (section 4.3 there, GSPO-token): every token of a rollout has the same value and is clipped
    together; its gradient is ρ A times that of its own log-prob. Summed over a rollout this is the rollout's length
    times the GSPO objective, so that it agrees with the other estimators on-policy.

    Args:
        log_prob: [...,N,G]; old_log_prob: [...,N,G]; advantage: [...,N] or [...,N,G]; mask: [...,N,G].
        clip: one number for both sides, or (low, high); ratios are of whole rollouts, so far narrower than for tokens.

    Returns:
        Terms [...,N,G].

    Raises:
        UsageError: shapes that disagree, or a `clip` out of range.
    """
    log_ratio, advantage = _log_ratio(log_prob, old_log_prob, advantage, mask)
    length = mask.sum(-1, keepdim=True).clamp(min=1)
    rollout_ratio = (log_ratio.detach().sum(-1, keepdim=True) / length).exp()
    return _clipped_surrogate(rollout_ratio * _one_with_gradient(log_ratio), advantage, clip)


def cispo(log_prob: Tensor, old_log_prob: Tensor, advantage: Tensor, mask: Tensor, *, clip: Clip) -> Tensor:
    """Gradient -clamp(ρ, 1-low, 1+high) A ∇log p: a clipped weight that stops no token (CISPO, arXiv 2506.13585).

    The value is -clamp(ρ) A. Unlike in :func:`clipped`, a token whose ratio is out of range keeps a gradient.

    Args:
        log_prob: [...,N,G]; old_log_prob: [...,N,G]; advantage: [...,N] or [...,N,G]; mask: [...,N,G].
        clip: one number for both sides, or (low, high); low=1 leaves the weight unbounded below.

    Returns:
        Terms [...,N,G].

    Raises:
        UsageError: shapes that disagree, or a `clip` out of range.
    """
    low, high = _bounds(clip)
    log_ratio, advantage = _log_ratio(log_prob, old_log_prob, advantage, mask)
    weight = log_ratio.detach().exp().clamp(1 - low, 1 + high)
    return -weight * advantage * _one_with_gradient(log_ratio)


def truncated_weight(log_prob: Tensor, sampler_log_prob: Tensor, mask: Tensor, *, cap: float) -> Tensor:
    """min(p/p_sampler, cap) of every token: the weight that makes up for a sampler that is not quite the policy.

    For a sampler whose log-probs differ from those of scoring (other kernels, other precision) though the weights are
    the same. Times the advantage it corrects the token's gradient; a token's weight ignores the tokens before it and
    the cap bounds the variance, so what is corrected is the first order of a small mismatch (truncated importance
    sampling, Ionides, "Truncated importance sampling", JCGS 2008).

    Args:
        log_prob: [...,N,G] of the policy that scores, before its first update on these rollouts; no gradient.
        sampler_log_prob: [...,N,G] as the sampler reported them.
        mask: [...,N,G] bool; masked entries have weight 1, whatever they hold.
        cap: at least 1.

    Returns:
        Weight [...,N,G] in (0, cap].

    Raises:
        UsageError: shapes that disagree, or a `cap` out of range.
    """
    check_cap(cap)
    if sampler_log_prob.shape != log_prob.shape or mask.shape != log_prob.shape:
        raise UsageError(
            f"sampler_log_prob has shape {list(sampler_log_prob.shape)} and mask {list(mask.shape)},"
            f" expected those of log_prob {list(log_prob.shape)}"
        )
    log_ratio = torch.where(mask, log_prob.detach() - sampler_log_prob, 0.0)
    return log_ratio.exp().clamp(max=cap)


def check_cap(cap: float) -> None:
    """Check the cap of :func:`truncated_weight`."""
    if not (math.isfinite(cap) and cap >= 1):
        raise UsageError(f"truncation cap={cap!r}: expected a finite number of at least 1, the weight of no mismatch")


def _clipped_surrogate(ratio: Tensor, advantage: Tensor, clip: Clip) -> Tensor:
    low, high = _bounds(clip)
    gain = torch.minimum(ratio * advantage, ratio.clamp(1 - low, 1 + high) * advantage)
    return -gain


def _one_with_gradient(log_ratio: Tensor) -> Tensor:
    """Ones whose gradient is that of the log-prob."""
    return (log_ratio - log_ratio.detach()).exp()


def _log_ratio(log_prob: Tensor, old_log_prob: Tensor, advantage: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    if old_log_prob.shape != log_prob.shape:
        raise UsageError(
            f"old_log_prob has shape {list(old_log_prob.shape)}, expected that of log_prob {list(log_prob.shape)}"
        )
    log_prob, advantage = _prepare(log_prob, advantage, mask)
    return log_prob - torch.where(mask, old_log_prob.detach(), 0.0), advantage


def _prepare(log_prob: Tensor, advantage: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probs and advantages, both [...,N,G], with zeros instead of whatever the masked entries hold."""
    if mask.shape != log_prob.shape:
        raise UsageError(f"mask has shape {list(mask.shape)}, expected that of log_prob {list(log_prob.shape)}")
    if advantage.shape == log_prob.shape[:-1]:
        advantage = advantage[..., None]
    elif advantage.shape != log_prob.shape:
        raise UsageError(
            f"advantage has shape {list(advantage.shape)}; for log_prob of shape {list(log_prob.shape)} expected"
            f" {list(log_prob.shape[:-1])} (one per rollout) or {list(log_prob.shape)} (one per token)"
        )
    return torch.where(mask, log_prob, 0.0), torch.where(mask, advantage.detach(), 0.0)


def check_clip(clip: Clip) -> None:
    """Check the bounds of a ratio."""
    _bounds(clip)


def _bounds(clip: Clip) -> tuple[float, float]:
    low, high = clip if isinstance(clip, tuple) else (clip, clip)
    if not (0 < low <= 1 and high > 0):
        raise UsageError(f"clip={clip!r} is out of range; expected 0 < low <= 1 and high > 0, as one number or a pair")
    return low, high
