"""What rollouts from the prefixes of held-out rows say about a policy, at every horizon from one sampling."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from tensordict import TensorDictBase
from torch import Tensor

from ebft import schema
from ebft.features.contract import FeatureMap
from ebft.features.module import as_module
from ebft.loops.evaluation import quantities as names
from ebft.loops.evaluation.quantities import Quantity, Totals, per_unit
from ebft.loops.scoring import score
from ebft.loops.stages import Stage, at_step
from ebft.loops.summary import whole_features
from ebft.objectives.cross_entropy import prediction_mask
from ebft.objectives.moments import (
    alignment_part,
    conditional_feature_matching_loss,
    distinct_rollouts,
    diversity_part,
)
from ebft.policy import CausalPolicy

# Evaluation never draws the random numbers of a training step: those are steps 0, 1, 2, ...
EVALUATION_STEP = -1


@torch.no_grad()
def measure_rollouts(
    policy: CausalPolicy,
    sample: Stage,
    maps: Mapping[str, FeatureMap],
    data: TensorDictBase,
    *,
    horizons: Sequence[int],
    batch_size: int,
    seed: int,
    scoring: Mapping[str, float] | None = None,
) -> Iterator[dict[Quantity, tuple[Tensor, Tensor]]]:
    """Measure a policy on held-out rows, batch by batch.

    Rollouts are drawn once, of the longest horizon; their first g tokens are the rollouts that horizon g would have
    drawn from the same anchors, since every token has its own random number.

    Args:
        policy: the policy.
        sample: the stage that writes anchors, targets and rollouts of the longest horizon.
        maps: feature maps by name.
        data: rows of batch size [M], see `ebft.data.packing.pack`; with `answer_mask`, answers are measured apart.
        horizons: at which to compare features; the longest is that of `sample`.
        scoring: temperature, top_p, ... of the sampler, so that entropies are of the distribution sampled from.

    Yields:
        Totals of a batch, [B] each: of cross-entropy (all tokens, answers); for each horizon of distinct, duplicate
        and copying rollouts, and for each map of the unbiased feature-matching loss and the reward with its parts; for
        each place of the entropy of the policy on generated text and on data, and of its surprisal on data.
    """
    for td in data.split(batch_size):
        td = sample(at_step(td.to(policy.device).clone(False), seed=seed, step=EVALUATION_STEP))
        yield {**_token_totals(policy, td, scoring=scoring), **_horizon_totals(td, maps, horizons)}


def embed_at(embed: Stage, td: TensorDictBase, horizons: Sequence[int]) -> list[TensorDictBase]:
    """The batch at each of the horizons, see `at_horizon`, with features.

    Out of one pass where the stage and its feature map offer that (`ebft.features.module`), embedded anew otherwise.
    """
    found = [at_horizon(td, horizon) for horizon in horizons]
    if not hasattr(embed, "at_horizons"):
        return [embed(cut) for cut in found]
    for cut, features in zip(found, embed.at_horizons(td, horizons), strict=True):
        cut[schema.ROLLOUT_FEATURES], cut[schema.TARGET_FEATURES] = features
    return found


def at_horizon(td: TensorDictBase, horizon: int) -> TensorDictBase:
    """The same anchors with the first `horizon` tokens of rollouts and targets; of all of them, the batch as it is."""
    if horizon == td[schema.ROLLOUT_TOKENS].shape[-1]:
        return td.clone(False)
    cut = td.select(
        *(key for key in (schema.TOKENS, schema.MASK, schema.DOCUMENT_IDS, schema.ANCHORS, schema.ANCHOR_MASK)),
        strict=False,
    ).clone(False)
    for key in (schema.ROLLOUT_TOKENS, schema.ROLLOUT_MASK, schema.TARGET_TOKENS, schema.TARGET_MASK):
        cut[key] = td[key][..., :horizon]
    return cut


def _horizon_totals(td: TensorDictBase, maps: Mapping[str, FeatureMap], horizons: Sequence[int]) -> Totals:
    valid = td[schema.ANCHOR_MASK]
    documents = schema.DOCUMENT_IDS in set(td.keys())
    embedded = {name: embed_at(as_module(m, documents=documents), td, horizons) for name, m in maps.items()}
    found: dict[Quantity, tuple[Tensor, Tensor]] = {}
    for place, horizon in enumerate(horizons):
        cut = at_horizon(td, horizon)
        rollouts, mask = cut[schema.ROLLOUT_TOKENS], cut[schema.ROLLOUT_MASK]
        distinct = distinct_rollouts(rollouts, mask) / rollouts.shape[2]
        found[Quantity(names.DISTINCT, at=horizon)] = per_unit(distinct, valid)
        found[Quantity(names.DUPLICATES, at=horizon)] = per_unit(repeated(rollouts, mask), valid)
        own, own_mask = cut[schema.TARGET_TOKENS][:, :, None], cut[schema.TARGET_MASK][:, :, None]
        copies = _equal(rollouts, mask, own, own_mask).double().mean(-1)
        found[Quantity(names.COPIES, at=horizon)] = per_unit(copies, valid)
        for name, cuts in embedded.items():
            for metric, values in _matching(*whole_features(cuts[place])).items():
                found[Quantity(metric, name, horizon)] = per_unit(values, valid)
    return found


def repeated(tokens: Tensor, mask: Tensor) -> Tensor:
    """Share of an anchor's rollouts that another one repeats: [...,N,G], [...,N,G] to [...] float64."""
    same = _equal(tokens[..., :, None, :], mask[..., :, None, :], tokens[..., None, :, :], mask[..., None, :, :])
    return (same.sum(-1) > 1).double().mean(-1)


def _matching(rollout: Tensor, target: Tensor) -> dict[str, Tensor]:
    """The loss and the means over rollouts of the reward (7) of arXiv 2603.12248 and its two parts, each [B,K]."""
    alignment, similarity = alignment_part(rollout, target).mean(-1), diversity_part(rollout).mean(-1)
    return {
        names.MATCHING: conditional_feature_matching_loss(rollout, target),
        names.REWARD: alignment - similarity,
        names.ALIGNMENT: alignment,
        names.SIMILARITY: similarity,
    }


def _token_totals(policy: CausalPolicy, td: TensorDictBase, *, scoring: Mapping[str, float] | None) -> Totals:
    """Cross-entropy, and entropy by place: the target is scored as one more rollout of its anchor."""
    scored = td.clone(False)
    for part in ("tokens", "mask"):
        target, rollout = td["target", part], td["rollout", part]
        scored["rollout", part] = torch.cat([target[:, :, None], rollout], 2)
    score(policy, scored, scoring=scoring, entropy=True)
    token_log_prob, entropy = scored[schema.POLICY_TOKEN_LOG_PROB], scored[schema.POLICY_ENTROPY]
    mask, documents = td[schema.MASK], td.get(schema.DOCUMENT_IDS, None)
    kinds = {names.ALL: None, names.ANSWERS: td.get(schema.ANSWER_MASK, None)}
    found = {
        Quantity(names.CROSS_ENTROPY, kind): per_unit(-token_log_prob, prediction_mask(mask, answers, documents))
        for kind, answers in kinds.items()
        if kind == names.ALL or answers is not None
    }
    horizon = td[schema.TARGET_TOKENS].shape[-1]
    places = td[schema.ANCHORS][..., None] - 1 + torch.arange(horizon, device=mask.device)
    surprisal = -token_log_prob.gather(1, places.clamp(0, token_log_prob.shape[1] - 1).flatten(1)).view(places.shape)
    on_data, real = entropy[:, :, 0], td[schema.TARGET_MASK] & td[schema.ANCHOR_MASK][..., None]
    generated, alive = entropy[:, :, 1:], td[schema.ROLLOUT_MASK] & td[schema.ANCHOR_MASK][..., None, None]
    for k in range(horizon):
        found[Quantity(names.ENTROPY, names.GENERATED, k + 1)] = per_unit(generated[..., k], alive[..., k])
        found[Quantity(names.ENTROPY, names.DATA, k + 1)] = per_unit(on_data[..., k], real[..., k])
        found[Quantity(names.SURPRISAL, names.DATA, k + 1)] = per_unit(surprisal[..., k], real[..., k])
    return found


def _equal(tokens: Tensor, mask: Tensor, others: Tensor, others_mask: Tensor) -> Tensor:
    """Whether continuations [...,G] are the same token for token, what is masked left out: [...]."""
    return (torch.where(mask, tokens, -1) == torch.where(others_mask, others, -1)).all(-1)
