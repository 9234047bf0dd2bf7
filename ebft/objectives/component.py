"""Reward and advantage as one step of a pipeline: features in, reward and advantage out."""

from __future__ import annotations

import torch
from tensordict.nn import TensorDictModule
from torch import Tensor

from ebft import schema
from ebft.errors import UsageError
from ebft.objectives import shaping
from ebft.objectives.baselines import rounding, zero_spread
from ebft.objectives.horizons import horizon_weights
from ebft.objectives.scores import (
    Scores,
    Values,
    check_credit,
    check_token_baseline,
    hold_last,
    rollout_scores,
    token_scores,
)

METRICS = (
    *("alignment", "similarity", "feature_matching_proxy"),
    *("reward_spread", "zero_spread_groups", "zero_advantage_groups"),
)


def objective(
    values: Values,
    *,
    estimator: str = "rloo",
    diversity: float = 1.0,
    credit: str | None = None,
    horizons: str = "uniform",
    token_baseline: str = "none",
    trace: float = 1.0,
    drop_zero_spread: bool = False,
    normalize_advantage: bool = False,
    clip_advantage: float | None = None,
) -> TensorDictModule:
    """A module that reads the features and writes reward and advantage, 0 at masked anchors, and metrics.

    Features per rollout, [B,K,N,D], give reward and advantage [B,K,N]. With `credit` they are per token, [B,K,N,G,D]
    with targets [B,K,G,D], and reward and advantage are [B,K,N,G]; see ``scores``.

    The metrics are [B,K], one value per anchor: ``alignment`` and ``similarity``, the two parts of the mean reward
    (before the factor `diversity`); ``feature_matching_proxy``, (53) with the sign of a loss, for where whitening
    leaves no loss to report; ``reward_spread``, the standard deviation of the rewards of its rollouts (of their
    sums over the positions, with `credit`); and whether these do not differ (``zero_spread_groups``) and its advantages
    are all 0 (``zero_advantage_groups``), within rounding.

    Args:
        values: `kernels.kernel_values` or `moments.moment_values` with their options bound, or a function like them.
        estimator, diversity: of `baselines.advantage`.
        credit: None, or how tokens are credited: "reward_to_go", "total" or "own" of ``scores``.
        horizons, token_baseline, trace: with `credit`, of ``scores.token_scores``.
        drop_zero_spread, normalize_advantage, clip_advantage: of ``shaping.shape``. Each is biased.
    """
    if credit is not None:
        check_credit(credit)
        check_token_baseline(token_baseline, trace=trace, credit=credit)
        horizon_weights(horizons, 1)
    elif (horizons, token_baseline, trace) != ("uniform", "none", 1):
        raise UsageError(
            f"horizons={horizons!r}, token_baseline={token_baseline!r}, trace={trace!r} are of rewards of tokens: they"
            " want credit='reward_to_go'"
        )
    if clip_advantage is not None:
        shaping.check_limit(clip_advantage)

    def reward_and_advantage(rollout: Tensor, target: Tensor, anchor_mask: Tensor, *masks: Tensor):
        if credit is None:
            scores = rollout_scores(values, rollout, target, anchor_mask, estimator=estimator, diversity=diversity)
            real = anchor_mask[..., None].expand_as(scores.reward)
        else:
            rollout_mask, target_mask = masks
            scores = token_scores(
                values,
                hold_last(rollout, rollout_mask),
                hold_last(target, target_mask),
                anchor_mask,
                estimator=estimator,
                diversity=diversity,
                credit=credit,
                horizons=horizons,
                token_baseline=token_baseline,
                trace=trace,
                tokens=rollout_mask,
            )
            real = anchor_mask[..., None, None] & rollout_mask
        spread, same = _spread(scores)
        gain = torch.where(real, scores.advantage, 0.0)
        gain = shaping.shape(
            gain,
            real,
            same,
            anchor_mask,
            drop_zero_spread=drop_zero_spread,
            normalize_advantage=normalize_advantage,
            clip_advantage=clip_advantage,
        )
        idle = gain.abs().flatten(2).amax(-1) <= rounding(gain, scores.scale)
        proxy = scores.similarity / 2 - scores.alignment  # (53), as `moments.feature_matching_proxy`
        metrics = (scores.alignment, scores.similarity, proxy, spread, same, idle)
        whole = anchor_mask.view(*anchor_mask.shape, *[1] * (scores.reward.ndim - 2))
        return (
            torch.where(whole, scores.reward, 0.0),
            gain,
            *(torch.where(anchor_mask, metric.to(gain.dtype), 0.0) for metric in metrics),
        )

    return TensorDictModule(
        reward_and_advantage,
        in_keys=[
            schema.ROLLOUT_FEATURES,
            schema.TARGET_FEATURES,
            schema.ANCHOR_MASK,
            *([] if credit is None else [schema.ROLLOUT_MASK, schema.TARGET_MASK]),
        ],
        out_keys=[schema.REWARD, schema.ADVANTAGE, *map(schema.metric, METRICS)],
        strict=True,
    )


def _spread(scores: Scores) -> tuple[Tensor, Tensor]:
    """Standard deviation [B,K] of the rollouts' rewards, and whether it is 0 within rounding [B,K]."""
    reward = scores.reward if scores.reward.ndim == 3 else scores.reward.sum(-1)
    if reward.shape[-1] < 2:
        return torch.zeros_like(reward[..., 0]), torch.ones_like(reward[..., 0], dtype=torch.bool)
    return reward.std(-1), zero_spread(reward, scale=scores.scale)
