"""From a budget and flags to the options of every arm's runs and of every evaluation."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ebft import schema
from ebft.assemble.answers import objectives_of
from ebft.assemble.checks import resolve_run, settle
from ebft.assemble.evaluation import MAP_OPTIONS
from ebft.assemble.grid import taken_options
from ebft.assemble.overlap import overlaps
from ebft.assemble.policy import policy_folder
from ebft.assemble.rows import FIELDS, Data, pack_part, usable_rows
from ebft.assemble.study_budget import Budget, Settings
from ebft.components import OPTION_NAMES, choose
from ebft.components.methods import GIVEN, with_defaults
from ebft.data.examples import Example
from ebft.errors import UsageError, flag
from ebft.loops.study.arms import ARMS


@dataclass(frozen=True)
class Task:
    """Data to train on; whose prompts are answered, if not its own; and the verifier of data without tests."""

    data: str
    prompts_from: str | None = None
    verifier: str | None = None


TASKS = {
    "qa-code": Task("qa-code", "humaneval"),
    "code": Task("code", "humaneval"),
    "translation": Task("translation", verifier="bleu"),
}
VALIDATION, TEST = "validation", "test"

# How programs are judged, in training and in the evaluation.
JUDGING = ("test_timeout", "test_prompt")
# Options of an evaluation that are those of the runs.
_SHARED = (
    *("data", *FIELDS, "chat", "length", "stride", "first"),
    *("rollouts", "temperature", "top_p", "stop", "device", "dtype", "attention"),
    *JUDGING,
)
# Other options of an evaluation -> the study's settings that they are: of sequences, and of answers.
_OF_SEQUENCES = {
    "features": "eval_features",
    "held_out": "eval_rows",
    "batch": "eval_batch",
    "horizons": "eval_horizons",
}
OF_ANSWERS = {
    "prompts": "prompts",
    "prompt_length": "prompt_length",
    "answers": "answers",
    "max_new_tokens": "answer_tokens",
    "answer_temperature": "answer_temperature",
}


def shared_options(
    budget: Budget, *, task: Task, flags: Mapping[str, Any], defaults: Mapping[str, Any]
) -> dict[str, Any]:
    """The options that all runs share: defaults of `run`, the task's data, the budget's, and those the user gave.

    Raises:
        UsageError: both --steps and --epochs, or neither.
    """
    judging = {name: value for name, value in budget.methods.get("rlvr", {}).items() if name in JUDGING}
    shared = {**defaults, "data": task.data, **budget.run, **judging, **flags, "split": VALIDATION}
    if flags.get("chat") and "stop" not in flags:
        shared["stop"] = None  # a budget's are where the code goes on that a prompt begins; chat models begin anew
    if "steps" in flags and "epochs" in flags:
        raise UsageError(f"--epochs {flags['epochs']} and --steps {flags['steps']}: give one of the two")
    for one, other in (("steps", "epochs"), ("epochs", "steps")):
        if one in flags:
            shared[other] = None
    if shared["steps"] is None and shared["epochs"] is None:
        raise UsageError("a study needs --steps or --epochs: neither the budget nor a flag says how many")
    return shared


def find_verifier(budget: Budget, data: Data, *, task: Task, flags: Mapping[str, Any]) -> str | None:
    """What the answers of RLVR are verified by: what is asked for, else tests where there are some, else the task's."""
    if not data.answers:
        return None
    tested = any(isinstance(item, Example) and item.tests for item in data.train)
    asked = flags.get("verifier") or budget.methods.get("rlvr", {}).get("verifier")
    return asked or ("unit_tests" if tested else task.verifier)


def examples_in_a_row(data: Data, tokenizer: Any, options: Mapping[str, Any]) -> float:
    """Mean number of examples in a training row of SFT and EBFT (1 for plain text, whose rows are the examples).

    Args:
        options: of the runs of an arm that trains on packed rows.
    """
    if not data.answers:
        return 1.0
    settled, resolved = settle(options), resolve_run(options)
    rows = usable_rows(pack_part(data.train, data.answers, tokenizer, settled), settled, resolved)
    ids = rows[schema.DOCUMENT_IDS]
    return len(ids[ids >= 0].unique()) / len(rows)


def answers_prompts(arm: str) -> bool:
    """Whether the arm's rows are single prompts with their answers, rather than packed."""
    return GIVEN.get(ARMS[arm].method or "", {}).get("sampler") == "full"


def arm_options(
    budget: Budget, settings: Settings, shared: Mapping[str, Any], *, flags: Mapping[str, Any], verifier: str | None,
    per_row: float, answers: bool = False, tests: bool = False,
) -> dict[str, dict[str, Any]]:  # fmt: skip
    """The options of each arm's runs, without `lr` and `seed`, and without `policy` after another arm.

    An option that an arm's method and components do not take is left out for it.

    Args:
        shared: of `shared_options`; flags: options of `run` that the user gave.
        per_row: of `examples_in_a_row`.
        answers: whether the evaluation draws whole answers; tests: whether it runs tests.

    Raises:
        UsageError: a flag that no arm takes, or numbers of steps that do not give every arm as many examples.
    """
    found: dict[str, dict[str, Any]] = {}
    overlapping = ["overlap"] * (shared["overlap"] > 1)  # for those alone that have something to overlap
    used = {*(["stop"] if answers else []), *(JUDGING if tests else ())}  # by the evaluation
    for name in settings.arms:
        arm = ARMS[name]
        if arm.method is None:
            continue
        of_method = budget.methods.get(arm.method, {})
        of_arm = {"verifier": verifier} if arm.verified else {}
        options = {**shared, **of_method, **flags}
        options |= {**of_arm, "method": arm.method}
        options, kept = _taken_alone(options, strict=of_method)
        used |= kept
        if overlapping and overlaps(*objectives_of(settle(options))):
            used.add("overlap")
        elif overlapping:
            options["overlap"] = 1
        options |= _amount(name, options, shared, of_method, per_row)
        if arm.after is not None and options["backbone"] in (None, "start") and "backbone" in _of_features(options):
            options["backbone"] = policy_folder(shared["policy"])  # every arm is measured with the base's features
        for late in ("lr", "seed", *(["policy"] if arm.after is not None else [])):
            options.pop(late)
        found[name] = options
    for name in flags:
        if name in (*OPTION_NAMES, *overlapping) and name not in used:
            raise UsageError(f"{flag(name)} {flags[name]} applies to no arm of this study: leave it out")
    return found


def evaluation_options(
    settings: Settings, shared: Mapping[str, Any], *, task: Task, answers: bool, defaults: Mapping[str, Any],
    bootstrap: int, level: float,
) -> dict[str, Any]:  # fmt: skip
    """The options of every evaluation, without `policy`: the test half, the same random numbers for all.

    Args:
        shared: of `shared_options`; answers: whether there are prompts to answer.
        defaults: of the options of `evaluate`.
    """
    maps = [choose("features", name.strip()) for name in settings.eval_features.split(",") if name.strip()]
    taken = {option for entry in maps for option in entry.options}
    options = {
        **defaults,
        **{name: shared[name] for name in _SHARED if shared[name] is not None},
        **{name: shared[name] for name in MAP_OPTIONS if name in taken},
        **{option: getattr(settings, name) for option, name in _OF_SEQUENCES.items()},
        "split": TEST,
        "seed": 0,
        "bootstrap": bootstrap,
        "level": level,
    }
    if "backbone" in taken and shared["backbone"] in (None, "start"):
        options["backbone"] = policy_folder(shared["policy"])
    if answers:
        options |= {option: getattr(settings, name) for option, name in OF_ANSWERS.items()}
        options |= {"prompts_from": task.prompts_from, "greedy": True}
    options.pop("policy")
    return options


def in_words_of_a_study(message: str) -> str:
    """An error of `evaluate`, with the names that a study gives to the options which it hands on."""
    flags = {flag(option): flag(name) for option, name in {**_OF_SEQUENCES, **OF_ANSWERS}.items()}
    return re.sub(r"--[a-z-]+", lambda found: flags.get(found[0], found[0]), message)


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


def _amount(
    name: str, options: Mapping[str, Any], shared: Mapping[str, Any], of_method: Mapping[str, Any], per_row: float
) -> dict[str, Any]:
    """Batch and steps, or epochs, by which an arm sees its share of the examples: of its half, or of the passes.

    Where rows are single prompts, a batch has as many as a packed one has examples, unless the budget says another.
    """
    share, batch = ARMS[name].share, options["batch"]
    single = answers_prompts(name)
    if single and "batch" not in of_method:
        batch = max(1, round(shared["batch"] * per_row))
    if shared["epochs"] is not None:
        return {"epochs": shared["epochs"] * share, "steps": None, "batch": batch}
    rows = shared["steps"] * shared["batch"] * share
    if single:
        steps = shared["steps"] * share if "batch" not in of_method else round(rows * per_row / batch)
    else:
        steps = rows / batch
    if steps != int(steps) or steps < 1:
        raise UsageError(
            f"--steps {shared['steps']} of --batch {shared['batch']}: the arm {name} is to see {rows:g} rows, which its"
            f" batches of {batch} do not give; choose numbers that divide"
        )
    return {"steps": int(steps), "epochs": None, "batch": batch, "train_half": ARMS[name].half}


def _of_features(options: Mapping[str, Any]) -> Mapping[str, Any]:
    name = with_defaults(options).get("features")
    return {} if name is None else choose("features", name).options
