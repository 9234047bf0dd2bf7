"""From a budget and flags to the options of every arm's runs and of every evaluation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ebft.assemble.evaluation import MAP_OPTIONS
from ebft.assemble.grid import taken_options
from ebft.assemble.policy import policy_folder
from ebft.assemble.study_budget import Budget, Settings
from ebft.components import OPTION_NAMES, choose
from ebft.errors import UsageError
from ebft.loops.study.arms import ARMS


@dataclass(frozen=True)
class Task:
    """Data to train on, and whose prompts are answered, if not its own."""

    data: str
    prompts_from: str | None = None


TASKS = {
    "qa-code": Task("qa-code", "humaneval"),
    "code": Task("code", "humaneval"),
    "translation": Task("translation"),
}
VALIDATION, TEST = "validation", "test"

# Options of an evaluation that are those of the runs.
_SHARED = (
    *("data", "text_field", "prompt_field", "answer_field", "chat", "length", "stride", "first", "rollouts"),
    *("temperature", "top_p", "device", "dtype", "attention"),
)


def arm_options(
    budget: Budget, settings: Settings, *, task: Task, flags: Mapping[str, Any], defaults: Mapping[str, Any]
) -> dict[str, dict[str, Any]]:
    """The options of each arm's runs, without `lr` and `seed`, and without `policy` after another arm.

    An option that an arm's method and components do not take is left out for it.

    Args:
        flags: options of `run` that the user gave; defaults: of all options of `run`.

    Raises:
        UsageError: a flag that no arm takes, or numbers of steps that do not give every arm as many examples.
    """
    shared = {**defaults, "data": task.data, **budget.run, **flags}
    shared["split"] = VALIDATION
    if "steps" in flags and "epochs" in flags:
        raise UsageError(f"--epochs {flags['epochs']} and --steps {flags['steps']}: give one of the two")
    for one, other in (("steps", "epochs"), ("epochs", "steps")):
        if one in flags:
            shared[other] = None
    found, used = {}, set()
    for name in settings.arms:
        arm = ARMS[name]
        if arm.method is None:
            continue
        of_method = budget.methods.get(arm.method, {})
        options = {**shared, **of_method, **flags, "method": arm.method}
        options, kept = _taken_alone(options, strict=of_method)
        used |= kept
        options |= _amount(name, options, shared)
        if arm.after is not None and options["backbone"] is None and "backbone" in _of_features(options):
            options["backbone"] = policy_folder(options["policy"])  # every arm is measured with the base's features
        for late in ("lr", "seed", *(["policy"] if arm.after is not None else [])):
            options.pop(late)
        found[name] = options
    for name in flags:
        if name in OPTION_NAMES and name not in used:
            raise UsageError(f"--{name.replace('_', '-')} {flags[name]} applies to no arm of this study: leave it out")
    return found


def evaluation_options(
    settings: Settings, run: Mapping[str, Any], *, task: Task, answers: bool, defaults: Mapping[str, Any],
    bootstrap: int, level: float,
) -> dict[str, Any]:  # fmt: skip
    """The options of every evaluation, without `policy`: the test half, the same random numbers for all.

    Args:
        run: the options of all runs; answers: whether the data has prompts and answers.
        defaults: of the options of `evaluate`.
    """
    maps = [choose("features", name.strip()) for name in settings.eval_features.split(",") if name.strip()]
    taken = {option for entry in maps for option in entry.options}
    options = {
        **defaults,
        **{name: run[name] for name in _SHARED},
        **{name: run[name] for name in MAP_OPTIONS if name in taken},
        "split": TEST,
        "features": settings.eval_features,
        "held_out": settings.eval_rows,
        "batch": settings.eval_batch,
        "horizons": settings.eval_horizons,
        "seed": 0,
        "bootstrap": bootstrap,
        "level": level,
    }
    if "backbone" in taken:
        options["backbone"] = run["backbone"] or policy_folder(run["policy"])
        if options["backbone"] == "start":
            options["backbone"] = policy_folder(run["policy"])
    if answers or task.prompts_from is not None:
        options |= {
            "prompts_from": task.prompts_from,
            "prompts": settings.prompts,
            "prompt_length": settings.prompt_length,
            "answers": settings.answers,
            "max_new_tokens": settings.answer_tokens,
            "answer_temperature": settings.answer_temperature,
            "greedy": True,
        }
    return options


def _taken_alone(options: Mapping[str, Any], *, strict: Mapping[str, Any]) -> tuple[dict[str, Any], set[str]]:
    """The options with None for those that method and components do not take, and which of them they take.

    Args:
        strict: options that stay, to be refused by name when the run is checked.
    """
    kept = dict(options)
    while True:  # a component that is left out leaves out its options
        taken = taken_options(kept)
        left_out = [n for n in OPTION_NAMES if kept.get(n) is not None and n not in taken and n not in strict]
        if not left_out:
            return kept, {name for name in OPTION_NAMES if kept.get(name) is not None}
        kept |= dict.fromkeys(left_out)


def _amount(name: str, options: Mapping[str, Any], shared: Mapping[str, Any]) -> dict[str, Any]:
    """Steps, or epochs, by which an arm sees its share of the examples."""
    share = ARMS[name].share
    if shared["epochs"] is not None:
        return {"epochs": shared["epochs"] * share, "steps": None}
    if shared["steps"] is None:
        raise UsageError("a study needs its --steps, or its --epochs: neither the budget nor a flag says how many")
    rows = shared["steps"] * shared["batch"] * share
    steps, rest = divmod(rows, options["batch"])
    if rest or not steps:
        raise UsageError(
            f"--steps {shared['steps']} of --batch {shared['batch']}: the arm {name} is to see {rows:g} examples, which"
            f" its batches of {options['batch']} do not give; choose numbers that divide"
        )
    return {"steps": int(steps), "epochs": None}


def _of_features(options: Mapping[str, Any]) -> Mapping[str, Any]:
    return choose("features", options["features"]).options
