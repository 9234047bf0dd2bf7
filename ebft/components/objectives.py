"""Objectives by name, and the baselines of their policy gradient.

An objective is built of its options: those of `MATCHING` to values of a kernel, which compare features of rollouts and
targets; `verifier` to a `Verifier`; `energy` to an energy and what its file says of it. Several are one objective as
`combine:feature_matching+0.1*verifier`.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from ebft.components.component import Component, nearest, select
from ebft.components.verifiers import OPTIONS, VERIFIERS, make_verifier
from ebft.components.weighted import weighted_names
from ebft.errors import UsageError
from ebft.objectives import kernels, moments
from ebft.objectives.energy import LinearEnergy
from ebft.objectives.energy_reward import load_energy
from ebft.objectives.scores import Values

COMBINE = "combine:"
VERIFIER = "verifier"


def _feature_matching(*, alignment: str) -> Values:
    if alignment not in moments.ALIGNMENTS:
        raise UsageError(f"alignment {alignment!r}: expected {', '.join(map(repr, moments.ALIGNMENTS))}")

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


def _energy(*, energy: str | None) -> tuple[LinearEnergy, dict[str, Any]]:
    if energy is None:
        raise UsageError("--objective energy wants --energy FILE, an energy.safetensors of the command tilt")
    return load_energy(Path(energy))


OBJECTIVES = {
    "feature_matching": Component(
        "distance of feature moments (the paper's (7)); alignment dot, cosine or unit_target",
        {"alignment": "dot"},
        _feature_matching,
    ),
    "kernel_score": Component(
        "the same with a kernel: linear, cosine, polynomial, rbf, laplace or energy",
        {"kernel": "energy", "bandwidth": None, "power": None, "degree": None, "offset": None},
        _kernel_score,
    ),
    VERIFIER: Component(
        f"a score of the rollout's text: {', '.join(VERIFIERS)} or FILE.py:FUNCTION",
        {"verifier": "chrf", "group_aware": False, **OPTIONS},
        make_verifier,
    ),
    "energy": Component("minus an energy of the rollout's features, as `tilt` fits it", {"energy": None}, _energy),
}
MATCHING = ("feature_matching", "kernel_score")  # those that compare features of rollouts and targets


def objective_parts(text: str) -> dict[str, float]:
    """The objectives of --objective with their weights: one, or those behind `combine:`.

    Raises:
        UsageError: an unknown or repeated name, or a weight that is no number.
    """
    if text.startswith(COMBINE):
        behind = text.removeprefix(COMBINE)
        return weighted_names(behind, group="objective", prefix="combine", known=OBJECTIVES)
    select("objective", OBJECTIVES, text, also=", or several of them as combine:feature_matching+0.1*verifier")
    return {text: 1.0}


def combined(text: str) -> Component:
    """The component behind --objective; that of several has the options of all, and is built part by part."""
    names = objective_parts(text)
    if text in names:
        return OBJECTIVES[text]
    return Component(text, {option: v for name in names for option, v in OBJECTIVES[name].options.items()})


def build_objective(name: str, options: Mapping[str, Any]) -> Any:
    """The objective `name` of the options of all parts; see the head of this module for what it is."""
    entry = OBJECTIVES[name]
    return entry.build(**{option: options[option] for option in entry.options})


ESTIMATORS = {
    "rloo": Component("leave-one-out baseline (94) of the paper: unbiased; wants 3 rollouts or more"),
    "rloo_tuned": Component("rloo with a coefficient that the other anchors determine: unbiased"),
    "mean": Component("mean reward of the others: diversity part too small by (N-2)/(N-1)"),
    "group_norm": Component("z-score over the rollouts of an anchor: biased"),
    "none": Component("no baseline: unbiased, more variance"),
}
