"""Progress: how far each recipe lowers held-out feature-matching losses and cross-entropy.

    python benchmarks/progress.py OUT [half-hour|levers] [--cells paper:0,defaults] [--minutes 30] [--seeds 0,1,2]
        [--against RECIPE]

trains smollm2-135m on the standard library's source, for every recipe and seed. `half-hour` gives the paper's recipe
and the defaults of `run` as many steps as fit into --minutes; `levers` starts from the first run that a user makes and
changes one thing at a time, with as many sequences for each. Then the policy and its start are compared on the same
held-out texts with the same random numbers. A cell (recipe, seed) is half an hour, or six minutes, of two cores, so
OUT is made for many sittings, and these files in it for keeping:

    steps.json            steps of a recipe, how many fit where the time is given: the same ever after, on any machine
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
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import progress_report
from benchmarks.commands import command
from benchmarks.progress_recipes import PLANS, POLICY, Plan, flags
from ebft.errors import UsageError
from ebft.files import write_json
from ebft.loops.evaluation.quantities import Quantity
from ebft.loops.evaluation.result import read_totals

PROBE = 4  # steps of the run that measures a step; the first of them pays for what is done once
Cell = tuple[str, int]


def chosen_cells(text: str, recipes: Collection[str], seeds: Sequence[int]) -> list[Cell]:
    """`plain:0,paper` to cells, seed by seed: a recipe without a seed has all of them. "all" and "none" are words.

    Raises:
        UsageError: no such recipe, or no such seed.
    """
    found = []
    for part in recipes if text == "all" else [] if text == "none" else text.split(","):
        recipe, _, seed = part.strip().partition(":")
        if recipe not in recipes or (seed and seed not in map(str, seeds)):
            raise UsageError(
                f"--cells {part}: expected RECIPE or RECIPE:SEED, of the recipes {', '.join(recipes)} and the seeds"
                f" {', '.join(map(str, seeds))}"
            )
        found += [(recipe, int(seed))] if seed else [(recipe, s) for s in seeds]
    return sorted(dict.fromkeys(found), key=lambda cell: cell[1])


def train(folder: Path, options: Mapping[str, str], *, steps: int, seed: int) -> dict[str, Any]:
    """A run in `folder`, or the rest of it; its machine, versions, times, and the tokens that it saw or drew."""
    if not (folder / "evaluation.json").exists():
        # what is measured before and after training is not this benchmark's: it is kept small
        given = {**options, "steps": str(steps), "seed": str(seed), "held_out": "8", "policy": POLICY}
        command("run", *flags(given), "--out", str(folder), *(["--resume"] if folder.exists() else []))
    config = json.loads((folder / "config.json").read_text())
    with open(folder / "metrics.csv", newline="") as file:
        rows = [(float(row["time_step"]), float(row["tokens_per_second"])) for row in csv.DictReader(file)]
    times, tokens = [time for time, _ in rows], sum(time * rate for time, rate in rows)
    found = {"step_s": statistics.median(times[1:] or times), "train_s": sum(times), "tokens": round(tokens)}
    return {**found, "machine": config["machine"], "versions": config["versions"]}


def fixed_steps(out: Path, plan: Plan, minutes: float | None, recipes: Collection[str]) -> dict[str, Any]:
    """What steps.json holds, after a short run of each of `recipes` that is not in it and does not say its steps.

    Raises:
        UsageError: it was made for other minutes, or other options of a recipe; minutes where no recipe needs them.
    """
    path = out / "steps.json"
    timed = any("steps" not in plan.options_of(recipe) for recipe in plan.recipes)
    if minutes is not None and not timed:
        raise UsageError(f"--minutes {minutes:g}: every recipe of this plan has its steps: leave it out")
    fresh = {"minutes": (minutes or 30.0) if timed else None, "recipes": {}}
    found = json.loads(path.read_text()) if path.exists() else fresh
    if minutes not in (None, found["minutes"]):
        raise UsageError(f"--minutes {minutes:g}: {path} is for {found['minutes']:g}: give those, or another folder")
    for recipe in plan.recipes:
        options = plan.options_of(recipe)
        if recipe in recipes and recipe not in found["recipes"]:
            if "steps" in options:
                known: dict[str, Any] = {"steps": int(options["steps"])}
            else:
                probe = train(out / "runs" / f"{recipe}-probe", options, steps=PROBE, seed=0)
                steps = max(1, int(found["minutes"] * 60 / probe["step_s"]))
                known = {"steps": steps, "step_s": probe["step_s"], "machine": probe["machine"]}
            found["recipes"][recipe] = {"options": options, **known}
            write_json(path, found)
        if recipe in found["recipes"]:
            _check_options(found["recipes"][recipe]["options"], options, path, recipe)
    return found


def held_out(policy: str, folder: Path, plan: Plan) -> dict[str, Any]:
    """What every held-out sequence adds to the totals of a policy, and the Python whose library it is."""
    if not (folder / "evaluation.json").exists():
        command("evaluate", *flags(plan.measure), "--policy", policy, "--out", str(folder))
    totals = read_totals(folder / "sequences.csv")
    sums = {name: [x.tolist() for x in totals[quantity]] for name, quantity in plan.metrics.items()}
    evaluation = json.loads((folder / "evaluation.json").read_text())
    return {"python": evaluation["machine"]["python"], "measure": dict(plan.measure), "sums": sums}


def base(out: Path, plan: Plan) -> dict[str, Any]:
    """What base.json holds, measured where it is not there."""
    path = out / "base.json"
    if not path.exists():
        write_json(path, held_out(POLICY, out / "runs" / "base-evaluation", plan))
    return json.loads(path.read_text())


def changes(
    before: dict[str, Any], after: dict[str, Any], metrics: Mapping[str, Quantity]
) -> dict[str, dict[str, float]]:
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
    return progress_report.differences([(before, after)], metrics)


def measure(out: Path, cell: Cell, plan: Plan, steps: dict[str, Any]) -> None:
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
    start = base(out, plan)
    run = train(folder, known["options"], steps=known["steps"], seed=seed)
    after = held_out(str(folder), out / "runs" / f"{recipe}-{seed}-evaluation", plan)
    found = {"recipe": recipe, "seed": seed, "options": known["options"], "steps": known["steps"], **run}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {**found, "changes": changes(start, after, plan.metrics), **after})


def _check_options(kept: dict[str, Any], now: dict[str, Any], path: Path, recipe: str) -> None:
    differing = sorted(key for key in {*kept, *now} if kept.get(key) != now.get(key))
    if differing:
        raise UsageError(
            f"{path} has {recipe} with other {', '.join(differing)}: remove what it was measured with, or give the"
            " changed recipe a name of its own"
        )


def main(
    out: Annotated[Path, typer.Argument(help="Folder of the parts and the report.")],
    plan: Annotated[str, typer.Argument(help=f"What is compared: {' or '.join(PLANS)}.")] = "half-hour",
    cells: Annotated[str, typer.Option(help="RECIPE or RECIPE:SEED, with commas between; all; or none.")] = "all",
    minutes: Annotated[float | None, typer.Option(help="half-hour: training time of a cell (default 30).")] = None,
    seeds: Annotated[str, typer.Option(help="With commas between.")] = "0,1,2",
    against: Annotated[str | None, typer.Option(help="The recipe that others are compared with.")] = None,
) -> None:
    """Train and measure the cells that are not there yet, and report on those that are."""
    if plan not in PLANS:
        raise UsageError(f"{plan}: expected a plan, {' or '.join(PLANS)}")
    made, numbers = PLANS[plan], [int(seed) for seed in seeds.split(",")]
    if against is not None and against not in made.recipes:
        raise UsageError(f"--against {against}: expected a recipe, {', '.join(made.recipes)}")
    made = replace(made, against=against or made.against)
    chosen = chosen_cells(cells, made.recipes, numbers)
    out.mkdir(parents=True, exist_ok=True)
    steps = fixed_steps(out, made, minutes, {recipe for recipe, _ in chosen})
    for cell in chosen:
        measure(out, cell, made, steps)
        progress_report.write(out, made, steps, numbers)
    print(progress_report.write(out, made, steps, numbers))


if __name__ == "__main__":
    try:
        typer.run(main)
    except UsageError as error:
        raise SystemExit(f"error: {error}") from error
