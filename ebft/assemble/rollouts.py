"""From options to rollouts on disk."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from ebft import schema
from ebft.assemble.checks import resolve_run, settle
from ebft.assemble.config import machine, versions
from ebft.assemble.grid import check_axes, make_cells, of_components
from ebft.assemble.pipeline import build_features, build_sampler
from ebft.assemble.policy import load_policy
from ebft.assemble.rows import check_anchors, pack_data, read_data
from ebft.data.packing import batches as batches_of
from ebft.errors import UsageError
from ebft.features.module import as_module
from ebft.loops.ablation.results import Cell
from ebft.loops.ablation.rollouts import draw, save_rollouts
from ebft.loops.ablation.sketch import Projection
from ebft.loops.display import Display
from ebft.loops.run import open_folder


def rollouts_from_options(
    options: Mapping[str, Any],
    *,
    over: Mapping[str, Sequence[Any]],
    batches: int,
    sketch: int,
    out: Path,
    console: Console,
) -> None:
    """Draw the rollouts of the first `batches` batches of a run at its start, and keep them for replays.

    Args:
        options: all options of `run`; those of training are not used.
        over: option of feature maps -> values: the maps of this grid are evaluated and their features kept.
        sketch: numbers that a score gradient is projected to; 0 for no sketches.

    Raises:
        UsageError: bad input, before anything is written.
    """
    for name, value, least in (("batches", batches, 1), ("sketch", sketch, 0)):
        if value < least:
            raise UsageError(f"--{name} {value}: expected a whole number >= {least}")
    allowed = {name: options[name] for name in of_components("features")}
    if over:
        check_axes(over, allowed)
    cells = make_cells(over, options) if over else []
    chosen = [resolve_run(cell.options, gradient=bool(sketch)) for cell in cells]
    cells = [replace(cell, options=settle(cell.options)) for cell in cells]
    resolved, given = resolve_run(options, gradient=bool(sketch)), dict(options)
    options = settle(options)
    check_anchors(options)
    open_folder(out, resume=False)
    data = read_data(options)
    policy = load_policy(options)
    reference = policy.reference()
    maps = {
        number: as_module(build_features(policy, reference, cell.options, parts).embed, documents=True)
        for number, (cell, parts) in enumerate(zip(cells, chosen, strict=True))
    }
    train_rows, _ = pack_data(data, policy.tokenizer, options, resolved, console=console)
    size = sum(p.numel() for p in policy.trainable().values())
    projection = Projection(size, dimension=sketch, seed=options["seed"]) if sketch else None
    drawn = draw(
        policy,
        build_sampler(policy, options, resolved, answers=data.answers),
        maps,
        batches_of(train_rows, batch_size=options["batch"], seed=options["seed"]),
        batches=batches,
        seed=options["seed"],
        scoring={"temperature": options["temperature"], "top_p": options["top_p"]},
        projection=projection,
    )
    found = list(Display(console).track(drawn, label="batches", total=batches))
    config = {
        "options": given,
        "batches": batches,
        "features": [_description(cell, parts) for cell, parts in zip(cells, chosen, strict=True)],
        "autocast": None if policy.autocast is None else str(policy.autocast).removeprefix("torch."),
        "sketch": {"dimension": sketch, "seed": options["seed"], "parameters": size} if sketch else None,
        "versions": versions(),
        "machine": machine(policy.device),
    }
    td: Any = torch.cat(found)  # type: ignore[call-overload]
    save_rollouts(out, td, config, policy.tokenizer)
    count = int(td[schema.ANCHOR_MASK].sum())
    console.print(
        f"{out}  {len(td)} sequences, {count} anchors, {count * options['rollouts']} rollouts", soft_wrap=True
    )


def _description(cell: Cell, resolved: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    return {"features": cell.options["features"], **resolved["features"]}
