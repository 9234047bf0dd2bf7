"""Verifiers by name: options -> what gives texts their rewards."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from ebft.components.component import nearest
from ebft.errors import UsageError, flag
from ebft.objectives import verifiers
from ebft.objectives.programs import programs


class Reference(Protocol):
    """What a verifier may know of the example that a row comes from; `ebft.data` has such a class."""

    @property
    def prompt(self) -> str: ...

    @property
    def answer(self) -> Any: ...

    @property
    def tests(self) -> Sequence[str]: ...


@dataclass(frozen=True)
class Verifier:
    """A score of texts, and what it has to be given next to them.

    Args:
        score: of `ebft.objectives.verifiers.verifier`.
        wants: "answer": the example's answer, or the target's text where data has no examples; "example": the example
            itself, with its tests.
        group: whether `score` is called for one anchor at a time.
    """

    score: verifiers.Score
    wants: str = "answer"
    group: bool = False

    def reference(self, example: Reference) -> Any:
        """What `score` is given of an example."""
        return example if self.wants == "example" else example.answer


def _unit_tests(*, test_credit: str, test_timeout: float, test_prompt: bool | None) -> verifiers.Score:
    if test_credit not in ("all", "share"):
        raise UsageError(f"--test-credit {test_credit!r}: expected 'all' or 'share'")
    if not test_timeout > 0:
        raise UsageError(f"--test-timeout {test_timeout}: expected seconds above 0")

    def score(texts: Sequence[str], examples: Sequence[Reference], *, fenced: bool = False) -> Tensor:
        prompts, answers = [e.prompt for e in examples], [e.answer for e in examples]
        sources = programs(texts, prompts, answers, together=test_prompt, fenced=fenced)
        tests = [list(example.tests) for example in examples]
        return verifiers.unit_tests(sources, tests, credit=test_credit, timeout=test_timeout)

    return score


# Name -> its options with their defaults, and how to make its score of them.
_VERIFIERS: dict[str, tuple[dict[str, Any], Callable[..., verifiers.Score]]] = {
    "exact_match": ({}, lambda: verifiers.exact_match),
    "bleu": (
        {"bleu_tokenizer": "13a", "lowercase": False},
        lambda bleu_tokenizer, lowercase: partial(verifiers.bleu, tokenize=bleu_tokenizer, lowercase=lowercase),
    ),
    "chrf": (
        {"word_order": 0, "lowercase": False},
        lambda word_order, lowercase: partial(verifiers.chrf, word_order=word_order, lowercase=lowercase),
    ),
    "unit_tests": ({"test_credit": "all", "test_timeout": 5.0, "test_prompt": None}, _unit_tests),
}
VERIFIERS = tuple(_VERIFIERS)
OPTIONS = dict.fromkeys(option for options, _ in _VERIFIERS.values() for option in options)


def make_verifier(*, verifier: str, group_aware: bool, **options: Any) -> Verifier:
    """A verifier by name, or a user's function as FILE.py:FUNCTION.

    A user's function takes (texts, references), M strings and as many references (the answers of the data's examples,
    on plain text the text that follows), and returns M numbers; with `group_aware` the N texts of one anchor and its
    one reference, and returns N numbers.

    Args:
        verifier: one of `VERIFIERS`, or FILE.py:FUNCTION.
        group_aware: call a user's function anchor by anchor.
        options: of `OPTIONS`; None where not given.

    Raises:
        UsageError: an unknown name, a file or function that is not there, or an option that this verifier does not
            take.
    """
    own = ":" in verifier
    if not own and verifier not in _VERIFIERS:
        raise UsageError(
            f"unknown verifier {verifier!r}{nearest(verifier, _VERIFIERS)}: expected one of {', '.join(_VERIFIERS)},"
            " or a function of your own as FILE.py:FUNCTION"
        )
    defaults, build = ({}, lambda: _function(verifier)) if own else _VERIFIERS[verifier]
    for name, value in options.items():
        if value is not None and name not in defaults:
            takers = ", ".join(taker for taker, (taken, _) in _VERIFIERS.items() if name in taken)
            raise UsageError(f"{flag(name)} {value} does not apply to --verifier {verifier}; it belongs to {takers}")
    if group_aware and not own:
        raise UsageError(f"--group-aware: {verifier} looks at one text at a time; it is for a FILE.py:FUNCTION")
    score = build(**{name: value if options.get(name) is None else options[name] for name, value in defaults.items()})
    return Verifier(score, "example" if verifier == "unit_tests" else "answer", group_aware)


def _function(text: str) -> verifiers.Score:
    path, _, name = text.rpartition(":")
    if not Path(path).is_file():
        raise UsageError(f"--verifier {text}: there is no file {path!r}; expected FILE.py:FUNCTION")
    spec = importlib.util.spec_from_file_location(f"ebft_verifier_{Path(path).stem}", path)
    if spec is None or spec.loader is None:
        raise UsageError(f"--verifier {text}: {path!r} is no Python file; expected FILE.py:FUNCTION")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise UsageError(f"--verifier {text}: {path!r} could not be imported: {error!r}") from error
    found = getattr(module, name, None)
    if not callable(found):
        raise UsageError(f"--verifier {text}: {path!r} has no function {name!r}; expected FILE.py:FUNCTION")
    return found
