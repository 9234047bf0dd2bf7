"""From a task and a budget to the paper's comparison of methods."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from ebft.assemble.ablate import check_cell
from ebft.assemble.config import machine, version_changes, versions
from ebft.assemble.evaluation import bootstrap_options, load_data, parse_numbers, settle_options
from ebft.assemble.policy import policy_folder
from ebft.assemble.protections import say_protections
from ebft.assemble.rows import Data, read_data
from ebft.assemble.study_arms import (
    TASKS,
    Task,
    answers_prompts,
    arm_options,
    evaluation_options,
    examples_in_a_row,
    find_verifier,
    shared_options,
)
from ebft.assemble.study_budget import read_budget, settle_settings
from ebft.assemble.study_cells import Plan, begin_cell, cell_state, collect, tidy
from ebft.components.methods import METHODS
from ebft.data.examples import Example
from ebft.data.named import HALVES
from ebft.errors import UsageError
from ebft.files import exclusive, write_atomically, write_json
from ebft.loading import choose_device, load_tokenizer
from ebft.loops.ablation.results import write_rows
from ebft.loops.ablation.study import run_study
from ebft.loops.evaluation.show import print_grids
from ebft.loops.interrupt import stop_after
from ebft.loops.run import open_folder
from ebft.loops.study.arms import ARMS, BASE
from ebft.loops.study.choice import CRITERIA
from ebft.loops.study.differences import Difference, all_differences
from ebft.loops.study.measured import Found, columns_of
from ebft.loops.study.plots import horizon_png, training_png
from ebft.loops.study.tables import document, on_the_screen

PICTURES = {
    "training.png": "Losses on the validation half over the examples seen",
    "horizon.png": "Feature-matching loss on the test half over the tokens of a rollout",
}


def study_from_options(
    name: str,
    options: Mapping[str, Any],
    *,
    explicit: Collection[str],
    settings: Mapping[str, Any],
    budget: str,
    seeds: Sequence[int],
    out: Path,
    bootstrap: int,
    level: float,
    minutes: float | None,
    drop_policies: bool,
    console: Console,
) -> Found:
    """Check everything, run what is not done yet, write tables and plots.

    Args:
        name: a task by name, or a file of data.
        options: all options of `run`, by name; explicit: which of them the user gave.
        settings: those of `Settings` that the user gave, None for the others.

    Raises:
        UsageError: bad input, before anything is written; an `out` with another study.
        Interrupted: Ctrl-C, or `minutes` are over; the same command goes on.
    """
    from ebft.commands.derived import evaluate_defaults

    if len(set(seeds)) != len(seeds) or not seeds:
        raise UsageError(f"--seeds {','.join(map(str, seeds))}: expected different seeds, such as 0,1,2")
    task, chosen = TASKS.get(name, Task(name)), read_budget(budget, name)
    flags = {option: options[option] for option in explicit}
    shared = shared_options(chosen, task=task, flags=flags, defaults=options)
    data = read_data({**shared, "split": None})
    verifier = find_verifier(chosen, data, task=task, flags=flags)
    decided = settle_settings(chosen, settings, where=f"--budget {budget}", verifier=verifier)
    if decided.criterion not in CRITERIA:
        raise UsageError(f"--criterion {decided.criterion!r}: expected one of {', '.join(CRITERIA)}")
    resolve = partial(arm_options, chosen, decided, shared, flags=flags, verifier=verifier)
    arms = resolve(per_row=1.0)
    if not arms:
        raise UsageError("--arms base: there is nothing to compare; name an arm that is trained")
    base = shared["policy"]
    for arm, trained in arms.items():
        _check_arm(arm, trained, base, decided.lr_grid.get(ARMS[arm].rate_of or arm, (1.0,)))
    measuring = evaluation_options(
        decided, shared, task=task, answers=data.answers, defaults=evaluate_defaults(), bootstrap=bootstrap, level=level
    )
    settle_options({**measuring, "policy": base}, set(measuring), policy=base)
    load_data(measuring, ())
    for split in HALVES:
        read_data({**shared, "split": split})  # refuses data that cannot be split
    packed = next((own for arm, own in arms.items() if not answers_prompts(arm)), None)
    per_row = 1.0
    if packed is not None:
        whole = {"policy": base, **packed, "lr": 1.0, "seed": 0}
        per_row = examples_in_a_row(data, load_tokenizer(policy_folder(base)), whole)
    arms = resolve(per_row=per_row)
    in_a_row = {arm: 1.0 if answers_prompts(arm) else per_row for arm in arms}
    plan = Plan(out, decided.arms, list(seeds), arms, measuring, base, decided.lr_grid, decided.criterion, in_a_row)
    horizon = shared["horizon"] or METHODS["ebft"].options["horizon"]
    horizons = parse_numbers("eval-horizons", measuring["horizons"])
    columns_at = max((g for g in horizons if g <= horizon), default=horizons[-1])
    config = {
        "task": name,
        "policy": base,
        "budget": budget,
        "settings": dataclasses.asdict(decided),
        "options": arms,
        "evaluation": measuring,
        "examples_in_a_row": in_a_row,
        "seeds": list(seeds),
    }
    _open(plan, config, console)
    if _has_tests(data, task):
        say_protections(console)
    about = _about(config, data, horizon=columns_at)
    title = f"{name}: {base}"

    def write(failures: Mapping[str, str], *, differences: bool) -> tuple[Found, list[Difference]]:
        found = collect(plan, failures)
        config["choices"] = plan.choices
        write_json(out / "study.json", config)
        write_rows(_rows(found), out / "results.csv")
        tested = [one for by_seed in found.tested.values() for one in by_seed.values()]
        columns = columns_of(tested, horizon=columns_at) if tested else []
        of = all_differences(found, columns, **bootstrap_options(measuring)) if differences else []
        if differences:
            write_atomically(out / "differences.csv", _difference_csv(of))
            for file, draw in (("training.png", training_png), ("horizon.png", horizon_png)):
                write_atomically(out / file, draw(found, level=level, title=title))
        pictures = PICTURES if differences else {}
        text = document(found, columns, of, title=title, about=about, level=level, pictures=pictures)
        write_atomically(out / "table.md", text.encode())
        if differences:
            print_grids(console, on_the_screen(found, columns, level=level))
        return found, of

    def finished() -> None:
        for arm in plan.grids:  # a choice is made, and written down, as soon as the candidates are there
            if all(cell_state(run) == "done" for run in plan.candidates(arm)):
                plan.rate(arm)
        tidy(plan, drop_policies=drop_policies)
        write({}, differences=False)

    with exclusive(out), stop_after(minutes):
        failures = run_study(
            plan.cells(), partial(begin_cell, plan), out=out, console=console, finished=finished, find_state=cell_state
        )
        tidy(plan, drop_policies=drop_policies)
        found, _ = write(failures, differences=True)
    for file, meaning in _FILES.items():
        console.print(f"{out / file}  {meaning}", soft_wrap=True, highlight=False)
    if failures:
        console.print(
            f"[red]{len(failures)} cells failed[/red], see {out / 'failures.json'}; the same command tries them again",
            soft_wrap=True, highlight=False,
        )  # fmt: skip
    return found


_FILES = {
    "table.md": "all tables: the paper's Table 1, differences, costs, learning rates",
    "results.csv": "a row for every arm, seed and quantity",
    "differences.csv": "a row for every pair of arms and column",
    "study.json": "configuration, choices, versions, machine",
    **PICTURES,
}


def _check_arm(arm: str, own: Mapping[str, Any], base: str, rates: Sequence[float]) -> None:
    for rate in rates:
        try:
            check_cell({"policy": base, **own, "lr": rate, "seed": 0})
        except UsageError as error:
            raise UsageError(f"arm {arm}: {error}") from error


def _open(plan: Plan, config: dict[str, Any], console: Console) -> None:
    """Make the study's folder, or take up its choices.

    Raises:
        UsageError: it holds another study, or something else.
    """
    path = plan.out / "study.json"
    if path.is_file():
        stored = json.loads(path.read_text(encoding="utf-8"))
        now = json.loads(json.dumps({key: value for key, value in config.items() if key != "seeds"}))
        differing = _differing(now, stored)
        if stored["seeds"][:1] != config["seeds"][:1]:
            differing.append(f"the first of seeds {config['seeds']} (there {stored['seeds']})")
        if differing:
            raise UsageError(
                f"{plan.out} holds a study of another configuration: {'; '.join(differing)}. Give the same, or another"
                " --out; seeds may be added"
            )
        plan.choices.update(stored.get("choices", {}))
        if other := version_changes(stored["versions"]):
            console.print(f"other versions than at the start, so numbers may differ in their last digits: {other}")
        config |= {name: stored[name] for name in ("versions", "machine")}
    for run in plan.cells():
        cell_state(run)  # refuses another study's folder before anything is written
    if not path.is_file():
        config |= {"versions": versions(), "machine": machine(choose_device(plan.evaluation["device"]))}
        open_folder(plan.out, resume=False)
        write_json(path, config)


def _differing(now: Mapping[str, Any], stored: Mapping[str, Any], path: str = "") -> list[str]:
    """`steps 3 (there 2)` for every value that differs; keys that only one has are those of another version."""
    found = []
    for key, value in now.items():
        if key not in stored or stored[key] == value:
            continue
        if isinstance(value, dict) and isinstance(stored[key], dict):
            found += _differing(value, stored[key], f"{path}{key} ")
        else:
            found.append(f"{path}{key} {value} (there {stored[key]})")
    return found


def _has_tests(data: Data, task: Task) -> bool:
    return task.prompts_from is not None or any(isinstance(e, Example) and e.tests for e in data.held_out)


def _about(config: Mapping[str, Any], data: Data, *, horizon: int) -> list[str]:
    """What was compared, in sentences."""
    settings = config["settings"]
    arm, run = next(iter(config["options"].items()))
    if run["epochs"] is not None:
        amount = f"{run['epochs'] / ARMS[arm].share:g} passes over the examples"
    else:
        rows = run["steps"] * run["batch"] / ARMS[arm].share
        amount = f"{rows:,.0f} rows of {run['length']} tokens"
        if data.answers:
            amount += f", {rows * config['examples_in_a_row'][arm]:,.0f} examples,"
    prompts = f" and {settings['prompts']} prompts" if config["evaluation"]["greedy"] else ""
    return [
        f"Budget `{config['budget']}`, seeds {', '.join(map(str, config['seeds']))}. Every method sees {amount} in all."
        f" Table 1 is measured on {settings['eval_rows']} rows{prompts} of data that no choice was made on; learning"
        " rates are chosen on the validation half of the held-out data, with the first seed. CE: cross-entropy in nats"
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
