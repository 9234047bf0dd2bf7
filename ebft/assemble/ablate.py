"""From options and axes to a study of runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from ebft.assemble.checks import resolve_run, settle
from ebft.assemble.grid import check_axes, check_cells, folder_name, make_cells, of_components
from ebft.assemble.loss import build_loss
from ebft.assemble.reward import build_values
from ebft.assemble.rows import read_data
from ebft.assemble.run import run_from_options
from ebft.assemble.starts import same_start
from ebft.components.component import nearest
from ebft.errors import UsageError
from ebft.files import write_atomically, write_json
from ebft.loops.ablation.plots import draw_axes
from ebft.loops.ablation.results import Cell, Results, read_rows, write_rows
from ebft.loops.ablation.study import Run, run_study, say_failures, state
from ebft.loops.ablation.tables import compare, study_markdown, study_table
from ebft.loops.run import open_folder

# Options that say what a metric measures; metrics that are not here mean the same in every cell.
_TEXT = ("data", "text_field", "prompt_field", "answer_field", "tests_field", "chat", "split", "length", "held_out")
_SAMPLING = (*of_components("sampler"), "horizon", "max_new_tokens", "stop", "rollouts", "temperature", "top_p")
_FEATURES = (*_TEXT, *_SAMPLING, *of_components("features"))
YARDSTICKS = {
    "cross_entropy": _TEXT,
    "kl": (*_TEXT, *_SAMPLING, "policy"),
    "distinct_rollouts": (*_TEXT, *_SAMPLING),
    "feature_matching_loss": _FEATURES,
    "reward": (*_FEATURES, *of_components("whitening", "objective"), "diversity", "credit"),
}

SHOWN = ("cross_entropy", "feature_matching_loss", "reward")


def ablate(
    over: Mapping[str, Sequence[Any]],
    *,
    out: str | Path,
    seeds: int = 1,
    one_at_a_time: bool = False,
    console: Console | None = None,
    **options: Any,
) -> Results:
    """Run every cell of a grid over `seeds` seeds, each an ordinary run below `out`, and compare them.

    A second call with the same arguments skips what is done and retries what failed; one with more seeds or values
    adds to it.

    Args:
        over: option of `run` -> values.
        out: the study's folder.
        one_at_a_time: run the base, and cells that differ from it in one axis.
        options: other options of `run`, by name; the defaults of the command line where left out.

    Returns:
        What `results.csv` holds, and the failures.

    Raises:
        UsageError: bad input, before the first run.
    """
    from ebft.commands.derived import run_defaults

    known = run_defaults()
    for name in options:
        if name not in known:
            raise UsageError(f"{name}={options[name]!r}: there is no such option of run{nearest(name, known)}")
    check_axes(over, known)
    return ablate_from_options(
        {**known, **options},
        explicit=set(options),
        over=over,
        seeds=seeds,
        one_at_a_time=one_at_a_time,
        out=Path(out),
        console=console or Console(),
    )


def ablate_from_options(
    options: Mapping[str, Any],
    *,
    explicit: set[str],
    over: Mapping[str, Sequence[Any]],
    seeds: int,
    one_at_a_time: bool,
    out: Path,
    console: Console,
) -> Results:
    """`ablate`, with all options of `run` and which of them the user gave."""
    if seeds < 1:
        raise UsageError(f"--seeds {seeds}: expected the number of seeds, 1 or more")
    cells = make_cells(over, options, given=explicit, one_at_a_time=one_at_a_time)
    check_cells(cells, check_cell)
    read_data(options)
    numbers = range(options["seed"], options["seed"] + seeds)
    members = {(cell.name, seed): _run(cell, seed, out) for cell in cells for seed in numbers}
    runs = list(members.values())
    for run in runs:
        state(run)  # refuses another study's folder before anything is written
    if not (out / "study.json").is_file():
        open_folder(out, resume=False)
    write_json(
        out / "study.json",
        {"over": dict(over), "seeds": list(numbers), "one_at_a_time": one_at_a_time, "options": dict(options)},
    )

    def results(failures: Mapping[str, str]) -> Results:
        rows = [
            row
            for cell in cells
            for seed in numbers
            for row in read_rows(members[cell.name, seed].folder, cell, tuple(over), seed=seed)
        ]
        return Results(tuple(over), cells, rows, failures, YARDSTICKS)

    def finished() -> None:
        write_rows(results({}).rows, out / "results.csv")

    failures = run_study(runs, partial(_begin, runs), out=out, console=console, finished=finished)
    found = results(failures)
    write_rows(found.rows, out / "results.csv")
    write_study(found, out, console)
    return found


def check_cell(options: Mapping[str, Any], *, gradient: bool = True) -> None:
    """Everything that can be known to be wrong with a run, or with what needs no gradient, before a model is loaded."""
    resolved, settled = resolve_run(options, gradient=gradient), settle(options)
    build_values(settled, resolved)
    build_loss(settled, resolved["pg"])


def write_study(results: Results, out: Path, console: Console) -> None:
    """Tables and plots of a study, into its folder and onto the screen."""
    write_atomically(out / "results.md", study_markdown(results).encode())
    for metric in SHOWN:
        if metric in results.metrics():
            console.print(study_table(results, metric))

    def values(cell: Cell, metric: str):
        for line in compare(results, metric):
            if line.cell is cell:
                single = [float(row["difference"]) for row in results.of(cell, metric)]
                return line.change.mean, line.change.half_width, single
        return None

    plots = draw_axes(results, values, out, metrics=results.metrics(), ylabel="change on held-out text")
    for path, meaning in {
        out / "results.csv": "a row for every cell, seed and metric",
        out / "results.md": "all metrics, cells side by side",
        **dict.fromkeys(plots, "a panel for every metric"),
    }.items():
        console.print(f"{path}  {meaning}", soft_wrap=True, highlight=False)
    say_failures(results.failures, of="runs", out=out, console=console)


def _run(cell: Cell, seed: int, out: Path) -> Run:
    name = f"{cell.name}, seed {seed}"
    return Run(name, {**cell.options, "seed": seed}, out / folder_name(cell) / f"seed-{seed}")


def _begin(runs: Sequence[Run], run: Run, resume: bool, console: Console) -> None:
    before = None if resume else same_start(runs, run.options)
    run_from_options(
        run.options, explicit=set(run.options), out=run.folder, resume=resume, console=console, before=before
    )
