"""What the commands share: the panels of their help, and options with a panel."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import typer

MODEL, DATA, SAMPLING = "Model", "Text", "Rollouts"
MATCHING, LOSS, TRAINING, OUTPUT = "What is matched", "Loss", "Training", "Output"


def option(panel: str, help: str, *names: str, **extra: Any):
    """A typer option that stands under `panel` in the help."""
    return typer.Option(*names, help=help, rich_help_panel=panel, **extra)


def given_options(context: typer.Context, *, besides: Collection[str]) -> tuple[dict[str, Any], set[str]]:
    """The options of a command but those named in `besides`, by parameter name, and which of them the user gave."""
    options = {name: value for name, value in context.params.items() if name not in besides}
    return options, {name for name in options if context.get_parameter_source(name).name == "COMMANDLINE"}  # type: ignore[union-attr]
