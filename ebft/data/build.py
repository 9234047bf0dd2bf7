"""What the data sets that are built on this machine share."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from ebft.files import write_json

EXAMPLES, COUNTS = "examples.jsonl", "counts.json"


def write_examples(folder: Path, records: Sequence[Mapping[str, Any]], counts: Mapping[str, Any]) -> Path:
    """A new folder of `EXAMPLES`, as `examples.load_examples` reads them, and of `COUNTS`: how they came about."""
    folder.mkdir()
    text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    (folder / EXAMPLES).write_text(text, encoding="utf-8")
    write_json(folder / COUNTS, counts)
    return folder


def progress_bar() -> Progress:
    """Of a number of things done, with the time left, on stderr."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    return Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=Console(stderr=True))
