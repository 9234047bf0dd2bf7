"""Objectives by name: options -> values of a kernel; and the baselines of their policy gradient."""

from __future__ import annotations

from functools import partial
from typing import Any

from ebft.components.component import Component, nearest
from ebft.errors import UsageError
from ebft.objectives import kernels, moments
from ebft.objectives.scores import Values


def _feature_matching(*, alignment: str) -> Values:
    if alignment not in ("dot", "cosine"):
        raise UsageError(f"alignment {alignment!r}: expected 'dot' or 'cosine'")

    def values(rollout, target, *, mask):
        return moments.moment_values(rollout, target, alignment=alignment)

    values.alignment = alignment  # type: ignore[attr-defined]
    return values


def _kernel_score(*, kernel: str, **options: float | None) -> Values:
    if kernel not in kernels.KERNELS:
        raise UsageError(f"kernel {kernel!r}{nearest(kernel, kernels.KERNELS)}: expected {', '.join(kernels.KERNELS)}")
    given: dict[str, Any] = {name: value for name, value in options.items() if value is not None}
    kernels.check_options(kernel, **given)
    return partial(kernels.kernel_values, kernel=kernel, **given)


OBJECTIVES = {
    "feature_matching": Component(
        "distance of feature moments (the paper's (7)); alignment dot or cosine",
        {"alignment": "dot"},
        _feature_matching,
    ),
    "kernel_score": Component(
        "the same with a kernel: linear, cosine, polynomial, rbf, laplace or energy",
        {"kernel": "energy", "bandwidth": None, "power": None, "degree": None, "offset": None},
        _kernel_score,
    ),
}
ESTIMATORS = {
    "rloo": Component("leave-one-out baseline (94) of the paper: unbiased; wants 3 rollouts or more"),
    "rloo_tuned": Component("rloo with a coefficient that the other anchors determine: unbiased"),
    "mean": Component("mean reward of the others: diversity part too small by (N-2)/(N-1)"),
    "group_norm": Component("z-score over the rollouts of an anchor: biased"),
    "none": Component("no baseline: unbiased, more variance"),
}
