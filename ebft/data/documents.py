"""Documents: plain texts with a name, from a file, a folder, JSON lines, the standard library or a hub data set."""

from __future__ import annotations

import hashlib
import json
import os
import re
import sysconfig
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ebft.errors import UsageError

STDLIB = "stdlib"
DEFAULT_TEXT_FIELD = "text"

# Tests are data rather than code to learn from, and other people's packages differ from machine to machine.
_STDLIB_SKIP = frozenset({"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"})
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_FILE_SUFFIXES = (".jsonl", ".json", ".txt", ".py", ".md")


@dataclass(frozen=True)
class Document:
    """A text, and what it is called where it comes from (a relative path, or file:line)."""

    name: str
    text: str


def load_documents(source: str, *, text_field: str | None = None) -> list[Document]:
    """Load text documents, in an order that depends on the source alone.

    Texts keep their line endings. In sources of many documents, blank ones are left out; folders also leave out
    hidden names and binary files (not UTF-8, or with NUL bytes).

    Args:
        source: one of
            `stdlib`, the source files of the running Python's standard library, without tests;
            a folder, all text files below it;
            a `.jsonl` file, one document a line;
            any other text file, one document;
            anything else, the id of a hub data set, of which the split `train` is read (needs `ebft[hub]`).
        text_field: JSON lines and hub data sets only: the field that holds the text, by default `text`.

    Raises:
        UsageError: the source does not exist, cannot be read or holds no text; a line or field of it is not what it
            should be; `text_field` is given where it means nothing.
    """
    path = Path(source).expanduser()
    field = DEFAULT_TEXT_FIELD if text_field is None else text_field
    if source == STDLIB:
        _refuse_text_field(text_field, "the standard library")
        return _load_stdlib()
    if not source.strip():
        raise UsageError(f"source {source!r} is blank: give stdlib, a file, a folder, or a hub data set id")
    if path.is_dir():
        _refuse_text_field(text_field, f"the folder {source}")
        return _load_folder(path)
    if path.suffix == ".jsonl" and path.exists():
        return _load_json_lines(path, field)
    if path.exists():
        _refuse_text_field(text_field, f"the text file {source}")
        return [Document(path.name, _read_text_file(path))]
    if not _HUB_ID.fullmatch(source) or source.endswith(_FILE_SUFFIXES):
        raise UsageError(f"no such file or folder: {source}")
    return _load_hub(source, field)


def split_documents(documents: Sequence[Document], *, held_out: float = 0.1) -> tuple[list[Document], list[Document]]:
    """Split into (train, held out) by a hash of each text.

    A document's side depends on its own text alone, so it stays when others come or go, and copies of a text land on
    one side. Only where that would leave a side empty is the text nearest the threshold moved over. If there is one
    text only, it is cut at a line boundary: its head is the training side.

    Args:
        held_out: the expected fraction of held-out documents (of one text: the fraction of its characters).

    Raises:
        UsageError: no documents, `held_out` outside (0, 1), or a single text without a line boundary to cut at.
    """
    if not 0 < held_out < 1:
        raise UsageError(f"held_out={held_out}: expected a fraction between 0 and 1, both exclusive")
    if not documents:
        raise UsageError("there are no documents to split: give at least one")
    place = {document.text: _unit_hash(document.text) for document in documents}
    if len(place) == 1:
        head, tail = _cut(documents[0], fraction=1 - held_out)
        return [head], [tail]
    held = {text for text, value in place.items() if value < held_out}
    if not held:
        held = {min(place, key=place.__getitem__)}
    elif len(held) == len(place):
        held.remove(max(place, key=place.__getitem__))
    train = [document for document in documents if document.text not in held]
    return train, [document for document in documents if document.text in held]


def _refuse_text_field(text_field: str | None, what: str) -> None:
    if text_field is not None:
        raise UsageError(
            f"text_field={text_field!r} means nothing for {what}: it names a field of a .jsonl file or hub data set"
        )


def _load_stdlib() -> list[Document]:
    root = Path(sysconfig.get_path("stdlib"))
    documents = [
        Document(name, text)
        for name in _walk(root, skip=_STDLIB_SKIP)
        if name.endswith(".py") and (text := _decode(_read(root / name)))
    ]
    if not documents:
        raise UsageError(f"source stdlib: this Python has no source files in {root}; give a folder of texts instead")
    return documents


def _load_folder(root: Path) -> list[Document]:
    names = _walk(root)
    texts = {name: _decode(_read(root / name)) for name in names}
    documents = [Document(name, text) for name, text in texts.items() if text]
    if not documents:
        binary = sum(text is None for text in texts.values())
        raise UsageError(
            f"the folder {root} holds no text: {len(names)} files that are not hidden, {binary} of them binary"
            f" (not UTF-8, or with NUL bytes) and {len(names) - binary} blank"
        )
    return documents


def _walk(root: Path, *, skip: frozenset[str] = frozenset()) -> list[str]:
    """The files below `root` as sorted relative POSIX paths, without hidden names and folders named in `skip`."""
    found = []
    for folder, folders, files in os.walk(root, onerror=_raise_unreadable):
        folders[:] = [name for name in folders if name not in skip and not name.startswith(".")]
        paths = [Path(folder, name) for name in files if not name.startswith(".")]
        found += [path.relative_to(root).as_posix() for path in paths if path.is_file()]
    return sorted(found)


def _raise_unreadable(error: OSError) -> None:
    raise UsageError(f"cannot read {error.filename}: {error.strerror}") from error


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from error


def _decode(raw: bytes) -> str | None:
    """The text, "" for a blank one, None for binary data."""
    try:
        text = raw.decode("utf-8-sig")  # a byte-order mark is not text
    except UnicodeDecodeError:
        return None
    if "\0" in text:
        return None
    return text if text.strip() else ""


def _read_text_file(path: Path) -> str:
    text = _decode(_read(path))
    if text is None:
        raise UsageError(f"{path} is not a text file: it is not UTF-8, or has NUL bytes")
    if not text:
        raise UsageError(f"{path} is empty")
    return text


def _load_json_lines(path: Path, field: str) -> list[Document]:
    documents = []
    # Split at "\n" alone: JSON strings may hold the other characters that str.splitlines takes for a line's end.
    for number, line in enumerate(_read_text_file(path).split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise UsageError(f"{where}: not JSON: {error.msg} at column {error.colno}") from error
        if not isinstance(record, dict):
            raise UsageError(f"{where}: expected a JSON object with the field {field!r}, found {line.strip()[:60]}")
        documents.append(Document(f"{path.name}:{number}", _text_of(record, field, where)))
    return _not_blank(documents, f"the field {field!r} of {path}")


def _text_of(record: dict, field: str, where: str) -> str:
    if field not in record:
        raise UsageError(
            f"{where}: no field {field!r}; found {', '.join(map(repr, record)) or 'no fields'}; set text_field"
        )
    if not isinstance(record[field], str):
        raise UsageError(
            f"{where}: the field {field!r} is {json.dumps(record[field], default=str)[:60]}, expected a string"
        )
    return record[field]


def _load_hub(source: str, field: str) -> list[Document]:
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
    documents = [
        Document(f"{source}:{number}", _text_of(row, field, f"data set {source}, row {number}"))
        for number, row in enumerate(rows)
    ]
    return _not_blank(documents, f"the field {field!r} of the data set {source}")


def _not_blank(documents: list[Document], what: str) -> list[Document]:
    kept = [document for document in documents if document.text.strip()]
    if not kept:
        raise UsageError(f"{what} is empty: it holds no text in any of {len(documents)} documents")
    return kept


def _unit_hash(text: str) -> float:
    """A number in [0, 1) that depends on the text alone, the same on every machine."""
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:6], "big") / 2**48


def _cut(document: Document, *, fraction: float) -> tuple[Document, Document]:
    """Cut a text at the line boundary nearest to `fraction` of it that leaves both parts some text."""
    text = document.text
    first, last = len(text) - len(text.lstrip()), len(text.rstrip())
    boundaries = [match.end() for match in re.finditer("\n", text) if first < match.start() and match.end() < last]
    if not boundaries:
        raise UsageError(
            f"{document.name} is the only text and has one line only, so nothing can be held out: give more lines or"
            " documents"
        )
    at = min(boundaries, key=lambda boundary: abs(boundary - fraction * len(text)))
    return Document(document.name, text[:at]), Document(document.name, text[at:])
