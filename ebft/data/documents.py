"""Documents: plain texts with a name, from a file, a folder, JSON lines, the standard library or a hub data set."""

from __future__ import annotations

import os
import re
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ebft.data.records import decode, hub_rows, is_hub_id, json_lines, read, read_text, text_of
from ebft.data.split import split_by
from ebft.errors import UsageError

STDLIB = "stdlib"
DEFAULT_TEXT_FIELD = "text"

# Tests are data rather than code to learn from, and other people's packages differ from machine to machine.
_STDLIB_SKIP = frozenset({"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"})


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
        return [Document(path.name, read_text(path))]
    if not is_hub_id(source):
        raise UsageError(f"no such file or folder: {source}")
    return _load_hub(source, field)


def split_documents(
    documents: Sequence[Document], *, held_out: float = 0.1, salt: str = ""
) -> tuple[list[Document], list[Document]]:
    """Split into (train, held out) by a hash of each text.

    A document's side depends on its own text alone, so it stays when others come or go, and copies of a text land on
    one side. Only where that would leave a side empty is the text nearest the threshold moved over. If there is one
    text only, it is cut at a line boundary: its head is the training side.

    Args:
        held_out: the expected fraction of held-out documents (of one text: the fraction of its characters).
        salt: another one splits independently of this one.

    Raises:
        UsageError: no documents, `held_out` outside (0, 1), or a single text without a line boundary to cut at.
    """
    texts = {document.text for document in documents}
    if len(texts) == 1 and 0 < held_out < 1:
        head, tail = _cut(documents[0], fraction=1 - held_out)
        return [head], [tail]
    return split_by(documents, lambda document: salt + document.text, held_out=held_out)


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
        if name.endswith(".py") and (text := decode(read(root / name)))
    ]
    if not documents:
        raise UsageError(f"source stdlib: this Python has no source files in {root}; give a folder of texts instead")
    return documents


def _load_folder(root: Path) -> list[Document]:
    names = _walk(root)
    texts = {name: decode(read(root / name)) for name in names}
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


def _load_json_lines(path: Path, field: str) -> list[Document]:
    documents = [
        Document(f"{path.name}:{where.rpartition(' ')[2]}", text_of(record, field, where, option="text_field"))
        for where, record in json_lines(path, wanted=f"the field {field!r}")
    ]
    return _not_blank(documents, f"the field {field!r} of {path}")


def _load_hub(source: str, field: str) -> list[Document]:
    documents = [
        Document(f"{source}:{where.rpartition(' ')[2]}", text_of(row, field, where, option="text_field"))
        for where, row in hub_rows(source)
    ]
    return _not_blank(documents, f"the field {field!r} of the data set {source}")


def _not_blank(documents: list[Document], what: str) -> list[Document]:
    kept = [document for document in documents if document.text.strip()]
    if not kept:
        raise UsageError(f"{what} is empty: it holds no text in any of {len(documents)} documents")
    return kept


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
