"""What training data may not share with the problems that it is evaluated on."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable

from ebft.data.doctests import Problem

NGRAM = 10  # words


class Overlap:
    """Tells which problems have a name, a signature or a run of words in common with held-out ones.

    Args:
        held_out: (prompt, answer) of problems laid out as in HumanEval.
    """

    def __init__(self, held_out: Iterable[tuple[str, str]]):
        self.names: set[str] = set()
        self.signatures: set[tuple[str, ...]] = set()
        self.ngrams: set[tuple[str, ...]] = set()
        for prompt, answer in held_out:
            self.ngrams |= _ngrams(prompt + answer)
            for node in ast.walk(ast.parse(prompt + answer)):
                if isinstance(node, ast.FunctionDef):
                    self.names.add(_plain(node.name))
                    self.signatures.add(tuple(argument.arg for argument in node.args.args))

    def reason(self, problem: Problem) -> str | None:
        """ "name", "signature" or "words", the first that is shared; None if none is.

        Names are compared without case and underscores, signatures where there are two parameters or more, words in
        runs of `NGRAM`.
        """
        if _plain(problem.name) in self.names:
            return "name"
        if len(problem.parameters) > 1 and problem.parameters in self.signatures:
            return "signature"
        if self.ngrams & _ngrams(problem.prompt + problem.body):
            return "words"
        return None


def _plain(name: str) -> str:
    return name.replace("_", "").lower()


def _ngrams(text: str) -> set[tuple[str, ...]]:
    words = re.findall(r"\w+", text.lower())
    return {tuple(words[i : i + NGRAM]) for i in range(len(words) - NGRAM + 1)}
