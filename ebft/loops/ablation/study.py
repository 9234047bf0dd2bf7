"""Runs of a study, one after the other: what is done is skipped, what was begun goes on, what fails is recorded."""

from __future__ import annotations

import gc
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from ebft.errors import UsageError, flag
from ebft.files import write_json
from ebft.loops.ablation.results import shown
from ebft.loops.display import Display
from ebft.loops.interrupt import Interrupted

NEW, BEGUN, DONE = "new", "begun", "done"


@dataclass(frozen=True)
class Run:
    """One run of a study: its name for people, its options (those known before it begins) and its folder.

    Runs of one `kind` take about as long as each other.
    """

    name: str
    options: Mapping[str, Any]
    folder: Path
    kind: str = ""


Begin = Callable[[Run, bool, Console], None]  # (run, whether it goes on, where it prints)


def state(run: Run) -> str:
    """Whether a run is new, begun or done.

    Raises:
        UsageError: its folder holds a run with other options.
    """
    path = run.folder / "config.json"
    if not path.is_file():
        return NEW
    refuse_other_options(run, stored_options(path))
    return DONE if (run.folder / "evaluation.json").is_file() else BEGUN


def stored_options(path: Path) -> dict[str, Any]:
    """The `options` in a file of a run.

    Raises:
        UsageError: there are none.
    """
    try:
        return dict(json.loads(path.read_text())["options"])
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{path} does not hold the options of a run: remove {path.parent}") from error


def refuse_other_options(run: Run, stored: Mapping[str, Any]) -> None:
    """Refuse to take what was made with the `stored` options for `run`.

    Raises:
        UsageError: names the options that differ.
    """
    wanted = json.loads(json.dumps(run.options))
    differing = [
        f"{flag(name)} {value} (there {shown(stored[name])})"
        for name, value in wanted.items()
        if name in stored and stored[name] != value
    ]
    if differing:
        raise UsageError(
            f"{run.folder} holds a run with other options: {', '.join(differing)}. Give those, or another --out"
        )


def run_study(
    runs: Sequence[Run],
    begin: Begin,
    *,
    out: Path,
    console: Console,
    finished: Callable[[], None],
    find_state: Callable[[Run], str] = state,
) -> dict[str, str]:
    """Run what is not done yet; what a run prints goes to `<its folder>.log`.

    A run that raises is recorded in `failures.json` of `out` and the next one begins.

    Args:
        begin: starts or resumes a run and returns when it is done.
        finished: is called after every run, to write down what there is by then.
        find_state: of a run that is not one of training.

    Returns:
        Failures, run -> message.

    Raises:
        UsageError: a folder holds a run with other options; nothing was run.
        Interrupted: Ctrl-C; what is done is kept, the same command goes on.
    """
    states = [find_state(run) for run in runs]
    waiting = [(run, there) for run, there in zip(runs, states, strict=True) if there != DONE]
    done = len(runs) - len(waiting)
    if done:
        console.print(f"{done} of {len(runs)} runs are done already", highlight=False)
    failures: dict[str, str] = {}
    write_json(out / "failures.json", failures)
    tracked = Display(console, lines=len(runs)).track(
        _one_by_one(waiting, begin, console, total=len(runs)),
        label="runs",
        total=len(runs),
        done=done,
        describe=lambda item: item[2],
    )
    for run, error, _ in tracked:
        if error is not None:
            failures[run.name] = error
            write_json(out / "failures.json", failures)
            console.print(f"[red]failed[/red] {run.name}: {error}", soft_wrap=True, highlight=False)
        finished()
    return failures


def say_failures(failures: Mapping[str, str], *, of: str, out: Path, console: Console) -> None:
    """Say that there were some, of `runs` or `cells`, and what to do about it."""
    if failures:
        console.print(
            f"[red]{len(failures)} {of} failed[/red], see {out / 'failures.json'}; the same command tries them again",
            soft_wrap=True,
            highlight=False,
        )


def _one_by_one(
    waiting: Sequence[tuple[Run, str]], begin: Begin, console: Console, *, total: int
) -> Iterator[tuple[Run, str | None, str]]:
    """Yields (run, what went wrong, how long the others will take) as runs end."""
    taken: dict[str, list[float]] = {}
    for number, (run, there) in enumerate(waiting, start=1):
        place, start = total - len(waiting) + number, time.perf_counter()
        console.print(f"run {place} of {total}: {run.name}, {run.folder}.log", soft_wrap=True, highlight=False)
        try:
            error = _logged(run, there == BEGUN, begin)
        except (Interrupted, KeyboardInterrupt) as stop:
            raise Interrupted(
                f"stopped in run {place} of {total}, {run.name}; what is done is kept, the same command goes on"
            ) from stop
        taken.setdefault(run.kind, []).append(time.perf_counter() - start)
        left = time_left(taken, [other.kind for other, _ in waiting[number:]])
        yield run, error, f"{run.name}{f'; about {_duration(left)} left' if number < len(waiting) else ''}"


def time_left(taken: Mapping[str, Sequence[float]], kinds: Sequence[str]) -> float:
    """Seconds that runs of these kinds will take, from those that runs of each kind took.

    A kind of which there was none yet takes as long as the mean over kinds.
    """
    means = {kind: sum(seconds) / len(seconds) for kind, seconds in taken.items()}
    overall = sum(means.values()) / len(means)
    return sum(means.get(kind, overall) for kind in kinds)


def _logged(run: Run, resume: bool, begin: Begin) -> str | None:
    """Run with a log; what went wrong, if anything did."""
    run.folder.parent.mkdir(parents=True, exist_ok=True)
    with open(run.folder.with_name(f"{run.folder.name}.log"), "a", encoding="utf-8") as log:
        try:
            begin(run, resume, Console(file=log, width=120))
        except Interrupted:
            raise
        except Exception as error:  # whatever it is, the other runs are not to suffer from it
            reason = str(error) if isinstance(error, UsageError) else f"{type(error).__name__}: {error}"
            log.write(f"failed: {reason}\n")
            return reason
        finally:
            gc.collect()  # the model is in cycles, and the next one needs its place
    return None


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s" if minutes else f"{rest} s"
