"""`rollouts`: draw rollouts once, for many replays."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from ebft.commands.derived import options_under, parse_option, run_defaults, with_run_options
from ebft.commands.options import DATA, MODEL, SAMPLING, given_options, option

EXAMPLES = ("rollouts --out rollouts --keep features=hidden --sketch 256",)

KEPT = "What is kept"


@with_run_options(only={*options_under(MODEL, DATA, SAMPLING), "batch", "seed"} - {"checkpointing"})
def rollouts(
    context: typer.Context,
    out: Annotated[Path, option(KEPT, "Folder to write.")],
    batches: Annotated[int, option(KEPT, "Batches of --batch sequences: those of a run's first steps.")] = 4,
    keep: Annotated[
        list[str] | None,
        option(
            KEPT,
            "Feature maps to evaluate now, for those that need the model: features=hidden, and their options,"
            " layers=0.5;last (those of text or tokens alone need not be kept)",
        ),
    ] = None,
    sketch: Annotated[
        int,
        option(
            KEPT,
            "Numbers that the score gradient of every rollout is projected to, 256 say; a backward pass each (default"
            " 0: none)",
        ),
    ] = 0,
) -> None:
    """Draw the rollouts that a run begins with and keep them for `ablate --replay`.

    Keeps tokens, anchors, targets, rollouts and log-probs as memory maps; with --keep the features of maps that need
    the model, with --sketch what the signal of gradients is computed from. Nothing is trained.
    """
    from transformers.utils import logging

    from ebft.assemble import rollouts_from_options
    from ebft.assemble.grid import parse_axes

    logging.disable_progress_bar()
    options, _ = given_options(context, besides=("out", "batches", "keep", "sketch"))
    over = parse_axes(keep, known=run_defaults(), parse=parse_option) if keep else {}
    rollouts_from_options(
        {**run_defaults(), **options}, over=over, batches=batches, sketch=sketch, out=out, console=Console()
    )
