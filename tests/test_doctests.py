"""Problems out of docstrings: what the assertions are worth, what a problem is made of, what overlaps held-out ones."""

import pytest

from ebft import sandbox
from ebft.data.doctests import Problem, assertions, with_tests, without_tests
from ebft.data.overlap import Overlap
from ebft.data.qa_code import verified

MODULE = '''"""Module."""
from __future__ import annotations
import math, os.path as path
from collections import Counter, deque as queue
from . import neighbour
import numpy

CONSTANT = 3


def area(radius: float) -> float:
    """Area of a disc.

    >>> area(1)
    3.141592653589793
    >>> round(area(2), 1)
    12.6
    """
    return math.pi * radius**2


@property
def most(items):
    """No examples."""
    return Counter(items)


class Box:
    def size(self,
             unit="cm"):
        """Its size."""

        text = """two
        lines"""
        return text


def one_line(x): """Doc >>> 1"""; return x


def empty():
    """>>> empty()"""


def triple(x):
    """Three times.

    >>> from package.module import triple
    >>> list(map(triple, queue([1, 2])))
    [3, 6]
    """
    return CONSTANT * x


def len(x):
    """
    >>> len([1])
    1
    """
    return 1
'''


def test_a_problem_is_what_a_function_needs_and_what_it_must_do():
    area, triple = with_tests(MODULE, package="package")
    assert area.prompt == (
        "from __future__ import annotations\nimport math\n\n\n"
        'def area(radius: float) -> float:\n    """Area of a disc.\n\n    >>> area(1)\n    3.141592653589793\n'
        '    >>> round(area(2), 1)\n    12.6\n    """\n'
    )
    assert area.body == "    return math.pi * radius**2\n"
    assert area.parameters == ("radius",)
    assert area.tests == (
        "assert str.__eq__(repr(area(1)), '3.141592653589793')\nassert str.__eq__(repr(round(area(2), 1)), '12.6')\n"
    )
    assert triple.tests == (
        "from collections import deque as queue\nassert str.__eq__(repr(list(map(triple, queue([1, 2])))), '[3, 6]')\n"
    )


def test_functions_with_a_docstring():
    found = {problem.name: problem for problem in without_tests(MODULE)}
    assert set(found) == {"area", "most", "size", "triple", "len"}
    assert found["size"].prompt == 'def size(self,\n         unit="cm"):\n    """Its size."""\n'
    assert found["size"].body.startswith('    text = """two\n    lines"""\n')
    assert found["most"].prompt == '@property\ndef most(items):\n    """No examples."""\n'
    assert list(without_tests("def f(:")) == []


def test_only_what_solves_its_tests_and_is_not_empty_is_kept():
    problems = list(with_tests(MODULE, package="package"))
    vacuous = Problem("f", (), "def f():\n    ...\n", "    return 1\n", "assert True\n")
    kept, why = verified([*problems, vacuous])
    assert [problem.name for problem in kept] == ["area"]  # triple needs CONSTANT
    assert why == {"kept": 1, "fails": 1, "empty body passes": 1}


@pytest.mark.parametrize(
    ("docstring", "right", "wrong"),
    [
        (">>> f(1)\n2\n", "def f(x): return x + 1", "def f(x): return 2.0"),
        (">>> f(1)\n[1, 'a']\n", "def f(x): return [1, 'a']", "def f(x): return (1, 'a')"),
        (">>> x = f(1)\n>>> x\n2\n", "def f(x): return 2", "def f(x): return 3"),
        (">>> print(f(1))\na\n<BLANKLINE>\nb\n", "def f(x): return 'a\\n\\nb'", "def f(x): return 'a\\nb'"),
        (">>> f('x')\nTraceback (most recent call last):\n  ...\nValueError: no x\n",
         "def f(x): raise ValueError('no x')", "def f(x): raise ValueError('no y')"),
        (">>> f('x')\nTraceback (most recent call last):\n  ...\nKeyError: 'x'\n",
         "def f(x): return {}[x]", "def f(x): 0"),
        (">>> for i in f(2):\n...     print(i)\n0\n1\n>>> f(1)\nrange(0, 1)\n", "f = range", "f = list"),
        (">>> f(1)\n2\n", "def f(x): return x + 1",
         "class A(str):\n  def __eq__(*_): return True\n"
         "class B:\n  def __repr__(_): return A('9')\ndef f(x): return B()"),
    ],
)  # fmt: skip
def test_assertions(docstring, right, wrong):
    tests = assertions(docstring, package="package")
    ok, bad = sandbox.run_all([(right, tests), (wrong, tests)], timeout=20)
    assert ok.passed, ok.output
    assert bad.reason == "failed"


@pytest.mark.parametrize(
    "docstring",
    [
        "no examples",
        ">>> f(1)",
        ">>> f(1) # doctest: +SKIP\n2",
        ">>> f(1) # doctest: +ELLIPSIS\n[1...",
        ">>> f()\n[...]",
    ],
)
def test_what_cannot_be_checked_is_no_test(docstring):
    assert assertions(docstring, package="package") == ""


def test_overlap():
    held_out = [
        ("def is_prime(n):\n    '''Tell whether it is.'''\n", "    return all(n % i for i in range(2, n))\n"),
        ("def gcd(a, b):\n    '''doc'''\n", "    while b: a, b = b, a % b\n    return a\n"),
    ]
    overlap = Overlap(held_out)

    def problem(name, parameters, body):
        return Problem(name, parameters, f"def {name}({', '.join(parameters)}):\n    '''x'''\n", body, "")

    assert overlap.reason(problem("isPrime", ("x",), "    return 1\n")) == "name"
    assert overlap.reason(problem("divisor", ("a", "b"), "    return 1\n")) == "signature"
    assert overlap.reason(problem("other", ("n",), "    return 1\n")) is None
    copied = "    while b: a, b = b, a % b\n    return a\n"
    assert overlap.reason(problem("other", ("b", "a"), copied)) is None  # 9 words
    assert overlap.reason(problem("other", ("n",), "    # gcd a b doc\n" + copied)) == "words"
