"""A plot for every axis of an ablation."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from ebft.files import write_atomically
from ebft.loops.ablation.results import Cell, Results, axis_values
from ebft.loops.palette import COLOURS, colours

# (cell, metric) -> value, half the width of its interval (NaN for none), the single values behind it
Values = Callable[[Cell, str], tuple[float, float, Sequence[float]] | None]

_LINES = ("s-", "o--", "^:")  # marker and dashes, another one when the colours are used up


def draw_axes(results: Results, values: Values, out: Path, *, metrics: Sequence[str], ylabel: str) -> list[Path]:
    """`axis-<name>.png` for every axis along which cells differ: a panel a metric, a line a setting of the others."""
    paths = []
    for axis in results.axes:
        lines = axis_lines(results, axis)
        if lines and metrics:
            path = out / f"axis-{axis}.png"
            write_atomically(path, _png(results, values, axis, lines, metrics=metrics, ylabel=ylabel))
            paths.append(path)
    return paths


def axis_lines(results: Results, axis: str) -> dict[str, list[Cell]]:
    """Cells that differ in one axis only, by what the other axes are; groups of a single cell are no line."""
    groups: dict[str, list[Cell]] = {}
    for cell in results.cells:
        rest = {name: value for name, value in axis_values(cell, results.axes).items() if name != axis}
        groups.setdefault(", ".join(f"{name}={value}" for name, value in rest.items()), []).append(cell)
    return {name: cells for name, cells in groups.items() if len(cells) > 1}


def _png(
    results: Results,
    values: Values,
    axis: str,
    lines: Mapping[str, Sequence[Cell]],
    *,
    metrics: Sequence[str],
    ylabel: str,
) -> bytes:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    places = list(dict.fromkeys(axis_values(cell, results.axes)[axis] for cells in lines.values() for cell in cells))
    columns = min(3, len(metrics))
    rows = math.ceil(len(metrics) / columns)
    figure = Figure(figsize=(1 + 3.8 * columns, 0.8 + 2.7 * rows), dpi=120, layout="constrained")
    shades = colours(len(lines))
    for number, metric in enumerate(metrics):
        axes = figure.add_subplot(rows, columns, number + 1)
        for line, (name, cells) in enumerate(lines.items()):
            shift = (line - (len(lines) - 1) / 2) * min(0.12, 0.5 / len(lines))
            found = [(axis_values(cell, results.axes)[axis], values(cell, metric)) for cell in cells]
            known = [(places.index(place) + shift, *value) for place, value in found if value is not None]
            colour = shades[line]
            for x, _, _, single in known:
                axes.plot([x] * len(single), single, "o", markersize=3, alpha=0.35, markeredgewidth=0, color=colour)
            axes.errorbar(
                [x for x, *_ in known],
                [mean for _, mean, _, _ in known],
                yerr=[half if math.isfinite(half) else 0.0 for _, _, half, _ in known],
                fmt=_LINES[line // len(COLOURS) % len(_LINES)],
                markersize=4, linewidth=1, capsize=3, color=colour, label=name,
            )  # fmt: skip
        title = metric.replace("_", " ")
        if axis in results.yardsticks.get(metric, ()):
            title += "\n(another measure for every value)"
        axes.set_title(title, fontsize=10, loc="left", parse_math=False)
        axes.set_xticks(range(len(places)), places, fontsize=8, parse_math=False)
        axes.set_xlim(-0.5, len(places) - 0.5)
        axes.set_xlabel(axis, fontsize=8, parse_math=False)
        axes.axhline(0, color="0.8", linewidth=0.8, zorder=0)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8)
    figure.supylabel(ylabel, fontsize=9)
    if len(lines) > 1:
        handles, labels = figure.axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", fontsize=8, ncols=2)
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    return buffer.getvalue()
