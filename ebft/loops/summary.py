"""What one watches of a batch: means over its anchors, and how much of its gradient is signal."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from tensordict import TensorDictBase
from torch import Tensor

from ebft import schema
from ebft.loops.numbers import read
from ebft.loops.scoring import has_rollouts
from ebft.objectives.moments import (
    conditional_feature_matching_loss,
    distinct_rollouts,
    effective_rollouts,
    feature_matching_profile,
)
from ebft.objectives.scores import hold_last, whole
from ebft.sharding import local


def whole_features(td: TensorDictBase) -> tuple[Tensor, Tensor]:
    """Features of whole rollouts [B,K,N,D] and targets [B,K,D]; where there are some per token, the last ones."""
    rollout, target = td[schema.ROLLOUT_FEATURES], td[schema.TARGET_FEATURES]
    if rollout.ndim == 4:
        return rollout, target
    return whole(rollout, td[schema.ROLLOUT_MASK]), whole(target, td[schema.TARGET_MASK])


def summarise(td: TensorDictBase) -> dict[str, float]:
    """`measures` as numbers."""
    return read(measures(td))


def measures(td: TensorDictBase) -> dict[str, Tensor]:
    """Means over the valid anchors of a batch of what one watches; nothing of a batch without rollouts."""
    if not has_rollouts(td):
        return {}
    valid = td[schema.ANCHOR_MASK]
    rollouts = td[schema.ROLLOUT_TOKENS].shape[2]
    drawn = td[schema.ROLLOUT_TOKENS], td[schema.ROLLOUT_MASK]
    summary = {
        "reward": _mean(td[schema.REWARD], valid),
        "distinct_rollouts": _mean(distinct_rollouts(*drawn).float(), valid) / rollouts,
        "effective_rollouts": _mean(effective_rollouts(*drawn), valid),
    }
    features = td.get(schema.ROLLOUT_FEATURES, None)
    if rollouts > 1 and features is not None:
        matching = conditional_feature_matching_loss(*whole_features(td))
        summary["feature_matching_loss"] = _mean(matching, valid)
    if rollouts > 1 and features is not None and features.ndim == 5:
        summary |= horizon_profile(td)
    own = td.get("metrics", None)
    return summary | ({} if own is None else {name: _mean(value, valid) for name, value in own.items()})


def _mean(values: Tensor, valid: Tensor) -> Tensor:
    """Of values [B,K,...] over the anchors that are valid [B,K]; without `values[valid]`, for which a GPU waits."""
    own = valid.view(*valid.shape, *[1] * (values.ndim - 2)).expand_as(values)
    return torch.where(own, values, 0.0).sum() / own.sum()


def horizon_profile(td: TensorDictBase) -> dict[str, Tensor]:
    """Feature-matching loss at horizons 1, 2, 4, ... and the last, from features per token; mean over valid anchors."""
    held = [
        hold_last(td[features], td[mask])
        for features, mask in (
            (schema.ROLLOUT_FEATURES, schema.ROLLOUT_MASK),
            (schema.TARGET_FEATURES, schema.TARGET_MASK),
        )
    ]
    profile = feature_matching_profile(*held)  # [B,K,G]
    horizons = doubling_horizons(profile.shape[-1])
    return {f"feature_matching_loss_{g}": _mean(profile[..., g - 1], td[schema.ANCHOR_MASK]) for g in horizons}


def doubling_horizons(longest: int) -> list[int]:
    """1, 2, 4, ... up to `longest`, and that."""
    return sorted({longest, *(2**power for power in range(longest.bit_length()))})


def squared_norm(parameters: Sequence[torch.nn.Parameter]) -> Tensor:
    """Of the gradients that they hold, of sharded ones of this process's share: a scalar, float64."""
    norms = [local(p.grad).norm().double() for p in parameters if p.grad is not None]
    return torch.stack(norms).square().sum() if norms else torch.zeros((), dtype=torch.float64)
