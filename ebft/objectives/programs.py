"""Answers that are programs, or the rest of one that the prompt begins."""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence

_OPENING = re.compile(r"(\s*)(`{3,})\s*([^`\s]*)[^`]*")  # indentation, marks and language
_PYTHON = ("", "python", "python3", "py")


def compiles(source: str) -> bool:
    """Whether `source` is a Python program; nothing of it is run."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            compile(source, "<answer>", "exec", dont_inherit=True)
    except (SyntaxError, ValueError, RecursionError, MemoryError, OverflowError):
        return False
    return True


def unfenced(text: str) -> str:
    """The lines of the first Markdown fence that is of Python or of no language; the text itself where there is none.

    A fence that is not closed, as in an answer that was cut off, goes on to the end.
    """
    block: list[str] | None = None
    for line in text.split("\n"):
        if block is None:
            if opening := _OPENING.fullmatch(line):
                block, (indent, marks, language) = [], opening.groups()
        elif set(mark := line.strip()) == {"`"} and len(mark) >= len(marks):
            if language.lower() in _PYTHON:
                return "\n".join(block)
            block = None
        else:
            block.append(line.removeprefix(indent))
    return text if block is None or language.lower() not in _PYTHON else "\n".join(block)


def programs(
    answers: Sequence[str],
    prompts: Sequence[str],
    references: Sequence[str],
    *,
    together: bool | None = None,
    fenced: bool = False,
) -> list[str]:
    """The program of every answer: prompt and answer together, or the answer alone.

    Args:
        answers, prompts, references: M strings each; the references are right answers.
        together: the one or the other; None: together where the prompt and the reference are a program.
        fenced: take programs out of Markdown fences, in which chat models write them, unless the answer is one as it
            is. Where the reference has to be taken out of one to be a program, answers are so in any case.
    """
    pairs = list(zip(prompts, references, strict=True))
    known = {pair: _begin(*pair, together) for pair in set(pairs)}
    return [
        _program(answer, start, fenced or fence)
        for answer, (start, fence) in zip(answers, (known[pair] for pair in pairs), strict=True)
    ]


def _begin(prompt: str, right: str, together: bool | None) -> tuple[str, bool]:
    """What a program begins with before the answer, and whether the right one is in a fence."""
    inside = unfenced(right)
    for answer in dict.fromkeys((right, inside)):
        start = prompt if together or (together is None and compiles(_joined(prompt, answer, answer != right))) else ""
        if compiles(_joined(start, answer, answer != right)):
            return start, answer != right
    return prompt * bool(together), False


def _program(answer: str, start: str, fenced: bool) -> str:
    whole = start + answer
    if not fenced or compiles(whole):
        return whole
    inside = unfenced(answer)
    return _joined(start, inside, inside != answer)


def _joined(start: str, answer: str, lines: bool) -> str:
    """An answer that is whole lines begins on one of its own."""
    return f"{start}\n{answer}" if lines and start and not start.endswith("\n") else start + answer
