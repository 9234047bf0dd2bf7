"""`compare`: runs and policies side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from ebft.commands.evaluate import evaluate as evaluate_command
from ebft.commands.options import OUTPUT, given_options, option, with_options_of

EXAMPLES = (
    "compare runs/a runs/b",
    "compare runs/a smollm2-135m --evaluate --quick",
)


@with_options_of(evaluate_command, without=("policy",))
def compare(
    context: typer.Context,
    policies: Annotated[
        list[str], typer.Argument(help="Folders of runs, or policies: an embedded name, a folder, a hub id.")
    ],
    evaluate: Annotated[
        bool,
        typer.Option("--evaluate", help="Evaluate the policies of runs too, on the same prompts and random numbers."),
    ] = False,
    out: Annotated[Path | None, option(OUTPUT, "Folder for the results (default runs/TIME-compare)")] = None,
) -> None:
    """Put runs or policies into one table with plots.

    Of runs: which options differ, held-out metrics before and after, and curves; this takes no model. Of policies (of
    runs with --evaluate): everything that `evaluate` measures, on the same rows, prompts and random numbers, and the
    paired difference of each from the first.

    Writes compare.md, compare.csv and compare.png.
    """
    from transformers.utils import logging

    from ebft.assemble import compare_from_options

    logging.disable_progress_bar()
    options, explicit = given_options(context, besides=("out", "policies"))
    compare_from_options(policies, options, explicit=explicit, out=out, console=Console())
