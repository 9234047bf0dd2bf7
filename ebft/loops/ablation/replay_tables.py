"""Cells of a replay side by side."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from torch import Tensor

from ebft.files import write_atomically
from ebft.loops.ablation.intervals import reach
from ebft.loops.ablation.plots import draw_axes
from ebft.loops.ablation.results import Cell, Results, write_rows
from ebft.loops.ablation.tables import NO_COMPARISON, markdown_table, with_error

_AT_ONCE = 3  # metrics in one table, so that it fits a terminal of 100 columns


def replay_tables(results: Results) -> list[Table]:
    """Value ± standard error of every metric and cell, a few metrics a table."""
    metrics, tables = results.metrics(), []
    for begin in range(0, len(metrics), _AT_ONCE):
        some = metrics[begin : begin + _AT_ONCE]
        table = Table(title="On saved rollouts: value ± standard error over sequences", title_justify="left")
        table.add_column("cell", overflow="fold", min_width=15)
        for metric in some:
            table.add_column(metric.replace("_", " "), justify="right")
        for cell in results.cells:
            table.add_row(cell.name, *(_value(results, cell, metric) for metric in some))
        tables.append(table)
    return tables


def replay_markdown(results: Results, correlation: Tensor, *, confidence: float = 0.95) -> str:
    """Values, paired differences to the first cell, and correlations, in Markdown."""
    metrics = results.metrics()
    header = ["cell", *(metric.replace("_", " ") for metric in metrics)]
    values = [[cell.name, *(_value(results, cell, m) for m in metrics)] for cell in results.cells]
    changes = [
        [cell.name, *(_difference(results, cell, m, confidence=confidence) for m in metrics)]
        for cell in results.cells[1:]
    ]
    names = [cell.name for cell in results.cells]
    matrix = [[name, *(f"{x:.2f}" for x in row)] for name, row in zip(names, correlation.tolist(), strict=True)]
    numbered = ["", *(str(number) for number in range(1, len(names) + 1))]
    parts = [
        "## Values\n\n± is the standard error over sequences, by the jackknife.\n\n" + markdown_table(header, values),
        f"## Differences to {names[0]}\n\nPaired by sequence; ± is the {confidence:.0%} t-interval. {NO_COMPARISON}:"
        " another unit or feature map, no comparison.\n\n" + markdown_table(header, changes),
        "## Correlation of the advantages\n\n"
        + markdown_table(numbered, [[f"{n} {row[0]}", *row[1:]] for n, row in enumerate(matrix, start=1)]),
    ]
    return "\n".join(parts)


def correlation_rows(names: Sequence[str], correlation: Tensor) -> list[dict[str, Any]]:
    """The matrix [C,C], a pair a row."""
    return [
        {"cell": one, "other": other, "correlation": value}
        for one, row in zip(names, correlation.tolist(), strict=True)
        for other, value in zip(names, row, strict=True)
    ]


def draw_correlations(names: Sequence[str], correlation: Tensor) -> bytes:
    """The matrix as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    size = 2.5 + 0.45 * len(names)
    figure = Figure(figsize=(size + 1.5, size), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(correlation.numpy(), vmin=-1, vmax=1, cmap="RdBu_r")
    labels = [f"{number} {name}" for number, name in enumerate(names, start=1)]
    axes.set_yticks(range(len(names)), labels, fontsize=7, parse_math=False)
    axes.set_xticks(range(len(names)), [str(number) for number in range(1, len(names) + 1)], fontsize=7)
    if len(names) <= 16:
        for i, row in enumerate(correlation.tolist()):
            for j, value in enumerate(row):
                axes.text(j, i, f"{value:.2f}", ha="center", va="center", fontsize=6)
    axes.set_title("correlation of advantages", fontsize=10, loc="left")
    figure.colorbar(image, shrink=0.7)
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    return buffer.getvalue()


def write_replay(results: Results, correlation: Tensor, out: Path, console: Console) -> None:
    """Tables, numbers and plots into a folder."""
    write_rows(results.rows, out / "results.csv")
    names = [cell.name for cell in results.cells]
    write_rows(correlation_rows(names, correlation), out / "correlations.csv")
    write_atomically(out / "results.md", replay_markdown(results, correlation).encode())
    write_atomically(out / "correlations.png", draw_correlations(names, correlation))
    plots = draw_axes(results, partial(_point, results), out, metrics=results.metrics(), ylabel="on saved rollouts")
    meanings = {
        "results.csv": "a row for every cell and metric",
        "results.md": "cells side by side",
        "correlations.csv": "of advantages between cells (also correlations.png)",
    }
    for path, meaning in {
        **{out / n: m for n, m in meanings.items()},
        **dict.fromkeys(plots, "a panel a metric"),
    }.items():
        console.print(f"{path}  {meaning}", soft_wrap=True, highlight=False)


def _row(results: Results, cell: Cell, metric: str) -> Mapping[str, Any] | None:
    return next(iter(results.of(cell, metric)), None)


def _value(results: Results, cell: Cell, metric: str) -> str:
    row = _row(results, cell, metric)
    return "" if row is None else with_error(row["value"], row["standard_error"])


def _difference(results: Results, cell: Cell, metric: str, *, confidence: float) -> str:
    row = _row(results, cell, metric)
    if row is None or row["difference"] is None:
        return ""
    if results.unlike(metric, results.cells[0], cell):
        return NO_COMPARISON
    return with_error(row["difference"], reach(row["sequences"] - 1, confidence) * row["difference_error"], sign=True)


def _point(results: Results, cell: Cell, metric: str) -> tuple[float, float, Sequence[float]] | None:
    for row in results.of(cell, metric):
        return row["value"], reach(row["sequences"] - 1) * row["standard_error"], ()
    return None
