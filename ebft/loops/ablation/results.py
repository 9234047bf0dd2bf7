"""What an ablation found: rows of numbers, cell by cell, and their way into files."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ebft.files import write_atomically


@dataclass(frozen=True)
class Cell:
    """One choice of options: its settings (axis -> value) and all of its options."""

    settings: Mapping[str, Any]
    options: Mapping[str, Any]

    @property
    def name(self) -> str:
        """`features=hidden, estimator=rloo`; `base` without settings."""
        return ", ".join(f"{name}={shown(value)}" for name, value in self.settings.items()) or "base"


@dataclass(frozen=True)
class Results:
    """Everything that an ablation found.

    Attributes:
        axes: names of the options that were varied.
        cells: the first one is what the others are compared with.
        rows: dicts with `cell`, a value for every axis, `metric` and numbers; see `read_rows` and `replay`.
        failures: run -> what went wrong.
        yardsticks: metric -> names of the options that say what is measured: where two cells differ in one of them,
            their values of that metric are no comparison.
    """

    axes: tuple[str, ...]
    cells: Sequence[Cell]
    rows: Sequence[Mapping[str, Any]]
    failures: Mapping[str, str] = field(default_factory=dict)
    yardsticks: Mapping[str, Sequence[str]] = field(default_factory=dict)

    def metrics(self) -> list[str]:
        """Names of what was measured, in order."""
        return list(dict.fromkeys(row["metric"] for row in self.rows))

    def of(self, cell: Cell, metric: str) -> list[Mapping[str, Any]]:
        """The rows of one cell and metric."""
        return [row for row in self.rows if row["cell"] == cell.name and row["metric"] == metric]

    def unlike(self, metric: str, one: Cell, other: Cell) -> list[str]:
        """Options in which two cells differ and by which `metric` means something else in each."""
        return [name for name in self.yardsticks.get(metric, ()) if one.options.get(name) != other.options.get(name)]


def shown(value: Any) -> str:
    """An option's value as text; `default` where it was not given."""
    return "default" if value is None else str(value)


def axis_values(cell: Cell, axes: Sequence[str]) -> dict[str, str]:
    """The cell's value on every axis, given or not, as text."""
    return {name: shown(cell.options[name]) for name in axes}


def read_rows(folder: Path, cell: Cell, axes: Sequence[str], *, seed: int) -> list[dict[str, Any]]:
    """What the run in `folder` measured, a row a metric: before, after, difference and its standard error over held-out
    sequences, and the seconds and tokens of its training; none when it is not finished."""
    try:
        result = json.loads((folder / "evaluation.json").read_text())
    except FileNotFoundError:
        return []
    step = result["stages"].get("step", {})
    cost = {"seconds": step.get("seconds"), "tokens": step.get("tokens")}
    return [
        {"cell": cell.name, **axis_values(cell, axes), "seed": seed, "metric": metric, **numbers, **cost}
        for metric, numbers in result["metrics"].items()
    ]


def write_rows(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Rows as CSV, tidy: one measured value a row, a column for everything that tells it from the others."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(name for row in rows for name in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(path, text.getvalue().encode())
