"""Answers that are programs, or the rest of one that the prompt begins."""

from __future__ import annotations

import warnings
from collections.abc import Sequence


def compiles(source: str) -> bool:
    """Whether `source` is a Python program; nothing of it is run."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            compile(source, "<answer>", "exec", dont_inherit=True)
    except (SyntaxError, ValueError, RecursionError, MemoryError, OverflowError):
        return False
    return True


def programs(
    answers: Sequence[str], prompts: Sequence[str], references: Sequence[str], *, together: bool | None = None
) -> list[str]:
    """The program of every answer: prompt and answer together, or the answer alone.

    Args:
        answers, prompts, references: M strings each; the references are right answers.
        together: the one or the other; None: together where the prompt and the reference are a program.
    """
    known = {pair: compiles("".join(pair)) for pair in set(zip(prompts, references, strict=True)) if together is None}
    return [
        prompt * known.get((prompt, right), bool(together)) + answer
        for answer, prompt, right in zip(answers, prompts, references, strict=True)
    ]
