"""Run a generated Python program with its tests, in a process of its own that can do no harm.

=================== =========================================================================================
isolation           what holds a program
=================== =========================================================================================
``"namespaces"``    The Linux kernel: no network, no sight of other processes, an empty root with Python and the
                    system's libraries read-only and one small folder in memory, no capability, at most 8 processes.
                    When the program ends, everything it started has ended.
``"limits"``        Anywhere else on Unix: an audit hook refuses the network, new programs and files outside the
                    program's folder. It is a guard, not a wall: native code would get past it. The kernel refuses new
                    processes and threads (a program that needs them fails).
=================== =========================================================================================

In both: an environment of PATH, HOME, TMPDIR and LANG only, no standard input, no site-packages, no ctypes, no tracing,
hashing without randomness, and limits of the kernel on processor time, memory of each process, file size and open
files. As root, the program runs as the user `nobody`. macOS does not enforce the limit on memory.

What a verdict is worth. "passed" needs a random token that the harness writes after the last test. Ending early,
printing, replacing functions (built in, imported by the tests, or the harness's own), tracing, forking, or looking for
the token by any means of Python does not produce it. But program and tests share one interpreter, as tests that call
functions must: `weaknesses` says what that cannot keep out. Tests that compare types and values leave less room.
"""

from __future__ import annotations

import json
import math
import os
import secrets
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import IO, Any

from ebft.errors import UsageError

FORGERY = [
    "a test is passed as well by an object that is equal to everything, by a function that reads the expected value in"
    " the frame of the test that calls it, and by changes inside the library that the test uses",
    "native code (a bug of the interpreter, made-up bytecode, ctypes in a process that the program starts) can find the"
    " token of a pass in memory",
]
REASONS = ("passed", "failed", "error", "exit", "timeout", "memory")
ISOLATIONS = ("namespaces", "limits")
LAUNCHER = Path(__file__).with_name("launcher.py")
PYTHON = getattr(sys, "_base_executable", sys.executable)  # not a virtual environment's, which would need its folder

MIB = 1 << 20
PROCESSES, FILES, DISK, OUTPUT = 8, 64, 16 * MIB, 16_384
GRACE = 5.0  # seconds for the kernel to end a namespace


@dataclass(frozen=True)
class Result:
    """What became of a program.

    ``reason`` is "passed": all tests ran and none raised; "failed": a test raised; "error": the program itself raised
    or does not compile; "exit": it ended, or was ended, before its tests were through; "timeout"; or "memory".
    ``output`` is the beginning of what it printed, with the traceback.
    """

    reason: str
    output: str

    @property
    def passed(self) -> bool:
        """Whether all tests ran and none raised."""
        return self.reason == "passed"


class SandboxError(UsageError):
    """The isolation asked for cannot be had on this machine."""


def run(program: str, tests: str, *, timeout: float = 5.0, memory: int = 512, isolation: str | None = None) -> Result:
    """Run `program` as a module named "program", then `tests` among its names.

    Args:
        program, tests: Python source. ``if __name__ == "__main__":`` is false.
        timeout: seconds of wall time, start included, and of processor time; then everything is killed.
        memory: MiB of address space for each of its processes; Python itself takes about 30.
        isolation: "namespaces", "limits", or None for the best that this machine permits.

    Returns:
        Result; bad programs never raise.

    Raises:
        UsageError: an option out of its range.
        SandboxError: the isolation cannot be had here.
    """
    check_limits(timeout=timeout, memory=memory, isolation=isolation)
    isolation = isolation or best_isolation()
    token = secrets.token_hex(16)
    with ExitStack() as stack:
        # A program can leave what cannot be deleted at once; that must not end a training run.
        folder = tempfile.TemporaryDirectory(prefix="sandbox-", ignore_cleanup_errors=True)
        root = os.path.realpath(stack.enter_context(folder))
        job = stack.enter_context(tempfile.TemporaryFile())
        (output, output_end), (report, report_end) = _pipe(stack), _pipe(stack)
        settings = {
            "program": program, "tests": tests, "token": token, "root": root, "isolation": isolation,
            "report": report_end.fileno(), "cpu": math.ceil(timeout), "memory": memory * MIB, "disk": DISK,
            "files": FILES, "processes": PROCESSES,
        }  # fmt: skip
        job.write(json.dumps(settings).encode())
        job.seek(0)
        deadline = time.monotonic() + timeout
        process = subprocess.Popen(
            # -s -P -S: nothing but the standard library. Not -I, which would ignore the seed of hashing.
            [PYTHON, "-s", "-P", "-S", "-B", "-Xutf8", str(LAUNCHER)],
            stdin=job,
            stdout=output_end,
            stderr=output_end,
            pass_fds=[report_end.fileno()],
            env={"PYTHONHASHSEED": "0"},
            cwd="/",
            start_new_session=True,
        )
        try:
            output_end.close()
            report_end.close()
            printed, verdict = _collect(output, report, deadline)
            late = _is_late(process, deadline)
        finally:
            _end(process, gently=isolation == "namespaces")
    reason = _reason(verdict.decode(errors="replace"), process.returncode, late, token)
    return Result(reason, printed.decode(errors="replace"))


def run_all(
    jobs: Sequence[tuple[str, str]],
    *,
    workers: int | None = None,
    timeout: float = 5.0,
    memory: int = 512,
    isolation: str | None = None,
) -> list[Result]:
    """:func:`run` on pairs of a program and its tests, `workers` at a time (None: one per processor), in their order.

    More workers than processors share them, and a program close to `timeout` may then miss it.
    """
    workers = os.cpu_count() or 1 if workers is None else workers
    if workers < 1:
        raise UsageError(f"workers={workers!r}: expected a number of at least 1, or None for one per processor")
    options: dict[str, Any] = {"timeout": timeout, "memory": memory, "isolation": isolation}
    check_limits(**options)
    with ThreadPoolExecutor(workers) as pool:
        return list(pool.map(lambda job: run(*job, **options), jobs))


@cache
def best_isolation() -> str:
    """The strongest isolation that this machine permits, found out by trying."""
    try:
        run("", "", timeout=60.0, isolation="namespaces")
    except SandboxError:
        return "limits"
    return "namespaces"


def weaknesses(isolation: str | None = None) -> list[str]:
    """What programs are not kept from here, a sentence each.

    Args:
        isolation: of :func:`run`; None for the best that this machine permits.
    """
    if (isolation or best_isolation()) == "namespaces":
        return FORGERY
    return [
        *FORGERY,
        "network, new programs and files outside are refused by the interpreter, not by the kernel: native code would"
        " get past that",
        "other processes can be seen",
        *(["memory is not limited"] if sys.platform == "darwin" else []),
    ]


def check_limits(*, timeout: float, memory: int, isolation: str | None) -> None:
    """Check the options of :func:`run`."""
    if not (math.isfinite(timeout) and timeout > 0):
        raise UsageError(f"timeout={timeout!r}: expected a number of seconds above 0")
    if not memory >= 64:
        raise UsageError(f"memory={memory!r}: expected a number of MiB of at least 64; Python itself takes about 30")
    if isolation is not None and isolation not in ISOLATIONS:
        raise UsageError(f"isolation={isolation!r} is not known; expected one of {', '.join(ISOLATIONS)}, or None")


def _pipe(stack: ExitStack) -> list[IO[bytes]]:
    """The two ends of a pipe, closed with `stack` at the latest."""
    ends = zip(os.pipe(), ("rb", "wb"), strict=True)
    return [stack.enter_context(open(end, mode, buffering=0)) for end, mode in ends]


def _collect(output: IO[bytes], report: IO[bytes], deadline: float) -> tuple[bytes, bytes]:
    """The first bytes of each pipe, until both are closed or `deadline`; what comes after them is read and dropped."""
    kept = {output.fileno(): b"", report.fileno(): b""}
    with selectors.DefaultSelector() as selector:
        for number in kept:
            selector.register(number, selectors.EVENT_READ)
        while selector.get_map() and (left := deadline - time.monotonic()) > 0:
            for key, _ in selector.select(left):
                chunk = os.read(key.fd, 1 << 16)
                if not chunk:
                    selector.unregister(key.fd)
                kept[key.fd] += chunk[: OUTPUT - len(kept[key.fd])]
    return kept[output.fileno()], kept[report.fileno()]


def _is_late(process: subprocess.Popen[bytes], deadline: float) -> bool:
    try:
        process.wait(max(deadline - time.monotonic(), 0))
    except subprocess.TimeoutExpired:
        return True
    return False


def _end(process: subprocess.Popen[bytes], *, gently: bool) -> None:
    """Make sure that nothing runs any more. Told gently, the launcher first waits for the end of the namespace."""
    if process.poll() is not None:
        return
    if gently:
        process.terminate()
        _is_late(process, time.monotonic() + GRACE)
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _reason(verdict: str, code: int, late: bool, token: str) -> str:
    if verdict == token:
        return "passed"
    if verdict.startswith(token + " "):
        raise SandboxError(
            f"no sandbox by {verdict.removeprefix(token + ' ')}. isolation=None takes what this machine permits"
        )
    if verdict in ("failed", "error", "exit", "memory"):
        return verdict
    return "timeout" if late or code in (-signal.SIGXCPU, 128 + signal.SIGXCPU) else "exit"
