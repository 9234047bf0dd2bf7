"""The paper's Figures 1 and 2 for a study: losses over training, feature matching over the horizon."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from ebft.loops.ablation.intervals import t_interval
from ebft.loops.evaluation import quantities as names
from ebft.loops.evaluation.run import SEQUENCES
from ebft.loops.palette import colours
from ebft.loops.study.arms import ARMS, BASE
from ebft.loops.study.measured import Found

CURVES = {"cross_entropy": "cross-entropy", "feature_matching_loss": "feature-matching loss"}

# x -> values at x, one a seed
Points = Mapping[float, Sequence[float]]


def training_points(found: Found, arm: str, metric: str) -> Points:
    """The metric on the validation half after so many examples, by seed."""
    points: dict[float, list[float]] = {}
    for by_metric in found.curves.get(arm, {}).values():
        for examples, value in by_metric.get(metric, []):
            if math.isfinite(value):
                points.setdefault(examples, []).append(value)
    return dict(sorted(points.items()))


def horizon_points(found: Found, arm: str, feature_map: str) -> Points:
    """The feature-matching loss on the test half, by tokens of a rollout."""
    tested = list(found.tested.get(arm, {}).values())
    points: dict[float, list[float]] = {}
    for one in tested[:1] if arm == BASE else tested:
        for entry in one.values[SEQUENCES]:
            if entry["metric"] == names.MATCHING and entry["of"] == feature_map and entry["value"] is not None:
                points.setdefault(entry["at"], []).append(entry["value"])
    return dict(sorted(points.items()))


def training_png(found: Found, *, level: float, title: str) -> bytes:
    """Figure 1: cross-entropy and feature-matching loss over the examples seen, mean over seeds with t-intervals.

    Arms that are `verified` measure the cross-entropy of their answers alone: dashed, and said so.
    """

    def lines(metric: str) -> dict[str, Points]:
        return {arm: training_points(found, arm, metric) for arm in found.curves}

    panels = {label: lines(metric) for metric, label in CURVES.items()}
    apart = [arm for arm in found.curves if ARMS[arm].verified]
    return _png(panels, "examples seen", level=level, title=title, apart=apart)


def horizon_png(found: Found, *, level: float, title: str) -> bytes:
    """Figure 2: the feature-matching loss over the tokens of a rollout, a panel a feature map."""
    first = next((one for tested in found.tested.values() for one in tested.values()), None)
    entries = [] if first is None else first.values[SEQUENCES]
    maps = dict.fromkeys(e["of"] for e in entries if e["metric"] == names.MATCHING)
    panels = {
        f"feature-matching loss, {name}": {arm: horizon_points(found, arm, name) for arm in found.tested}
        for name in maps
    }
    return _png(panels, "tokens of a rollout", level=level, title=title, prepare=_logarithmic)


def _png(
    panels: Mapping[str, Mapping[str, Points]], what: str, *, level: float, title: str,
    prepare: Callable = lambda axes, places: None, apart: Collection[str] = (),
) -> bytes:  # fmt: skip
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shades = dict(zip(ARMS, colours(len(ARMS)), strict=True))
    figure = Figure(figsize=(4.8 * max(1, len(panels)), 3.9), dpi=120, layout="constrained")
    figure.suptitle(title, fontsize=11, parse_math=False)
    for number, (heading, lines) in enumerate(panels.items()):
        axes = figure.add_subplot(1, len(panels), number + 1)
        for arm, points in lines.items():
            if not points:
                continue
            intervals = [t_interval(values, confidence=level) for values in points.values()]
            reach = [one.half_width if math.isfinite(one.half_width) else 0.0 for one in intervals]
            means = [one.mean for one in intervals]
            style: dict[str, Any] = {"marker": "o", "markersize": 3, "linewidth": 1.3, "capsize": 2}
            style |= {"linestyle": "--"} if arm in apart else {}
            label = ARMS[arm].title + " (of answers alone)" * (arm in apart)
            axes.errorbar(list(points), means, yerr=reach, label=label, color=shades[arm], **style)
        prepare(axes, sorted({x for points in lines.values() for x in points}))
        axes.set_title(heading, fontsize=9, loc="left", parse_math=False)
        axes.set_xlabel(what, fontsize=8)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25, linewidth=0.6)
        axes.tick_params(labelsize=8)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=7, frameon=False)
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    return buffer.getvalue()


def _logarithmic(axes, places: Sequence[float]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(places, [f"{place:g}" for place in places])
    axes.minorticks_off()
