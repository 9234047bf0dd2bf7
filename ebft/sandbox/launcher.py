"""Runs one program and its tests under limits, in a process of its own. A script: standard library only.

The job is read from standard input: JSON with ``program``, ``tests``, ``token``, ``root`` (an empty folder) and the
limits. The verdict goes to the file descriptor ``report``: the token when all tests are through, else what happened.
"""

from __future__ import annotations

import builtins
import importlib
import json
import os
import re
import resource
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from types import ModuleType
from typing import Any

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import guards
import namespaces

del sys.path[0]


def main() -> None:
    """Read the job, shut the door, run."""
    job = json.load(sys.stdin)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    with suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:  # Linux: if memory runs out, this goes first
        file.write("1000")
    try:
        folder = shut(job)
    except OSError as error:
        os.write(job["report"], f"{job['token']} {error}".encode())
        os._exit(1)
    os.environ.clear()
    os.environ.update(PATH="/usr/bin:/bin", HOME=folder, TMPDIR=folder, LANG="C.UTF-8")
    run(job["program"], job["tests"], token=job["token"], report=job["report"])


def shut(job: dict[str, Any]) -> str:
    """Apply isolation and limits; the folder that the program may write to."""
    processes = job["processes"]
    if job["isolation"] == "namespaces":
        namespaces.enter(job["root"], disk=job["disk"])
        folder = namespaces.FOLDER
        processes += 2  # the two that wait for it
    else:
        folder, processes = job["root"], 0  # of one user's processes; 0: no new process or thread
        if os.getuid() == 0:
            os.chown(folder, namespaces.NOBODY, namespaces.NOBODY)
            namespaces.become_nobody()
        os.chdir(folder)
        if not os.access(os.__file__, os.R_OK):
            library = os.path.dirname(os.__file__)
            raise OSError(f"the user nobody, as whom root runs programs, cannot read {library}: be another user")
    limits = {"CPU": job["cpu"], "AS": job["memory"], "FSIZE": job["disk"], "NOFILE": job["files"], "NPROC": processes}
    for name, limit in {**limits, "CORE": 0}.items():
        resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (limit, limit + 1 if name == "CPU" else limit))
    if job["isolation"] != "namespaces":
        guards.install(folder)
    return folder


def run(program: str, tests: str, *, token: str, report: int) -> None:
    """Run `program` as a module, then `tests` in its names; report and end the process."""
    # Bound here, and copied: what the program puts in the place of these functions changes nothing below.
    write, end, process, compile_, exec_ = os.write, os._exit, os.getpid, compile, exec
    show, out, quiet, caught, copy = traceback.print_exc, sys.stdout, suppress, BaseException, dict
    myself, pristine = process(), dict(vars(builtins))

    def finish(verdict: str) -> None:
        if process() != myself:
            end(1)  # a fork of the program got here
        with quiet(caught):
            out.flush()
        write(report, verdict.encode())
        end(0)

    restore = remember(tests)
    guards.refuse_inspection()
    module = ModuleType("program")
    space = vars(module)
    sys.modules["program"] = sys.modules["__main__"] = module
    kind = "error"
    try:
        exec_(compile_(program, "<program>", "exec", 0, True, 0), space)
        kind = "failed"
        restore()
        own = {name: value for name, value in space.items() if name not in pristine}
        names = copy(own, __builtins__=pristine, __name__="program")
        exec_(compile_(tests, "<tests>", "exec", 0, True, 0), names)
    except SystemExit:
        finish("exit")
    except MemoryError:
        finish("memory")
    except caught:
        with quiet(caught):
            out.flush()
            show()
        finish(kind)
    finish(token)


def remember(tests: str) -> Callable[[], None]:
    """Import what `tests` import; what is returned undoes a program's changes to these modules' names."""
    modules, kept = sys.modules, []
    for name in re.findall(r"^\s*(?:import|from)\s+([\w.]+)", tests, re.MULTILINE):
        with suppress(Exception):  # the tests will fail of it, and say so
            module = importlib.import_module(name)
            kept.append((name, module, vars(module), dict(vars(module))))

    def restore() -> None:
        for name, module, now, before in kept:
            modules[name] = module
            now.update(before)

    return restore


if __name__ == "__main__":
    main()
