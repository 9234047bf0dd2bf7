"""Fit an energy on rollouts of a policy, and measure what reweighting rollouts by it does to held-out text."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from tensordict import TensorDictBase
from torch import Tensor

from ebft import schema
from ebft.loops.evaluate import paired_difference
from ebft.loops.stages import Stage, at_step
from ebft.objectives.energy import LinearEnergy, Tilt, effective_sample_size, fit_tilt, tilt_log_weights

METHODS = ("plain", "resampled", "best")
_FIT, _EVALUATION = -2, -1  # steps that key the random numbers: training has 0, 1, ..., held-out measurement -1


@dataclass(frozen=True)
class Rollouts:
    """Rollouts of C contexts."""

    features: Tensor  # [C,N,D]
    target: Tensor  # [C,D]
    agreement: Tensor  # [C,N], share of the target's tokens that the rollout has at the same place
    sequence: Tensor  # [C] int64: which sequence a context belongs to


def draw(
    sample: Stage, embed: Stage, data: Iterable[TensorDictBase], *, seed: int, held_out: bool
) -> Iterable[Rollouts]:
    """Rollouts of every real anchor, batch by batch; those of fitting and of measuring have other random numbers."""
    count = 0
    for batch in data:
        td = embed(sample(at_step(batch.clone(False), seed=seed, step=_EVALUATION if held_out else _FIT)))
        real = td[schema.ANCHOR_MASK]
        yield Rollouts(
            td[schema.ROLLOUT_FEATURES][real].cpu(),
            td[schema.TARGET_FEATURES][real].cpu(),
            token_agreement(*(td[key][real] for key in _TOKENS)).cpu(),
            count + real.nonzero()[:, 0].cpu(),
        )
        count += len(td)


_TOKENS = (schema.ROLLOUT_TOKENS, schema.ROLLOUT_MASK, schema.TARGET_TOKENS, schema.TARGET_MASK)


def together(parts: Iterable[Rollouts]) -> Rollouts:
    """The rollouts of all batches."""
    columns = zip(*((p.features, p.target, p.agreement, p.sequence) for p in parts), strict=True)
    return Rollouts(*(torch.cat(column) for column in columns))


def token_agreement(rollout: Tensor, rollout_mask: Tensor, target: Tensor, target_mask: Tensor) -> Tensor:
    """Share of the target's tokens that a rollout has at the same place: [...,N,G] and [...,G] to [...,N].

    Args:
        rollout, rollout_mask: [...,N,G]; target, target_mask: [...,G].
    """
    same = (rollout == target[..., None, :]) & rollout_mask & target_mask[..., None, :]
    return same.sum(-1) / target_mask.sum(-1, keepdim=True).clamp(min=1)


def fit(rollouts: Rollouts, **options: Any) -> Tilt:
    """`ebft.objectives.fit_tilt` on these rollouts."""
    return fit_tilt(rollouts.features, rollouts.target, **options)


def measure(rollouts: Rollouts, energy: LinearEnergy | None, *, fitting: Mapping[str, Any]) -> dict[str, Any]:
    """Plain sampling against rollouts reweighted by an energy, on contexts that the energy has not seen.

    Each method makes, of N/2 rollouts of a context, the mean features of what it would return: ``plain``, their mean;
    ``resampled``, the mean under the weights of the tilt, in proportion to which importance resampling draws; ``best``,
    the features of the rollout of least energy. With the two halves of the rollouts, that is twice, independently, and
    ⟨m₁ - φ(y), m₂ - φ(y)⟩ estimates the conditional feature-matching loss ‖E m - φ(y)‖² (arXiv 2603.12248, (5))
    without the variance of m. ``plain`` is unbiased for the policy's loss; the others are as good as N/2 rollouts make
    them.

    Args:
        rollouts: of held-out contexts, N even.
        energy: None fits one for each context, on the half of its rollouts that is not weighed and on its own target:
            what an energy that knew the answer could do with these rollouts, no method.
        fitting: options of :func:`fit`, for the energies per context.

    Returns:
        ``effective_rollouts`` (of N; of N/2 per context) and ``moment_gap``, ‖mean over contexts of the (weighted) mean
        features less φ(y)‖, before and after; per method ``feature_matching_loss`` and ``token_agreement`` (expected,
        over what it would return of N/2 rollouts), with their difference from plain and its standard error over
        sequences.
    """
    half = rollouts.features.shape[1] // 2
    parts = [rollouts.features[:, :half], rollouts.features[:, half : 2 * half]]
    agreement = [rollouts.agreement[:, :half], rollouts.agreement[:, half : 2 * half]]
    if energy is None:
        energies = [fit_tilt(part, rollouts.target, per_context=True, **fitting).energy for part in reversed(parts)]
        ranks = [own(part) for own, part in zip(energies, parts, strict=True)]
        weights = [tilt_log_weights(part, own).exp() for own, part in zip(energies, parts, strict=True)]
        effective = torch.stack([effective_sample_size(weight.log()) for weight in weights]).mean(0)
    else:
        ranks, weights = [energy(part) for part in parts], [tilt_log_weights(part, energy).exp() for part in parts]
        effective = effective_sample_size(tilt_log_weights(rollouts.features, energy))
    chosen: dict[str, list[Tensor]] = {
        "plain": [torch.full_like(weight, 1 / half) for weight in weights],
        "resampled": weights,
        "best": [torch.zeros_like(rank).scatter_(-1, rank.argmin(-1, keepdim=True), 1.0) for rank in ranks],
    }
    gap, per_context = {}, {}
    for name, shares in chosen.items():
        means = [torch.einsum("cn,cnd->cd", share, part) for share, part in zip(shares, parts, strict=True)]
        off = [mean - rollouts.target for mean in means]
        gap[name] = ((off[0] + off[1]) / 2).mean(0).norm().item()
        matched = [(share * own).sum(-1) for share, own in zip(shares, agreement, strict=True)]
        per_context[name] = {
            "feature_matching_loss": (off[0] * off[1]).sum(-1),
            "token_agreement": (matched[0] + matched[1]) / 2,
        }
    return {
        "contexts": len(rollouts.features),
        "rollouts": 2 * half,
        "effective_rollouts": effective.mean().item(),
        "moment_gap": {"before": gap["plain"], "after": gap["resampled"]},
        "methods": {
            name: _against_plain(own, per_context["plain"], rollouts.sequence) for name, own in per_context.items()
        },
    }


def _against_plain(own: Mapping[str, Tensor], plain: Mapping[str, Tensor], sequence: Tensor) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for name, values in own.items():
        difference, error = paired_difference(_sums(plain[name], sequence), _sums(values, sequence))
        known = None if math.isnan(error) else error  # of a single sequence there is none, and JSON knows no NaN
        result[name] = {"mean": values.mean().item(), "difference": difference, "standard_error": known}
    return result


def _sums(values: Tensor, sequence: Tensor) -> tuple[Tensor, Tensor]:
    """Sum and count of each sequence, [M], in float64."""
    size = int(sequence.max()) + 1
    total, count = (torch.zeros(size, dtype=torch.float64) for _ in range(2))
    return total.index_add(0, sequence, values.double()), count.index_add(0, sequence, torch.ones_like(values).double())
