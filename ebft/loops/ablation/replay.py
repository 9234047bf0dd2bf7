"""What a choice of features, whitening, reward, baseline and loss makes of rollouts that are there already."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from tensordict import TensorDictBase
from torch import Tensor

from ebft import schema
from ebft.loops.ablation.intervals import Jackknife, jackknife
from ebft.loops.ablation.sketch import SKETCH
from ebft.loops.summary import whole_features
from ebft.objectives.counts import totals
from ebft.objectives.diagnostics import gradient_signal_to_noise
from ebft.objectives.losses import EBFTLoss
from ebft.objectives.moments import conditional_feature_matching_loss

REWARD_SPREAD = "reward_spread"
ZERO_SPREAD = "zero_spread_share"
AGREEMENT = "token_agreement"
MATCHING = "feature_matching_loss"
VARIANCE = "advantage_variance"
SIGNAL = "signal_to_noise"


class Outcome(NamedTuple):
    """One cell's metrics, with what they are without each sequence, and the advantages of all rollouts."""

    metrics: Mapping[str, Jackknife]
    advantages: Tensor  # [R]


def measure(batches: Sequence[TensorDictBase], loss: EBFTLoss) -> Outcome:
    """Metrics of rewarded batches, with sequences as the independent units.

    * ``reward_spread``: mean over anchors of the standard deviation of the rewards of their rollouts.
    * ``zero_spread_share``: share of anchors whose rollouts all have one reward, within rounding.
    * ``token_agreement``: correlation, within anchors, of the advantage of a rollout with the share of the target's
      tokens that it has in their places. 0 where one of them never differs.
    * ``feature_matching_loss``: the unbiased estimate (5), of the features as they are, not whitened.
    * ``advantage_variance``: over all rollouts, in units of the reward squared.
    * ``signal_to_noise``: ‖E g‖²/E‖g - E g‖² of the policy gradient of one sequence, from sketches of its score
      gradients; left out without sketches, and where tokens are credited one by one.

    Args:
        batches: with rewards and advantages, as the pipeline wrote them, and the policy's log-probs.
        loss: of which the policy-gradient term is used.
    """
    parts = [_units(td) for td in batches]
    metrics = {
        name: jackknife(statistic, torch.cat([part[name] for part in parts])) for name, statistic in _STATISTICS.items()
    }
    gradients = [sequence_gradients(td, loss) for td in batches]
    if all(g is not None for g in gradients):
        metrics[SIGNAL] = jackknife(gradient_signal_to_noise_or_nan, torch.cat(gradients))  # type: ignore[arg-type]
    return Outcome(metrics, torch.cat([whole_advantage(td)[td[schema.ANCHOR_MASK]].flatten() for td in batches]))


def gradient_signal_to_noise_or_nan(gradients: Tensor) -> Tensor:
    """`gradient_signal_to_noise` of [M,P]; not a number for fewer than 2 draws."""
    return gradient_signal_to_noise(gradients) if len(gradients) > 1 else torch.tensor(torch.nan)


def whole_advantage(td: TensorDictBase) -> Tensor:
    """[B,K,N]: the advantage of a rollout, summed over its tokens where there is one for each."""
    advantage = td[schema.ADVANTAGE]
    return advantage if advantage.ndim == 3 else torch.where(td[schema.ROLLOUT_MASK], advantage, 0.0).sum(-1)


def token_agreement(td: TensorDictBase) -> Tensor:
    """[B,K,N]: share of the target's tokens that a rollout has, each in its place."""
    real = td[schema.TARGET_MASK][:, :, None]
    same = (td[schema.ROLLOUT_TOKENS] == td[schema.TARGET_TOKENS][:, :, None]) & real & td[schema.ROLLOUT_MASK]
    return same.sum(-1) / real.sum(-1).clamp(min=1)


def rollout_weights(td: TensorDictBase, loss: EBFTLoss) -> Tensor | None:
    """[B,K,N]: derivative of the policy-gradient term in a rollout's log-prob; None where tokens are credited apart.

    Tokens of a rollout differ in it by what sampling and scoring differ in their log-probs; it is their mean.
    """
    if td[schema.ADVANTAGE].ndim == 4:
        return None
    td = td.clone(False)
    log_prob = td[schema.POLICY_LOG_PROB].detach().clone().requires_grad_()
    td[schema.POLICY_LOG_PROB] = log_prob
    td.update(totals(td, cross_entropy_tokens=loss.cross_entropy_tokens))
    (weights,) = torch.autograd.grad(loss(td)["loss_policy_gradient"], log_prob)
    real = td[schema.ROLLOUT_MASK] & td[schema.ANCHOR_MASK][..., None, None]
    return torch.where(real, weights, 0.0).sum(-1) / real.sum(-1).clamp(min=1)


def sequence_gradients(td: TensorDictBase, loss: EBFTLoss) -> Tensor | None:
    """[B,S]: sketched gradient of the policy-gradient term, by sequence, times B, so that the batch's is their mean."""
    if td.get(SKETCH, None) is None:
        return None
    weights = rollout_weights(td, loss)
    return None if weights is None else len(td) * torch.einsum("bkn,bkns->bs", weights.double(), td[SKETCH].double())


def correlations(outcomes: Sequence[Outcome]) -> Tensor:
    """[C,C]: correlation of the advantages of all rollouts between cells; not a number where they never differ."""
    a = torch.stack([outcome.advantages.double() for outcome in outcomes])
    a = a - a.mean(1, keepdim=True)
    norm = a.norm(dim=1)
    return (a @ a.mT) / (norm[:, None] * norm)


def _units(td: TensorDictBase) -> dict[str, Tensor]:
    """For every metric what each sequence adds to it, [B,Q]."""
    anchors = td[schema.ANCHOR_MASK]
    advantage = whole_advantage(td).double()
    agreement = token_agreement(td).double()
    count = anchors.sum(1) * advantage.shape[2]
    a, g = (torch.where(anchors[..., None], x - x.mean(-1, keepdim=True), 0.0) for x in (advantage, agreement))
    advantage = torch.where(anchors[..., None], advantage, 0.0)

    def mean(values: Tensor) -> Tensor:
        return torch.stack([torch.where(anchors, values.double(), 0.0).sum(1), anchors.sum(1).double()], -1)

    def total(values: Tensor) -> Tensor:
        return values.flatten(1).sum(1)

    return {
        REWARD_SPREAD: mean(td[schema.metric("reward_spread")]),
        ZERO_SPREAD: mean(td[schema.metric("zero_spread_groups")]),
        AGREEMENT: torch.stack([total(a * g), total(a * a), total(g * g)], -1),
        MATCHING: mean(conditional_feature_matching_loss(*whole_features(td))),
        VARIANCE: torch.stack([total(advantage), total(advantage**2), count.double()], -1),
    }


def _ratio(units: Tensor) -> Tensor:
    total, count = units.sum(0)
    return total / count


def _correlation(units: Tensor) -> Tensor:
    both, one, other = units.sum(0)
    size = (one * other).sqrt()
    return both / size if size > 0 else torch.zeros_like(both)


def _variance(units: Tensor) -> Tensor:
    total, square, count = units.sum(0)
    return square / count - (total / count) ** 2


_STATISTICS: dict[str, Callable[[Tensor], Tensor]] = {
    REWARD_SPREAD: _ratio,
    ZERO_SPREAD: _ratio,
    AGREEMENT: _correlation,
    MATCHING: _ratio,
    VARIANCE: _variance,
}
