"""From saved rollouts and axes to what each cell makes of them, without the language model."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from tensordict import TensorDictBase
from transformers import AutoTokenizer

from ebft import schema
from ebft.assemble.ablate import check_cell
from ebft.assemble.checks import resolve_run, settle
from ebft.assemble.grid import check_axes, check_cells, make_cells, of_components
from ebft.assemble.loss import build_loss
from ebft.assemble.reward import build_reward, build_values, decoder
from ebft.assemble.run import observe_moments
from ebft.components import choose
from ebft.components.component import nearest
from ebft.errors import UsageError, flag
from ebft.features.module import as_module
from ebft.features.whitening import PopulationWhitening
from ebft.files import write_json
from ebft.loops.ablation.intervals import standard_error
from ebft.loops.ablation.replay import MATCHING, REWARD_SPREAD, VARIANCE, Outcome, correlations, measure
from ebft.loops.ablation.replay_tables import replay_tables, write_replay
from ebft.loops.ablation.results import Cell, Results, axis_values
from ebft.loops.ablation.rollouts import kept_features, load_rollouts
from ebft.loops.display import Display
from ebft.loops.run import open_folder

_FEATURES = of_components("features")
_REWARD = (*_FEATURES, *of_components("whitening", "objective"), "diversity", "credit")
YARDSTICKS = {MATCHING: _FEATURES, REWARD_SPREAD: _REWARD, VARIANCE: _REWARD}

# The whitening of a replay has its moment from the other half of the rollouts, not from batches before training.
_OF_CALIBRATION = ("calibration", "decay")
REPLAYED = tuple(
    name
    for name in (
        *_REWARD,
        *of_components("estimator", "pg"),
        *("drop_zero_spread", "normalize_advantage", "clip_advantage", "normalization"),
    )
    if name not in _OF_CALIBRATION
)


class _NoModel:
    """What stands for the policy where its tokenizer is all there is of it."""

    device = torch.device("cpu")

    def __init__(self, tokenizer: Any, autocast: torch.dtype | None) -> None:
        self.tokenizer, self.autocast = tokenizer, autocast

    def __getattr__(self, name: str) -> Any:
        raise _ModelNeeded


class _ModelNeeded(Exception):
    """Something asked for more of the policy than its tokenizer."""


def replay(
    rollouts: str | Path,
    over: Mapping[str, Sequence[Any]],
    *,
    out: str | Path | None = None,
    one_at_a_time: bool = False,
    console: Console | None = None,
    **options: Any,
) -> Results:
    """Measure what every cell of a grid makes of saved rollouts; see `ebft.loops.ablation.replay.measure`.

    Args:
        rollouts: a folder that the command `rollouts` wrote.
        over: option -> values, of features, whitening, objective, estimator, policy gradient and shaping.
        out: folder for results.csv, results.md, correlations.csv and plots; None writes nothing.
        one_at_a_time: the base, and cells that differ from it in one axis.
        options: the same options for every cell.

    Raises:
        UsageError: bad input, an option that rollouts do not leave open, or features that need the model and were not
            kept.
    """
    for name in options:
        if name not in REPLAYED:
            raise UsageError(f"{name}={options[name]!r}: {_not_replayed(name)}")
    return replay_from_options(
        Path(rollouts),
        options,
        over=over,
        one_at_a_time=one_at_a_time,
        out=None if out is None else Path(out),
        console=console or Console(),
    )


def replay_from_options(
    rollouts: Path,
    given: Mapping[str, Any],
    *,
    over: Mapping[str, Sequence[Any]],
    one_at_a_time: bool,
    out: Path | None,
    console: Console,
) -> Results:
    """`replay`, with the options of `run` that the user gave."""
    from ebft.commands.derived import run_defaults

    for name in (*over, *given):
        if name not in REPLAYED:
            raise UsageError(f"{flag(name)} with --replay: {_not_replayed(name)}")
    defaults = run_defaults()
    check_axes(over, defaults)
    td, config = load_rollouts(rollouts)
    # What the options of the saved run say of rewards and losses was not used when the rollouts were drawn.
    options = {**defaults, **config["options"], **{name: defaults[name] for name in (*REPLAYED, *_OF_CALIBRATION)}}
    options = {**options, "method": "ebft", "kl": 0.0, "ce": 0.0, "entropy": 0.0, **given}
    cells = make_cells(over, options, given=given, one_at_a_time=one_at_a_time)
    check_cells(cells, partial(check_cell, gradient=False))
    if out is not None and not (out / "replay.json").is_file():
        open_folder(out, resume=False)
        write_json(out / "replay.json", {"rollouts": str(rollouts), "over": dict(over), "options": dict(given)})
    tokenizer = AutoTokenizer.from_pretrained(str(rollouts / "tokenizer"))
    autocast = None if config["autocast"] is None else getattr(torch, config["autocast"])
    stand_in = _NoModel(tokenizer, autocast)
    embedded: dict[str, list[TensorDictBase]] = {}
    outcomes: list[Outcome] = []
    rows: list[dict[str, Any]] = []
    for cell in Display(console).track(cells, label="cells", total=len(cells), describe=lambda cell: cell.name):
        start = time.perf_counter()
        resolved = resolve_run(cell.options, gradient=False)
        key = repr({"features": settle(cell.options)["features"], **resolved["features"]})
        if key not in embedded:
            embedded[key] = _embed(td, config, cell, resolved, stand_in)
        batches = _reward(embedded[key], cell, resolved, tokenizer)
        outcomes.append(measure(batches, build_loss(settle(cell.options), resolved["pg"])))
        rows += _rows(cell, tuple(over), outcomes[-1], outcomes[0], td, time.perf_counter() - start)
    results = Results(tuple(over), cells, rows, yardsticks=YARDSTICKS)
    for table in replay_tables(results):
        console.print(table)
    if out is not None:
        write_replay(results, correlations(outcomes), out, console)
    return results


def _embed(
    td: TensorDictBase, config: Mapping[str, Any], cell: Cell, resolved: Mapping[str, Mapping], stand_in: _NoModel
) -> list[TensorDictBase]:
    """The saved batches with the features of a cell: those that were kept, or those of a map that needs no model."""
    batches = [part.clone(False) for part in td.split(config["options"]["batch"])]
    name = settle(cell.options)["features"]
    wanted = {"features": name, **resolved["features"]}
    if wanted in config["features"]:
        kept = kept_features(config["features"].index(wanted))
        for part in batches:
            part[schema.ROLLOUT_FEATURES], part[schema.TARGET_FEATURES] = part[kept[0]], part[kept[1]]
        return batches
    build = choose("features", name).build
    try:
        stage = as_module(build(stand_in, stand_in, **resolved["features"]).embed, documents=True)
    except _ModelNeeded as error:
        there = "; ".join(_words(entry) for entry in config["features"]) or "none"
        raise UsageError(
            f"cell {cell.name}: {_words(wanted)} needs the language model, and its features were not kept with"
            f" the rollouts (kept: {there}). Save them with --keep features={name} and its options"
        ) from error
    return [stage(part) for part in batches]


def _reward(
    batches: Sequence[TensorDictBase], cell: Cell, resolved: Mapping[str, Mapping], tokenizer: Any
) -> list[TensorDictBase]:
    """Rewards and advantages, batch by batch; a moment is of the half of the batches that it does not whiten."""
    if cell.options["whitening"] != "population":
        stage = build_reward(settle(cell.options), resolved, decode=decoder(tokenizer))
        return [stage(part.clone(False)) for part in batches]
    if len(batches) < 2:
        raise UsageError(
            f"cell {cell.name}: the moment of one half of the batches whitens the other, and there is one batch only:"
            " save more rollouts with --batches"
        )
    found: dict[int, TensorDictBase] = {}
    for half in (0, 1):
        values = build_values(settle(cell.options), resolved)
        for number, part in enumerate(batches):
            if number % 2 != half:
                _observe(values.values(), part)
        stage = build_reward(settle(cell.options), resolved, decode=decoder(tokenizer), values=values)
        found.update({n: stage(part.clone(False)) for n, part in enumerate(batches) if n % 2 == half})
    return [found[number] for number in range(len(batches))]


def _observe(values: Iterable[Any], part: TensorDictBase) -> None:
    for whitening in values:
        if isinstance(whitening, PopulationWhitening):
            observe_moments(whitening, part)


def _rows(
    cell: Cell, axes: Sequence[str], outcome: Outcome, base: Outcome, td: TensorDictBase, seconds: float
) -> list[dict[str, Any]]:
    tokens = int(td[schema.ROLLOUT_MASK].sum())
    rows = []
    for metric, found in outcome.metrics.items():
        other = base.metrics.get(metric)
        numbers = {
            "value": found.value,
            "standard_error": standard_error(found.without),
            "difference": None if other is None else found.value - other.value,
            "difference_error": None if other is None else standard_error(found.without - other.without),
        }
        shared = {"sequences": len(td), "seconds": seconds, "tokens": tokens}
        rows.append({"cell": cell.name, **axis_values(cell, axes), "metric": metric, **numbers, **shared})
    return rows


def _words(description: Mapping[str, Any]) -> str:
    return " ".join(f"{name}={value}" for name, value in description.items())


def _not_replayed(name: str) -> str:
    if name in _OF_CALIBRATION:
        return "the whitening of a replay takes its moment from the other half of the rollouts: leave it out"
    return (
        f"saved rollouts leave only rewards and the policy gradient open{nearest(name, REPLAYED)}: expected options of"
        " features, whitening, objective, estimator and policy gradient"
    )
