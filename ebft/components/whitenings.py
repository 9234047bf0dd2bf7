"""Whitenings by name: (values of a kernel, options) -> values of whitened features."""

from __future__ import annotations

import torch

from ebft.components.component import Component
from ebft.errors import UsageError
from ebft.features.whitening import PopulationWhitening, whiten
from ebft.objectives.scores import Values


def _group_whitening(values: Values) -> Values:
    def whitened(rollout, target, *, mask):
        return values(*whiten(rollout, target, mode="group"), mask=mask)

    return whitened


def _sample_whitening(values: Values) -> Values:
    if getattr(values, "alignment", None) != "cosine":
        raise UsageError(
            "whitening sample is defined for the cosine with the target only: use --objective feature_matching"
            " --alignment cosine, or --whitening group"
        )

    def whitened(rollout, target, *, mask):
        rollout, targets = whiten(rollout, target, mode="sample")
        return torch.cosine_similarity(rollout, targets, dim=-1), rollout @ rollout.mT

    return whitened


WHITENINGS = {
    "none": Component("features as they are", {}, lambda values: values),
    "group": Component(
        "by the anchor's own rollouts (the paper's (8)): diversity sees duplicates only", {}, _group_whitening
    ),
    "sample": Component("the authors' code: by an N x N matrix; with --alignment cosine only", {}, _sample_whitening),
    "population": Component(
        "by a second moment of other contexts, which keeps similarities",
        {"calibration": 2, "decay": None, "shrinkage": 0.1, "centred": False, "rank": None},
        PopulationWhitening,
    ),
}
