"""Feature matching: rewards and losses of the moments of the features (arXiv 2603.12248, sections 2 and 3)."""

from __future__ import annotations

import torch
from torch import Tensor

from ebft.errors import UsageError
from ebft.objectives.kernels import check_diversity, check_features, kernel_score_reward, mean_over_others, unit


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
        alignment: "dot" or "cosine". The diversity term is a dot product in both, so "cosine" suits features of
            unit norm and whitened features; with other norms the two terms are on different scales.

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
        rollout: [...,N,D]; target: [...,D]; alignment: "dot" or "cosine", for the target only.

    Returns:
        Similarity with the target [...,N] and dot products among the rollouts [...,N,N].

    Raises:
        UsageError: shapes that disagree or an unknown `alignment`.
    """
    return alignment_part(rollout, target, alignment=alignment) / 2, rollout @ rollout.mT


def alignment_part(rollout: Tensor, target: Tensor, *, alignment: str = "dot") -> Tensor:
    """AT_j = 2 φ(ŷ_j)·φ(y), or twice the cosine: [...,N,D] and [...,D] to [...,N] (arXiv 2603.12248, (7), (9)).

    Raises:
        UsageError: shapes that disagree or an unknown `alignment`.
    """
    check_features(rollout, target)
    if alignment not in ("dot", "cosine"):
        raise UsageError(f"alignment={alignment!r} is not known; expected 'dot' or 'cosine'")
    if alignment == "cosine":
        rollout, target = unit(rollout), unit(target)
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


def distinct_rollouts(tokens: Tensor, mask: Tensor) -> Tensor:
    """How many different rollouts an anchor has, masked tokens ignored: [...,N,G] and [...,N,G] to [...] int64.

    Raises:
        UsageError: shapes that disagree.
    """
    if tokens.ndim < 2 or tokens.shape != mask.shape:
        raise UsageError(
            f"tokens have shape {list(tokens.shape)} and their mask {list(mask.shape)};"
            " expected [..., rollouts, horizon] for both"
        )
    tokens = torch.where(mask, tokens, -1)  # no token has this id
    same = (tokens[..., :, None, :] == tokens[..., None, :, :]).all(-1)  # [...,N,N]
    seen_before = same.tril(-1).any(-1)
    return (~seen_before).sum(-1)
