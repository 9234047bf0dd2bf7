"""An evaluation as tables on the screen and in Markdown: values, or differences of policies, with their intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from ebft.loops.evaluation import prompts
from ebft.loops.evaluation import quantities as names
from ebft.loops.evaluation.result import Entry, look_up
from ebft.loops.report_frame import number
from ebft.loops.report_verdict import aligned

PLACES = (1, 2, 4, 8, 16, 32, 64)
TITLES = {
    names.CROSS_ENTROPY: "cross-entropy",
    names.BLEU: "corpus BLEU",
    prompts.PASS: "pass",
    prompts.SENTENCE_BLEU: "sentence BLEU",
    prompts.SENTENCE_CHRF: "chrF",
    prompts.COMPILES: "compiles",
    names.DRIFT: "entropy drift per token",
}
# Metric -> what its `at` means in a title.
_AT_K = (prompts.PASS, prompts.EXACT, prompts.SENTENCE_BLEU, prompts.SENTENCE_CHRF)
_REWARD = (names.REWARD, names.ALIGNMENT, names.SIMILARITY)
_BY_HORIZON = (names.MATCHING, *_REWARD)
_ROLLOUTS = (names.DISTINCT, names.DUPLICATES, names.COPIES)
_BY_PLACE = (names.ENTROPY, names.SURPRISAL, names.GAP)


@dataclass(frozen=True)
class Grid:
    """A table of texts: its title, the headings, and rows whose first cell is a label."""

    title: str
    header: list[str]
    rows: list[list[str]]


def cell(entry: Entry | None) -> str:
    """A value with half the width of its interval."""
    if entry is None or entry["value"] is None:
        return "–"
    if entry["low"] is None or entry["high"] is None:
        return aligned(entry["value"], float("nan"))
    half = (entry["high"] - entry["low"]) / 2
    if half <= 1e-6 * abs(entry["value"]):  # of rounding alone
        return number(entry["value"])
    return f"{aligned(entry['value'], half)} ± {aligned(half, half)}"


def title(entry: Entry) -> str:
    """What a quantity is called in a table."""
    text = TITLES.get(entry["metric"], entry["metric"].replace("_", " "))
    if entry["metric"] in _AT_K and entry["of"] == names.GREEDY:
        return f"{text}, greedy"
    if entry["metric"] in _AT_K:
        return f"{text}@{entry['at']}" if entry["metric"] == prompts.PASS else f"{text}, best of {entry['at']}"
    if entry["metric"] in (names.CROSS_ENTROPY, names.PERPLEXITY):
        return f"{text}, {'all tokens' if entry['of'] == names.ALL else 'answers'}"
    text += f", {entry['of']}" if entry["of"] else ""
    return text + (f" ({entry['at']})" if entry["at"] is not None else "")


def columns_of(entries: Mapping[str, Sequence[Entry]]) -> list[Grid]:
    """The tables of several policies, or of differences: a quantity a row, a policy a column.

    Args:
        entries: of each policy or difference, by name; all have the same quantities.
    """
    own = {name: list(found) for name, found in entries.items()}
    first = next(iter(own.values()))
    longest = max(_horizons(first), default=None)
    groups = {
        "": [e for e in first if e["metric"] not in (*_BY_HORIZON, *_ROLLOUTS, *_BY_PLACE)],
        "Feature-matching loss, by tokens of a rollout": [e for e in first if e["metric"] == names.MATCHING],
        f"Reward of rollouts of {longest} tokens: alignment less similarity": [
            e for e in first if e["metric"] in _REWARD and e["at"] == longest
        ],
        "Rollouts of an anchor, shares (tokens of a rollout)": [e for e in first if e["metric"] in _ROLLOUTS],
        "Entropy on generated text less that on data, in nats, by place": [
            e for e in first if e["metric"] == names.GAP and e["at"] in PLACES
        ],
    }
    return [
        Grid(heading, ["", *own], [[_label(e), *(_at(found, e) for found in own.values())] for e in rows])
        for heading, rows in groups.items()
        if rows
    ]


def side_by_side(entries: Sequence[Entry]) -> list[Grid]:
    """The tables of one policy, with feature maps and kinds of text side by side."""
    own = list(entries)
    plain = [e for e in own if e["metric"] not in (*_BY_HORIZON, *_ROLLOUTS, *_BY_PLACE)]
    found = [Grid("", ["metric", "value", "interval", "units"], [[title(e), *_in_full(e)] for e in plain])]
    maps = list(dict.fromkeys(e["of"] for e in own if e["metric"] == names.MATCHING))
    horizons = _horizons(own)
    if maps:
        rows = [[str(g), *(cell(look_up(own, names.MATCHING, m, g)) for m in maps)] for g in horizons]
        found.append(Grid("Feature-matching loss, by tokens of a rollout", ["tokens", *maps], rows))
        rows = [[k, *(cell(look_up(own, k, m, horizons[-1])) for m in maps)] for k in _REWARD]
        found.append(Grid(f"Reward of rollouts of {horizons[-1]} tokens", ["part", *maps], rows))
    if horizons:
        rows = [[str(g), *(cell(look_up(own, metric, at=g)) for metric in _ROLLOUTS)] for g in horizons]
        found.append(Grid("Rollouts of an anchor, shares", ["tokens", "distinct", "repeated", "like the text"], rows))
    places = [k for k in PLACES if look_up(own, names.GAP, at=k)]
    if places:
        kinds = ((names.ENTROPY, names.GENERATED), (names.ENTROPY, names.DATA), (names.SURPRISAL, names.DATA))
        rows = [
            [str(k), *(cell(look_up(own, m, of, k)) for m, of in kinds), cell(look_up(own, names.GAP, at=k))]
            for k in places
        ]
        header = ["token", "generated", "on data", "surprisal", "gap"]
        found.append(Grid("Entropy of the policy at the k-th token, in nats", header, rows))
    return found


def print_grids(console: Console, found: Sequence[Grid]) -> None:
    """On the screen."""
    for grid in found:
        table = Table(title=grid.title or None, title_justify="left")
        for place, heading in enumerate(grid.header):
            table.add_column(heading, justify="right" if place else "left", overflow="fold")
        for row in grid.rows:
            table.add_row(*row)
        console.print(table)


def markdown(found: Sequence[Grid]) -> str:
    """The same in Markdown."""
    parts = []
    for grid in found:
        lines = [f"## {grid.title}", ""] if grid.title else []
        lines += ["| " + " | ".join(grid.header) + " |", "|---" + "|---:" * (len(grid.header) - 1) + "|"]
        lines += ["| " + " | ".join(row) + " |" for row in grid.rows]
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


def _label(entry: Entry) -> str:
    """As `title`, but without the metric where the table's heading says it."""
    parts = (entry["of"], str(entry["at"])) if entry["metric"] in (names.MATCHING, names.GAP) else (title(entry),)
    return ", ".join(part for part in parts if part)


def _in_full(entry: Entry) -> list[str]:
    """Value, interval and units: intervals need not lie evenly around their value."""
    if entry["low"] is None or entry["high"] is None:
        return [number(entry["value"]), "–", str(entry["units"])]
    half = (entry["high"] - entry["low"]) / 2
    value, low, high = (aligned(entry[key], half) for key in ("value", "low", "high"))
    return [value, f"{low} to {high}", str(entry["units"])]


def _horizons(entries: Sequence[Entry]) -> list[int]:
    return sorted({e["at"] for e in entries if e["metric"] == names.DISTINCT})


def _at(entries: Sequence[Entry], like: Entry) -> str:
    return cell(look_up(list(entries), like["metric"], like["of"], like["at"]))
