"""Progress per hour: how far each recipe lowers the held-out feature-matching loss in the same time.

    python benchmarks/progress.py OUT [MINUTES [SEEDS]]      (default 30 minutes, seeds 0,1,2)

trains smollm2-135m on the standard library's source with the policy gradient alone (no cross-entropy, no KL), for every
recipe and seed as many steps as fit into MINUTES on this machine (a short run of each recipe measures its step). Then
the policies and their start are measured on the same held-out texts with the same random numbers, under the paper's
features. OUT/runs goes on where it was stopped; the results are OUT/progress.json and OUT/progress.md.
"""

from __future__ import annotations

import csv
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from ebft.files import write_atomically, write_json
from ebft.loops.ablation.intervals import t_interval

ROOT = Path(__file__).parents[1]
POLICY = "smollm2-135m"
COMMON = "data=stdlib length=128 stride=16 first=16 horizon=8 rollouts=4 batch=8 lora=16 lr=0.001 ce=0 kl=0"
RECIPES = {
    "paper": "features=hidden whitening=group alignment=cosine estimator=rloo",
    "plain": "features=hidden estimator=rloo_tuned",
    "mean of the rollout": "features=hidden pooling=mean whitening=group estimator=rloo_tuned",
    "all horizons": "features=hidden pooling=none credit=reward_to_go token_baseline=ridge estimator=rloo",
}
MEASURE = "features=hidden held-out=64 horizons=8 prompts=1 answers=1 k=1 max-new-tokens=1 stride=16 first=16"
PROBE = 4  # steps of the run that measures a step; the first of them pays for what is done once


def flags(text: str) -> list[str]:
    """`a=1 b=2` -> --a 1 --b 2."""
    pairs = (part.split("=") for part in text.split())
    return [word for name, value in pairs for word in (f"--{name.replace('_', '-')}", value)]


def command(*arguments: str) -> None:
    """Run one of the project's commands."""
    subprocess.run([sys.executable, str(ROOT / "cli.py"), *arguments], check=True)


def train(folder: Path, recipe: str, *, steps: int, seed: int) -> None:
    """A run in `folder`, or the rest of it."""
    if (folder / "evaluation.json").exists():
        return
    # what is measured before and after training is not this benchmark's: it is kept small
    options = [*flags(COMMON), *flags(recipe), *flags(f"steps={steps} seed={seed} held-out=8"), "--policy", POLICY]
    command("run", *options, "--out", str(folder), *(["--resume"] if folder.exists() else []))


def step_seconds(folder: Path) -> float:
    """Median time of a step of a run, without the first."""
    with open(folder / "metrics.csv", newline="") as file:
        return statistics.median([float(row["time_step"]) for row in csv.DictReader(file)][1:])


def differences(table: Path) -> dict[str, dict[str, float]]:
    """Policy -> value, low, high, standard_error of its paired difference from the start."""
    with open(table, newline="") as file:
        return {
            row["policy"]: {key: float(row[key]) for key in ("value", "low", "high", "standard_error")}
            for row in csv.DictReader(file)
            if (row["table"], row["metric"], row["of"]) == ("difference", "feature_matching_loss", "hidden")
        }


def markdown(results: dict[str, Any]) -> str:
    """A row for every recipe."""
    lines = [
        f"{results['minutes']:g} minutes for each run, {len(results['seeds'])} seeds. Change of the held-out"
        " feature-matching loss from the start, ± half of the 95 % interval over seeds; below 0 is better.",
        "",
        "| recipe | steps | change | over the paper's | " + " | ".join(f"seed {s}" for s in results["seeds"]) + " |",
        "|---|---:|---:|---:|" + "---:|" * len(results["seeds"]),
    ]
    paper = statistics.mean(row["value"] for row in results["recipes"]["paper"]["changes"])
    for name, row in results["recipes"].items():
        values = [change["value"] for change in row["changes"]]
        seeds = " | ".join(f"{c['value']:+.4f} ± {c['standard_error']:.4f}" for c in row["changes"])
        mean, half, _ = t_interval(values)
        lines.append(f"| {name} | {row['steps']} | {mean:+.4f} ± {half:.4f} | {mean / paper:.2f} | {seeds} |")
    return "\n".join(lines) + "\n"


def main(out: Path, minutes: float, seeds: list[int]) -> None:
    rows: dict[str, Any] = {}
    for name, recipe in RECIPES.items():
        place = name.replace(" ", "-")
        probe = out / "runs" / f"{place}-probe"
        train(probe, recipe, steps=PROBE, seed=0)
        rows[name] = {"recipe": recipe, "step_s": step_seconds(probe), "folders": []}
        rows[name]["steps"] = max(1, int(minutes * 60 / rows[name]["step_s"]))
        for seed in seeds:
            folder = out / "runs" / f"{place}-{seed}"
            train(folder, recipe, steps=rows[name]["steps"], seed=seed)
            rows[name]["folders"].append(str(folder))
    table = out / "compare" / "compare.csv"
    folders = [folder for row in rows.values() for folder in row["folders"]]
    if not table.exists():
        options = ["--evaluate", *flags(MEASURE), "--data", "stdlib", "--out", str(table.parent)]
        command("compare", POLICY, *folders, *options)
    changes = differences(table)
    config = json.loads((Path(folders[0]) / "config.json").read_text())
    for row in rows.values():
        row["changes"] = [changes[folder] for folder in row.pop("folders")]
    results = {"machine": config["machine"], "minutes": minutes, "seeds": seeds, "common": COMMON, "recipes": rows}
    write_json(out / "progress.json", results)
    write_atomically(out / "progress.md", markdown(results).encode())
    print(markdown(results))


if __name__ == "__main__":
    if not 2 <= len(sys.argv) <= 4:
        raise SystemExit(__doc__)
    given = sys.argv[2:]
    minutes = float(given[0]) if given else 30.0
    main(Path(sys.argv[1]), minutes, [int(seed) for seed in (given[1] if len(given) > 1 else "0,1,2").split(",")])
