"""Programs that pretend to have passed by ending early, or by changing what judges them."""

from __future__ import annotations

import pytest

from ebft import sandbox
from tests.sandboxed import WRONG, isolation, run

__all__ = ["isolation"]


PRETENDERS = [
    "import sys; sys.exit(0)",
    "import os; os._exit(0)",
    "raise SystemExit",
    "exit = quit = None\nraise KeyboardInterrupt",
    "import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
    "print('passed'); import os; os._exit(0)",
    "import os\nfor n in range(3, 60):\n  try: os.write(n, b'passed')\n  except OSError: pass\nos._exit(0)",
    "import os\nfor n in range(3, 60):\n  try: os.write(n, b'passed')\n  except OSError: pass",
    "import builtins\nbuiltins.AssertionError = None\nbuiltins.answer = lambda: 42\nbuiltins.exec = print",
    "import builtins\nbuiltins.exec = builtins.compile = lambda *_: None\nbuiltins.BaseException = ()",
    "import os, sys, traceback\nos.write = os._exit = sys.exit = traceback.print_exc = lambda *_: None",
    "import sys\nsys.stdout = sys.stderr = None\ndel sys.modules['__main__'], sys.modules['program']",
    "import sys\nsys.excepthook = lambda *_: None\nsys.modules.clear()",
    "import atexit, os\natexit.register(os._exit, 0)",
    "__builtins__ = {}\nAssertionError = SystemExit",
    "import __main__\n__main__.run = __main__.finish = print",
    "import os\nif os.fork(): os._exit(0)",
    "import os\nif not os.fork(): os._exit(0)",
    "def answer(): import os; os._exit(0)",
    "def answer(): raise SystemExit(0)",
]


def test_success_cannot_be_pretended(isolation):
    found = sandbox.run_all([(program, WRONG) for program in PRETENDERS], timeout=20, isolation=isolation)
    reasons = {program: result.reason for program, result in zip(PRETENDERS, found, strict=True)}
    assert {program: why for program, why in reasons.items() if why not in ("failed", "error", "exit")} == {}


def test_a_fork_does_not_vote(isolation):
    """The child goes through the tests as well; only the program's own word counts, once."""
    program = "import os\nchild = os.fork()\nif child: os.waitpid(child, 0)"
    found = run(program, "assert child", isolation=isolation)
    assert found.passed if isolation == "namespaces" else found.reason == "error"
    assert not run(program, "assert not child", isolation=isolation).passed


def test_tests_see_the_real_built_in_functions(isolation):
    program = "import builtins\nbuiltins.sorted = lambda x: [1, 2]\nbuiltins.len = lambda x: 2\ndef f(): return [3]"
    assert not run(program, "assert len(f()) == 2", isolation=isolation).passed
    assert not run(program, "assert sorted(f()) == [1, 2]", isolation=isolation).passed


@pytest.mark.parametrize(
    ("program", "tests"),
    [
        ("def sorted(x): return [1, 2]", "assert sorted([3]) == [1, 2]"),
        ("def abs(x): return 0\ndef answer(): return 7", "assert abs(answer() - 42) < 1e-6"),
        ("str = repr = lambda x: '42'\ndef answer(): return 7", "assert repr(answer()) == '42'"),
        ("class AssertionError(Exception): pass\ndef answer(): return 7", WRONG),
        ("import math\nmath.isclose = lambda *_, **__: True", "import math\nassert math.isclose(1, 2)"),
        ("import math, sys\nmath.inf = 0\ndel sys.modules['math']", "from math import inf\nassert inf == 0"),
        ("import sys, types\nsys.modules['math'] = types.SimpleNamespace(inf=0)", "import math\nassert math.inf == 0"),
        ("import os.path\nos.path.exists = lambda _: True", "import os.path\nassert os.path.exists('/none')"),
        ("import unittest\nunittest.main = print", "import unittest\nassert unittest.main is print"),
        ("import doctest\ndoctest.testmod = print", "  \nfrom doctest import testmod\nassert testmod is print"),
    ],
)  # fmt: skip
def test_tests_see_the_real_functions_by_any_name(isolation, program, tests):
    assert run(program, tests, isolation=isolation).reason == "failed"


def test_a_program_may_use_the_names_of_built_in_functions_itself(isolation):
    program = "def sum(x): return len(x)\ndef f(x): return sum(x)"
    assert run(program, "assert f([5, 5]) == 2 and sum([5, 5]) == 10", isolation=isolation).passed


@pytest.mark.parametrize("when", ["before", "during"])
def test_lines_of_the_tests_cannot_be_skipped(isolation, when):
    """A trace function may move a frame to another line."""
    program = """
    import sys
    def jump(frame, event, argument):
        if frame.f_code.co_filename == "<tests>" and event == "line" and frame.f_lineno == 2:
            frame.f_lineno = 3
        return jump
    def answer():
        frame = sys._getframe(1)
        frame.f_trace = jump
        sys.settrace(jump)
    """ + ("sys.settrace(jump)" if when == "before" else "")
    tests = f"{'answer()' if when == 'during' else 'pass'}\n{WRONG}\nx = 1\n"
    found = run(program, tests, isolation=isolation)
    assert "refused in the sandbox: sys.settrace" in found.output
    assert not found.passed


BREAK_OUTS = [
    "import os\nwhile True: os.fork()",
    "x = []\nwhile True: x.append(bytearray(10**7))",
    "while True: pass",
    "while True: print('passed' * 1000)",
    "import shutil\nshutil.rmtree('/', ignore_errors=True)",
    "import os\nos.listdir(os.path.expanduser('~root'))",
    "import socket\nsocket.create_server(('', 0))",
    "import os\nos.kill(os.getppid(), 9)",
    "import os, signal\nos.killpg(0, signal.SIGTERM)",
    "import subprocess\nsubprocess.Popen(['/bin/sleep', '54321'])",
    "import ctypes\nctypes.string_at(0)",
    "import sys\nsys.setrecursionlimit(10**9)\ndef f(): f()\nf()",
]


def test_no_break_out_makes_a_wrong_program_pass(isolation):
    """And the pool goes on: between any two of them an innocent program passes."""
    jobs = [job for program in BREAK_OUTS for job in ((program, WRONG), ("", ""))]
    found = sandbox.run_all(jobs, workers=3, timeout=1.5, isolation=isolation)
    assert {p: r.reason for p, r in zip(BREAK_OUTS, found[::2], strict=True) if r.passed} == {}
    assert all(result.passed for result in found[1::2])


def test_assertions_are_not_optimised_away(isolation):
    assert not run("import sys\nassert 1 == 2", isolation=isolation).passed
