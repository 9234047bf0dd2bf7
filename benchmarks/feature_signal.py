"""What a reward knows: agreement with the text, the text planted among rollouts, spread, and the gradient's signal.

* **agreement**: correlation, within the groups of N rollouts, of the reward with the share of the target's tokens that
  a rollout has at the same places. 1 would be a reward that counts equal tokens; a good map need not come near.
* **planted**: the target takes the place of the last of the N rollouts, and every one of the N is judged by its mean
  similarity to the other N-1 (the diversity term, with no target in it: with its own target the text would win by being
  itself). It wins when it is the most similar; ties are shared. Under a policy that writes like the text the target is
  exchangeable with the rollouts and wins with probability 1/N under any map. Above that, rollouts stray from what is
  typical; below, the text does: either way the map sees a difference, and 1/N says that it sees none.
* **spread**: standard deviation of the rewards of a group; **flat**: share of groups whose rewards are all the same.
* **SNR²**: of the policy gradient with the leave-one-out baseline, summed over all anchors. With g_1..g_R from
  independent sets of rollouts, E⟨g_i,g_j⟩ / (E‖g‖² - E⟨g_i,g_j⟩), i ≠ j: squared norm of the mean over the mean squared
  distance from it (`ebft.loops.signal.statistics`). Unbiased above and below the line; negative when the mean cannot
  be told from 0.

Standard errors are by the jackknife: over sequences for the first two, over the R sets for the last.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.feature_maps import folds
from ebft.loops.signal import statistics
from ebft.objectives.baselines import advantage, reward_scale, rounding, zero_spread
from ebft.objectives.kernels import kernel_score_reward, mean_over_others

Estimate = tuple[float, float]  # value and standard error


def measure(
    rollout: Tensor, target: Tensor, agreement: Tensor, *, whitening: str, group: int
) -> tuple[dict[str, Any], Tensor]:
    """All but the gradient.

    Args:
        rollout: [B,K,M,D] features, M = R·N; target: [B,K,D]; agreement: [B,K,M].
        whitening: its name.
        group: N; rollouts r·N .. r·N+N-1 are a group.

    Returns:
        A row of results, and the advantages [B,K,M].
    """
    batch, anchors, count, _ = rollout.shape
    sets = count // group
    groups = rollout.unflatten(2, (sets, group)).flatten(1, 2)  # [B,K·R,N,D]
    targets = target.repeat_interleave(sets, 1)  # [B,K·R,D]
    planted = torch.cat([targets[:, :, None], groups[:, :, :-1]], 2)
    reward, gain, wins, flat = (
        rollout.new_zeros(batch, anchors * sets, *tail) for tail in ((group,), (group,), (), ())
    )
    for rows, values in folds(whitening, {"rollout": groups, "target": targets}):
        yes = torch.ones(len(rows), anchors * sets, dtype=torch.bool)
        k_target, k_rollouts = values(groups[rows], targets[rows], mask=yes)
        reward[rows] = kernel_score_reward(k_target, k_rollouts, diversity=1.0)
        gain[rows] = advantage(k_target, k_rollouts, estimator="rloo", diversity=1.0)
        flat[rows] = zero_spread(reward[rows], scale=reward_scale(k_target, k_rollouts, diversity=1.0)).float()
        wins[rows] = won(values(planted[rows], targets[rows], mask=yes)[1])
    same = agreement.unflatten(2, (sets, group)).flatten(1, 2)
    r, a = (x.double() - x.double().mean(-1, keepdim=True) for x in (reward, same))
    moments = torch.stack([(r * a).sum((1, 2)), (r * r).sum((1, 2)), (a * a).sum((1, 2))], -1)  # [B,3]
    trials = torch.full((batch,), wins.shape[1], dtype=torch.float64)
    row = {
        "agreement": jackknife(moments, _correlation),
        "planted": jackknife(torch.stack([wins.double().sum(1), trials], -1), _share),
        "spread": float(reward.std(-1).mean()),
        "flat": float(flat.mean()),
    }
    return row, gain.unflatten(1, (anchors, sets)).flatten(2)


def won(k: Tensor) -> Tensor:
    """How far the first of N candidates has won, from values [...,N,N]: 1, or its share of a tie, or 0."""
    typical = mean_over_others(k)
    best = typical >= typical.amax(-1, keepdim=True) - rounding(typical, k.abs().amax((-2, -1)))[..., None]
    return best[..., 0].float() / best.sum(-1)


def jackknife(sums: Tensor, estimate: Callable[[Tensor], float]) -> Estimate:
    """Estimate of the sum over parts, and its standard error, from parts [B,C]."""
    total = sums.sum(0)
    return estimate(total), _deviation([estimate(total - part) for part in sums])


def signal_to_noise(gram: Tensor) -> Estimate:
    """SNR² and its standard error from the inner products [R,R] of R independent gradients; NaN when all are 0."""
    if not gram.diagonal().any():
        return math.nan, math.nan
    sets = len(gram)
    estimate = statistics.jackknife(gram.double().view(1, sets, 1, 1, sets, 1), statistics.signal_to_noise)[0]
    return estimate.value, estimate.error


def _deviation(left_out: list[float]) -> float:
    values = torch.tensor(left_out, dtype=torch.float64)
    return float(((len(values) - 1) * (values - values.mean()).square().mean()).sqrt())


def _correlation(sums: Tensor) -> float:
    product, first, second = sums.tolist()
    return product / math.sqrt(first * second) if first > 0 and second > 0 else math.nan


def _share(sums: Tensor) -> float:
    return float(sums[0] / sums[1])
