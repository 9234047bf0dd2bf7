"""Commands that take the options of another beside their own, and what is known of those of `run`."""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import cache
from typing import Any

import typer

from ebft.commands.options import plain, with_options_of
from ebft.commands.run import run
from ebft.errors import UsageError

# Where a run is and where its options come from; these are no options of what is run.
NOT_OF_THE_RUN = ("context", "out", "resume", "force", "config", "preset", "help")


def with_run_options(*, only: Collection[str] | None = None) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command the options of `run` too; see `with_options_of`.

    Args:
        only: which of the options of `run`; all but `out`, `resume` and `force` when left out.
    """
    return with_options_of(run, only=only, without=("out", "resume", "force"))


@cache
def _command(function: Callable[..., None]) -> Any:
    app = typer.Typer(add_completion=False)
    app.command()(function)
    return typer.main.get_command(app)


def _defaults(function: Callable[..., None]) -> dict[str, Any]:
    return {p.name: p.default for p in _command(function).params if p.name not in NOT_OF_THE_RUN}


def run_defaults() -> dict[str, Any]:
    """The options of `run` with their defaults, by parameter name."""
    return _defaults(run)


def evaluate_defaults() -> dict[str, Any]:
    """The options of `evaluate` with their defaults, by parameter name."""
    from ebft.commands.evaluate import evaluate

    return _defaults(evaluate)


def options_under(*panels: str) -> set[str]:
    """The options of `run` that stand under these panels of its help."""
    return {p.name for p in _command(run).params if p.rich_help_panel in panels and p.name not in NOT_OF_THE_RUN}


def parse_option(name: str, text: str) -> Any:
    """A value of an option of `run`, from text as the command line reads it; true or false where it is a switch.

    Raises:
        UsageError: the text is no such value.
    """
    (parameter,) = (p for p in _command(run).params if p.name == name)
    if parameter.is_flag:
        if text not in ("true", "false"):
            raise UsageError(f"--over {name}: {text!r} is neither true nor false")
        return text == "true"
    try:
        context = _command(run).make_context("run", [f"{parameter.opts[0]}={text}"], resilient_parsing=False)
        return plain(context.params[name])
    except typer.BadParameter as error:
        raise UsageError(f"--over {name}: {text!r}: {error.message}") from error
