"""The results of `benchmarks/features.py` as Markdown and as one plot."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.feature_maps import MEANING
from benchmarks.sampling_report import MIB, table
from ebft.files import write_atomically

_COLOURS = {"none": "#4c72b0", "group": "#dd8452", "sample": "#937860", "population": "#55a868"}


def write(out: Path, plot: Path, results: dict[str, Any]) -> None:
    """OUT/features.json, OUT/features.md and, once there are gradients, the plot."""
    out.mkdir(parents=True, exist_ok=True)
    write_atomically(out / "features.json", (json.dumps(results, indent=2) + "\n").encode())
    write_atomically(out / "features.md", markdown(results).encode())
    if any("snr2" in row for row in results["signal"]):
        plot.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(plot, png(results))


def read(out: Path) -> dict[str, Any]:
    """What OUT/features.json holds; nothing when there is none."""
    path = out / "features.json"
    return json.loads(path.read_text()) if path.is_file() else {}


def markdown(results: dict[str, Any]) -> str:
    """Where it was measured, and one table for each kind of result there is."""
    machine, choice = results["machine"], results["choice"]
    where = machine["device"] if machine["device"] != "cpu" else machine["processor"]
    parts = [
        f"{choice['policy']} computed in {results['compute_dtype']}; {where}, {machine['threads']} threads, torch"
        f" {machine['versions']['torch']}.\n"
    ]
    if results["hidden"]:
        parts += ["## Hidden states: one comb against N full passes\n", hidden(results["hidden"])]
    if results["sbert"]:
        parts += ["## Sentences: distinct strings against all\n", sbert(results["sbert"])]
    if results["signal"]:
        parts += ["## Which features carry the signal?\n", signal_text(results), signal(results["signal"])]
    return "\n".join(parts)


def hidden(rows: Sequence[dict[str, Any]]) -> str:
    """A line for every setting."""
    head = ("setting", "full passes s", "comb s", "speed-up", "full passes MiB", "comb MiB", "smallest cosine")
    lines = [
        (
            *(row["setting"], f"{row['full_s']:.3g}", f"{row['comb_s']:.3g}", f"{row['full_s'] / row['comb_s']:.2f}×"),
            *(_mib(row, "full_peak"), _mib(row, "comb_peak"), f"{row['smallest_cosine']:.4f}"),
        )
        for row in rows
    ]
    return table(head, lines)


def sbert(rows: Sequence[dict[str, Any]]) -> str:
    """A line for every source and context."""
    head = ("text", "context tokens", "strings", "distinct", "duplicates", "all s", "distinct s", "time saved")
    lines = [
        (
            *(row["source"], str(row["context_tokens"]), str(row["strings"]), str(row["distinct"])),
            *(f"{1 - row['distinct'] / row['strings']:.1%}", f"{row['all_s']:.3g}", f"{row['distinct_s']:.3g}"),
            f"{1 - row['distinct_s'] / row['all_s']:.1%}",
        )
        for row in rows
    ]
    return table(head, lines)


def signal_text(results: dict[str, Any]) -> str:
    """What was drawn, what the columns are and which map is which."""
    draw = results["draw"]
    maps = "".join(f"* `{name}`: {meaning}\n" for name, meaning in MEANING.items())
    return (
        f"{draw['sequences']} held-out rows of {draw['length']} tokens from each text, an anchor every"
        f" {draw['stride']} tokens from {draw['first']} on, {draw['resamples']} independent sets of N ="
        f" {draw['rollouts']} rollouts of {draw['horizon']} tokens at temperature 1, the same for all maps; diversity"
        " 1. Columns, as `benchmarks/feature_signal.py` defines them: correlation of the reward with token agreement"
        f" inside a group; how often the planted text is the most typical of N (1/N = {1 / draw['rollouts']:.2f} when a"
        " map sees no difference); mean standard deviation of the rewards of a group; share of groups without any; SNR²"
        f" of the policy gradient over all anchors of a text, in LoRA adapters of rank {results['choice']['lora']} that"
        " act from the last token of the prefix on. ± one standard error.\n\n" + maps
    )


def signal(rows: Sequence[dict[str, Any]]) -> str:
    """A table for each text, a line for each map and whitening."""
    head = ("features", "whitening", "agreement", "planted wins", "spread", "flat groups", "SNR²")
    parts = []
    for source in dict.fromkeys(row["source"] for row in rows):
        lines = [
            (
                *(row["features"], row["whitening"], _estimate(row["agreement"]), _estimate(row["planted"])),
                *(f"{row['spread']:.3g}", f"{row['flat']:.1%}", _estimate(row.get("snr2", (math.nan, math.nan)))),
            )
            for row in rows
            if row["source"] == source
        ]
        parts.append(f"### {source}\n\n{table(head, lines)}")
    return "\n".join(parts)


def png(results: dict[str, Any]) -> bytes:
    """SNR² of every map and whitening, a panel for each text. Touches no global state of matplotlib."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = [row for row in results["signal"] if "snr2" in row]
    sources, maps = (list(dict.fromkeys(row[name] for row in rows)) for name in ("source", "features"))
    whitenings = list(dict.fromkeys(row["whitening"] for row in rows))
    figure = Figure(figsize=(5 * len(sources) + 1, 0.38 * len(maps) + 1.5), layout="constrained")
    for number, source in enumerate(sources):
        axes = figure.add_subplot(1, len(sources), number + 1)
        axes.axvline(0, color="#999999", linewidth=0.8)
        for shift, whitening in enumerate(whitenings):
            shown = [row for row in rows if row["source"] == source and row["whitening"] == whitening]
            places = [-maps.index(row["features"]) - 0.18 * (shift - (len(whitenings) - 1) / 2) for row in shown]
            axes.errorbar(
                [row["snr2"][0] for row in shown],
                places,
                xerr=[0 if math.isnan(row["snr2"][1]) else row["snr2"][1] for row in shown],
                fmt="o",
                markersize=4,
                linewidth=1,
                color=_COLOURS.get(whitening),
                label=whitening,
            )
        axes.set_yticks([-i for i in range(len(maps))], maps if number == 0 else [""] * len(maps))
        axes.set_title(source)
        axes.set_xlabel("SNR² of the policy gradient")
        axes.grid(axis="x", linewidth=0.3)
        if number == len(sources) - 1:
            axes.legend(title="whitening", fontsize=8)
    FigureCanvasAgg(figure)
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=110)
    return content.getvalue()


def _estimate(value: Sequence[float]) -> str:
    if math.isnan(value[0]):
        return "–"
    return f"{value[0]:.3f}" if math.isnan(value[1]) else f"{value[0]:.3f} ± {value[1]:.3f}"


def _mib(row: dict[str, Any], name: str) -> str:
    return f"{row[name] / MIB:.0f}" if row.get(name) else "–"
