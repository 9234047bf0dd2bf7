"""The report of `progress.py`: what the cells that are there say, and which are missing."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from benchmarks.progress_recipes import Plan
from ebft.files import write_atomically, write_json
from ebft.loops.ablation.intervals import Interval, paired_interval, t_interval
from ebft.loops.evaluation.quantities import Quantity, Totals
from ebft.loops.evaluation.result import look_up, mean_differences

Cells = Mapping[str, Mapping[str, Mapping[str, Any]]]  # recipe -> seed -> what is kept of a cell


def path_of(out: Path, cell: tuple[str, int]) -> Path:
    """Where a cell is kept."""
    return out / "cells" / f"{cell[0]}-{cell[1]}.json"


def _totals(measured: Mapping[str, Any], metrics: Mapping[str, Quantity]) -> Totals:
    """The totals of every held-out sequence that a cell or the base keeps."""
    columns = {name: [torch.tensor(c, dtype=torch.float64) for c in measured["sums"][name]] for name in metrics}
    return {Quantity(*quantity): (columns[name][0], columns[name][1]) for name, quantity in metrics.items()}


def differences(pairs: Iterable[tuple[Mapping, Mapping]], metrics: Mapping[str, Quantity]) -> dict[str, dict]:
    """Metric -> value, low, high and standard_error of the mean over pairs of the second less the first, over texts."""
    entries = mean_differences([(_totals(first, metrics), _totals(second, metrics)) for first, second in pairs])
    found = {}
    for name, quantity in metrics.items():
        entry = look_up(entries, *quantity)
        assert entry is not None
        found[name] = {key: entry[key] for key in ("value", "low", "high", "standard_error")}
    return found


def write(out: Path, plan: Plan, steps: Mapping[str, Any], seeds: Sequence[int]) -> str:
    """Write progress.json and progress.md of the cells that are there; returns the latter."""
    cells: dict[str, dict[str, dict]] = {recipe: {} for recipe in plan.recipes}
    missing = []
    for recipe, found in cells.items():
        for seed in seeds:
            path = path_of(out, (recipe, seed))
            if path.exists():
                found[str(seed)] = json.loads(path.read_text())
            else:
                missing.append(f"{recipe}:{seed}")
    start = json.loads((out / "base.json").read_text()) if any(cells.values()) else {}
    rows = {recipe: _row(plan, steps["recipes"][recipe], recipe, cells, start) for recipe, has in cells.items() if has}
    common = {"common": plan.common, "measure": plan.measure, "against": plan.against, "metrics": list(plan.metrics)}
    result = {"minutes": steps["minutes"], "seeds": list(seeds), **common, "missing": missing, "recipes": rows}
    write_json(out / "progress.json", result)
    text = markdown(result)
    write_atomically(out / "progress.md", text.encode())
    return text


def _row(plan: Plan, known: Mapping, recipe: str, cells: Cells, start: Mapping) -> dict[str, Any]:
    """What is known of a recipe: its cells by seed; over texts, their mean less the start and less the other recipe."""
    kept = ("changes", "step_s", "train_s", "tokens", "machine", "versions")
    own = {seed: {key: cell[key] for key in kept} for seed, cell in cells[recipe].items()}
    base = cells[plan.against] if recipe != plan.against else {}
    pairs = [(base[seed], cell) for seed, cell in cells[recipe].items() if seed in base]
    return {
        "options": known["options"],
        "steps": known["steps"],
        "timed_on": known.get("machine"),
        "cells": own,
        "change": differences([(start, cell) for cell in cells[recipe].values()], plan.metrics),
        "against": differences(pairs, plan.metrics) if pairs else {},
    }


def markdown(result: Mapping[str, Any]) -> str:
    """A row for every recipe with a cell, and the missing ones by name."""
    seeds, against = [str(seed) for seed in result["seeds"]], result["against"]
    given = "The steps given" if result["minutes"] is None else f"{result['minutes']:g} minutes for each cell"
    metrics: list[str] = result["metrics"]
    first = metrics[0]
    lines = [
        f"{given}, {len(seeds)} seeds. Change of held-out totals from the start, below 0 is better: ± half of the 95 %"
        " interval over seeds (– of one), in brackets the 95 % interval over texts of the mean of these seeds; for a"
        f" single seed ± the standard error over texts. Against: what is less that of {against}, over the seeds that"
        " both have."
        " Tokens: of sequences and rollouts, in 10⁶; minutes: of training, by its median step.",
        "",
        _line(["recipe", "steps", "tokens", "minutes", *metrics, *(f"seed {seed}: {first}" for seed in seeds)]),
        "|---|" + "---:|" * (3 + len(metrics) + len(seeds)),
    ]
    for recipe, row in result["recipes"].items():
        cells = row["cells"]
        tokens = fmean(cell["tokens"] for cell in cells.values()) / 1e6
        minutes = fmean(cell["step_s"] for cell in cells.values()) * row["steps"] / 60
        own = [_two(t_interval(list(_changes(row, metric).values())), row["change"][metric]) for metric in metrics]
        singles = [_single(cells.get(seed), first) for seed in seeds]
        lines.append(_line([recipe, str(row["steps"]), f"{tokens:.3g}", f"{minutes:.3g}", *own, *singles]))
    others = {recipe: row for recipe, row in result["recipes"].items() if row["against"]}
    if others:
        lines += ["", _line([f"against {against}", "seeds", *metrics]), "|---|" + "---:|" * (1 + len(metrics))]
    for recipe, row in others.items():
        base = result["recipes"][against]
        shared = [seed for seed in row["cells"] if seed in base["cells"]]
        found = [
            _two(paired_interval(_changes(row, metric), _changes(base, metric)), row["against"][metric])
            for metric in metrics
        ]
        lines.append(_line([recipe, str(len(shared)), *found]))
    if result["missing"]:
        lines += ["", f"Missing: {', '.join(result['missing'])}."]
    return "\n".join([*lines, "", *_machines(result["recipes"])]) + "\n"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _changes(row: Mapping[str, Any], metric: str) -> dict[str, float]:
    return {seed: cell["changes"][metric]["value"] for seed, cell in row["cells"].items()}


def _two(over_seeds: Interval, over_texts: Mapping[str, float]) -> str:
    """A mean with its interval over seeds and the one over texts."""
    return f"{_interval(over_seeds)} ({over_texts['low']:+.4f} to {over_texts['high']:+.4f})"


def _machines(recipes: Mapping[str, Any]) -> list[str]:
    """Where steps were timed and cells trained: only of one machine are times the same time."""
    timed = {_machine(row["timed_on"]) for row in recipes.values() if row["timed_on"]}
    trained = {_machine(cell["machine"]) for row in recipes.values() for cell in row["cells"].values()}
    kinds = (("Steps timed", timed), ("Cells trained", trained))
    return [f"{what} on: {'; '.join(sorted(found))}." for what, found in kinds if found]


def _machine(machine: Mapping[str, Any]) -> str:
    return f"{machine['processor']}, {machine['threads']} threads, {machine['device']}"


def _interval(found: Interval) -> str:
    if not found.number:
        return "–"
    return f"{found.mean:+.4f} ± " + ("–" if math.isnan(found.half_width) else f"{found.half_width:.4f}")


def _single(cell: Mapping[str, Any] | None, metric: str) -> str:
    if cell is None:
        return "–"
    change = cell["changes"][metric]
    return f"{change['value']:+.4f} ± {change['standard_error']:.4f}"
