"""An evaluation, or several, as one picture: the loss over horizons, the entropy over places, best of k."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence

from ebft.loops.evaluation import prompts
from ebft.loops.evaluation import quantities as names
from ebft.loops.evaluation.result import Entry
from ebft.loops.palette import colours


def evaluation_png(entries: Mapping[str, Sequence[Entry]], *, title: str) -> bytes:
    """Panels for what was measured, a colour for each policy; bars and bands are bootstrap intervals.

    Args:
        entries: of each policy, by name.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    first = next(iter(entries.values()))
    panels: list[tuple[str, str, Callable]] = []
    for name in dict.fromkeys(e["of"] for e in first if e["metric"] == names.MATCHING):
        panels.append((f"feature-matching loss, {name}", "tokens of a rollout", _by_horizon(names.MATCHING, name)))
    if any(e["metric"] == names.GAP for e in first):
        if len(entries) == 1:
            panels.append(("entropy of the policy, nats", "place of the token", _entropies))
        panels.append(("entropy on generated less on data, nats", "place of the token", _gap))
    for metric, label in ((prompts.PASS, "pass@k"), (prompts.SENTENCE_CHRF, "chrF, best of k")):
        if any(e["metric"] == metric for e in first):
            panels.append((label, "k", _by_horizon(metric, "")))
    columns = 2 if len(panels) == 4 else min(3, max(1, len(panels)))
    rows = -(-len(panels) // columns) or 1
    figure = Figure(figsize=(4.2 * columns, 0.8 + 2.9 * rows), dpi=120, layout="constrained")
    figure.suptitle(title, fontsize=11, parse_math=False)
    for number, (heading, what, draw) in enumerate(panels):
        axes = figure.add_subplot(rows, columns, number + 1)
        for index, ((policy, own), colour) in enumerate(zip(entries.items(), colours(len(entries)), strict=True)):
            draw(axes, own, policy, colour, index)
        axes.set_title(heading, fontsize=9, loc="left", parse_math=False)
        axes.set_xlabel(what, fontsize=8)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25, linewidth=0.6)
        axes.tick_params(labelsize=8)
        handles, labels = axes.get_legend_handles_labels()
        if len(entries) > 1 or len(handles) > 1:
            for legend in axes.legend(handles, labels, fontsize=7, frameon=False).get_texts():
                legend.set_parse_math(False)
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    return buffer.getvalue()


def _by_horizon(metric: str, of: str) -> Callable:
    def draw(axes, entries: Sequence[Entry], policy: str, colour: str, index: int) -> None:
        own = _known(entries, metric, of)
        _with_bars(axes, own, policy, colour, aside=1.06**index)
        if metric == prompts.PASS:
            axes.set_ylim(bottom=0)
        axes.set_xscale("log", base=2)
        axes.set_xticks([e["at"] for e in own], [str(e["at"]) for e in own])
        axes.minorticks_off()

    return draw


def _entropies(axes, entries: Sequence[Entry], policy: str, colour: str, index: int) -> None:
    kinds = (
        (names.ENTROPY, names.GENERATED, "on generated text", colour),
        (names.ENTROPY, names.DATA, "on data", "#222222"),
        (names.SURPRISAL, names.DATA, "surprisal of data", "#999999"),
    )
    for metric, of, label, shade in kinds:
        own = _known(entries, metric, of)
        if metric == names.SURPRISAL:  # a third band would hide the two that are compared
            axes.plot([e["at"] for e in own], [e["value"] for e in own], color=shade, linewidth=1.0, label=label)
        else:
            _with_band(axes, own, label, shade)


def _gap(axes, entries: Sequence[Entry], policy: str, colour: str, index: int) -> None:
    axes.axhline(0, color="#222222", linewidth=0.8)
    _with_band(axes, _known(entries, names.GAP, ""), policy, colour)


def _with_bars(axes, own: Sequence[Entry], label: str, colour: str, *, aside: float) -> None:
    """On a logarithmic axis; `aside` is a factor that keeps the bars of policies from hiding each other."""
    values = [e["value"] for e in own]
    reach = None
    if all(e["low"] is not None for e in own):
        reach = [[e["value"] - e["low"] for e in own], [e["high"] - e["value"] for e in own]]
        reach = [[max(0.0, r) for r in side] for side in reach]
    style = {"marker": "o", "markersize": 3, "linewidth": 1.3, "capsize": 2, "color": colour, "label": label}
    axes.errorbar([e["at"] * aside for e in own], values, yerr=reach, **style)


def _with_band(axes, own: Sequence[Entry], label: str, colour: str) -> None:
    places = [e["at"] for e in own]
    axes.plot(places, [e["value"] for e in own], color=colour, linewidth=1.3, label=label)
    if all(e["low"] is not None for e in own):
        low, high = [e["low"] for e in own], [e["high"] for e in own]
        axes.fill_between(places, low, high, color=colour, alpha=0.15, linewidth=0)


def _known(entries: Sequence[Entry], metric: str, of: str) -> list[Entry]:
    return [e for e in entries if e["metric"] == metric and e["of"] == of and e["value"] is not None]
