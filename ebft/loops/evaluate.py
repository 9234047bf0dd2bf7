"""Held-out measurement: the same sequences, anchors and random numbers before and after, so differences are paired."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from tensordict import TensorDictBase

from ebft import schema
from ebft.loops.clock import Clock
from ebft.loops.evaluation.quantities import per_unit
from ebft.loops.evaluation.rollouts import EVALUATION_STEP, embed_at
from ebft.loops.scoring import score, score_start
from ebft.loops.stages import Stage, at_step, write_by_rows
from ebft.loops.summary import doubling_horizons, whole_features
from ebft.objectives.cross_entropy import prediction_mask
from ebft.objectives.kl import kl_estimate
from ebft.objectives.moments import conditional_feature_matching_loss, distinct_rollouts
from ebft.policy import CausalPolicy
from ebft.sharding import whole

METRICS = ("feature_matching_loss", "cross_entropy", "kl", "distinct_rollouts", "reward")

_NO_SUMS = ("tokens", "times", "profile")


@torch.no_grad()
def evaluate(
    policy: CausalPolicy,
    pipeline: Mapping[str, Stage],
    data: TensorDictBase,
    *,
    batch_size: int,
    seed: int,
    reference: CausalPolicy | None = None,
    scoring: Mapping[str, float] | None = None,
    profile: bool = False,
):
    """Measure a policy, batch by batch.

    Args:
        policy, pipeline, scoring: as in `ebft.loops.train.train`.
        data: held-out rows, batch size [M].
        reference: the start, to measure the divergence from; None says that the policy is the start.
        profile: also measure the feature-matching loss of the first 1, 2, 4, ... tokens of rollouts and targets, which
            the stage "embed" of the pipeline, if it has one, embeds in one pass if it can, and else anew for each.

    Yields:
        (sums, batch): `sums` maps each of `METRICS` (without features all but the first) to (sum [B], count [B]) over
        the anchors (tokens, for cross-entropy and divergence) of each sequence, and `tokens`, `times` for throughput;
        `batch` is the TensorDict with everything the pipeline wrote. The divergence is the k3 estimate, and it and the
        cross-entropy are computed on the first rollout of each anchor, which is all they need. Of several processes
        each scores its own rows, and all yield the same. `sums` also maps `profile` to the sums and counts of the
        feature-matching loss by the number of tokens, as text.
    """
    for td in data.split(batch_size):
        clock = Clock()
        td = at_step(td.to(policy.device).clone(False), seed=seed, step=EVALUATION_STEP)
        along: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        for name, stage in pipeline.items():
            with clock(name):
                if profile and name == "embed":
                    along, td = _profile(td, stage)
                else:
                    td = stage(td)
        with clock("score"):
            first = td.clone(False)
            first[schema.ROLLOUT_TOKENS] = td[schema.ROLLOUT_TOKENS][:, :, :1]
            first[schema.ROLLOUT_MASK] = td[schema.ROLLOUT_MASK][:, :, :1]
            _score(policy, first, reference=reference, scoring=scoring)
        tokens = int(td[schema.MASK].sum() + td[schema.ROLLOUT_MASK].sum())
        yield {**_sums(td, first), "tokens": tokens, "times": clock.times(), "profile": along}, td


def _score(
    policy: CausalPolicy,
    td: TensorDictBase,
    *,
    reference: CausalPolicy | None,
    scoring: Mapping[str, float] | None,
) -> None:
    """`score`, of several processes each its own rows; of sharded policies one after the other is gathered."""

    def gather(network: CausalPolicy, keys: list[Any], measure: Callable[[TensorDictBase], None]) -> None:
        def work(part: TensorDictBase) -> TensorDictBase:
            part = part.clone(False)
            measure(part)
            return part

        with whole(network):
            write_by_rows(td, keys, work)

    keys = [schema.POLICY_LOG_PROB, schema.POLICY_TOKEN_LOG_PROB]
    gather(policy, keys, lambda part: score(policy, part, scoring=scoring))
    if reference is not None:
        gather(reference, [schema.REFERENCE_LOG_PROB], lambda part: score_start(reference, part, scoring=scoring))


def _profile(td: TensorDictBase, embed: Stage) -> tuple[dict[str, tuple[torch.Tensor, torch.Tensor]], TensorDictBase]:
    """The feature-matching loss of the first g tokens by g as text: 1, 2, 4, ... and all of them; and td embedded."""
    horizons = doubling_horizons(td[schema.ROLLOUT_TOKENS].shape[-1])
    cuts = embed_at(embed, td, horizons)
    losses = (conditional_feature_matching_loss(*whole_features(cut)) for cut in cuts)
    found = {str(g): per_unit(loss, td[schema.ANCHOR_MASK]) for g, loss in zip(horizons, losses, strict=True)}
    return found, cuts[-1]


def _sums(td: TensorDictBase, first: TensorDictBase) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    valid = td[schema.ANCHOR_MASK]
    rollouts = td[schema.ROLLOUT_TOKENS].shape[2]
    matching = {}
    if td.get(schema.ROLLOUT_FEATURES, None) is not None:
        loss = conditional_feature_matching_loss(*whole_features(td))
        matching = {"feature_matching_loss": per_unit(loss, valid)}
    distinct = distinct_rollouts(td[schema.ROLLOUT_TOKENS], td[schema.ROLLOUT_MASK]) / rollouts
    predicted = prediction_mask(td[schema.MASK], td.get(schema.ANSWER_MASK, None), td.get(schema.DOCUMENT_IDS, None))
    ours = first[schema.POLICY_LOG_PROB]
    theirs = first.get(schema.REFERENCE_LOG_PROB, ours)
    return {
        **matching,
        "cross_entropy": per_unit(-first[schema.POLICY_TOKEN_LOG_PROB], predicted),
        "kl": per_unit(kl_estimate(ours, theirs, estimator="k3"), first[schema.ROLLOUT_MASK]),
        "distinct_rollouts": per_unit(distinct, valid),
        "reward": per_unit(td[schema.REWARD].flatten(2).mean(-1), valid),
    }


def concatenate(parts: list[dict]) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """The per-sequence sums and counts of all batches, each [M]."""
    names = [name for name in parts[0] if name not in _NO_SUMS]
    return {
        name: (torch.cat([part[name][0] for part in parts]), torch.cat([part[name][1] for part in parts]))
        for name in names
    }


def mean(sums: tuple[torch.Tensor, torch.Tensor]) -> float:
    """The ratio of totals: every anchor (or token) counts the same."""
    return (sums[0].sum() / sums[1].sum()).item()


def paired_difference(
    before: tuple[torch.Tensor, torch.Tensor], after: tuple[torch.Tensor, torch.Tensor]
) -> tuple[float, float]:
    """Mean of after - before and its standard error, with sequences as the independent units.

    Anchors of one sequence share their text, so they are summed first; the error is that of a ratio of totals over
    sequences (Cochran, Sampling Techniques, section 6.5). NaN for fewer than two sequences.
    """
    change, count = after[0] - before[0], before[1]
    difference = (change.sum() / count.sum()).item()
    sequences = int((count > 0).sum())
    if sequences < 2:
        return difference, math.nan
    residual = change - difference * count
    spread = (residual.square().sum() * sequences / (sequences - 1)).sqrt()
    return difference, (spread / count.sum()).item()
