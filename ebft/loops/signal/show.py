"""The results of a measurement as a table on the screen, in Markdown and as a plot."""

from __future__ import annotations

from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ebft.files import write_atomically

# Statistic -> column, digits.
_COLUMNS = {
    "signal_to_noise": ("SNR² of a batch", 4),
    "signal_to_noise_within": ("within", 4),
    "signal_to_noise_per_million": ("SNR² per 10⁶ token-forwards", 3),
    "signal_to_noise_within_per_million": ("within, per 10⁶", 3),
    "gain": ("SNR² over reference's", 2),
    "cosine_to_reference": ("cos. to reference", 2),
    "towards_reference_within": ("towards reference, within", 4),
    "cosine_to_cross_entropy": ("cos. to cross-entropy", 2),
    "noise_ratio": ("noise over reference's", 3),
}
LEGEND = (
    "SNR²: E⟨g_i, g_j⟩/(E‖g‖² - E⟨g_i, g_j⟩) over independent batches; within: over rollouts drawn anew for the same"
    " sequences. Towards reference: signal along the reference's mean gradient only. Noise over reference's: of"
    " rollouts, for configurations with the same expected gradient. ± 95 % jackknife intervals over batches."
)


def cells(row: Mapping[str, Any]) -> list[str]:
    """The cells of one configuration's row: token-forwards of a batch, then the statistics."""
    texts = [f"{row['token_forwards']:,.0f}"]
    for label, (_, digits) in _COLUMNS.items():
        texts.append(interval(row[label], digits))
    return texts


def interval(estimate: Mapping[str, float | None], digits: int) -> str:
    """`value ± reach`, without what is not defined."""
    value, high = estimate["value"], estimate["high"]
    if value is None:
        return "–"
    return f"{value:.{digits}f}" + ("" if high is None else f" ± {high - value:.{digits}f}")


def headings() -> list[str]:
    """Of the table's columns."""
    return ["configuration", "token-forwards", *(title for title, _ in _COLUMNS.values())]


def markdown(result: Mapping[str, Any]) -> str:
    """The table and its legend."""
    lines = ["| " + " | ".join(headings()) + " |", "|---" + "|---:" * (len(headings()) - 1) + "|"]
    lines += ["| " + " | ".join([name, *cells(row)]) + " |" for name, row in result["rows"].items()]
    size = f"{result['batches']} batches, {result['replicates']} replicates, {result['weights']:,} weights"
    return "\n".join(lines) + f"\n\n{size}; reference: {result['reference']}. {LEGEND}\n"


def print_table(console: Console, result: Mapping[str, Any]) -> None:
    """The same on the screen."""
    table = Table(
        title=f"Signal over {result['batches']} batches; reference: {result['reference']}", title_justify="left"
    )
    for number, title in enumerate(headings()):
        table.add_column(title, justify="right" if number else "left")
    for name, row in result["rows"].items():
        table.add_row(name, *cells(row))
    console.print(table)
    console.print(LEGEND, highlight=False)


def draw_plot(result: Mapping[str, Any], path: Path) -> None:
    """Signal-to-noise² of a batch, total and within, with intervals, a line for each configuration."""
    from matplotlib.figure import Figure

    rows = result["rows"]
    figure = Figure(figsize=(9, 1.2 + 0.3 * len(rows)), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    kinds = {"signal_to_noise": "over batches", "signal_to_noise_within": "rollouts of the same sequences"}
    for axis, (label, title) in zip(axes, kinds.items(), strict=True):
        for place, row in enumerate(rows.values()):
            estimate = row[label]
            if estimate["value"] is None:
                continue
            low, high = estimate["low"], estimate["high"]
            reach = None if low is None else [[estimate["value"] - low], [high - estimate["value"]]]
            axis.errorbar(estimate["value"], place, xerr=reach, fmt="o", color="tab:blue", markersize=4, capsize=2)
        axis.axvline(0, color="grey", linewidth=0.8)
        axis.set_xscale("symlog", linthresh=0.01)
        axis.set_title(f"signal-to-noise², {title}", fontsize=9)
        axis.grid(alpha=0.3)
    axes[0].set_yticks(range(len(rows)), list(rows), fontsize=8)
    axes[0].invert_yaxis()
    image = BytesIO()
    figure.savefig(image, dpi=120)
    write_atomically(path, image.getvalue())
