"""Programs that behave, how programs end, many at once; by every isolation that this machine permits."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from ebft import sandbox
from ebft.errors import UsageError
from ebft.sandbox import Result, SandboxError
from tests.sandboxed import isolation, run

__all__ = ["isolation"]


def test_both_isolations_are_told_apart(isolation):
    """In namespaces the program is one of three processes; otherwise it may not even look."""
    found = run("import os; print(os.getpid(), os.getcwd())", isolation=isolation)
    assert found.passed
    assert (found.output == "2 /work\n") == (isolation == "namespaces")


def test_verdicts(isolation):
    add = "def add(a, b):\n    return a + b\n"
    assert run(add, "assert add(1, 2) == 3", isolation=isolation) == Result("passed", "")
    failed = run(add, "assert add(1, 2) == 4", isolation=isolation)
    assert (failed.reason, failed.passed) == ("failed", False)
    assert "AssertionError" in failed.output
    assert run(add, "add(1)", isolation=isolation).reason == "failed"
    assert run("1 / 0", isolation=isolation).reason == "error"
    assert "ZeroDivisionError" in run("1 / 0", isolation=isolation).output
    assert run(add, "assert add(1,", isolation=isolation).reason == "failed"


def test_what_is_no_program_is_an_error(isolation):
    programs = ["def f(:", "x = (" + "(" * 5000, "\x00", "'\ud800'", " x = 1", "é = ", "a" * 10**6]
    found = sandbox.run_all([(program, "") for program in programs], isolation=isolation, timeout=20)
    assert {result.reason for result in found} <= {"error", "memory"}


def test_ordinary_programs_work(isolation):
    program = """
    import asyncio, collections, dataclasses, decimal, functools, json, math, random, re, tempfile, typing

    @dataclasses.dataclass
    class Point:
        x: int = 1

    async def three():
        await asyncio.sleep(0)
        return 3

    with tempfile.NamedTemporaryFile("w+") as file:
        file.write("übung")
        file.seek(0)
        text = file.read()
    """
    tests = "assert Point() == Point(1) and asyncio.run(three()) == 3 and text == 'übung' and __name__ == 'program'"
    assert run(program, tests, isolation=isolation) == Result("passed", "")


def test_unicode(isolation):
    found = run("größe = '𝄞 ünï'\nprint(größe)", "assert größe[0] == '𝄞'", isolation=isolation)
    assert found == Result("passed", "𝄞 ünï\n")


def test_hashing_is_the_same_every_time(isolation):
    runs = {run("print(hash('a'), list({'b', 'c', 'd'}))", isolation=isolation).output for _ in range(3)}
    assert len(runs) == 1


def test_many_at_once_keep_their_order(isolation):
    jobs = [(f"x = {i}\nprint(x)", f"assert x % 3 == {i % 2}") for i in range(24)]
    found = sandbox.run_all(jobs, workers=6, timeout=30, isolation=isolation)
    assert [result.passed for result in found] == [i % 3 == i % 2 for i in range(24)]
    assert [result.output.split("\n")[0] for result in found] == [str(i) for i in range(24)]
    assert sandbox.run_all([], isolation=isolation) == []


def test_every_end_has_its_reason(isolation):
    jobs = [
        ("", ""),
        ("", "assert 0"),
        ("1 / 0", ""),
        ("raise SystemExit", ""),
        ("while 1: 1", ""),
        ("x = 'a' * 10**10", ""),
    ]
    found = sandbox.run_all(jobs, timeout=1.5, isolation=isolation)
    assert tuple(result.reason for result in found) == sandbox.REASONS


def test_what_is_not_protected_is_said(isolation, monkeypatch):
    assert (sandbox.weaknesses(isolation) == sandbox.FORGERY) == (isolation == "namespaces")
    monkeypatch.setattr(sandbox.sys, "platform", "darwin")
    assert any("memory" in sentence for sentence in sandbox.weaknesses("limits"))


def test_open_files_do_not_pile_up(isolation):
    if not Path("/proc/self/fd").is_dir():
        pytest.skip("needs /proc to count open files")
    before = len(os.listdir("/proc/self/fd"))
    sandbox.run_all([("while True: pass", "")] * 3 + [("", "")] * 3, workers=3, timeout=0.5, isolation=isolation)
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"timeout": 0}, "timeout=0.*above 0"),
        ({"timeout": float("nan")}, "timeout=nan"),
        ({"memory": 8}, "memory=8.*at least 64"),
        ({"isolation": "docker"}, "isolation='docker'.*namespaces, limits"),
        ({"workers": 0}, "workers=0.*at least 1"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(UsageError, match=message):
        sandbox.run_all([("", "")], **options)


def test_an_isolation_that_cannot_be_had_is_an_error(monkeypatch, tmp_path):
    """With a launcher that cannot: the message says what the system said, and a program's own text is not mistaken."""
    broken = sandbox.LAUNCHER.read_text().replace("folder = shut(job)", "raise OSError(1, 'not permitted here')")
    (tmp_path / "launcher.py").write_text(broken)
    monkeypatch.setattr(sandbox, "LAUNCHER", tmp_path / "launcher.py")
    with pytest.raises(SandboxError, match=r"not permitted here.*isolation=None"):
        sandbox.run("", "", timeout=60, isolation="namespaces")
    sandbox.best_isolation.cache_clear()
    assert sandbox.best_isolation() == "limits"
    sandbox.best_isolation.cache_clear()
