"""`plan`: what a run will take, before it starts."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console

from ebft.commands.derived import with_run_options
from ebft.commands.options import MODEL, given_options, option

EXAMPLES = (
    "plan --policy smollm2-135m --lora 0 --length 1024 --stride 8 --batch 16 --micro-batch 4",
    "plan --preset paper-qa-code --processes 8",
)


@with_run_options()
def plan(
    context: typer.Context,
    processes: Annotated[int, option(MODEL, "Processes that torchrun will start, one for each GPU.")] = 1,
) -> None:
    """Predict the memory and the time that a run with the same options takes, without loading its model.

    Memory is that of tensors, by what they are for, with what each stage adds at its worst. What allocators and
    libraries keep comes on top: on a GPU the CUDA context; on a CPU the holes in the C library's heap between blocks
    that are freed in another order than they were made, up to as much as a stage adds and more, and the text. Time is
    that of the stages' matrix products on this device, timed now, times a factor that was measured on a CPU:
    `benchmarks/plan.py` compares both with runs.
    """
    from transformers.utils import logging

    from ebft.assemble import plan_from_options
    from ebft.commands.derived import run_defaults

    logging.disable_progress_bar()
    options, _ = given_options(context, besides=("processes", "config", "preset"))
    plan_from_options({**run_defaults(), **options}, processes=processes, console=Console())
