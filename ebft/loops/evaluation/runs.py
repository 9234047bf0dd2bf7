"""Runs side by side, from what they left in their folders: options that differ, held-out metrics, curves."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ebft.errors import UsageError
from ebft.loops.evaluation.show import Grid
from ebft.loops.history import HELD_OUT
from ebft.loops.palette import colours
from ebft.loops.report_curves import Curve, build_curves, read_metrics
from ebft.loops.report_verdict import aligned

# The curves that are drawn, those of them that the runs have.
CURVES = ("feature_matching_loss", "cross_entropy", "reward", "kl", "distinct_rollouts", "gradient_norm")


@dataclass(frozen=True)
class Run:
    """What a run left: its options, its held-out metrics before and after, its curves and those on held-out data."""

    name: str
    options: Mapping[str, Any]
    metrics: Mapping[str, Mapping[str, float]]
    curves: Mapping[str, Curve]
    held_out: Mapping[str, Curve]


def read_run(folder: str, options: Mapping[str, Any]) -> Run:
    """A run from its folder; one that goes on has no metrics before and after yet.

    Raises:
        UsageError: its metrics.csv or evaluation.json cannot be read.
    """
    path = Path(folder) / "evaluation.json"
    metrics: Mapping[str, Any] = {}
    if path.is_file():
        try:
            metrics = json.loads(path.read_text(encoding="utf-8"))["metrics"]
        except (ValueError, KeyError, TypeError) as error:
            raise UsageError(f"{path} does not hold the held-out metrics of a run ({error})") from error
    curves = {curve.name: curve for curve in build_curves(*read_metrics(Path(folder) / "metrics.csv"))}
    held_out = Path(folder) / HELD_OUT
    found = {c.name: c for c in build_curves(*read_metrics(held_out))} if held_out.is_file() else {}
    return Run(folder, options, metrics, curves, found)


def run_grids(runs: Sequence[Run]) -> list[Grid]:
    """Options that differ, and a line for each held-out metric of each run."""
    names = list(dict.fromkeys(name for run in runs for name in run.options))
    differing = [n for n in names if len({json.dumps(run.options.get(n), default=str) for run in runs}) > 1]
    found = []
    if differing and len(runs) > 1:
        rows = [[n.replace("_", "-"), *(_text(run.options.get(n)) for run in runs)] for n in differing]
        found.append(Grid("Options that differ", ["", *short_names([run.name for run in runs])], rows))
    metrics = list(dict.fromkeys(name for run in runs for name in run.metrics))
    rows = []
    for metric in metrics:
        for run, name in zip(runs, short_names([run.name for run in runs]), strict=True):
            if metric in run.metrics:
                rows.append([metric.replace("_", " "), name, *_before_after(run.metrics[metric])])
    if rows:
        header = ["metric", "run", "before", "after", "change ± s.e."]
        found.append(Grid("Held-out, before and after each run", header, rows))
    return found


def run_entries(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """The same for a table: run, metric, and before, after, difference, standard_error."""
    return [{"policy": run.name, "metric": metric, **values} for run in runs for metric, values in run.metrics.items()]


def short_names(names: Sequence[str]) -> list[str]:
    """The last part of every path, or as many parts as tell them apart."""
    parts = [Path(name).parts or (name,) for name in names]
    for count in range(1, max(map(len, parts)) + 1):
        found = ["/".join(p[-count:]) for p in parts]
        if len(set(found)) == len(set(names)):
            return found
    return list(names)


def curves_png(runs: Sequence[Run], *, title: str) -> bytes:
    """A panel for each curve, a colour for each run; dots are steps, squares held-out measurements."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    panels = [name for name in CURVES if any(name in run.curves or name in run.held_out for run in runs)]
    rows = max(1, math.ceil(len(panels) / 3))
    figure = Figure(figsize=(12, 0.8 + 2.7 * rows), dpi=120, layout="constrained")
    figure.suptitle(title, fontsize=11, parse_math=False)
    for number, name in enumerate(panels):
        axes = figure.add_subplot(rows, 3, number + 1)
        for run, label, colour in zip(runs, short_names([r.name for r in runs]), colours(len(runs)), strict=True):
            if curve := run.curves.get(name):
                axes.plot(curve.steps, curve.raw, "o", markersize=3, markeredgewidth=0, alpha=0.4, color=colour)
                axes.plot(curve.steps, curve.smooth, linewidth=1.5, color=colour, label=label)
            if held := run.held_out.get(name):
                axes.plot(held.steps, held.raw, "s--", markersize=4, linewidth=0.9, color=colour)
        axes.set_title(name.replace("_", " "), fontsize=9, loc="left")
        axes.set_xlabel("step", fontsize=8)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25, linewidth=0.6)
        axes.tick_params(labelsize=8)
        if number == 0:
            for text in axes.legend(fontsize=7, frameon=False).get_texts():
                text.set_parse_math(False)
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    return buffer.getvalue()


def _before_after(values: Mapping[str, float]) -> list[str]:
    before, after, difference, error = (
        float("nan") if values.get(key) is None else values[key]
        for key in ("before", "after", "difference", "standard_error")
    )
    sign = "+" if difference > 0 else ""
    change = f"{sign}{aligned(difference, error)} ± {aligned(error, error)}"
    return [aligned(before, error), aligned(after, error), change]


def _text(value: Any) -> str:
    return "–" if value is None else str(value)
