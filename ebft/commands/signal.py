"""`signal`: how much signal the gradients of configurations carry, and at what cost."""

from __future__ import annotations

import typing
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from ebft.commands.declared import of_model, of_text
from ebft.commands.derived import run_defaults
from ebft.commands.options import DATA, MODEL, OUTPUT, given_options, option, with_options_of
from ebft.commands.run import run

EXAMPLES = (
    'signal --config "paper: features=hidden whitening=group alignment=cosine" --config "dot: features=hidden"',
    'signal --config "paper: features=hidden rollouts=8" --allocate',
)

WHAT = "What is measured"


@with_options_of(of_model, of_text, only=("device", "dtype", "attention", "text_field"))
def signal(
    context: typer.Context,
    config: Annotated[
        list[str] | None,
        option(
            WHAT,
            "A configuration, `name: option=value ...` with options of `run`; again for each one"
            " (default: the paper's and three changes of it)",
        ),
    ] = None,
    set: Annotated[str | None, option(WHAT, "Options for every configuration, such as `stride=8 rollouts=8`")] = None,
    reference: Annotated[
        str | None, option(WHAT, "Name of the configuration that others are compared with (default: the first)")
    ] = None,
    parameters: Annotated[
        str | None,
        option(WHAT, "Gradients of the trained weights whose names match this regular expression (default: all)"),
    ] = None,
    batches: Annotated[int, option(WHAT, "M, independent batches; the interval shrinks as 1/M.")] = 16,
    batch: Annotated[int, option(WHAT, "B, sequences in a batch.")] = 4,
    replicates: Annotated[
        int, option(WHAT, "R, times that the rollouts of a batch are drawn: 2 or more tell their noise apart.")
    ] = 2,
    allocate: Annotated[
        bool,
        option(
            WHAT,
            "For one --config: how much noise sequences, anchors and rollouts bring, and how many pay best (at its"
            " horizon; strided anchors)",
            "--allocate",
        ),
    ] = False,
    policy: Annotated[str, option(MODEL, "Model: smollm2-135m, a folder or a hub id.")] = "smollm2-135m",
    lora: Annotated[int, option(MODEL, "Rank of LoRA adapters; 0 trains all weights.")] = 8,
    micro_batch: Annotated[int | None, option(MODEL, "Sequences scored at once (default batch)")] = None,
    data: Annotated[str, option(DATA, "stdlib, a text file, a folder, a .jsonl file or a hub dataset id.")] = "stdlib",
    length: Annotated[int, option(DATA, "T, tokens of a sequence.")] = 128,
    seed: Annotated[int, option(OUTPUT, "Keys every random number.")] = 0,
    out: Annotated[
        Path | None,
        option(OUTPUT, "Folder (default runs/TIME-signal); a measurement that is there goes on"),
    ] = None,
) -> None:
    """Measure the signal-to-noise² of policy gradients over independent batches, with 95 % intervals.

    For every configuration (features, whitening, objective, baseline, credit, rollouts, anchors, horizon): the signal
    of a batch, of the rollouts of given sequences, per token-forward spent, and where it points: towards the mean
    gradient of a reference and of cross-entropy. Configurations that draw rollouts alike share them.
    """
    from transformers.utils import logging

    from ebft.assemble import signal_from_options

    logging.disable_progress_bar()
    options, _ = given_options(context, besides=("out",))
    signal_from_options(options, base=run_defaults(), hints=typing.get_type_hints(run), out=out, console=Console())
