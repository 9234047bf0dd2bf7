"""Runs that measure the same start: one of them is enough to measure it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ebft.assemble.config import TRAINING_ALONE
from ebft.loops.ablation.study import Run, stored_options


def same_start(others: Sequence[Run], options: Mapping[str, Any]) -> Path | None:
    """The held-out measurement of the start by a finished run whose start is measured as with `options`, if any."""
    for other in others:
        path, config = other.folder / "before.json", other.folder / "config.json"
        if not ((other.folder / "evaluation.json").is_file() and config.is_file() and path.is_file()):
            continue
        stored = stored_options(config)
        if {name for name, value in options.items() if stored.get(name) != value} <= TRAINING_ALONE:
            return path
    return None
