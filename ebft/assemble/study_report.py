"""What a study has found, as files in its folder and on the screen."""

from __future__ import annotations

import csv
import dataclasses
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from ebft.assemble.evaluation import bootstrap_options
from ebft.files import write_atomically
from ebft.loops.ablation.results import write_rows
from ebft.loops.ablation.study import say_failures
from ebft.loops.evaluation.show import print_grids
from ebft.loops.study.arms import ARMS, BASE
from ebft.loops.study.differences import Difference, all_differences
from ebft.loops.study.measured import Column, Found, columns_of
from ebft.loops.study.plots import horizon_png, training_png
from ebft.loops.study.tables import document, on_the_screen

PICTURES = {
    "training.png": "Losses on the validation half over the examples seen",
    "horizon.png": "Feature-matching loss on the test half over the tokens of a rollout",
}
FILES = {
    "table.md": "all tables: the paper's Table 1, differences, costs, learning rates",
    "results.csv": "a row for every arm, seed and quantity",
    "differences.csv": "a row for every pair of arms and column",
    "study.json": "configuration, choices, versions, machine",
    **PICTURES,
}


def write_found(found: Found, config: Mapping[str, Any], out: Path, *, horizon: int) -> None:
    """Tables of what there is so far, without what takes long: differences and plots.

    Args:
        config: what study.json holds; horizon: tokens of a rollout at which features are compared.
    """
    write_rows(_rows(found), out / "results.csv")
    text = document(found, _columns(found, horizon), [], pictures={}, **_heading(config, horizon))
    write_atomically(out / "table.md", text.encode())


def write_whole(found: Found, config: Mapping[str, Any], out: Path, *, horizon: int, console: Console) -> None:
    """Everything, with Table 1 on the screen; arguments as in `write_found`."""
    heading, columns = _heading(config, horizon), _columns(found, horizon)
    differences = all_differences(found, columns, **bootstrap_options(config["evaluation"]))
    write_rows(_rows(found), out / "results.csv")
    write_atomically(out / "differences.csv", _difference_csv(differences))
    for file, draw in (("training.png", training_png), ("horizon.png", horizon_png)):
        write_atomically(out / file, draw(found, level=heading["level"], title=heading["title"]))
    text = document(found, columns, differences, pictures=PICTURES, **heading)
    write_atomically(out / "table.md", text.encode())
    print_grids(console, on_the_screen(found, columns, level=heading["level"]))
    for file, meaning in FILES.items():
        console.print(f"{out / file}  {meaning}", soft_wrap=True, highlight=False)
    say_failures(found.failures, of="cells", out=out, console=console)


def _columns(found: Found, horizon: int) -> list[Column]:
    tested = [one for by_seed in found.tested.values() for one in by_seed.values()]
    return columns_of(tested, horizon=horizon) if tested else []


def _heading(config: Mapping[str, Any], horizon: int) -> dict[str, Any]:
    return {
        "title": f"{config['task']}: {config['policy']}",
        "about": _about(config, horizon=horizon),
        "level": config["evaluation"]["level"],
    }


def _about(config: Mapping[str, Any], *, horizon: int) -> list[str]:
    """What was compared, in sentences."""
    settings = config["settings"]
    arm, run = next(iter(config["options"].items()))
    if run["epochs"] is not None:
        amount = f"{run['epochs'] / ARMS[arm].share:g} passes over the examples"
    else:
        rows = run["steps"] * run["batch"] / ARMS[arm].share
        amount = f"{rows:,.0f} rows of {run['length']} tokens"
        if config["answers"]:
            amount += f", {rows * config['examples_in_a_row'][arm]:,.0f} examples,"
    prompts = f" and {settings['prompts']} prompts" if config["evaluation"]["greedy"] else ""
    return [
        f"Budget `{config['budget']}`, seeds {', '.join(map(str, config['seeds']))}. Every method sees {amount} in all,"
        f" but for rounding. Table 1 is measured on {settings['eval_rows']} rows{prompts} of data that no choice was"
        " made on; learning rates are chosen on the validation half of the held-out data, with the first seed. CE:"
        " cross-entropy in nats"
        f" per token. FM: unbiased feature-matching loss of rollouts of {horizon} tokens, under each feature map.",
    ]


def _rows(found: Found) -> list[dict[str, Any]]:
    """Tidy: one value a row."""
    rows = []
    for arm, by_seed in found.tested.items():
        choice = found.choices.get(ARMS[arm].rate_of or arm)
        for seed, tested in list(by_seed.items())[: 1 if arm == BASE else None]:
            own = {"arm": arm, "seed": "" if arm == BASE else seed, "lr": "" if choice is None else choice["lr"]}
            rows += [{**own, "unit": kind, **entry} for kind, entries in tested.values.items() for entry in entries]
    for arm, costs in found.costs.items():
        for seed, cost in costs.items():
            own = {"arm": arm, "seed": seed, "lr": found.choices[ARMS[arm].rate_of or arm]["lr"], "unit": "training"}
            rows += [{**own, "metric": key, "value": value} for key, value in dataclasses.asdict(cost).items()]
    return rows


def _difference_csv(differences: Sequence[Difference]) -> bytes:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    header = ("arm", "other", "column", "difference", "half_width", "seeds", "p", "low", "high", "decided", "better")
    writer.writerow(header)
    for d in differences:
        numbers = (d.seeds.mean, d.seeds.half_width, d.seeds.number, d.p, d.low, d.high)
        writer.writerow([d.arm, d.other, d.column.title, *numbers, int(d.decided), int(d.better)])
    return text.getvalue().encode()
