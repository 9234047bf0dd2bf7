"""Examples: prompts with an answer and, for programs, tests; from JSON lines, TSV or a hub data set."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ebft.data.records import SHOWN, Record, hub_rows, is_hub_id, json_lines, shown, tab_separated, text_of
from ebft.data.split import split_by
from ebft.errors import UsageError

TABLES = (".jsonl", ".tsv")


@dataclass(frozen=True)
class Fields:
    """The names under which a source keeps the parts of an example; `tests` and `group` may be missing there."""

    prompt: str = "prompt"
    answer: str = "answer"
    tests: str = "tests"
    group: str = "group"


@dataclass(frozen=True)
class Example:
    """A prompt, the answer that continues it, and the Python sources of tests that a right answer passes.

    Tests run behind prompt + answer, or behind the answer alone; that is for whoever runs them to say. Examples of one
    `group` (a source file, a page) land on one side of a split; without one, those with equal prompts do.
    """

    name: str
    prompt: str
    answer: str
    tests: tuple[str, ...] = ()
    group: str = ""


def load_examples(source: str, *, fields: Fields | None = None) -> list[Example]:
    """Load examples, in the source's order.

    Args:
        source: a `.jsonl` file, an object a line; a `.tsv` file, whose first line names the fields; anything else, the
            id of a hub data set, of which the split `train` is read (needs `ebft[hub]`). Tests are a string, a list
            of strings, or a string that holds such a list.
        fields: what the parts are called there.

    Raises:
        UsageError: the source does not exist, cannot be read or is empty; a line has no prompt, no answer, or one that
            is blank or no string. Names file and line.
    """
    fields = fields or Fields()
    path = Path(source).expanduser()
    records = _table(path, fields) if path.suffix in TABLES or path.exists() else hub_rows(source)
    examples = [_example(record, where, fields) for where, record in records]
    if not examples:
        raise UsageError(f"{source} holds no examples")
    return examples


def has_examples(source: str, *, fields: Fields | None = None) -> bool:
    """Whether `source` holds examples: a TSV file, or JSON lines or a hub data set whose first has prompt and answer.

    Raises:
        UsageError: the first line or row cannot be read.
    """
    fields = fields or Fields()
    path = Path(source).expanduser()
    if path.suffix == ".tsv":
        return path.is_file()
    if path.suffix == ".jsonl" and path.is_file():
        records = json_lines(path, wanted="fields")
    elif is_hub_id(source):
        records = hub_rows(source)
    else:
        return False
    first = next(records, None)
    return first is not None and {fields.prompt, fields.answer} <= first[1].keys()


def split_examples(
    examples: Sequence[Example], *, held_out: float = 0.1, salt: str = ""
) -> tuple[list[Example], list[Example]]:
    """Split into (train, held out) by a hash of each example's group, or prompt; see `split.split_by`.

    Args:
        salt: another one splits independently of this one.
    """
    return split_by(
        examples, lambda example: salt + (example.group or example.prompt), held_out=held_out, what="examples"
    )


def _table(path: Path, fields: Fields) -> Iterator[tuple[str, Record]]:
    if not path.is_file():
        raise UsageError(f"no such file: {path}")
    if path.suffix == ".tsv":
        return tab_separated(path)
    if path.suffix == ".jsonl":
        return json_lines(path, wanted=f"the fields {fields.prompt!r} and {fields.answer!r}")
    raise UsageError(f"{path}: examples are read from a .jsonl or a .tsv file")


def _example(record: Record, where: str, fields: Fields) -> Example:
    texts = {}
    for part, option in (("prompt", "--prompt-field"), ("answer", "--answer-field")):
        name = getattr(fields, part)
        text = text_of(record, name, where, option=option)
        if not text.strip():
            raise UsageError(f"{where}: the {part} (field {name!r}) is blank, expected text")
        texts[part] = text
    group = record.get(fields.group)
    if group is not None and not isinstance(group, str):
        raise UsageError(f"{where}: the field {fields.group!r} is {shown(group)}, expected a string")
    return Example(where, **texts, tests=_tests(record.get(fields.tests), fields.tests, where), group=group or "")


def _tests(value: object, name: str, where: str) -> tuple[str, ...]:
    if value is None or value == "":
        return ()
    if isinstance(value, str) and value.lstrip().startswith("["):
        value = _listed(value)
    tests = [value] if isinstance(value, str) else value
    if not isinstance(tests, list) or not all(isinstance(test, str) and test.strip() for test in tests):
        raise UsageError(
            f"{where}: the field {name!r} is {shown(value)[:SHOWN]}, expected Python source or a list of it"
        )
    return tuple(tests)


def _listed(text: str) -> object:
    """The list that a string holds, which as a program would be no test of anything; else the string."""
    try:
        return ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return text
