"""What the commands share: the panels of their help, and options with a panel."""

from __future__ import annotations

from typing import Any

import typer

MODEL, DATA, SAMPLING = "Model", "Text", "Rollouts"
MATCHING, LOSS, TRAINING, OUTPUT = "What is matched", "Loss", "Training", "Output"


def option(panel: str, help: str, *names: str, **extra: Any):
    """A typer option that stands under `panel` in the help."""
    return typer.Option(*names, help=help, rich_help_panel=panel, **extra)
