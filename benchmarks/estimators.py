"""Which estimator of the policy gradient has the least error per rollout, under which kernel and whitening?

    python benchmarks/estimators.py FOLDER --collect     # rollouts of the policy, with their gradients, into FOLDER
    python benchmarks/estimators.py FOLDER               # what they say; needs no model

Of M rollouts for each context, groups of N are drawn again and again (`--repeats` partitions of two halves of the
rollouts, fixed by the seed); every estimator turns a group into a gradient estimate, of which the collection kept
projections (`estimators_collect.py`). What is reported, by N, kernel, whitening and estimator:

* ``variance``: of the estimate given the context, tr Cov, over the squared norm of the gradient: noise to signal of
  one group;
* ``scale`` and ``cosine`` of its mean to the gradient: both 1 without bias. The gradient is that of ``rloo`` over all
  rollouts of a half (with whitening in the group, that of ``none`` at the same N, since each N has its own). Squares
  and products of means are taken between the two halves, which share no rollouts;
* ``speed_up``: how many times fewer rollouts than without a baseline give a gradient of equal error, at the same N,
  contexts given: the ratio of the variances, each at the scale that suits it best. What a bias leaves over, however
  many rollouts there are (1 - cosine²), is not in it. ``over_rloo`` is the same against ``rloo``, and
  ``speed_up_texts`` against none with contexts drawn anew for every group, whose differences no estimator removes.

Estimators that are proved unbiased (tests/test_objectives_baselines.py) count with a scale of 1 where whitening does
not look at the group. Intervals are 95 %, by jackknife over sequences.
"""

from __future__ import annotations

import json
import math
import sys
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from scipy.stats import t as student
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import estimators_report
from benchmarks.estimators_collect import collect, load
from ebft.errors import UsageError
from ebft.features.whitening import PopulationWhitening, whiten
from ebft.files import write_json
from ebft.objectives.baselines import ESTIMATORS, advantage
from ebft.objectives.kernels import KERNELS, kernel_values
from ebft.objectives.moments import moment_values

RESULTS = Path(__file__).with_name("results")
SIZES = (2, 3, 4, 8, 16)
WHITENINGS = ("none", "group", "population")
COSINE = "linear, cosine alignment"  # the paper's (9)
UNBIASED = ("none", "rloo", "rloo_tuned")
CALIBRATION = 4  # sequences that the population moment is taken from; they are not measured


def values_of(kernel: str) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """(rollout [...,N,D], target [...,D]) -> kernel values [...,N] and [...,N,N]."""
    if kernel == COSINE:
        return lambda rollout, target: moment_values(rollout, target, alignment="cosine")
    return lambda rollout, target: kernel_values(rollout, target, kernel=kernel)


def gradients(
    features: Tensor,
    target: Tensor,
    scores: Tensor,
    *,
    size: int,
    kernel: str,
    group_whitening: bool,
    repeats: int,
    seed: int,
) -> dict[str, dict[str, Tensor]]:
    """What groups of `size` rollouts say about the gradient of every context, by estimator.

    Args:
        features: [A,M,D] of M rollouts of A contexts; target: [A,D]; scores: [A,M,P], gradients of log-probs.

    Returns:
        Estimator -> ``halves`` [2,A,P], the mean estimate from each half of the rollouts, and ``square`` [A], the mean
        squared norm of an estimate; ``reference`` -> its ``halves``, the gradient as well as the rollouts know it:
        ``rloo`` over each half as one group, with whitening in the group (where every size of group has a gradient of
        its own) ``none``.
    """
    contexts, count = scores.shape[:2]
    random = torch.Generator().manual_seed(seed)
    half = count // 2
    groups = half // size
    sums = {
        name: {"halves": scores.new_zeros(2, contexts, scores.shape[-1]), "square": scores.new_zeros(contexts)}
        for name in ESTIMATORS
    }
    for _ in range(repeats):
        for number in range(2):  # the halves stay the same in all repeats: their means share no rollouts
            order = number * half + torch.randperm(half, generator=random)
            index = order[: groups * size].view(groups, size)
            rollout, goal = features[:, index], target[:, None].expand(-1, groups, -1)
            if group_whitening:
                rollout, goal = whiten(rollout, goal, mode="group")
            k_target, k_rollouts = values_of(kernel)(rollout, goal)
            for name in ESTIMATORS:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # two rollouts leave the diversity part without a baseline
                    gain = advantage(k_target, k_rollouts, estimator=name)
                estimate = torch.einsum("agn,agnp->agp", gain, scores[:, index]) / size
                sums[name]["halves"][number] += estimate.mean(1) / repeats
                sums[name]["square"] += estimate.square().sum(-1).mean(1) / (2 * repeats)
    if group_whitening:
        return {**sums, "reference": {"halves": sums["none"]["halves"]}}
    halves = []
    for own, score in zip(features.split(half, 1), scores.split(half, 1), strict=False):
        gain = advantage(*values_of(kernel)(own, target), estimator="rloo")
        halves.append(torch.einsum("an,anp->ap", gain, score) / half)
    return {**sums, "reference": {"halves": torch.stack(halves[:2])}}


def products(found: Mapping[str, Mapping[str, Tensor]], sequences: int) -> dict[str, dict[str, Tensor]]:
    """Per sequence, [sequences]: squared norms of means, their product with the reference, and mean squares."""
    truth = found["reference"]["halves"]

    def mean(values: Tensor) -> Tensor:
        return values.view(sequences, -1).mean(1)

    return {
        name: {
            "true": mean((truth[0] * truth[1]).sum(-1)),
            "both": mean(((own["halves"] * truth.flip(0)).sum(-1)).mean(0)),
            "own": mean((own["halves"][0] * own["halves"][1]).sum(-1)),
            "square": mean(own["square"]),
            "none": mean(found["none"]["square"]),
            "rloo": mean(found["rloo"]["square"]),
        }
        for name, own in found.items()
        if name in ESTIMATORS
    }


def measures(parts: Mapping[str, Tensor], *, unbiased: bool) -> dict[str, Tensor]:
    """The reported numbers, from means of :func:`products` (over leading axes, if any)."""
    true, both, own = parts["true"], parts["both"], parts["own"]
    scale = torch.ones_like(true) if unbiased else both / true
    variance = parts["square"] - (true if unbiased else own)
    return {
        "variance": variance / true,
        "scale": both / true,
        "cosine": both / (true * own).clamp(min=0).sqrt(),
        "speed_up": (parts["none"] - true) / variance * scale**2,
        "over_rloo": (parts["rloo"] - true) / variance * scale**2,
        "speed_up_texts": parts["none"] / parts["square"] * scale**2,
    }


def with_intervals(parts: Mapping[str, Tensor], *, unbiased: bool) -> dict[str, list[float | None]]:
    """Each measure with the half-width of its 95 % interval, by jackknife over sequences; None where not finite."""
    count = len(parts["true"])
    whole = measures({name: value.mean() for name, value in parts.items()}, unbiased=unbiased)
    without = measures({n: (v.sum() - v) / (count - 1) for n, v in parts.items()}, unbiased=unbiased)
    width = float(student.ppf(0.975, count - 1))
    spread = {name: (values - values.mean()).square().sum() for name, values in without.items()}
    half = {name: width * ((count - 1) / count * value).sqrt().item() for name, value in spread.items()}
    pairs = {name: (value.item(), half[name]) for name, value in whole.items()}
    return {name: [number if math.isfinite(number) else None for number in pair] for name, pair in pairs.items()}


def population(rollout: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Features [S,K,M,D] and [S,K,D] of the sequences after the first `CALIBRATION`, whitened by a moment of these."""
    seen: list[Tensor] = []
    whitening = PopulationWhitening(lambda *features, mask: (seen.extend(features), features)[1], calibration=1)
    real = torch.ones(target.shape[:2], dtype=torch.bool)
    few = rollout[:CALIBRATION, :, :8]  # as many rollouts of a context as are measured at most count little more
    whitening.observe(few, target[:CALIBRATION], real[:CALIBRATION])
    return whitening(rollout[CALIBRATION:], target[CALIBRATION:], mask=real[CALIBRATION:])


def evaluate(
    folder: Path,
    *,
    sizes: tuple[int, ...],
    kernels: tuple[str, ...],
    repeats: int,
    seed: int,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Every cell of the comparison; finished (features, whitening, N) are kept in FOLDER/cells and not done again."""
    td, config = load(folder)
    if config["sequences"] < CALIBRATION + 3:
        raise UsageError(f"{folder} holds {config['sequences']} sequences: expected {CALIBRATION + 3} or more")
    if max(sizes) > config["rollouts"] // 2:
        raise UsageError(f"groups of {max(sizes)} do not fit into half of {config['rollouts']} rollouts")
    measured = td[CALIBRATION:]
    scores = measured["scores"].flatten(0, 1)
    rows: list[dict[str, Any]] = []
    (folder / "cells").mkdir(exist_ok=True)
    for name in config["features"]:
        for whitening in WHITENINGS:
            whole = (td["features", name], td["targets", name])
            rollout, target = population(*whole) if whitening == "population" else (x[CALIBRATION:] for x in whole)
            for size in sizes:
                path = folder / "cells" / f"{name}-{whitening}-{size}.json"
                settings = {"kernels": list(kernels), "repeats": repeats, "seed": seed, "sequences": len(td)}
                known = json.loads(path.read_text()) if path.is_file() else {}
                if known.get("settings") != settings:
                    say(f"features {name}, whitening {whitening}, N {size}")
                    known = {"settings": settings, "rows": []}
                    for kernel in kernels:
                        found = gradients(
                            rollout.flatten(0, 1), target.flatten(0, 1), scores,
                            size=size, kernel=kernel, group_whitening=whitening == "group", repeats=repeats, seed=seed,
                        )  # fmt: skip
                        for estimator, parts in products(found, len(measured)).items():
                            unbiased = estimator in UNBIASED and whitening != "group"
                            cell = {"features": name, "whitening": whitening, "rollouts": size, "kernel": kernel}
                            cell |= {"estimator": estimator, **with_intervals(parts, unbiased=unbiased)}
                            known["rows"].append(cell)
                    write_json(path, known)
                rows += known["rows"]
    return {"collection": config, "calibration_sequences": CALIBRATION, "repeats": repeats, "seed": seed, "rows": rows}


def main(
    folder: Annotated[Path, typer.Argument(help="Folder of the rollouts.")],
    collecting: Annotated[bool, typer.Option("--collect", help="Make the rollouts first, or go on with it.")] = False,
    policy: Annotated[str, typer.Option(help="Policy to collect from.")] = "smollm2-135m",
    data: Annotated[str, typer.Option(help="Text to collect on.")] = "stdlib",
    features: Annotated[str, typer.Option(help="Feature maps to collect, with commas between.")] = "hidden,sbert",
    sequences: Annotated[int, typer.Option(help=f"Sequences; {CALIBRATION} of them calibrate the population.")] = 32,
    rollouts: Annotated[int, typer.Option(help="M, rollouts of every context.")] = 48,
    projections: Annotated[int, typer.Option(help="P, numbers kept of every gradient.")] = 128,
    repeats: Annotated[int, typer.Option(help="Partitions of the rollouts into groups.")] = 6,
    seed: Annotated[int, typer.Option(help="Of rollouts, projections and partitions.")] = 0,
    quick: Annotated[bool, typer.Option("--quick", help="A small version: few sequences, N up to 4.")] = False,
    out: Annotated[Path, typer.Option(help="Folder of estimators.json and estimators.md.")] = RESULTS,
    plot: Annotated[Path | None, typer.Option(help="The plot (default docs/estimators.png; quick: none).")] = None,
) -> None:
    """Compare estimators of the policy gradient on saved rollouts."""
    console, sizes = Console(), SIZES
    if quick:
        sequences, rollouts, projections, repeats, sizes = 8, 12, 16, 1, (2, 3, 4)
    if collecting:
        collect(
            folder, policy=policy, data=data, features=tuple(features.split(",")), sequences=sequences, length=48,
            horizon=8, rollouts=rollouts, projections=projections, seed=seed, say=console.log,
        )  # fmt: skip
    results = evaluate(folder, sizes=sizes, kernels=(*KERNELS, COSINE), repeats=repeats, seed=seed, say=console.log)
    estimators_report.write(out, results, plot=plot if quick or plot else RESULTS.parents[1] / "docs/estimators.png")
    console.print(estimators_report.markdown(results), markup=False, soft_wrap=True)


if __name__ == "__main__":
    try:
        typer.run(main)
    except UsageError as error:
        raise SystemExit(f"error: {error}") from error
