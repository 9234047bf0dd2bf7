"""Records: the objects of a JSON lines file, the rows of a TSV file or of a hub data set, with where each stands."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ebft.errors import UsageError

Record = Mapping[str, Any]
SHOWN = 60  # characters of a bad line or value in an error

_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_FILE_SUFFIXES = (".jsonl", ".json", ".tsv", ".txt", ".py", ".md")


def read(path: Path) -> bytes:
    """The content of a file.

    Raises:
        UsageError: it cannot be read.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from error


def decode(raw: bytes) -> str | None:
    """The text, "" for a blank one, None for binary data: not UTF-8, or with NUL bytes."""
    try:
        text = raw.decode("utf-8-sig")  # a byte-order mark is not text
    except UnicodeDecodeError:
        return None
    if "\0" in text:
        return None
    return text if text.strip() else ""


def read_text(path: Path) -> str:
    """The text of a file.

    Raises:
        UsageError: it cannot be read, is binary, or is blank.
    """
    text = decode(read(path))
    if text is None:
        raise UsageError(f"{path} is not a text file: it is not UTF-8, or has NUL bytes")
    if not text:
        raise UsageError(f"{path} is empty")
    return text


def json_lines(path: Path, *, wanted: str) -> Iterator[tuple[str, Record]]:
    """(where, record) of every line that is not blank; `where` names file and line.

    Args:
        wanted: what a record should have, for the error: "the field 'text'".

    Raises:
        UsageError: a line is not a JSON object.
    """
    # Split at "\n" alone: JSON strings may hold the other characters that str.splitlines takes for a line's end.
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise UsageError(f"{where}: not JSON: {error.msg} at column {error.colno}") from error
        if not isinstance(record, dict):
            raise UsageError(f"{where}: expected a JSON object with {wanted}, found {line.strip()[:SHOWN]}")
        yield where, record


def tab_separated(path: Path) -> Iterator[tuple[str, Record]]:
    """(where, record) of every line after the first, which names the fields. Quotes are plain characters.

    Raises:
        UsageError: a line has more or fewer fields than the first.
    """
    header, *lines = read_text(path).split("\n")
    names = header.rstrip("\r").split("\t")
    for number, line in enumerate(lines, start=2):
        if not line.strip():
            continue
        values = line.rstrip("\r").split("\t")
        if len(values) != len(names):
            raise UsageError(
                f"{path}, line {number}: {len(values)} fields, but the first line names {len(names)}"
                f" ({', '.join(names)}). A text with a tab or a line break wants a .jsonl file"
            )
        yield f"{path}, line {number}", dict(zip(names, values, strict=True))


def is_hub_id(source: str) -> bool:
    """Whether `source`, which is no file or folder here, may be the id of a hub data set."""
    there = Path(source).expanduser().exists()
    return not there and _HUB_ID.fullmatch(source) is not None and not source.endswith(_FILE_SUFFIXES)


def hub_rows(source: str) -> Iterator[tuple[str, Record]]:
    """(where, record) of the split `train` of a hub data set.

    Raises:
        UsageError: the package `datasets` is missing, or the data set cannot be loaded.
    """
    try:
        import datasets
    except ImportError as error:
        raise UsageError(
            f"no such file or folder: {source}. If it is a hub data set, install the package that reads it:"
            ' pip install "ebft[hub]"'
        ) from error
    try:
        rows: Iterable[dict] = datasets.load_dataset(source, split="train")
    except Exception as error:  # the library and its network stack raise errors of many unrelated types
        raise UsageError(
            f"no such file or folder: {source}; and as a hub data set its split 'train' could not be loaded: {error}"
        ) from error
    for number, row in enumerate(rows):
        yield f"data set {source}, row {number}", row


def text_of(record: Record, field: str, where: str, *, option: str) -> str:
    """The string under `field`.

    Args:
        option: what names another field, for the error.

    Raises:
        UsageError: there is no such field, or it holds no string.
    """
    if field not in record:
        found = ", ".join(map(repr, record)) or "no fields"
        raise UsageError(f"{where}: no field {field!r}; found {found}; set {option}")
    if not isinstance(record[field], str):
        raise UsageError(f"{where}: the field {field!r} is {shown(record[field])}, expected a string")
    return record[field]


def shown(value: Any) -> str:
    """A value as JSON, cut short for an error."""
    return json.dumps(value, default=str)[:SHOWN]
