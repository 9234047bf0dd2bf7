"""Reward and advantage as one step of a pipeline: features in, reward and advantage out."""

from __future__ import annotations

from collections.abc import Callable

import torch
from tensordict.nn import TensorDictModule
from torch import Tensor

from ebft import schema
from ebft.objectives.baselines import advantage
from ebft.objectives.kernels import kernel_score_reward

# (rollout [B,K,N,D], target [B,K,D], mask=[B,K]) -> values with the target [B,K,N] and among the rollouts [B,K,N,N]
Values = Callable[..., tuple[Tensor, Tensor]]


def objective(values: Values, *, estimator: str = "rloo", diversity: float = 1.0) -> TensorDictModule:
    """A module that reads the features and writes reward and advantage, both [B,K,N], 0 at masked anchors.

    Args:
        values: `kernels.kernel_values` or `moments.moment_values` with their options bound, or a function like them.
        estimator, diversity: of `baselines.advantage`.
    """

    def reward_and_advantage(rollout: Tensor, target: Tensor, anchor_mask: Tensor) -> tuple[Tensor, Tensor]:
        k_target, k_rollouts = values(rollout, target, mask=anchor_mask)
        reward = kernel_score_reward(k_target, k_rollouts, diversity=diversity)
        gain = advantage(k_target, k_rollouts, estimator=estimator, diversity=diversity)
        real = anchor_mask[..., None]
        return torch.where(real, reward, 0.0), torch.where(real, gain, 0.0)

    return TensorDictModule(
        reward_and_advantage,
        in_keys=[schema.ROLLOUT_FEATURES, schema.TARGET_FEATURES, schema.ANCHOR_MASK],
        out_keys=[schema.REWARD, schema.ADVANTAGE],
        strict=True,
    )
