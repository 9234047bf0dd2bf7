"""Training curves: read `metrics.csv`, smooth, and draw the same panels as inline SVG and as PNG."""

from __future__ import annotations

import csv
import io
import math
from dataclasses import dataclass, replace
from pathlib import Path

from ebft.errors import UsageError
from ebft.loops.report_frame import Frame

TIME_PREFIX = "time_"
_LIMIT = (
    1e100  # beyond any float32 metric: larger values are treated as missing, so that axis arithmetic cannot overflow
)
_EXACT = {"learning_rate"}  # set, not measured: smoothing would only lag behind
_MAX_POINTS = 1000  # drawn in a panel; a longer run is thinned evenly after smoothing


@dataclass(frozen=True)
class Curve:
    """One metric over the training steps: the finite values only, `missing` counts the others."""

    name: str
    steps: list[int]
    raw: list[float]
    smooth: list[float]
    missing: int

    @property
    def title(self) -> str:
        return self.name.replace("_", " ")


def read_metrics(path: Path) -> tuple[list[int], dict[str, list[float]]]:
    """Read `metrics.csv`: the steps in order, and a column of equal length for every other name.

    An empty, cut or non-numeric cell is NaN (a run that was killed leaves a torn last row). A step that was written
    twice, by a run that was resumed from an older checkpoint, counts once: the later row wins.

    Raises:
        UsageError: the file is missing, or its first column is not `step`.
    """
    if not path.is_file():
        raise UsageError(f"no {path.name} in {str(path.parent)!r}: give the folder of a run that has started to train")
    with path.open(newline="", encoding="utf-8", errors="replace") as file:
        header, *rows = list(csv.reader(file)) or [["step"]]
    if header[:1] != ["step"]:
        raise UsageError(
            f"first column of {str(path)!r} is {header[:1]}, expected 'step': is this a run's metrics.csv?"
        )
    by_step = {}
    for row in rows:
        cells = [_float(cell) for cell in row] + [math.nan] * (len(header) - len(row))
        if math.isfinite(cells[0]):
            by_step[int(cells[0])] = cells
    steps = sorted(by_step)
    return steps, {name: [by_step[s][i] for s in steps] for i, name in enumerate(header) if i > 0}


def _float(cell: str) -> float:
    try:
        value = float(cell)
    except ValueError:
        return math.nan
    return value if abs(value) < _LIMIT else math.nan


def smoothing_span(count: int) -> float:
    """Span of the smoothing, in steps, for a run of `count` steps: a fifteenth of the run, at least 4."""
    return max(4.0, count / 15)


def smooth(values: list[float], *, span: float) -> list[float]:
    """Exponentially weighted mean of the values so far, with decay 1 − 2/(span + 1).

    The weights are normalised to sum to one at every step, so the first values are not pulled towards zero.
    """
    decay = 1 - 2 / (span + 1)
    total = weight = 0.0
    result = []
    for value in values:
        total = decay * total + value
        weight = decay * weight + 1
        result.append(total / weight)
    return result


def build_curves(steps: list[int], columns: dict[str, list[float]]) -> list[Curve]:
    """A curve for every column that has a finite value, in the order of the file."""
    curves = []
    for name, values in columns.items():
        known = [(s, v) for s, v in zip(steps, values, strict=True) if math.isfinite(v)]
        if known:
            raw = [v for _, v in known]
            smoothed = raw if name in _EXACT else smooth(raw, span=smoothing_span(len(steps)))
            curves.append(Curve(name, [s for s, _ in known], raw, smoothed, len(values) - len(known)))
    return curves


def held_out_curves(path: Path) -> list[Curve]:
    """The held-out measurements during training, as they are; none where there is no such file."""
    if not path.is_file():
        return []
    return [
        replace(curve, name=f"held_out_{curve.name}", smooth=curve.raw)
        for curve in build_curves(*read_metrics(path))
        if not curve.name.endswith(("_change", "_standard_error"))
    ]


def curve_svg(curve: Curve) -> str:
    """One panel as an inline SVG element: raw points light, smoothed line on top; colours come from the page's CSS."""
    frame = Frame.around(curve.steps, curve.raw)  # a weighted mean never leaves the range of the raw values
    thin = slice(None, None, math.ceil(len(curve.steps) / _MAX_POINTS))
    points = frame.points(curve.steps[thin], curve.raw[thin])
    line = frame.points(curve.steps[thin], curve.smooth[thin])
    marks = [f'<path class="raw" d="M{"h0M".join(points)}h0"/>', f'<path class="smooth" d="M{"L".join(line)}h0"/>']
    return frame.svg(marks, label=f"{curve.title} over the training steps")


def curves_png(curves: list[Curve], *, title: str) -> bytes:
    """The panels as one PNG image, three in a row. Touches no global state of matplotlib."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = max(1, math.ceil(len(curves) / 3))
    figure = Figure(figsize=(12, 0.6 + 2.5 * rows), dpi=120, layout="constrained")
    figure.suptitle(title, fontsize=13, parse_math=False)
    figure.supxlabel("step", fontsize=9)
    if not curves:
        figure.text(0.5, 0.5, "no finished step", ha="center", color="0.4")
    for i, curve in enumerate(curves):
        axes = figure.add_subplot(rows, 3, i + 1)
        axes.plot(curve.steps, curve.raw, "o", markersize=2.5, markeredgewidth=0, alpha=0.35, color="#2a5db0")
        axes.plot(curve.steps, curve.smooth, linewidth=1.6, color="#2a5db0")
        axes.set_title(curve.title, fontsize=10, loc="left", parse_math=False)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25, linewidth=0.6)
        axes.tick_params(labelsize=8)
        axes.margins(x=0.02)
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    return buffer.getvalue()
