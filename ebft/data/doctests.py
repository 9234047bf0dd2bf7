"""Problems with tests out of Python source: functions whose docstring shows examples, and docstrings with their body.

A problem is laid out as in HumanEval: the prompt is what a function needs from the head of its module, its signature
and docstring, the answer its body, the tests are assertions made of the docstring's examples. Nothing is executed here.
"""

from __future__ import annotations

import ast
import builtins
import doctest
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

Function = ast.FunctionDef | ast.AsyncFunctionDef
DOCSTRING_CHARACTERS, BODY_LINES = 1200, 25
_UNCHECKED = (doctest.ELLIPSIS, doctest.NORMALIZE_WHITESPACE, doctest.IGNORE_EXCEPTION_DETAIL)
_EXCEPTION = re.compile(r"(?P<kind>[\w.]+)(?:: (?P<message>.*))?\s*\Z", re.DOTALL)


@dataclass(frozen=True)
class Problem:
    """A function to be written: what is given, how it was written, and what it must do, if that is known."""

    name: str
    parameters: tuple[str, ...]
    prompt: str
    body: str
    tests: str


def with_tests(source: str, *, package: str) -> Iterator[Problem]:
    """The functions at the top level of a module whose docstring has examples that can be checked.

    Args:
        package: whose imports the examples do without, since the function stands alone.
    """
    tree = _parse(source)
    heads = list(_imports(tree))
    for function, docstring, prompt, body in _functions(tree, source, heads, nested=False):
        try:
            tests = assertions(docstring, package=package)
        except (ValueError, SyntaxError):  # examples that are none
            continue
        if tests and not hasattr(builtins, function.name):
            used = {node.id for node in ast.walk(ast.parse(tests)) if isinstance(node, ast.Name)} - {function.name}
            tests = "".join(line for names, line in heads if names & used) + tests
            yield Problem(function.name, _parameters(function), prompt, body, tests)


def without_tests(source: str) -> Iterator[Problem]:
    """Functions and methods with a docstring and a body of moderate length."""
    for function, docstring, prompt, body in _functions(_parse(source), source, [], nested=True):
        if len(docstring) <= DOCSTRING_CHARACTERS and len(body.splitlines()) <= BODY_LINES:
            yield Problem(function.name, _parameters(function), prompt, body, "")


def assertions(docstring: str, *, package: str) -> str:
    """The examples of a docstring as plain assertions, "" if none of them can be checked.

    Examples without output are run for what follows. Output is compared with the text of a value, by `str.__eq__`
    itself, which no value can overrule; output of loops and with ellipses is not compared.

    Raises:
        ValueError, SyntaxError: an example is not written as doctest wants it, or is no Python.
    """
    lines: list[str] = []
    checked = False
    for example in doctest.DocTestParser().get_examples(docstring):
        tree = ast.parse(example.source)
        if example.options.get(doctest.SKIP) or _is_import_of(tree, package):
            continue
        compared = example.want if example.exc_msg is None else example.exc_msg
        plain = not any(example.options.get(option) for option in _UNCHECKED) and "..." not in compared
        check = _check(tree, example) if plain else None
        checked |= check is not None
        lines.append(check or example.source)
    return "\n".join(line.rstrip("\n") for line in lines) + "\n" if checked else ""


def _check(tree: ast.Module, example: doctest.Example) -> str | None:
    if example.exc_msg is not None:
        found = _EXCEPTION.match(example.exc_msg)
        if found is None:
            return None
        kind, message = found["kind"].rpartition(".")[2], (found["message"] or "").rstrip("\n")
        return "\n".join(
            [
                "try:",
                *(f"    {line}" for line in example.source.rstrip("\n").split("\n")),
                "except BaseException as raised:",
                f"    assert str.__eq__(type(raised).__name__, {kind!r}) and str.__eq__(str(raised), {message!r})",
                "else:",
                f"    raise AssertionError({kind!r})",
            ]
        )
    if not example.want or len(tree.body) != 1 or not isinstance(tree.body[0], ast.Expr):
        return None
    value, show = tree.body[0].value, "repr"
    if isinstance(value, ast.Call) and isinstance(value.func, ast.Name) and value.func.id == "print":
        if len(value.args) != 1 or value.keywords:
            return None
        value, show = value.args[0], "str"
    want = example.want.removesuffix("\n").replace("<BLANKLINE>", "")
    return f"assert str.__eq__({show}({ast.unparse(value)}), {want!r})"


def _is_import_of(tree: ast.Module, package: str) -> bool:
    for node in tree.body:
        names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if any(name.split(".")[0] == package for name in names):
            return True
    return False


def _parse(source: str) -> ast.Module:
    """The module; an empty one for what is a template, or of another version of Python."""
    try:
        return ast.parse(source)
    except (SyntaxError, ValueError):
        return ast.Module([], [])


def _functions(
    tree: ast.Module, source: str, heads: Sequence[tuple[set[str], str]], *, nested: bool
) -> Iterator[tuple[Function, str, str, str]]:
    """(function, docstring, prompt, body) of every function with a docstring and a body after it.

    Args:
        heads: names that may be imported, with the line that does so.
        nested: also functions inside of others, and methods.
    """
    # As ast counts lines: str.splitlines breaks at form feeds as well.
    lines = [line + "\n" for line in source.split("\n")]
    for function in ast.walk(tree) if nested else tree.body:
        if not isinstance(function, Function) or len(function.body) < 2:
            continue
        docstring = ast.get_docstring(function, clean=False)
        text, after = function.body[0], function.body[1]
        if not docstring or not docstring.strip() or text.end_lineno == after.lineno:
            continue
        first = min([function.lineno, *(decorator.lineno for decorator in function.decorator_list)])
        given = lines[first - 1 : text.end_lineno]
        if function.lineno == text.lineno or "\t" in "".join(lines[first - 1 : function.end_lineno]):
            continue
        indent = " " * function.col_offset
        head = "".join(line for names, line in heads if names & _names(function))
        prompt = head + ("\n\n" if head else "") + _dedent(given, indent)
        body = _dedent(lines[text.end_lineno : function.end_lineno], indent).strip("\n") + "\n"
        yield function, docstring, prompt, body


def _imports(tree: ast.Module) -> Iterator[tuple[set[str], str]]:
    """Names that the head of a module imports from the standard library, with the line that imports them."""
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and node.module == "__future__":
            yield {"annotations"}, ast.unparse(node) + "\n"
        elif isinstance(node, ast.Import | ast.ImportFrom):
            module = getattr(node, "module", None)
            for alias in node.names:
                root = (module or alias.name).split(".")[0]
                if root not in sys.stdlib_module_names or (isinstance(node, ast.ImportFrom) and node.level):
                    continue
                alone = ast.ImportFrom(module, [alias], 0) if module else ast.Import([alias])
                yield {(alias.asname or alias.name).split(".")[0]}, ast.unparse(alone) + "\n"


def _names(function: Function) -> set[str]:
    names = {node.id for node in ast.walk(function) if isinstance(node, ast.Name)}
    annotated = function.returns or any(a.annotation for a in ast.walk(function) if isinstance(a, ast.arg))
    return names | ({"annotations"} if annotated else set())


def _parameters(function: Function) -> tuple[str, ...]:
    arguments = function.args
    every = [*arguments.posonlyargs, *arguments.args, arguments.vararg, *arguments.kwonlyargs, arguments.kwarg]
    return tuple(argument.arg for argument in every if argument is not None)


def _dedent(lines: list[str], indent: str) -> str:
    return "".join(line.removeprefix(indent) for line in lines)
