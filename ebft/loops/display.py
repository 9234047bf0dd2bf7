"""What a person sees while a run goes on, and the table at its end."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

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


class Display:
    """Live progress with ETA on a terminal; a line every now and then where there is none (logs, CI)."""

    def __init__(self, console: Console, *, lines: int = 10):
        self.console, self._lines = console, lines

    def track(self, items: Iterable, *, label: str, total: int, done: int = 0, describe=lambda item: "") -> Iterable:
        """Yield the items, showing how many of `total` are done, the time left and what `describe` says."""
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("ETA"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[text]}"),
        )
        live = self.console.is_terminal
        every = max(1, total // self._lines)
        with Progress(*columns, console=self.console, disable=not live) as progress:
            task = progress.add_task(label, total=total, completed=done, text="")
            for item in items:
                done += 1
                progress.update(task, completed=done, text=describe(item))
                if not live and (done % every == 0 or done == total):
                    self.console.print(f"{label} {done}/{total}  {describe(item)}", soft_wrap=True, highlight=False)
                yield item


def result_table(metrics: Mapping[str, Mapping[str, float]]) -> Table:
    """Each metric before -> after, with the paired standard error."""
    table = Table(
        title="Held-out: same texts and random numbers before and after, paired standard errors", title_justify="left"
    )
    table.add_column("metric", no_wrap=True)
    for name in ("before", "after", "change", "± s.e."):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("verdict")
    for name, row in metrics.items():
        table.add_row(
            name.replace("_", " "),
            f"{row['before']:.4f}",
            f"{row['after']:.4f}",
            f"{row['difference']:+.4f}",
            f"{row['standard_error']:.4f}",
            verdict(name, row["difference"], row["standard_error"])[0],
        )
    return table


def stage_table(stages: Mapping[str, Mapping[str, float]]) -> Table:
    """Time and throughput of each stage of training."""
    table = Table(title="Training, by stage", title_justify="left")
    for name in ("stage", "seconds", "tokens/s"):
        table.add_column(name, justify="left" if name == "stage" else "right")
    for name, row in stages.items():
        table.add_row(name, f"{row['seconds']:.1f}", f"{row['tokens_per_second']:,.0f}")
    return table
