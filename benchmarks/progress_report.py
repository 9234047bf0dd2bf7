"""The report of `progress.py`: what the cells that are there say, and which are missing."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.progress_recipes import COMMON, MEASURE, METRICS, RECIPES
from ebft.files import write_atomically, write_json
from ebft.loops.ablation.intervals import Interval, paired_interval, t_interval

MATCHING, CROSS_ENTROPY = METRICS
AGAINST = "paper-adapters"  # the paper's reward under the optimiser of most others


def path_of(out: Path, cell: tuple[str, int]) -> Path:
    """Where a cell is kept."""
    return out / "cells" / f"{cell[0]}-{cell[1]}.json"


def write(out: Path, steps: Mapping[str, Any], seeds: Sequence[int]) -> str:
    """Write progress.json and progress.md of the cells that are there; returns the latter."""
    cells: dict[str, dict[int, dict]] = {recipe: {} for recipe in RECIPES}
    missing = []
    for recipe, found in cells.items():
        for seed in seeds:
            path = path_of(out, (recipe, seed))
            if path.exists():
                found[seed] = json.loads(path.read_text())
            else:
                missing.append(f"{recipe}:{seed}")
    rows = {recipe: _row(steps["recipes"][recipe], found) for recipe, found in cells.items() if found}
    common = {"common": COMMON, "measure": MEASURE}
    result = {"minutes": steps["minutes"], "seeds": list(seeds), **common, "missing": missing, "recipes": rows}
    write_json(out / "progress.json", result)
    text = markdown(result)
    write_atomically(out / "progress.md", text.encode())
    return text


def _row(known: Mapping[str, Any], cells: Mapping[int, Mapping[str, Any]]) -> dict[str, Any]:
    """What is known of a recipe; cells by seed."""
    kept = ("changes", "step_s", "train_s", "tokens", "machine", "versions")
    own = {str(seed): {key: cell[key] for key in kept} for seed, cell in cells.items()}
    return {"options": known["options"], "steps": known["steps"], "machine": known["machine"], "cells": own}


def markdown(result: Mapping[str, Any]) -> str:
    """A row for every recipe with a cell, and the missing ones by name."""
    seeds = [str(seed) for seed in result["seeds"]]
    changes = {
        metric: {
            recipe: {seed: cell["changes"][metric]["value"] for seed, cell in row["cells"].items()}
            for recipe, row in result["recipes"].items()
        }
        for metric in METRICS
    }
    lines = [
        f"{result['minutes']:g} minutes for each cell, {len(seeds)} seeds. Change of held-out totals from the start,"
        " below 0 is better: ± half of the 95 % interval over seeds (– of one), for a single seed the standard error"
        f" over sequences. Against: the loss less that of {AGAINST}, over the seeds that both have. Tokens: of"
        " sequences and rollouts, in 10⁶; the loss is also given for each million of them.",
        "",
        f"| recipe | steps | tokens | loss | for each | against {AGAINST} | cross-entropy | "
        + " | ".join(f"seed {seed}" for seed in seeds)
        + " |",
        "|---|---:|---:|---:|---:|---:|---:|" + "---:|" * len(seeds),
    ]
    against = changes[MATCHING].get(AGAINST, {})
    for recipe, row in result["recipes"].items():
        own = changes[MATCHING][recipe]
        tokens = {seed: cell["tokens"] / 1e6 for seed, cell in row["cells"].items()}
        parts = [
            t_interval(list(own.values())),
            t_interval([own[seed] / tokens[seed] for seed in own]),
            paired_interval(own, against),
            t_interval(list(changes[CROSS_ENTROPY][recipe].values())),
        ]
        singles = [_single(row["cells"].get(seed)) for seed in seeds]
        cells = [recipe, str(row["steps"]), f"{fmean(tokens.values()):.3g}", *map(_interval, parts), *singles]
        lines.append("| " + " | ".join(cells) + " |")
    if result["missing"]:
        lines += ["", f"Missing: {', '.join(result['missing'])}."]
    lines += ["", *_machines(result["recipes"])]
    return "\n".join(lines) + "\n"


def _machines(recipes: Mapping[str, Any]) -> list[str]:
    """Where steps were timed and cells trained: only of one machine are times the same time."""
    timed = {_machine(row["machine"]) for row in recipes.values()}
    trained = {_machine(cell["machine"]) for row in recipes.values() for cell in row["cells"].values()}
    kinds = (("Steps timed", timed), ("Cells trained", trained))
    return [f"{what} on: {'; '.join(sorted(found))}." for what, found in kinds if found]


def _machine(machine: Mapping[str, Any]) -> str:
    return f"{machine['processor']}, {machine['threads']} threads, {machine['device']}"


def _interval(found: Interval) -> str:
    if not found.number:
        return "–"
    return f"{found.mean:+.4f} ± " + ("–" if math.isnan(found.half_width) else f"{found.half_width:.4f}")


def _single(cell: Mapping[str, Any] | None) -> str:
    if cell is None:
        return "–"
    change = cell["changes"][MATCHING]
    return f"{change['value']:+.4f} ± {change['standard_error']:.4f}"
