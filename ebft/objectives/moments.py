"""Feature matching: rewards and losses of the moments of the features (arXiv 2603.12248, sections 2 and 3)."""

from __future__ import annotations

import torch
from torch import Tensor

from ebft.errors import UsageError
from ebft.objectives.kernels import (
    check_diversity,
    check_features,
    check_values,
    kernel_score_reward,
    mean_over_others,
    unit,
)

ALIGNMENTS = ("dot", "cosine", "unit_target")


def feature_matching_reward(
    rollout: Tensor, target: Tensor, *, diversity: float = 1.0, alignment: str = "dot"
) -> Tensor:
    """Reward of every rollout: alignment with the target minus similarity to the other rollouts.

    r_j = AT_j - diversity · DT_j, with AT and DT as in :func:`alignment_part` and :func:`diversity_part`
    (arXiv 2603.12248, (7); with `diversity` the α of (67); with ``alignment="cosine"`` on whitened features, (9)).
    The policy gradient of this reward, with ``alignment="dot"``, descends the conditional feature-matching loss.

    Args:
        rollout: [...,N,D] features of the rollouts of one anchor.
        target: [...,D] features of the target.
        diversity: α ≥ 0; with 0, one rollout per anchor is enough.
        alignment: "dot", "cosine" or "unit_target", which scales the target alone to unit norm. The diversity term is a
            dot product in all, so the last two suit features of unit norm and whitened features; with other norms the
            two terms are on different scales. On features whitened by their group these are the variants of appendix B:
            "dot" the raw (41), "cosine" variant (i), (49), "unit_target" variant (iii), (52). Variant (ii), (51), which
            takes cosines in both terms, is ``kernels.kernel_score_reward`` of the kernel "cosine".

    Returns:
        Reward [...,N].

    Raises:
        UsageError: shapes that disagree, an unknown `alignment`, or one rollout with `diversity` above 0.
    """
    k_target, k_rollouts = moment_values(rollout, target, alignment=alignment)
    return kernel_score_reward(k_target, k_rollouts, diversity=diversity)


def moment_values(rollout: Tensor, target: Tensor, *, alignment: str = "dot") -> tuple[Tensor, Tensor]:
    """Similarities that the reward is made of, in the form that ``baselines.advantage`` takes.

    Args:
        rollout: [...,N,D]; target: [...,D]; alignment: "dot", "cosine" or "unit_target", for the target only.

    Returns:
        Similarity with the target [...,N] and dot products among the rollouts [...,N,N].

    Raises:
        UsageError: shapes that disagree or an unknown `alignment`.
    """
    return alignment_part(rollout, target, alignment=alignment) / 2, rollout @ rollout.mT


def alignment_part(rollout: Tensor, target: Tensor, *, alignment: str = "dot") -> Tensor:
    """AT_j = 2 φ(ŷ_j)·φ(y): [...,N,D] and [...,D] to [...,N] (arXiv 2603.12248, (7)).

    With "cosine" both vectors at unit norm, (9) and (49); with "unit_target" the target alone, (52).

    Raises:
        UsageError: shapes that disagree or an unknown `alignment`.
    """
    check_features(rollout, target)
    if alignment not in ALIGNMENTS:
        raise UsageError(f"alignment={alignment!r} is not known; expected {', '.join(map(repr, ALIGNMENTS))}")
    if alignment != "dot":
        target = unit(target)
    if alignment == "cosine":
        rollout = unit(rollout)
    return 2 * (rollout @ target[..., None]).squeeze(-1)


def diversity_part(rollout: Tensor) -> Tensor:
    """DT_j = (2/(N-1)) Σ_{j'≠j} φ(ŷ_j)·φ(ŷ_j'): [...,N,D] to [...,N] (arXiv 2603.12248, (7)). High means alike.

    Raises:
        UsageError: fewer than 2 rollouts.
    """
    check_diversity(1.0, rollouts=rollout.shape[-2])
    return 2 * mean_over_others(rollout @ rollout.mT)


def conditional_feature_matching_loss(rollout: Tensor, target: Tensor) -> Tensor:
    """Unbiased estimate of ‖E φ(ŷ) - φ(y)‖², the loss of one context and target (arXiv 2603.12248, (5)).

    ‖φ(y)‖² - mean_j (AT_j - DT_j/2). The plug-in ‖mean_j φ(ŷ_j) - φ(y)‖² would be too large by the variance of the
    features over N. An estimate can be negative; use features as they are, without whitening them by the group.

    Args:
        rollout: [...,N,D] features of N ≥ 2 independent rollouts.
        target: [...,D] features of the target.

    Returns:
        Loss [...], one per anchor.

    Raises:
        UsageError: shapes that disagree or fewer than 2 rollouts.
    """
    if rollout.ndim >= 2 and rollout.shape[-2] < 2:
        raise UsageError(
            f"rollout features have shape {list(rollout.shape)}: the estimate needs 2 or more rollouts per anchor"
            f" (found {rollout.shape[-2]})"
        )
    reward = alignment_part(rollout, target) - diversity_part(rollout) / 2
    return target.square().sum(-1) - reward.mean(-1)


def feature_matching_profile(rollout: Tensor, target: Tensor) -> Tensor:
    """The loss at every horizon, from the features of the first g tokens (arXiv 2603.12248, appendix A).

    Expect it to rise with the horizon even for a perfect model: its floor, the variance of the features given the
    context, does (lemma A.1).

    Args:
        rollout: [...,N,G,D]; target: [...,G,D].

    Returns:
        :func:`conditional_feature_matching_loss` at each horizon, [...,G].

    Raises:
        UsageError: shapes that disagree or fewer than 2 rollouts.
    """
    return conditional_feature_matching_loss(rollout.movedim(-2, -3), target)


def feature_matching_proxy(k_target: Tensor, k_rollouts: Tensor) -> Tensor:
    """(53) of arXiv 2603.12248 with the sign of a loss, lower is better: -mean_j (AT_j - DT_j/2).

    For whitened or normalised similarities, under which there is no loss to report. With the plain dot product it is
    the unbiased estimate of L_CFM less ‖φ(y)‖², which no policy changes; with any kernel, of its score less k(y, y).

    Args:
        k_target: [...,N] and k_rollouts: [...,N,N], as of :func:`moment_values` or ``kernels.kernel_values``, N ≥ 2.

    Returns:
        Proxy [...].

    Raises:
        UsageError: shapes that disagree or fewer than 2 rollouts.
    """
    check_values(k_target, k_rollouts, diversity=1.0)
    return (mean_over_others(k_rollouts) - 2 * k_target).mean(-1)


def distinct_rollouts(tokens: Tensor, mask: Tensor) -> Tensor:
    """How many different rollouts an anchor has, masked tokens ignored: [...,N,G] and [...,N,G] to [...] int64.

    Raises:
        UsageError: shapes that disagree.
    """
    seen_before = _same(tokens, mask).tril(-1).any(-1)
    return (~seen_before).sum(-1)


def effective_rollouts(tokens: Tensor, mask: Tensor) -> Tensor:
    """1 / Σ (share of each different rollout)²: [...,N,G] and [...,N,G] to [...], from 1 (all alike) to N.

    The number of equally frequent rollouts that would repeat as often (Hill, "Diversity and evenness", Ecology 1973,
    order 2).

    Raises:
        UsageError: shapes that disagree.
    """
    same = _same(tokens, mask)
    return same.shape[-1] ** 2 / same.sum((-2, -1)).float()


def _same(tokens: Tensor, mask: Tensor) -> Tensor:
    """Which rollouts of an anchor are the same: [...,N,G] to [...,N,N]."""
    if tokens.ndim < 2 or tokens.shape != mask.shape:
        raise UsageError(
            f"tokens have shape {list(tokens.shape)} and their mask {list(mask.shape)};"
            " expected [..., rollouts, horizon] for both"
        )
    tokens = torch.where(mask, tokens, -1)  # no token has this id
    return (tokens[..., :, None, :] == tokens[..., None, :, :]).all(-1)
