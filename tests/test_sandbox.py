"""Programs that misbehave, one test each; by every isolation that this machine permits."""

from __future__ import annotations

import os
import sys
import tempfile
import time
from pathlib import Path

import pytest

from ebft import sandbox
from ebft.errors import UsageError
from ebft.sandbox import Result, SandboxError
from tests.sandboxed import WRONG, isolation, run

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


# ---- time and memory


@pytest.mark.parametrize(
    "loop", ["while True: pass", "import time; time.sleep(60)", "try:\n  input()\nexcept EOFError:\n  while 1: 1"]
)
def test_a_loop_without_end_is_stopped(isolation, loop):
    begin = time.monotonic()
    assert run(loop, isolation=isolation, timeout=0.4).reason == "timeout"
    assert time.monotonic() - begin < 3


def test_signals_do_not_save_a_program(isolation):
    program = """
    import signal
    for number in (signal.SIGTERM, signal.SIGXCPU, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    while True: pass
    """
    assert run(program, isolation=isolation, timeout=0.4).reason == "timeout"


def test_closing_its_outputs_does_not_save_a_program(isolation):
    begin = time.monotonic()
    found = run("import os, time; os.closerange(0, 60); time.sleep(60)", isolation=isolation, timeout=0.4)
    assert (found.reason, time.monotonic() - begin < 3) == ("timeout", True)


def test_processor_time_is_limited(isolation):
    found = run("import resource; print(resource.getrlimit(resource.RLIMIT_CPU)[0])", isolation=isolation, timeout=7)
    assert found.output == "7\n"


@pytest.mark.parametrize(
    "bomb", ["x = bytearray(10**9)", "x = []\nwhile True: x.append('a' * 10**6)", "x = 'a' * 10**10"]
)
def test_memory_bomb(isolation, bomb):
    assert run(bomb, isolation=isolation).reason == "memory"
    assert run("x = bytearray(40 * 2**20)", isolation=isolation, memory=512).passed


def test_no_input(isolation):
    found = run("import sys\nassert sys.stdin.read() == ''\ninput()", isolation=isolation)
    assert (found.reason, "EOFError" in found.output) == ("error", True)


def test_huge_output_is_cut(isolation):
    program = "print('é' * 20_000_000)\nprint('end')"
    found = run(program, isolation=isolation)
    assert found.passed
    assert found.output.startswith("éé")
    assert len(found.output.encode()) <= sandbox.OUTPUT + 2  # half a character is replaced
    assert run("while True: print('x' * 10**5)", isolation=isolation, timeout=1).reason == "timeout"


def test_disk_is_limited(isolation):
    program = (
        f"with open('big', 'wb') as file:\n  for _ in range({sandbox.DISK // 2**20 + 2}): file.write(bytes(2**20))"
    )
    assert run(program, isolation=isolation).reason == "error"
    assert run("open('small', 'wb').write(bytes(2**20))", isolation=isolation).passed


# ---- processes


def test_fork_bomb(isolation):
    begin = time.monotonic()
    found = run("import os\nwhile True: os.fork()", isolation=isolation)
    assert found.reason == "error"
    # the children go on forking until the program ends, and may not outlive it
    found = run(
        "import os, time\nprint(sum(1 for _ in [os.fork() for _ in range(3)]))\ntime.sleep(60)",
        isolation=isolation,
        timeout=1,
    )
    assert found.reason in ("timeout", "error")
    assert time.monotonic() - begin < 8


def test_threads_are_bounded(isolation):
    start = "threading.Thread(target=time.sleep, args=(9,), daemon=True).start()"
    program = f"import threading, time\nfor _ in range(50): {start}"
    found = run(program, isolation=isolation)
    assert "can't start new thread" in found.output


def processes() -> dict[int, str]:
    """Command lines of all processes."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            found[int(path.parent.name)] = path.read_bytes().decode(errors="replace")
        except OSError:
            continue
    return found


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="needs /proc to look at processes")
@pytest.mark.parametrize("end", ["", "time.sleep(60)"])
def test_background_processes_end_with_the_program(isolation, end):
    program = f"""
    import os, time, sys
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            os.execv("/bin/sleep", ["sleep", "54321"])
        os._exit(0)
    time.sleep(0.3)
    print("started")
    sys.stdout.flush()
    {end}
    """
    found = run(program, isolation=isolation, timeout=2)
    assert ("started" in found.output) == (isolation == "namespaces"), found
    assert not [line for line in processes().values() if "54321" in line or str(sandbox.LAUNCHER) in line]


def test_the_parent_cannot_be_killed(isolation):
    program = """
    import os, signal
    done = []
    for process in (os.getppid(), PARENT, 1, 0, -1):
        try:
            os.kill(process, signal.SIGKILL if process else 0)
            done.append(process)
        except OSError:
            pass
    print(done)
    """.replace("PARENT", str(os.getpid()))
    found = run(program, isolation=isolation)
    # Its parent, and process 1, are those of its own namespace: there the first process is deaf to it.
    assert found.reason in ("passed", "exit")
    if isolation == "limits":
        assert found.output == "[]\n"
    assert run("import os\nos.killpg(0, 9)", WRONG, isolation=isolation).reason in ("exit", "error")


# ---- what is outside


def test_writing_outside(isolation, tmp_path):
    tmp_path.chmod(0o777)
    victim = tmp_path / "victim"
    victim.write_text("whole")
    victim.chmod(0o666)
    program = f"""
    import os, pathlib, shutil
    victim = pathlib.Path({str(victim)!r})
    done = []
    def attempt(action):
        try:
            action()
            done.append(action)
        except OSError:
            pass
    attempt(lambda: victim.write_text("broken"))
    attempt(lambda: victim.open("a").write("broken"))
    attempt(lambda: os.close(os.open(victim, os.O_TRUNC | os.O_WRONLY)))
    attempt(lambda: os.truncate(victim, 0))
    attempt(victim.unlink)
    attempt(lambda: os.rename(victim, "mine"))
    attempt(lambda: os.symlink(victim, "link") or open("link", "w"))
    attempt(lambda: victim.with_name("new").write_text("x"))
    attempt(lambda: open({__file__!r}, "a"))
    attempt(lambda: open(os.__file__, "a"))
    attempt(lambda: open("/usr/new", "w"))
    attempt(lambda: open("../new", "w"))
    attempt(lambda: open("/tmp/new", "w"))
    """
    assert run(program, "assert not done, len(done)", isolation=isolation) == Result("passed", "")
    assert victim.read_text() == "whole"
    assert [path.name for path in tmp_path.iterdir()] == ["victim"]


def test_a_folder_that_is_open_is_no_way_out(isolation, tmp_path):
    """Paths are relative to it, which no audit event of `open` says."""
    copy = Path(sandbox.PYTHON).parents[1]  # a library that the kernel lets everyone write to, where it is the test's
    folder = copy / "lib" / "open" if copy.is_relative_to(tempfile.gettempdir()) else tmp_path
    folder.mkdir(exist_ok=True)
    folder.chmod(0o777)
    (folder / "victim").write_text("whole")
    (folder / "victim").chmod(0o666)
    (folder / "empty").mkdir()
    program = f"""
    import os
    done = []
    def attempt(action):
        try:
            done.append(action())
        except OSError:
            pass
    open("mine", "w").close()
    own, folders = os.open(".", os.O_RDONLY), []
    for path in ({str(folder)!r}, "/usr", os.path.dirname(os.__file__)):
        for flags in (os.O_RDONLY, os.O_DIRECTORY, getattr(os, "O_PATH", 0)):
            try:
                folders.append(os.open(path, flags))
            except OSError:
                pass
    for fd in folders:
        attempt(lambda: os.open("new", os.O_WRONLY | os.O_CREAT, dir_fd=fd))
        attempt(lambda: os.open("victim", os.O_WRONLY | os.O_TRUNC, dir_fd=fd))
        attempt(lambda: os.rename("mine", "victim", dst_dir_fd=fd))
        attempt(lambda: os.rename("victim", "theirs", src_dir_fd=fd))
        attempt(lambda: os.utime("victim", (0, 0), dir_fd=fd))
        attempt(lambda: os.remove("victim", dir_fd=fd))
        attempt(lambda: os.rmdir("empty", dir_fd=fd))
        attempt(lambda: (os.fchdir(fd), open("new", "w")))
    print(len(folders))
    attempt(lambda: os.utime("mine", dir_fd=own))
    attempt(lambda: os.rename("mine", "yours", src_dir_fd=own, dst_dir_fd=own))
    attempt(lambda: os.remove("yours", dir_fd=own))
    """
    found = run(program, "", isolation=isolation)
    assert found.passed, found
    assert (found.output == "0\n") == (isolation == "limits")  # the kernel lets them be opened, but not written to
    assert run(program, f"assert len(done) == {3 * (isolation == 'namespaces')}, done", isolation=isolation).passed
    assert sorted(path.name for path in folder.iterdir()) == ["empty", "victim"]
    assert (folder / "victim").read_text() == "whole"
    assert (folder / "victim").stat().st_mtime > 0


# What a guard might be deceived by, before the file VICTIM is written to by way of `path`.
DECEIVERS = {
    "built-in functions": """
import builtins
for name in ("any", "all", "isinstance", "type", "len"): setattr(builtins, name, lambda *_: True)""",
    "names in os": """
for name in ("readlink", "getcwd", "stat", "lstat", "fsdecode", "fspath"): setattr(os, name, lambda *_: OWN)
os.isinstance = lambda *_: False""",
    "names in os.path": """
for name in dir(os.path):
    if callable(getattr(os.path, name)): setattr(os.path, name, lambda *_, **__: (OWN, True))
os.path.realpath = lambda *_: OWN""",
    "what is seen in a traceback": """
def nothing(*_, **__): return True
def look(frame):
    for value in [*frame.f_locals.values(), *frame.f_globals.values()]:
        if hasattr(value, "__code__"):
            for cell in value.__closure__ or ():
                try: cell.cell_contents = ("/",)
                except ValueError: pass
            try: value.__code__ = nothing.__code__
            except ValueError: pass
        if type(value) is dict and "os.remove" in value: value.clear()
try: open(path, "w")
except OSError as error:
    trace = error.__traceback__
    while trace:
        if trace.tb_frame.f_code.co_filename != "<program>": look(trace.tb_frame)
        trace = trace.tb_next""",
    "a string": """
class Text(str):
    def lie(self, *_): return OWN
    def parts(self, *_): return [OWN]
    startswith = lambda *_: True
    split, partition, rpartition = parts, lambda *_: (OWN, "", ""), lambda *_: (OWN, "", "")
    __str__ = __getitem__ = __add__ = encode = __fspath__ = lie
path = Text(path)""",
    "octets": """
class Octets(bytes):
    def lie(self, *_): return OWN
    __getitem__ = decode = __str__ = lie
path = Octets(path.encode())""",
    "a path": """
class Path:
    real, asked = path, 0
    __class__ = int
    def __fspath__(self):
        self.asked += 1
        return OWN + "/x" if self.asked == 1 else self.real
path = Path()""",
    "a pathlib path": "import pathlib; path = pathlib.Path(path)",
    "steps up": "path = OWN + '/..' * 12 + path",
}


def test_what_judges_paths_cannot_be_deceived(isolation, tmp_path):
    tmp_path.chmod(0o777)
    for parent in tmp_path.parents[:2]:
        parent.chmod(0o755)
    victim = tmp_path / "victim"
    victim.write_text("whole")
    victim.chmod(0o666)
    first = f"import os\nOWN, path, remove = os.getcwd(), {str(victim)!r}, os.remove\n"
    last = """
for action in (lambda: open(path, "a").write("x"), lambda: os.open(path, os.O_TRUNC | os.O_WRONLY),
               lambda: os.rename(path, "mine"), lambda: os.truncate(path, 0), lambda: remove(path)):
    try: action()
    except (OSError, TypeError): pass
"""
    jobs = [(first + deceit + last, "") for deceit in DECEIVERS.values()]
    found = sandbox.run_all(jobs, isolation=isolation, timeout=20)
    assert {n: r for n, r in zip(DECEIVERS, found, strict=True) if r != Result("passed", "")} == {}
    assert victim.read_text() == "whole"


def test_its_folder_is_its_own_and_is_deleted(isolation, monkeypatch):
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        monkeypatch.setattr(tempfile, "tempdir", folder)
        program = "import os\nopen('left', 'x').write('x')\nprint(os.getcwd() == os.environ['HOME'])\nos.chmod('.', 0)"
        for _ in range(2):  # the second finds nothing of the first
            found = run(program, isolation=isolation)
            assert found.output.startswith("True\n")
            assert not os.listdir(folder)


def test_secrets_of_the_environment(isolation, monkeypatch):
    monkeypatch.setenv("SECRET_TOKEN", "hunter2")
    program = """
    import os, glob, subprocess
    seen = str(dict(os.environ))
    for path in ["/proc/PARENT/environ", f"/proc/{os.getppid()}/environ", "/proc/self/environ", "/proc/1/environ"]:
        try:
            seen += open(path).read()
        except OSError:
            pass
    try:
        seen += subprocess.run(["env"], capture_output=True, text=True).stdout
    except OSError:
        pass
    print(sorted(os.environ))
    """.replace("PARENT", str(os.getpid()))
    found = run(program, "assert 'hunter2' not in seen and 'SECRET' not in seen", isolation=isolation)
    assert found == Result("passed", "['HOME', 'LANG', 'PATH', 'TMPDIR']\n")


def test_files_of_the_user_cannot_be_read(isolation, tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("hunter2")
    for path in (secret, "/etc/passwd", __file__, os.path.expanduser("~")):
        found = run(
            f"import os\nos.listdir({str(path)!r}) if os.path.isdir({str(path)!r}) else open({str(path)!r})",
            isolation=isolation,
        )
        if isolation == "namespaces" and os.path.isdir(path) and sys.base_prefix.startswith(str(path)):
            continue  # the way to Python's library, with nothing else on it
        assert found.reason == "error", path


def test_no_network(isolation):
    import socket

    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        socket.create_connection(("127.0.0.1", port), timeout=1).close()  # it listens
        program = f"import socket\nsocket.create_connection(('127.0.0.1', {port}), timeout=1)"
        assert run(program, isolation=isolation).reason == "error"
    program = "import socket\nsocket.socket(socket.AF_UNIX).connect('/run/docker.sock')"
    assert run(program, isolation=isolation).reason == "error"


# ---- pretending to have passed


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


# ---- many at once


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
