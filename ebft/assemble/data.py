"""From the name of a data set to its card on the screen."""

from __future__ import annotations

from collections.abc import Mapping

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ebft.assemble.protections import say_protections
from ebft.assemble.rows import FIELDS, read_parts
from ebft.data.card import QUANTILES, part_rows, sample
from ebft.data.examples import Example
from ebft.data.named import DATA_SETS
from ebft.loading import load_tokenizer


def list_data_sets(console: Console) -> None:
    """A line for each data set that has a name."""
    width = max(map(len, DATA_SETS))
    for name, data_set in DATA_SETS.items():
        console.print(f"[cyan]{name:<{width}}[/cyan] {escape(data_set.summary)}", highlight=False, soft_wrap=True)


def print_card(name: str, *, policy: str, console: Console, fields: Mapping[str, str | None] | None = None) -> None:
    """Counts, lengths in tokens, licence, source and a sample of a data set, or of a file.

    Args:
        fields: options of `rows.FIELDS`, None where not given.

    Raises:
        UsageError: there is no such data, no tokenizer for `policy`, or a field that the data does not have.
    """
    data_set = DATA_SETS.get(name)
    parts = read_parts({**dict.fromkeys(FIELDS), **(fields or {}), "data": name})
    tokenizer = load_tokenizer(policy)
    console.print(f"[bold]{escape(name)}[/bold]" + (f": {escape(data_set.summary)}" if data_set else ""))
    if data_set:
        about = {"licence": data_set.licence, "source": data_set.source}
        about |= {f"kept of {source}": _in_words(counts) for source, counts in data_set.counts().items()}
        for key, value in about.items():
            console.print(f"{key}: {value}", markup=False, highlight=False, soft_wrap=True)
    columns = ("count", "tests", *QUANTILES, "tokens")
    table = Table("part", box=box.SIMPLE, title=f"lengths in tokens of {escape(policy)}", title_justify="left")
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    for part, items in parts.items():
        for row in part_rows(part, items, tokenizer):
            table.add_row(f"{row['part']} {row['what']}", *(f"{row[column]:,}" for column in columns))
    console.print(table)
    if any(isinstance(item, Example) and item.tests for items in parts.values() for item in items):
        say_protections(console)
    first = next(iter(parts.values()))
    for key, value in sample(first).items():
        if not value:
            continue
        console.rule(key, align="left")
        console.print(value[:2000], markup=False, highlight=False, soft_wrap=True)


def _in_words(counts: object) -> str:
    return ", ".join(f"{key} {value}" for key, value in counts.items()) if isinstance(counts, dict) else str(counts)
