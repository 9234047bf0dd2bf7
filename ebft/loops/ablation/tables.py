"""Cells side by side: means with intervals, and differences to the first cell that are paired where they can be."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from ebft.loops.ablation.intervals import Interval, paired_interval, t_interval
from ebft.loops.ablation.results import Cell, Results
from ebft.loops.report_verdict import aligned

NO_COMPARISON = "–"
HEADER = ("cell", "seeds", "before", "after", "change", "vs. first")


@dataclass(frozen=True)
class Line:
    """One cell under one metric.

    Attributes:
        before, after: means over the seeds.
        change: after - before, with its interval over the seeds.
        against: change less that of the first cell, paired by seed; None for that cell itself and where the two do not
            measure the same.
        unlike: the options because of which they do not.
    """

    cell: Cell
    before: float
    after: float
    change: Interval
    against: Interval | None
    unlike: Sequence[str]


def compare(results: Results, metric: str, *, confidence: float = 0.95) -> list[Line]:
    """A line for every cell that has a finished run."""
    base, lines = results.cells[0], []
    first = _by_seed(results.of(base, metric), "difference")
    for cell in results.cells:
        rows = results.of(cell, metric)
        if not rows:
            continue
        changes, unlike = _by_seed(rows, "difference"), results.unlike(metric, base, cell)
        paired = None if cell is base or unlike else paired_interval(changes, first, confidence=confidence)
        before, after = (t_interval([float(row[name]) for row in rows]).mean for name in ("before", "after"))
        change = t_interval(list(changes.values()), confidence=confidence)
        lines.append(Line(cell, before, after, change, paired, unlike))
    return lines


def study_table(results: Results, metric: str, *, confidence: float = 0.95) -> Table:
    """`compare` as a table for the terminal."""
    table = Table(title=metric.replace("_", " "), title_justify="left", caption_justify="left")
    table.add_column("cell", overflow="fold", min_width=15)
    for name in HEADER[1:]:
        table.add_column(name, justify="right")
    lines = compare(results, metric, confidence=confidence)
    for line in lines:
        table.add_row(*_cells(line))
    table.caption = " ".join(remarks(results, metric, lines, confidence=confidence))
    return table


def study_markdown(results: Results, *, confidence: float = 0.95) -> str:
    """Every metric's table, in Markdown."""
    parts = []
    for metric in results.metrics():
        lines = compare(results, metric, confidence=confidence)
        parts.append(
            f"## {metric.replace('_', ' ')}\n\n{markdown_table(HEADER, [_cells(line) for line in lines])}\n"
            + "".join(f"{text}\n" for text in remarks(results, metric, lines, confidence=confidence))
        )
    failed = "".join(f"* {name}: {reason}\n" for name, reason in results.failures.items())
    return "\n".join(parts) + (f"\n## Failed\n\n{failed}" if failed else "")


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown; the first column flush left, the others right."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(text.replace("|", "\\|") for text in line) + " |" for line in lines) + "\n"


def remarks(results: Results, metric: str, lines: Sequence[Line], *, confidence: float = 0.95) -> list[str]:
    """What has to be said with the numbers."""
    counts = {line.change.number for line in lines}
    found = ["vs. first: the change less that of the first cell, paired by seed."] if len(lines) > 1 else []
    if counts - {1}:
        found.append(
            f"± is the {confidence:.0%} t-interval over seeds, which share the held-out text: it says nothing of other"
            " texts."
        )
    if 1 in counts:
        found.append("Where there is one seed only, there is no interval over seeds.")
    unlike = dict.fromkeys(name for line in lines for name in line.unlike)
    if unlike:
        found.append(
            f"{NO_COMPARISON}: {metric.replace('_', ' ')} means something else under another {', '.join(unlike)}."
        )
    return found


def with_error(value: float, error: float, *, sign: bool = False) -> str:
    """`0.123 ± 0.045`, digits down to the second of the error; the value alone where there is none.

    An error that is one of rounding, of equal values, is 0.
    """
    error = 0.0 if error < 1e-12 * abs(value) else error
    text = ("+" if sign and value > 0 else "") + aligned(value, error)
    return f"{text} ± {aligned(error, error)}" if math.isfinite(error) else text


def _cells(line: Line) -> list[str]:
    against = "" if line.against is None else with_error(line.against.mean, line.against.half_width, sign=True)
    if line.unlike:
        against = NO_COMPARISON
    elif line.against is not None and line.against.number == 0:
        against = "no shared seed"
    elif line.against is not None and line.against.number != line.change.number:
        against += f" ({line.against.number} seeds)"
    numbers = (aligned(line.before, line.change.half_width), aligned(line.after, line.change.half_width))
    change = with_error(line.change.mean, line.change.half_width, sign=True)
    return [line.cell.name, str(line.change.number), *numbers, change, against]


def _by_seed(rows: Sequence[Mapping[str, Any]], name: str) -> dict[Any, float]:
    return {row["seed"]: float(row[name]) for row in rows}
