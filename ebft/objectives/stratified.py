"""Reward and advantage of rollouts with chosen first tokens as one step of a pipeline."""

from __future__ import annotations

import torch
from tensordict.nn import TensorDictModule
from torch import Tensor

from ebft import schema
from ebft.objectives.horizons import horizon_weights
from ebft.objectives.kernels import kernel_score_reward
from ebft.objectives.scores import Values, hold_last, to_go
from ebft.objectives.strata import stratified_coefficients, stratum_weights


def stratified_objective(
    values: Values, *, kind: str, strata: int, diversity: float = 1.0, horizons: str | None = None
) -> TensorDictModule:
    """A module that reads features and the first tokens' log-probs and writes reward and advantage [B,K,N,G].

    The advantage holds the weights of the rollouts, so that the mean over rollouts of Σ_t -A_t log p_t has the gradient
    of the score: see ``strata``. The reward is that of a rollout among the others of its anchor, as if all had been
    drawn independently; it is for looking at.

    Args:
        values: as for ``component.objective``.
        kind, strata, diversity: of ``strata``; as the rollouts were drawn.
        horizons: None for features of whole rollouts; or the weights of ``horizons.horizon_weights`` for features per
            token, which are credited with the rewards from their own position on.
    """

    def reward_and_advantage(
        rollout: Tensor,
        target: Tensor,
        anchor_mask: Tensor,
        log_prob: Tensor,
        rollout_mask: Tensor,
        target_mask: Tensor,
    ) -> tuple[Tensor, Tensor]:
        weights, pairs = stratum_weights(log_prob[..., 0], kind=kind, strata=strata)
        steps = rollout_mask.shape[-1]
        if horizons is None:
            columns, scale = [(rollout, target)], torch.ones(1)
        else:
            held, goal = hold_last(rollout, rollout_mask), hold_last(target, target_mask)
            columns = list(zip(held.unbind(3), goal.unbind(2), strict=True))
            scale = horizon_weights(horizons, steps)
        rewards, firsts, laters = [], [], []
        for (phi, psi), weight in zip(columns, scale.tolist(), strict=True):
            k_target, k_rollouts = values(phi, psi, mask=anchor_mask)
            rewards.append(weight * kernel_score_reward(k_target, k_rollouts, diversity=diversity))
            first, later = stratified_coefficients(k_target, k_rollouts, weights, pairs, kind=kind, diversity=diversity)
            firsts.append(weight * first)
            laters.append(weight * later)
        first, later = (to_go(torch.stack(x, -1)).expand(*log_prob.shape) for x in (firsts, laters))
        advantage = torch.cat([first[..., :1], later[..., 1:]], -1)
        real = anchor_mask[..., None, None] & rollout_mask
        reward = torch.stack(rewards, -1).sum(-1)
        return (
            torch.where(anchor_mask[..., None], reward, 0.0),
            torch.where(real, advantage, 0.0).to(reward.dtype),
        )

    return TensorDictModule(
        reward_and_advantage,
        in_keys=[
            schema.ROLLOUT_FEATURES,
            schema.TARGET_FEATURES,
            schema.ANCHOR_MASK,
            schema.ROLLOUT_LOG_PROB,
            schema.ROLLOUT_MASK,
            schema.TARGET_MASK,
        ],
        out_keys=[schema.REWARD, schema.ADVANTAGE],
        strict=True,
    )
