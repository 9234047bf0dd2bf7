"""From a task and a budget to the paper's comparison of methods."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from ebft.assemble.ablate import check_cell
from ebft.assemble.config import machine, version_changes, versions
from ebft.assemble.evaluation import load_data, parse_numbers, settle_options
from ebft.assemble.policy import policy_folder
from ebft.assemble.protections import say_protections
from ebft.assemble.rows import Data, read_data
from ebft.assemble.study_arms import (
    OF_ANSWERS,
    TASKS,
    Task,
    answers_prompts,
    arm_options,
    evaluation_options,
    examples_in_a_row,
    find_verifier,
    in_words_of_a_study,
    shared_options,
)
from ebft.assemble.study_budget import read_budget, settle_settings, unverified
from ebft.assemble.study_cells import Plan, begin_cell, cell_state, collect, tidy
from ebft.assemble.study_report import write_found, write_whole
from ebft.components.methods import METHODS
from ebft.data.examples import Example
from ebft.data.named import HALVES
from ebft.errors import UsageError
from ebft.files import exclusive, write_json
from ebft.loading import choose_device, load_tokenizer
from ebft.loops.ablation.study import DONE, run_study
from ebft.loops.interrupt import stop_after
from ebft.loops.run import open_folder
from ebft.loops.study.arms import ARMS
from ebft.loops.study.choice import CRITERIA
from ebft.loops.study.measured import Found


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
    plan, config, shown, tested, left_out = _prepare(
        name, options, explicit=explicit, settings=settings, budget=budget, seeds=seeds, out=out, bootstrap=bootstrap,
        level=level,
    )  # fmt: skip
    _open(plan, config, console)
    if left_out:
        console.print(f"{', '.join(left_out)}: left out, as there is nothing to verify answers with")
    if tested:
        say_protections(console)

    def found(failures: Mapping[str, str]) -> Found:
        config["choices"] = plan.choices
        write_json(out / "study.json", config)
        return collect(plan, failures)

    def finished() -> None:
        for arm in plan.grids:  # a choice is made, and written down, as soon as the candidates are there
            if all(cell_state(run) == DONE for run in plan.candidates(arm)):
                plan.rate(arm)
        tidy(plan, drop_policies=drop_policies)
        write_found(found({}), config, out, horizon=shown)

    with exclusive(out), stop_after(minutes):
        failures = run_study(
            plan.cells(), partial(begin_cell, plan), out=out, console=console, finished=finished, find_state=cell_state
        )
        tidy(plan, drop_policies=drop_policies)
        results = found(failures)
        write_whole(results, config, out, horizon=shown, console=console)
    return results


def _prepare(
    name: str, options: Mapping[str, Any], *, explicit: Collection[str], settings: Mapping[str, Any], budget: str,
    seeds: Sequence[int], out: Path, bootstrap: int, level: float,
) -> tuple[Plan, dict[str, Any], int, bool, list[str]]:  # fmt: skip
    """Check everything that needs no model; arguments as in `study_from_options`.

    Returns:
        The plan; what study.json holds; the tokens of a rollout at which Table 1 compares features; whether generated
        programs will be run; and the arms that there is no verifier for.
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
    answers, tests = data.answers or task.prompts_from is not None, _has_tests(data, task)
    judging = {"answers": answers, "tests": tests}
    resolve = partial(arm_options, chosen, decided, shared, flags=flags, verifier=verifier, **judging)
    arms = resolve(per_row=1.0)
    if not arms:
        raise UsageError("--arms base: there is nothing to compare; name an arm that is trained")
    base = shared["policy"]
    for arm, trained in arms.items():
        _check_arm(arm, trained, base, decided.lr_grid.get(ARMS[arm].rate_of or arm, (1.0,)))
    try:
        measuring = evaluation_options(
            decided, shared, task=task, answers=answers, defaults=evaluate_defaults(), bootstrap=bootstrap, level=level
        )
        settle_options({**measuring, "policy": base}, set(measuring), policy=base)
        load_data(measuring, [option for option, name in OF_ANSWERS.items() if settings.get(name) is not None])
    except UsageError as error:
        raise UsageError(in_words_of_a_study(str(error))) from error
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
    shown = max((g for g in horizons if g <= horizon), default=horizons[-1])
    config = {
        "task": name,
        "policy": base,
        "budget": budget,
        "settings": dataclasses.asdict(decided),
        "options": arms,
        "evaluation": measuring,
        "answers": data.answers,
        "texts": {"training": len(data.train), "held_out": len(data.held_out)},
        "examples_in_a_row": in_a_row,
        "seeds": list(seeds),
    }
    return plan, config, shown, tests, unverified(chosen, settings, decided)


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
