"""Weighted sums of rewards, with every part on record."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from tensordict import TensorDictBase
from torch import Tensor

from ebft import schema
from ebft.errors import UsageError
from ebft.objectives.verifiers import Decode, check_finite

Stage = Callable[[TensorDictBase], TensorDictBase]


def weighted_sum(parts: Mapping[str, Tensor], weights: Mapping[str, float]) -> Tensor:
    """Σ weights[name] · parts[name].

    Args:
        parts: tensors of one shape, by name; weights: a finite number for each of these names.

    Returns:
        The sum, of the same shape.

    Raises:
        UsageError: no part, a part without a weight, a weight without a part or not finite, or shapes that disagree.
    """
    check_weights(parts, weights)
    shapes = {name: list(part.shape) for name, part in parts.items()}
    if len({tuple(shape) for shape in shapes.values()}) > 1:
        raise UsageError(f"parts of different shapes cannot be summed: {shapes}")
    return torch.stack([weights[name] * part for name, part in parts.items()]).sum(0)


def combine(stages: Mapping[str, Stage], weights: Mapping[str, float], *, decode: Decode) -> Stage:
    """A stage that runs several reward stages and writes the weighted sums of their rewards and of their advantages.

    The gradient of a sum is the sum of the gradients, so with unbiased baselines (see ``baselines.advantage``) the sum
    of the advantages is unbiased for the sum of the objectives. "group_norm" scales every part by itself.

    Each part finds the batch as it was before this stage, whatever the others wrote. Masked anchors get 0. The metrics
    are ``<name>_reward``, [B,K], the mean over the rollouts of a part's reward before its weight, those that the
    parts write, with ``<name>_`` in front of theirs, and of the sum ``reward_spread`` and ``zero_spread_groups``: 1
    where the rewards of no part with a weight differ, as far as the parts report that.

    Args:
        stages: by name, each writes reward and advantage of shape [B,K,N] (``component.objective`` without `credit`,
            ``verifiers.verifier``, ...).
        weights: a finite number for each of these names. A part of weight 0 is run and logged.
        decode: (tokens [M,G], mask [M,G]) -> M strings, for the errors.

    Raises:
        UsageError: as :func:`weighted_sum`, at once; when run, a part without reward or advantage or with one that is
            not finite, which is named with the rollout's text.
    """
    check_weights(stages, weights)

    def run(td: TensorDictBase) -> TensorDictBase:
        rewards, advantages, metrics = {}, {}, {}
        before = td.exclude(schema.REWARD, schema.ADVANTAGE, "metrics")
        written = []
        for name, stage in stages.items():
            out = stage(before.copy())
            rewards[name], advantages[name] = _part(out, name, decode)
            metrics[f"{name}_reward"] = rewards[name].mean(-1)
            own = out.get("metrics", None)
            metrics.update({} if own is None else {f"{name}_{key}": value for key, value in own.items()})
            written.append(out.exclude(schema.REWARD, schema.ADVANTAGE, "metrics"))
        for out in written:
            td.update(out)
        td[schema.REWARD] = weighted_sum(rewards, weights)
        td[schema.ADVANTAGE] = weighted_sum(advantages, weights)
        for name, value in metrics.items():
            td[schema.metric(name)] = value
        reward = td[schema.REWARD]
        spread = reward.std(-1) if reward.shape[-1] > 1 else torch.zeros_like(reward[..., 0])
        td[schema.metric("reward_spread")] = spread
        same = [f"{name}_zero_spread_groups" for name in stages if weights[name]]
        if same and all(name in metrics for name in same):
            td[schema.metric("zero_spread_groups")] = torch.stack([metrics[name] for name in same]).amin(0)
        return td

    return run


def check_weights(parts: Mapping[str, object], weights: Mapping[str, float]) -> None:
    """Check that there is something to sum, and a finite weight for each part and for nothing else."""
    if not parts:
        raise UsageError("there are no parts to sum; give at least one")
    missing, unknown = sorted(set(parts) - set(weights)), sorted(set(weights) - set(parts))
    if missing:
        raise UsageError(f"no weight for {', '.join(missing)}; there are weights for {', '.join(weights) or 'nothing'}")
    if unknown:
        raise UsageError(f"weights for {', '.join(unknown)}, which are no parts; the parts are {', '.join(parts)}")
    for name, weight in weights.items():
        if not math.isfinite(weight):
            raise UsageError(f"weight {weight!r} of {name}: expected a finite number")


def _part(td: TensorDictBase, name: str, decode: Decode) -> tuple[Tensor, Tensor]:
    """Reward and advantage of one part, [B,K,N] each, 0 at masked anchors."""
    tokens, mask, real = td[schema.ROLLOUT_TOKENS], td[schema.ROLLOUT_MASK], td[schema.ANCHOR_MASK]
    found = []
    for key in (schema.REWARD, schema.ADVANTAGE):
        value = td.get(key, None)
        if value is None or value.shape != tokens.shape[:3]:
            what = "nothing" if value is None else f"shape {list(value.shape)}"
            raise UsageError(f"part {name} wrote {what} to {key!r}; expected [B,K,N], here {list(tokens.shape[:3])}")
        value = torch.where(real[..., None], value, 0.0)
        check_finite(value, tokens, mask, decode, name=f"{key[-1]} of part {name},")
        found.append(value)
    return found[0], found[1]
