"""From options to the evaluation of one policy in its folder."""

from __future__ import annotations

import json
import time
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from ebft.assemble.config import machine, versions
from ebft.assemble.evaluation import (
    Evaluation,
    bootstrap_options,
    load,
    load_data,
    measure,
    new_folder,
    prepare,
    settle_options,
)
from ebft.assemble.protections import say_protections
from ebft.files import clear_disk_errors, make_folder, write_atomically, write_json
from ebft.loops.display import Display
from ebft.loops.evaluation.plot import evaluation_png
from ebft.loops.evaluation.result import csv_bytes, summarise
from ebft.loops.evaluation.run import Measured
from ebft.loops.evaluation.show import print_grids, side_by_side
from ebft.loops.interrupt import stop_requests


def evaluate_from_options(
    options: Mapping[str, Any], *, explicit: Collection[str], out: Path | None, console: Console
) -> dict[str, Any]:
    """Check the options, measure, write.

    Args:
        options: those of the command `evaluate`, by parameter name; explicit: which of them the user gave.
        out: the folder to write, which must be new or empty.

    Returns:
        What evaluation.json holds.

    Raises:
        UsageError: any bad input, before anything is written.
    """
    name = options["policy"]
    options = settle_options(options, explicit, policy=name)
    out = new_folder(out, "evaluate")
    data = load_data(options, explicit)
    console.print(f"policy {name}, data {options['data']}", highlight=False)
    policy = load(name, options)
    evaluation = prepare(policy, name, options, data)
    announce(evaluation, console)
    begin = time.perf_counter()
    with stop_requests() as stop:
        measured = measure(evaluation, policy, label="", display=Display(console), stop=stop)
    seconds = time.perf_counter() - begin
    values = {kind: summarise(totals, **bootstrap_options(options)) for kind, totals in measured.totals.items()}
    result = {
        "policy": name,
        "values": values,
        "horizons": list(evaluation.horizons),
        "notes": list(evaluation.notes),
        "options": options,
        "versions": versions(),
        "machine": machine(policy.device),
        "seconds": round(seconds, 1),
    }
    with clear_disk_errors(out):
        make_folder(out)
    write_measured(out, measured, evaluation)
    entries = [entry for found in values.values() for entry in found]
    write_atomically(out / "evaluation.png", evaluation_png({name: entries}, title=f"{name} on {options['data']}"))
    write_json(out / "evaluation.json", result)  # last: where it is, the evaluation is whole
    print_grids(console, side_by_side(entries))
    console.print(legend(options), highlight=False)
    for file, meaning in _FILES.items():
        if (out / file).exists():
            console.print(f"{out / file}  {meaning}", soft_wrap=True, highlight=False)
    return result


_FILES = {
    "evaluation.json": "all values with their intervals",
    "evaluation.png": "the loss over horizons, the entropy over places",
    "sequences.csv": "what every sequence adds to each value",
    "prompts.csv": "what every prompt adds to each value",
    "answers.jsonl": "prompts, references and answers",
}


def announce(evaluation: Evaluation, console: Console) -> None:
    """Say what will be measured."""
    prompts = "" if evaluation.prompts is None else f", {len(evaluation.prompts.rows)} prompts"
    console.print(
        f"{len(evaluation.rows)} held-out sequences of {evaluation.options['length']} tokens{prompts};"
        f" {evaluation.options['rollouts']} rollouts of {evaluation.horizons[-1]} tokens from every anchor",
        highlight=False,
    )
    for note in evaluation.notes:
        console.print(note, highlight=False, soft_wrap=True)
    if evaluation.prompts is not None and any(example.tests for example in evaluation.prompts.examples):
        say_protections(console)


def legend(options: Mapping[str, Any]) -> str:
    """What the numbers are."""
    return (
        f"Intervals: {options['level']:.0%}, bootstrap (BCa) over sequences, for whole answers over prompts; ± is half"
        " their width."
    )


def write_measured(folder: Path, measured: Measured, evaluation: Evaluation) -> None:
    """The values of every unit, and the answers, into `folder`."""
    for kind, totals in measured.totals.items():
        write_atomically(folder / f"{kind}.csv", csv_bytes(totals))
    if evaluation.prompts is not None:
        pairs = zip(evaluation.prompts.examples, measured.answers, strict=True)
        lines = [{"prompt": e.prompt, "answer": e.answer, "answers": texts} for e, texts in pairs]
        for line, text in zip(lines, measured.greedy, strict=False):  # none without --greedy
            line["greedy"] = text
        content = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        write_atomically(folder / "answers.jsonl", content.encode("utf-8", "backslashreplace"))
