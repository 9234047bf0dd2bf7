"""Progress per hour: how far each recipe lowers the held-out feature-matching loss in the same time.

    python benchmarks/progress.py OUT [--cells plain:0,paper] [--minutes 30] [--seeds 0,1,2]

trains smollm2-135m on the standard library's source, for every recipe and seed as many steps as fit into --minutes.
Then the policy and its start are compared on the same held-out texts with the same random numbers, under the paper's
features. That is an hour of a core for every cell (recipe, seed) on two cores, so OUT is made for many sittings, and
these files in it for keeping:

    steps.json            how many steps fit, and where that was measured: the same ever after, on any machine
    base.json             what every held-out sequence adds to the totals of the start
    cells/RECIPE-SEED.json  the same of a trained policy, and the change; a cell that is there is not trained again
    progress.json, .md    the report of the cells that are there

OUT/runs holds what is under way, and can go when its cells are there. The text is that of the Python that runs this:
one that differs is refused.
"""

from __future__ import annotations

import csv
import json
import statistics
import subprocess
import sys
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import progress_report
from benchmarks.progress_recipes import MEASURE, METRICS, POLICY, RECIPES, flags, options_of
from ebft.errors import UsageError
from ebft.files import write_json
from ebft.loops.evaluation.quantities import Quantity, Totals
from ebft.loops.evaluation.result import look_up, paired_differences, read_totals

ROOT = Path(__file__).parents[1]
PROBE = 4  # steps of the run that measures a step; the first of them pays for what is done once
Cell = tuple[str, int]


def command(*arguments: str) -> None:
    """Run one of the project's commands."""
    subprocess.run([sys.executable, str(ROOT / "cli.py"), *arguments], check=True)


def chosen_cells(text: str, seeds: Sequence[int]) -> list[Cell]:
    """`plain:0,paper` to cells, seed by seed: a recipe without a seed has all of them. "all" and "none" are words.

    Raises:
        UsageError: no such recipe, or no such seed.
    """
    found = []
    for part in RECIPES if text == "all" else [] if text == "none" else text.split(","):
        recipe, _, seed = part.strip().partition(":")
        if recipe not in RECIPES or (seed and seed not in map(str, seeds)):
            raise UsageError(
                f"--cells {part}: expected RECIPE or RECIPE:SEED, of the recipes {', '.join(RECIPES)} and the seeds"
                f" {', '.join(map(str, seeds))}"
            )
        found += [(recipe, int(seed))] if seed else [(recipe, s) for s in seeds]
    return sorted(dict.fromkeys(found), key=lambda cell: cell[1])


def train(folder: Path, recipe: str, *, steps: int, seed: int) -> dict[str, Any]:
    """A run in `folder`, or the rest of it; its machine, versions, times, and the tokens that it saw or drew."""
    if not (folder / "evaluation.json").exists():
        # what is measured before and after training is not this benchmark's: it is kept small
        given = {**options_of(recipe), "steps": str(steps), "seed": str(seed), "held_out": "8", "policy": POLICY}
        command("run", *flags(given), "--out", str(folder), *(["--resume"] if folder.exists() else []))
    config = json.loads((folder / "config.json").read_text())
    with open(folder / "metrics.csv", newline="") as file:
        rows = [(float(row["time_step"]), float(row["tokens_per_second"])) for row in csv.DictReader(file)]
    times, tokens = [time for time, _ in rows], sum(time * rate for time, rate in rows)
    found = {"step_s": statistics.median(times[1:] or times), "train_s": sum(times), "tokens": round(tokens)}
    return {**found, "machine": config["machine"], "versions": config["versions"]}


def fixed_steps(out: Path, minutes: float | None, recipes: Collection[str]) -> dict[str, Any]:
    """What steps.json holds, after a short run of each of `recipes` that is not in it.

    Raises:
        UsageError: it was made for other minutes, or for other options of a recipe.
    """
    path = out / "steps.json"
    found = json.loads(path.read_text()) if path.exists() else {"minutes": minutes or 30.0, "recipes": {}}
    if minutes not in (None, found["minutes"]):
        raise UsageError(f"--minutes {minutes:g}: {path} is for {found['minutes']:g}: give those, or another folder")
    for recipe in RECIPES:
        options = options_of(recipe)
        if recipe in recipes and recipe not in found["recipes"]:
            probe = train(out / "runs" / f"{recipe}-probe", recipe, steps=PROBE, seed=0)
            steps = max(1, int(found["minutes"] * 60 / probe["step_s"]))
            known = {name: probe[name] for name in ("step_s", "machine")}
            found["recipes"][recipe] = {"options": options, "steps": steps, **known}
            write_json(path, found)
        if recipe in found["recipes"]:
            _check_options(found["recipes"][recipe]["options"], options, path, recipe)
    return found


def held_out(policy: str, folder: Path) -> dict[str, Any]:
    """What every held-out sequence adds to the totals of a policy, and the Python whose library it is."""
    if not (folder / "evaluation.json").exists():
        command("evaluate", *flags(MEASURE), "--policy", policy, "--out", str(folder))
    totals = read_totals(folder / "sequences.csv")
    sums = {name: [x.tolist() for x in totals[quantity]] for name, quantity in METRICS.items()}
    evaluation = json.loads((folder / "evaluation.json").read_text())
    return {"python": evaluation["machine"]["python"], "measure": dict(MEASURE), "sums": sums}


def base(out: Path) -> dict[str, Any]:
    """What base.json holds, measured where it is not there."""
    path = out / "base.json"
    if not path.exists():
        write_json(path, held_out(POLICY, out / "runs" / "base-evaluation"))
    return json.loads(path.read_text())


def changes(before: dict[str, Any], after: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Metric -> value, low, high and standard_error of the paired change.

    Raises:
        UsageError: the two are not of the same sequences.
    """
    differing = [key for key in ("python", "measure") if before[key] != after[key]]
    counts = [[pair[1] for pair in part["sums"].values()] for part in (before, after)]
    if differing or counts[0] != counts[1]:
        raise UsageError(
            f"base.json is of other held-out sequences ({', '.join(differing) or 'their tokens'}; Python"
            f" {before['python']}, here {after['python']}): expected those, or a folder of its own"
        )
    entries = paired_differences(_totals(before), _totals(after))
    found = {}
    for name, quantity in METRICS.items():
        entry = look_up(entries, *quantity)
        assert entry is not None
        found[name] = {key: entry[key] for key in ("value", "low", "high", "standard_error")}
    return found


def measure(out: Path, cell: Cell, steps: dict[str, Any]) -> None:
    """Train and measure a cell, and keep it, unless it is there.

    Raises:
        UsageError: it is there with other options or steps, or of other sequences than the base.
    """
    recipe, seed = cell
    path, known = progress_report.path_of(out, cell), steps["recipes"][recipe]
    if path.exists():
        kept = json.loads(path.read_text())
        _check_options(kept["options"], known["options"], path, recipe)
        _check_options({"steps": kept["steps"]}, {"steps": known["steps"]}, path, recipe)
        return
    folder = out / "runs" / f"{recipe}-{seed}"
    start = base(out)
    run = train(folder, recipe, steps=known["steps"], seed=seed)
    after = held_out(str(folder), out / "runs" / f"{recipe}-{seed}-evaluation")
    found = {"recipe": recipe, "seed": seed, "options": known["options"], "steps": known["steps"], **run}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {**found, "changes": changes(start, after), **after})


def _totals(measured: dict[str, Any]) -> Totals:
    sums = measured["sums"]
    tensors = {name: [torch.tensor(column, dtype=torch.float64) for column in sums[name]] for name in METRICS}
    return {Quantity(*quantity): (tensors[name][0], tensors[name][1]) for name, quantity in METRICS.items()}


def _check_options(kept: dict[str, Any], now: dict[str, Any], path: Path, recipe: str) -> None:
    differing = sorted(key for key in {*kept, *now} if kept.get(key) != now.get(key))
    if differing:
        raise UsageError(
            f"{path} has {recipe} with other {', '.join(differing)}: remove what it was measured with, or give the"
            " changed recipe a name of its own"
        )


def main(
    out: Annotated[Path, typer.Argument(help="Folder of the parts and the report.")],
    cells: Annotated[str, typer.Option(help="RECIPE or RECIPE:SEED, with commas between; all; or none.")] = "all",
    minutes: Annotated[float | None, typer.Option(help="Training time of a cell (default 30).")] = None,
    seeds: Annotated[str, typer.Option(help="With commas between.")] = "0,1,2",
) -> None:
    """Train and measure the cells that are not there yet, and report on those that are."""
    numbers = [int(seed) for seed in seeds.split(",")]
    chosen = chosen_cells(cells, numbers)
    out.mkdir(parents=True, exist_ok=True)
    steps = fixed_steps(out, minutes, {recipe for recipe, _ in chosen})
    for cell in chosen:
        measure(out, cell, steps)
        progress_report.write(out, steps, numbers)
    print(progress_report.write(out, steps, numbers))


if __name__ == "__main__":
    try:
        typer.run(main)
    except UsageError as error:
        raise SystemExit(f"error: {error}") from error
