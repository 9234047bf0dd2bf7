"""What a person sees while a run goes on, and the table at its end."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from rich.box import HEAVY_HEAD, SIMPLE_HEAD
from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Column, Table
from rich.text import Text

from ebft.loops.report_verdict import verdict

WATCHED = {
    "reward": ("reward", ".3f"),
    "feature_matching_loss": ("FM", ".3f"),
    "cross_entropy": ("CE", ".3f"),
    "kl": ("KL", ".4f"),
    "gradient_norm": ("grad", ".2f"),
    "tokens_per_second": ("tok/s", ".0f"),
}


def watch_line(record: Mapping[str, float]) -> str:
    """The handful of numbers one watches, on one line."""
    return "  ".join(f"{label} {record[name]:{form}}" for name, (label, form) in WATCHED.items() if name in record)


class _TwoLines(Progress):
    """A bar that keeps its count and ETA in a narrow window: what else is to be said stands below it, cut to fit."""

    def get_renderables(self) -> Iterable[RenderableType]:
        yield self.make_tasks_table(self.tasks)
        for task in self.tasks:
            if task.fields["text"]:
                yield Text(task.fields["text"], no_wrap=True, overflow="ellipsis")


class Display:
    """Live progress with ETA on a terminal; a line every now and then where there is none (logs, CI)."""

    def __init__(self, console: Console, *, lines: int = 10):
        self.console, self._lines = console, lines

    def track(self, items: Iterable, *, label: str, total: int, done: int = 0, describe=lambda item: "") -> Iterable:
        """Yield the items, showing how many of `total` are done, the time left and what `describe` says."""
        columns = (
            TextColumn("{task.description}", table_column=Column(no_wrap=True)),
            BarColumn(bar_width=max(4, min(20, self.console.width - 50))),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("ETA", table_column=Column(no_wrap=True)),
            TimeRemainingColumn(),
        )
        live = self.console.is_terminal
        every = max(1, total // self._lines)
        with _TwoLines(*columns, console=self.console, disable=not live) as progress:
            task = progress.add_task(label, total=total, completed=done, text="")
            for item in items:
                done += 1
                progress.update(task, completed=done, text=describe(item))
                if not live and (done % every == 0 or done == total):
                    self.console.print(f"{label} {done}/{total}  {describe(item)}", soft_wrap=True, highlight=False)
                yield item


def result_table(metrics: Mapping[str, Mapping[str, float]], *, width: int = 100) -> Table:
    """Each metric before -> after, with the paired standard error; in a narrow window the verdict is under the name."""
    narrow = width < 80
    table = Table(
        title="Held-out: same texts and random numbers before and after, paired standard errors",
        title_justify="left",
        box=SIMPLE_HEAD if narrow else HEAVY_HEAD,
        pad_edge=not narrow,
        padding=(0, 0) if narrow else (0, 1),
    )
    table.add_column("metric", no_wrap=not narrow)
    for name in ("before", "after", "change", "± s.e."):
        table.add_column(name, justify="right", no_wrap=True)
    if not narrow:
        table.add_column("verdict")
    for name, row in metrics.items():
        words = verdict(name, row["difference"], row["standard_error"])[0]
        label = name.replace("_", " ")
        cells = [
            f"{row['before']:.4f}",
            f"{row['after']:.4f}",
            f"{row['difference']:+.4f}",
            f"{row['standard_error']:.4f}",
        ]
        table.add_row(f"{label}\n  {words}", *cells) if narrow else table.add_row(label, *cells, words)
    return table


def profile_line(profile: Mapping[str, Sequence[float]]) -> str:
    """The feature-matching loss at every horizon, before and after."""
    columns = zip(profile["horizons"], profile["before"], profile["after"], strict=True)
    return "feature matching loss by tokens: " + ", ".join(f"{g}: {a:.4f} → {b:.4f}" for g, a, b in columns)


def stage_table(stages: Mapping[str, Mapping[str, float]]) -> Table:
    """Time and throughput of each stage of training."""
    table = Table(title="Training, by stage", title_justify="left")
    for name in ("stage", "seconds", "tokens/s"):
        table.add_column(name, justify="left" if name == "stage" else "right")
    for name, row in stages.items():
        table.add_row(name, f"{row['seconds']:.1f}", f"{row['tokens_per_second']:,.0f}")
    return table
