"""From options to runs and policies side by side."""

from __future__ import annotations

import csv
import io
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from ebft.assemble.evaluate import announce, legend, write_measured
from ebft.assemble.evaluation import (
    bootstrap_options,
    load,
    load_data,
    measure,
    new_folder,
    prepare,
    same_vocabulary,
    settle_options,
)
from ebft.assemble.policy import run_options
from ebft.errors import UsageError, flag
from ebft.files import clear_disk_errors, make_folder, write_atomically
from ebft.loops.display import Display
from ebft.loops.evaluation.plot import evaluation_png
from ebft.loops.evaluation.result import Entry, paired_differences, summarise
from ebft.loops.evaluation.run import Measured
from ebft.loops.evaluation.runs import curves_png, read_run, run_entries, run_grids, short_names
from ebft.loops.evaluation.show import Grid, columns_of, markdown, print_grids
from ebft.loops.interrupt import stop_requests

_VALUES = ("value", "low", "high", "standard_error", "units", "before", "after")
COLUMNS = ("table", "policy", "metric", "of", "at", *_VALUES)


def compare_from_options(
    policies: Sequence[str],
    options: Mapping[str, Any],
    *,
    explicit: Collection[str],
    out: Path | None,
    console: Console,
) -> None:
    """Check, read the runs, evaluate the policies, write.

    Args:
        policies: folders of runs, or policies by name.
        options: those of the command `compare`; explicit: which of them the user gave.
        out: the folder to write, which must be new or empty.

    Raises:
        UsageError: any bad input, before anything is written.
    """
    names = list(policies)
    if len(set(names)) != len(names):
        raise UsageError(f"{' '.join(names)}: one of them is there twice; give each once")
    stored = {name: run_options(name) for name in names}
    runs = [read_run(name, own) for name, own in stored.items() if own is not None]
    evaluating = options["evaluate"] or len(runs) < len(names)
    if len(names) < 2:
        raise UsageError(f"{' '.join(names)}: give two or more to compare; `evaluate` measures one")
    if not evaluating:
        for option in explicit:
            raise UsageError(
                f"{flag(option)} is for an evaluation, and runs are compared by what they left: add"
                " --evaluate to measure their policies"
            )
    out = new_folder(out, "compare")
    grids: list[Grid] = []
    table: list[dict[str, Any]] = []
    images: dict[str, bytes] = {}
    if runs:
        grids += run_grids(runs)
        print_grids(console, grids)
        table += [{"table": "run", "value": row.pop("difference"), **row} for row in run_entries(runs)]
        images["curves.png"] = curves_png(runs, title="training, line smoothed; squares: held-out")
    measured: dict[str, Measured] = {}
    if evaluating:
        settled = settle_options(options, explicit, policy=names[0])
        measured, evaluation = _measure(names, settled, explicit, console)
        found, rows, picture = _tables(measured, settled)
        print_grids(console, found)
        console.print(legend(settled), highlight=False)
        grids, table, images["compare.png"] = [*grids, *found], [*table, *rows], picture
    else:
        images["compare.png"] = images.pop("curves.png")
    with clear_disk_errors(out):
        make_folder(out)
    for name, label in zip(measured, _labels(list(measured)), strict=True):
        folder = out / label.replace("/", "-")
        make_folder(folder)
        write_measured(folder, measured[name], evaluation)
    for file, image in images.items():
        write_atomically(out / file, image)
    pictures = "\n".join(f"![{file}]({file})" for file in images)
    write_atomically(out / "compare.md", f"{markdown(grids)}\n{pictures}\n".encode())
    write_atomically(out / "compare.csv", _csv(table))
    for file in ("compare.md", "compare.csv", *images):
        console.print(str(out / file), soft_wrap=True, highlight=False)


def _measure(names: Sequence[str], options: Mapping[str, Any], explicit: Collection[str], console: Console):
    """All policies on the same rows, prompts and random numbers: name -> Measured; and on what."""
    data = load_data(options, explicit)
    policies = {name: load(name, options) for name in names}
    same_vocabulary(policies)
    evaluation = prepare(policies[names[0]], names[0], options, data)
    announce(evaluation, console)
    labels = dict(zip(names, _labels(names), strict=True))
    with stop_requests() as stop:
        display = Display(console)
        found = {
            name: measure(evaluation, policy, label=f"{labels[name]}: ", display=display, stop=stop)
            for name, policy in policies.items()
        }
    return found, evaluation


def _tables(
    measured: Mapping[str, Measured], options: Mapping[str, Any]
) -> tuple[list[Grid], list[dict[str, Any]], bytes]:
    """Values and paired differences from the first, as tables, rows and a picture."""
    settings = bootstrap_options(options)
    names = list(measured)
    labels = dict(zip(names, _labels(names), strict=True))
    first = measured[names[0]].totals
    values: dict[str, list[Entry]] = {}
    differences: dict[str, list[Entry]] = {}
    rows = []
    for name, found in measured.items():
        values[labels[name]] = [e for totals in found.totals.values() for e in summarise(totals, **settings)]
        rows += [{"table": "value", "policy": name, **e} for e in values[labels[name]]]
        if name != names[0]:
            pairs = [paired_differences(first[kind], totals, **settings) for kind, totals in found.totals.items()]
            differences[labels[name]] = [e for part in pairs for e in part]
            rows += [{"table": "difference", "policy": name, **e} for e in differences[labels[name]]]
    grids = columns_of(values)
    for grid in columns_of(differences):
        title = f"Difference from {labels[names[0]]}, paired"
        grids.append(Grid(f"{title}: {grid.title}" if grid.title else title, grid.header, grid.rows))
    picture = evaluation_png(values, title=f"on {options['data']}, same rows and random numbers")
    return grids, rows, picture


def _labels(names: Sequence[str]) -> list[str]:
    return short_names(names) if names else []


def _csv(rows: Sequence[Mapping[str, Any]]) -> bytes:
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()
