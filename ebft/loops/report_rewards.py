"""The rewards of all rollouts over the training steps, as one histogram a column of steps."""

from __future__ import annotations

import csv
import math
from collections import Counter
from pathlib import Path
from statistics import median

from ebft.loops.report_frame import BOTTOM, TOP, Frame

_COLUMNS, _BINS = 48, 20


def read_rewards(path: Path) -> tuple[list[int], list[list[float]]]:
    """The steps of `rewards.csv` in order, and the finite rewards of each; nothing where there is no such file.

    A torn or unreadable cell is left out; of a step that is there twice the later row counts.
    """
    if not path.is_file():
        return [], []
    with path.open(newline="", encoding="utf-8", errors="replace") as file:
        rows = list(csv.reader(file))[1:]
    found = {}
    for row in rows:
        step, *cells = map(_float, row or [""])
        values = [value for value in cells if math.isfinite(value)]
        if math.isfinite(step) and values:
            found[int(step)] = values
    steps = sorted(found)
    return steps, [found[step] for step in steps]


def histogram(
    steps: list[int], rewards: list[list[float]], frame: Frame, *, columns: int = _COLUMNS, bins: int = _BINS
) -> list[tuple[int, int, int, float]]:
    """The cells that are not empty: (first step, last step, bin from below, share of the column's rewards)."""
    size = math.ceil(len(steps) / columns)
    cells = []
    for first in range(0, len(steps), size):
        values = [value for row in rewards[first : first + size] for value in row]
        place = (frame.y_high - frame.y_low) / bins
        counts = Counter(min(bins - 1, int((value - frame.y_low) / place)) for value in values)
        last = min(first + size, len(steps)) - 1
        cells += [(steps[first], steps[last], b, count / len(values)) for b, count in sorted(counts.items())]
    return cells


def rewards_svg(steps: list[int], rewards: list[list[float]]) -> str:
    """One panel: darker where more rollouts have the reward, and the median of every step as a line."""
    around = Frame.around(steps, [value for row in rewards for value in row])
    frame = Frame(steps[0] - 0.5, steps[-1] + 0.5, around.y_low, around.y_high)
    cells = histogram(steps, rewards, frame)
    height = (BOTTOM - TOP) / _BINS
    top = max(share for *_, share in cells)
    marks = []
    for first, last, b, share in cells:
        left, right = frame.x(first - 0.5), frame.x(last + 0.5)
        place = f'x="{left:.1f}" y="{BOTTOM - (b + 1) * height:.1f}" width="{right - left:.2f}" height="{height:.2f}"'
        marks.append(f'<rect class="cell" {place} fill-opacity="{0.08 + 0.82 * share / top:.2f}"/>')
    middle = frame.points(steps, map(median, rewards)) if len(steps) > 1 else []
    marks += [f'<path class="median" d="M{"L".join(middle)}"/>'] if middle else []
    return frame.svg(marks, label="Distribution of the rewards over the training steps")


def _float(cell: str) -> float:
    try:
        return float(cell)
    except ValueError:
        return math.nan
