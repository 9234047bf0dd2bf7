"""A study as tables: the paper's Table 1 for this policy, differences, costs and the choice of learning rates."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from ebft.loops.ablation.intervals import Interval, t_interval
from ebft.loops.ablation.tables import markdown_table, with_error
from ebft.loops.evaluation.show import Grid
from ebft.loops.report_frame import number
from ebft.loops.study.arms import ARMS, BASE, WARM
from ebft.loops.study.differences import Difference
from ebft.loops.study.measured import Column, Found

NONE = "–"
FLOOR = 0.02  # of scores from 0 to 1
WIDEST = 4  # columns side by side in a terminal


def over_seeds(found: Found, arm: str, column: Column, *, level: float) -> Interval | None:
    """Mean of a column over the seeds of an arm and its t-interval; None where nothing was measured.

    The base has one policy, and so no interval over seeds.
    """
    values = [v for v in (tested.value(column) for tested in found.tested.get(arm, {}).values()) if v is not None]
    if not values:
        return None
    return t_interval(values[:1] if arm == BASE else values, confidence=level)


def table_one(found: Found, columns: Sequence[Column], *, level: float) -> Grid:
    """A row an arm: its learning rate, and every column with its interval over seeds."""
    rows = []
    for arm, tested in found.tested.items():
        if tested:
            intervals = [over_seeds(found, arm, column, level=level) for column in columns]
            cells = [NONE if one is None else with_error(one.mean, one.half_width) for one in intervals]
            rows.append([ARMS[arm].title, _rate(found, arm), str(1 if arm == BASE else len(tested)), *cells])
    return Grid("", ["method", "lr", "seeds", *(column.title for column in columns)], rows)


def on_the_screen(found: Found, columns: Sequence[Column], *, level: float) -> list[Grid]:
    """Table 1 in parts that fit a terminal."""
    parts = [columns[start : start + WIDEST] for start in range(0, len(columns), WIDEST)]
    return [table_one(found, part, level=level) for part in parts]


def difference_grids(differences: Sequence[Difference]) -> list[Grid]:
    """A matrix a column of Table 1: the row's arm less the column's, ± over seeds, decided ones in bold."""
    grids = []
    for column in dict.fromkeys(d.column for d in differences):
        own = {(d.arm, d.other): d for d in differences if d.column == column}
        others = list(dict.fromkeys(other for _, other in own))
        arms = list(dict.fromkeys(arm for arm, _ in own))
        rows = [[ARMS[arm].title, *(_difference(own.get((arm, other))) for other in others)] for arm in arms]
        grids.append(Grid(f"{column.title} ({column.better} is better)", ["", *(ARMS[o].title for o in others)], rows))
    return grids


def cost_grid(found: Found, *, level: float) -> Grid:
    """Examples, tokens and seconds of one policy's training, and seconds of the search for its learning rate."""
    rows = []
    for arm, by_seed in found.costs.items():
        if by_seed:
            costs = list(by_seed.values())
            seconds = t_interval([cost.seconds for cost in costs], confidence=level)
            tokens = t_interval([float(cost.tokens) for cost in costs], confidence=level)
            examples = f"{costs[0].examples:,}"
            search = found.search.get(arm)
            rows.append(
                [
                    ARMS[arm].title,
                    examples,
                    number(tokens.mean),
                    with_error(seconds.mean, seconds.half_width),
                    NONE if search is None else f"{search:,.0f}",
                ]
            )
    return Grid("", ["method", "examples", "tokens", "seconds", "seconds of search"], rows)


def choice_grid(found: Found) -> Grid:
    """What every learning rate gave on the validation half, and which was chosen."""
    rows = []
    for arm, choice in found.choices.items():
        tried = ", ".join(f"{rate}: {number(value)}" for rate, value in choice["values"].items())
        edge = " (end of the grid)" if choice["edge"] else ""
        sense = f"{choice['better']} {choice['metric'].replace('_', ' ')}"
        rows.append([ARMS[arm].title, sense, tried, f"{choice['lr']:g}{edge}"])
    return Grid("", ["method", "criterion", "after training, by learning rate", "chosen"], rows)


def document(
    found: Found, columns: Sequence[Column], differences: Sequence[Difference], *, title: str, about: Sequence[str],
    level: float, pictures: Mapping[str, str],
) -> str:  # fmt: skip
    """Everything, in Markdown.

    Args:
        about: sentences on what was compared; pictures: file -> what it shows.
    """
    seeds = max((len(tested) for arm, tested in found.tested.items() if arm != BASE), default=0)
    parts = [f"# {title}", *about, "## Table 1", _markdown(table_one(found, columns, level=level))]
    parts.append(notes(found, columns, level=level, seeds=seeds))
    parts += [f"![{meaning}]({file})\n\n{meaning}" for file, meaning in pictures.items()]
    if differences:
        parts += ["## Differences", difference_note(len(differences), level=level, seeds=seeds)]
        parts += [f"### {grid.title}\n\n{_markdown(grid)}" for grid in difference_grids(differences)]
    parts += ["## Time and tokens of training", _markdown(cost_grid(found, level=level)), _COST_NOTE]
    if found.choices:
        parts += ["## Learning rates", _markdown(choice_grid(found))]
    if found.failures:
        failed = [f"* {name}: {reason}" for name, reason in found.failures.items()]
        parts += ["## Failed", "\n".join(failed)]
    return "\n\n".join(part.rstrip("\n") for part in parts) + "\n"


_COST_NOTE = (
    "Of one policy, from the start on (after a warm start with that); tokens are those of examples and rollouts that"
    " training went through; seconds are those of training steps, without measurements. The search is that of the"
    " learning rates that were not chosen, in all."
)


def notes(found: Found, columns: Sequence[Column], *, level: float, seeds: int) -> str:
    """What has to be said with Table 1."""
    text = [f"Mean over seeds ± half the {level:.0%} t-interval over seeds, on the same test texts."]
    if seeds == 1:
        text = ["One seed: there is no interval over seeds."]
    if found.tested.get(WARM):
        text.append("Warm start: SFT on one half of the examples; (ws) goes on from there with the other half.")
    if any(ARMS[arm].verified for arm in found.curves):
        text.append(
            "RLVR sees single prompts with their answers, of the examples that can be verified; its runs measure the"
            " cross-entropy of those answers and no feature matching, so its curve is not that of the others."
        )
    floor = [column.title for column in columns if _at_the_floor(found, column)]
    if floor:
        text.append(f"At the floor for every method (below {FLOOR}), and no comparison: {', '.join(floor)}.")
    return " ".join(text)


def _at_the_floor(found: Found, column: Column) -> bool:
    """Whether a score of whole answers is next to nothing under all policies."""
    values = [tested.value(column) for by_seed in found.tested.values() for tested in by_seed.values()]
    return column.better == "higher" and bool(values) and all(value is not None and value < FLOOR for value in values)


def difference_note(count: int, *, level: float, seeds: int) -> str:
    """What the differences mean."""
    text = (
        f"Row less column, paired by seed and text; ± is half the {level:.0%} t-interval over seeds, p that of the"
        f" t-test. Bold: it and the {level:.0%} bootstrap interval over test texts both leave out 0. The others are not"
        f" decided by the data. These are {count} comparisons: at a level of {level:.0%} some are to be expected to"
        " come out by chance."
    )
    return text if seeds != 1 else f"{text} With one seed nothing is decided over seeds."


def _difference(one: Difference | None) -> str:
    if one is None:
        return ""
    text = with_error(one.seeds.mean, one.seeds.half_width, sign=True)
    text = f"**{text}**" if one.decided else text
    return text if math.isnan(one.p) or not one.varied else f"{text} (p {one.p:.2g})"


def _rate(found: Found, arm: str) -> str:
    source = ARMS[arm].rate_of or arm
    choice: Mapping[str, Any] | None = found.choices.get(source)
    return NONE if choice is None else f"{choice['lr']:g}"


def _markdown(grid: Grid) -> str:
    return markdown_table(grid.header, grid.rows)
