"""Budgets of a study: YAML files that say how much of everything, each setting to be overridden by a flag."""

from __future__ import annotations

import typing
from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from ebft.assemble.option_files import check_names, convert, read_option_file, read_preset, yaml_names
from ebft.components.component import nearest
from ebft.components.methods import METHODS
from ebft.errors import UsageError, flag
from ebft.loops.study.arms import ARMS, BASE, needed

_BUDGETS = files("ebft") / "budgets"
_SECTIONS = ("run", "methods", "tasks")
ANY_FILE = "file"  # the section of `tasks` for a data file of the user's own


@dataclass(frozen=True)
class Settings:
    """What a study does beside the options of its runs; the flags of the command `study` have the same names."""

    arms: tuple[str, ...]
    lr_grid: Mapping[str, tuple[float, ...]]
    criterion: str
    eval_rows: int
    eval_batch: int
    eval_features: str
    eval_horizons: str
    prompts: int
    prompt_length: int
    answers: int
    answer_tokens: int
    answer_temperature: float


@dataclass(frozen=True)
class Budget:
    """A budget for one task: the study's settings, and options of its runs, for all and by method."""

    settings: Mapping[str, Any]
    run: Mapping[str, Any]
    methods: Mapping[str, Mapping[str, Any]]


def budget_names() -> list[str]:
    return yaml_names(_BUDGETS)


def read_budget(name: str, task: str) -> Budget:
    """A budget by name, or from a YAML file of the user's own, with its section for the task merged in.

    Raises:
        UsageError: an unknown name, a file that cannot be read, or an unknown key or value of another type.
    """
    where = f"--budget {name}"
    if Path(name).suffix in (".yaml", ".yml"):
        content = read_option_file(Path(name))
    elif name in budget_names():
        content = yaml.safe_load((_BUDGETS / f"{name}.yaml").read_text(encoding="utf-8"))
    else:
        raise UsageError(
            f"{where}: unknown budget{nearest(name, budget_names())}: expected one of {', '.join(budget_names())}, or a"
            " YAML file"
        )
    tasks = _section(content, "tasks", where)
    content = _merged(content, _section(tasks, task if task in tasks else ANY_FILE, where))
    content.pop("tasks", None)
    methods = _section(content, "methods", where)
    for method in methods:
        if method not in METHODS:
            raise UsageError(f"{where}: unknown method {method!r}: expected one of {', '.join(METHODS)}")
    settings = {key: value for key, value in content.items() if key not in _SECTIONS}
    known = [field.name for field in fields(Settings)]
    for key in settings:
        if key not in known:
            raise UsageError(f"{where}: unknown key {key!r}{nearest(key, [*known, *_SECTIONS])}")
    return Budget(
        _settings(settings, where),
        _run_options(_section(content, "run", where), f"{where}, run"),
        {
            name: _run_options(_section(methods, name, where), f"{where}, methods: {name}", without=("data", "policy"))
            for name in methods
        },
    )


def settle_settings(budget: Budget, given: Mapping[str, Any], *, where: str, verifier: str | None = None) -> Settings:
    """The settings of a budget under those that the user gave (None: not given).

    Args:
        verifier: of answers; without one the budget's arms that want one are left out.

    Raises:
        UsageError: one that neither has, values out of range, or an arm asked for that wants a verifier.
    """
    flags = {name: value for name, value in given.items() if value is not None}
    lr_grid = dict(budget.settings.get("lr_grid", {}))
    for text in flags.pop("lr_grid", None) or []:
        arm, equals, rates = text.rpartition("=")
        arms = [arm] if equals else [name for name, one in ARMS.items() if one.method and one.rate_of is None]
        lr_grid |= dict.fromkeys(arms, rates.split(","))
    merged = {**budget.settings, **flags, "lr_grid": lr_grid}
    if isinstance(merged.get("arms"), str):
        merged["arms"] = [name.strip() for name in merged["arms"].split(",") if name.strip()]
    for field in fields(Settings):
        if field.name not in merged:
            raise UsageError(f"{where} says nothing of {field.name}: give {flag(field.name)}")
    for arm in [name for name in merged["arms"] if name in ARMS and ARMS[name].verified and verifier is None]:
        if given.get("arms") is not None:
            raise UsageError(
                f"--arms {arm}: there is nothing to verify answers with: the data wants tests, or --verifier says how"
                " answers are compared with references"
            )
        merged["arms"] = [name for name in merged["arms"] if name != arm]
    chosen = with_needed(merged["arms"])
    merged["arms"] = chosen
    merged["lr_grid"] = {arm: _rates(arm, lr_grid) for arm in chosen if ARMS[arm].method and not ARMS[arm].rate_of}
    for arm in lr_grid:
        if arm not in ARMS or ARMS[arm].method is None or ARMS[arm].rate_of is not None:
            raise UsageError(f"--lr-grid {arm}: no arm has this name and a rate of its own{nearest(arm, ARMS)}")
    return Settings(**merged)


def unverified(budget: Budget, given: Mapping[str, Any], settings: Settings) -> list[str]:
    """The arms that `settle_settings` left out of these `settings` for want of a verifier."""
    arms = settle_settings(budget, given, where="the budget", verifier="any").arms
    return [arm for arm in arms if ARMS[arm].verified and arm not in settings.arms]


def with_needed(names: list[str]) -> tuple[str, ...]:
    """The arms in their order: the base, those named, and those that they need.

    Raises:
        UsageError: an unknown arm.
    """
    for name in names:
        if name not in ARMS:
            raise UsageError(f"--arms {name}: unknown{nearest(name, ARMS)}: expected some of {', '.join(ARMS)}")
    wanted = {BASE, *names, *(other for name in names for other in needed(name))}
    return tuple(name for name in ARMS if name in wanted)


def _rates(arm: str, grid: Mapping[str, Any]) -> tuple[float, ...]:
    values = grid.get(arm) or []
    try:
        rates = tuple(float(value) for value in (values if isinstance(values, list) else [values]))
    except (TypeError, ValueError):
        rates = ()
    if not rates or len(set(rates)) != len(rates) or not all(0 < rate < float("inf") for rate in rates):
        shown = ",".join(map(str, values if isinstance(values, list) else [values]))
        raise UsageError(f"--lr-grid {arm}={shown}: expected different numbers above 0, such as {arm}=0.001,0.003")
    return rates


def _settings(found: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Values of the types that `Settings` says; arms and learning rates are looked at when flags are known."""
    hints = typing.get_type_hints(Settings)
    return {
        name: value if name in ("arms", "lr_grid") else convert(value, hints[name], f"{where}: {name}")
        for name, value in found.items()
    }


def _run_options(found: Mapping[str, Any], where: str, *, without: Collection[str] = ("data",)) -> dict[str, Any]:
    """Options of `run`, those of a `preset` under them, but for those that a study says itself.

    Args:
        without: of the preset: its data, as that is the task's, and of one method's also the policy.
    """
    from ebft.commands.run import run

    options = dict(found)
    preset = options.pop("preset", None)
    below = {} if preset is None else read_preset(preset)
    options = {**{name: value for name, value in below.items() if name not in without}, **options}
    hints = typing.get_type_hints(run)
    check_names(options, hints, where)
    return {name: convert(value, hints[name], f"{where}: {name}") for name, value in options.items()}


def _section(content: Mapping[str, Any], name: str, where: str) -> dict[str, Any]:
    found = content.get(name) or {}
    if not isinstance(found, dict):
        raise UsageError(f"{where}: {name} is {found!r}, expected a section of keys and values")
    return found


def _merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Sections of `over` into those of `base`, its other values in their place."""
    both = {key: _merged(base[key], value) for key, value in over.items() if isinstance(value, dict) and key in base}
    return {**base, **over, **both}
