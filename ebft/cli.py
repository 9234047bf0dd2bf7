"""The command line: the app with its commands, and what becomes of errors; the work is elsewhere."""

from __future__ import annotations

import sys

import typer
from rich.console import Console
from rich.markup import escape

from ebft.commands import (
    ablate,
    compare,
    components,
    data,
    evaluate,
    plan,
    rollouts,
    run,
    sample,
    signal,
    study,
    tilt,
)
from ebft.commands.once import OncePerOption
from ebft.commands.options import examples
from ebft.distributed import is_first, number, said_by_first, started
from ebft.errors import UsageError

app = typer.Typer(
    help="Energy-based fine-tuning of language models: match features of short on-policy rollouts, not tokens.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)


@app.callback()
def _app(context: typer.Context) -> None:
    """Energy-based fine-tuning of language models: match features of short on-policy rollouts, not tokens."""
    if started() > 1 and context.invoked_subcommand != "run":
        raise UsageError(
            f"torchrun started {started()} processes of `{context.invoked_subcommand}`, and only `run` shares its work"
            " between processes: start it without torchrun"
        )


for module in (run, plan, evaluate, compare, sample, signal, tilt, ablate, study, rollouts, components, data):
    command = getattr(module, module.__name__.rpartition(".")[2])
    app.command(cls=OncePerOption, epilog=examples(*module.EXAMPLES))(command)


def main() -> None:
    """Run the app; bad input is one line on stderr and exit code 2, an interrupted run exit code 130."""
    from ebft.loops.interrupt import Interrupted

    errors = Console(stderr=True)
    try:
        app()
    except UsageError as error:
        if not (error.told or said_by_first()):
            who = "" if is_first() else f" in process {number()}"
            errors.print(f"[bold red]error{who}:[/bold red] {escape(str(error))}", soft_wrap=True, highlight=False)
        sys.exit(2)
    except (Interrupted, KeyboardInterrupt) as error:
        if is_first():
            errors.print(escape(str(error)) or "interrupted", soft_wrap=True, highlight=False)
        sys.exit(130)
