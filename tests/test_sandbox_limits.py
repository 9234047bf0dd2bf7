"""Programs without end, bombs of memory and output, processes that stay behind."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from ebft import sandbox
from tests.sandboxed import WRONG, isolation, run

__all__ = ["isolation"]


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
