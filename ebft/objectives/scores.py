"""From features to rewards and advantages: one for each rollout, or one for each of its tokens.

Per token, features are matched at every horizon 1..G. Let φ_g(ŷ) be the features of the first g tokens of a rollout
(of all of it, when it ended before), and L_g = ‖E φ_g(ŷ) - φ_g(y)‖², or the score of any kernel, the loss at horizon g.
What is descended is Σ_g L_g. The reward at position g is that of ``kernels.kernel_score_reward`` between the features
at position g,

    r_j[g] = 2 k(φ_g(ŷ_j), φ_g(y)) - (2α/(N-1)) Σ_{j'≠j} k(φ_g(ŷ_j), φ_g(ŷ_j')),

which depends on the first g tokens of rollout j only. A token can therefore not change the rewards before it, and
giving it the sum of those from its own position on ("reward_to_go") has the expected gradient of giving it all of them
("total"), as a rule with less variance. Both are unbiased for Σ_g L_g with an unbiased baseline, which is taken at each
horizon by itself. "own" gives a token the reward at its position alone: biased, blind to what a token leads to.

The losses may have weights, Σ_g w_g L_g (see ``horizons``), which multiply the rewards of their positions. A further
baseline of single tokens, and generalised advantage estimation, are those of ``token_baselines``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ebft.errors import UsageError
from ebft.objectives.baselines import advantage, reward_scale
from ebft.objectives.horizons import horizon_weights
from ebft.objectives.kernels import kernel_score_reward, mean_over_others
from ebft.objectives.token_baselines import check_trace, generalised_advantage, ridge_values, states_before

# (rollout [B,K,N,D], target [B,K,D], mask=[B,K]) -> values with the target [B,K,N] and among the rollouts [B,K,N,N]
Values = Callable[..., tuple[Tensor, Tensor]]

CREDITS = ("reward_to_go", "total", "own")
TOKEN_BASELINES = ("none", "ridge")


class Scores(NamedTuple):
    """What is known of the rollouts of every anchor once their features are."""

    reward: Tensor  # [B,K,N], or [B,K,N,G] of the positions
    advantage: Tensor  # [B,K,N], or [B,K,N,G] of the tokens
    alignment: Tensor  # [B,K]: mean over the rollouts of 2 k(ŷ, y)
    similarity: Tensor  # [B,K]: mean over the pairs of rollouts of 2 k(ŷ, ŷ'); 0 for a single rollout
    scale: Tensor  # [B,K]: size of the terms that a reward is the difference of


def hold_last(features: Tensor, mask: Tensor) -> Tensor:
    """Features [...,G,D] with those at masked places replaced by the last ones before them, as defined above.

    Args:
        features: [...,G,D], what masked places hold does not matter; mask: [...,G] bool, True on a rollout's tokens,
            which come first. A rollout without tokens gets zeros.

    Raises:
        UsageError: shapes that disagree.
    """
    if features.shape[:-1] != mask.shape:
        raise UsageError(f"features have shape {list(features.shape)}, their mask {list(mask.shape)}; expected [...,G]")
    last = (mask.sum(-1, keepdim=True) - 1).clamp(min=0)
    place = torch.arange(mask.shape[-1], device=mask.device).minimum(last)
    held = features.gather(-2, place[..., None].expand_as(features))
    return torch.where(mask.any(-1)[..., None, None], held, 0.0)


def whole(features: Tensor, mask: Tensor) -> Tensor:
    """Features of whole rollouts, from those of their tokens: [...,G,D], with the mask [...,G], to [...,D]."""
    return hold_last(features, mask)[..., -1, :]


def rollout_scores(
    values: Values, rollout: Tensor, target: Tensor, mask: Tensor, *, estimator: str = "rloo", diversity: float = 1.0
) -> Scores:
    """Scores of rollouts, from features of whole rollouts.

    Args:
        values: (rollout [B,K,N,D], target [B,K,D], mask=[B,K]) -> values with the target [B,K,N] and among the
            rollouts [B,K,N,N], as `kernels.kernel_values` with its options bound.
        rollout: [B,K,N,D]; target: [B,K,D].
        mask: [B,K] bool, True on real anchors.
        estimator, diversity: of ``baselines.advantage``; its groups are the anchors.

    Returns:
        Scores, with reward and advantage [B,K,N]. What masked anchors get depends on `values`.
    """
    return _scores(*values(rollout, target, mask=mask), mask, estimator=estimator, diversity=diversity)


def _scores(k_target: Tensor, k_rollouts: Tensor, mask: Tensor, *, estimator: str, diversity: float) -> Scores:
    alone = k_target.shape[-1] < 2
    return Scores(
        kernel_score_reward(k_target, k_rollouts, diversity=diversity),
        advantage(k_target, k_rollouts, estimator=estimator, diversity=diversity, mask=mask),
        2 * k_target.mean(-1),
        torch.zeros_like(k_target[..., 0]) if alone else 2 * mean_over_others(k_rollouts).mean(-1),
        reward_scale(k_target, k_rollouts, diversity=diversity),
    )


def token_scores(
    values: Values,
    rollout: Tensor,
    target: Tensor,
    mask: Tensor,
    *,
    estimator: str = "rloo",
    diversity: float = 1.0,
    credit: str = "reward_to_go",
    horizons: str = "uniform",
    token_baseline: str = "none",
    trace: float = 1.0,
    tokens: Tensor | None = None,
) -> Scores:
    """Scores of the tokens of rollouts, from features of the first g tokens.

    Args:
        values: as for :func:`rollout_scores`; called once for each horizon.
        rollout: [B,K,N,G,D]; target: [B,K,G,D]; see :func:`hold_last` for rollouts that end early.
        mask: [B,K] bool, True on real anchors.
        estimator, diversity: of ``baselines.advantage``; its groups are the anchors, at each horizon by itself.
        credit: "reward_to_go", "total" or "own", see the head of this module.
        horizons: weights w_g of the horizons, of ``horizons.horizon_weights``.
        token_baseline: "none", or "ridge" for ``token_baselines.ridge_values`` of the returns; unbiased, since they
            are fitted on other sequences (to the returns of "rloo" where the estimator is "rloo_tuned").
        trace: λ of ``token_baselines.generalised_advantage``; biased below 1. This and the token baseline go with
            ``credit="reward_to_go"`` only.
        tokens: [B,K,N,G] bool, True on real tokens, for the regression; None: all.

    Returns:
        Scores, with the reward of every position and the advantage every token is credited with, both [B,K,N,G];
        the others are summed over the horizons.

    Raises:
        UsageError: an unknown `credit`, or shapes that disagree.
    """
    check_credit(credit)
    check_token_baseline(token_baseline, trace=trace, credit=credit)
    if rollout.ndim != 5 or target.shape != rollout.shape[:2] + rollout.shape[3:]:
        raise UsageError(
            f"rollout features have shape {list(rollout.shape)} and target features {list(target.shape)};"
            " expected features of every token, [B,K,N,G,D] and [B,K,G,D]"
        )
    columns = zip(rollout.unbind(3), target.unbind(2), strict=True)
    pairs = [values(phi, goal, mask=mask) for phi, goal in columns]
    parts = [_scores(*pair, mask, estimator=estimator, diversity=diversity) for pair in pairs]
    weights = horizon_weights(horizons, rollout.shape[3]).to(rollout)
    reward, gain, alignment, similarity, scale = (
        torch.stack(column, -1) * weights for column in zip(*parts, strict=True)
    )
    totals = (alignment.sum(-1), similarity.sum(-1), scale.sum(-1))
    if token_baseline == "none" and trace == 1:
        return Scores(reward, credited(gain, credit), *totals)
    value = torch.zeros_like(gain)
    if token_baseline == "ridge":
        real = torch.ones_like(gain, dtype=torch.bool) if tokens is None else tokens
        fitted = gain
        if estimator == "rloo_tuned":
            # its coefficients would carry later tokens of the held-out sequence into the returns of the others: a bias
            plain = [advantage(*pair, estimator="rloo", diversity=diversity) for pair in pairs]
            fitted = torch.stack(plain, -1) * weights
        value = ridge_values(states_before(rollout, target, fitted), to_go(fitted), real & mask[..., None, None])
    return Scores(reward, generalised_advantage(gain, value, trace=trace), *totals)


def credited(advantage: Tensor, credit: str) -> Tensor:
    """Advantages [...,G] of the positions to those of the tokens [...,G]."""
    check_credit(credit)
    if credit == "own":
        return advantage
    if credit == "total":
        return advantage.sum(-1, keepdim=True).expand_as(advantage)
    return to_go(advantage)


def to_go(values: Tensor) -> Tensor:
    """Sum of the entries from each place on, along the last axis: [...,G] to [...,G]."""
    return values.flip(-1).cumsum(-1).flip(-1)


def check_credit(credit: str) -> None:
    """Check the name of a way to credit tokens."""
    if credit not in CREDITS:
        raise UsageError(f"credit={credit!r} is not known; expected one of {', '.join(CREDITS)}")


def check_token_baseline(name: str, *, trace: float, credit: str) -> None:
    """Check the name of a baseline of tokens, and that it and λ have rewards of positions to work on."""
    check_trace(trace)
    if name not in TOKEN_BASELINES:
        raise UsageError(f"token_baseline={name!r} is not known; expected one of {', '.join(TOKEN_BASELINES)}")
    if credit != "reward_to_go" and (name != "none" or trace != 1):
        raise UsageError(
            f"token_baseline={name!r} and trace={trace!r} with credit={credit!r}: they are for credit='reward_to_go'"
        )
