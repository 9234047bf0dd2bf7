"""Runs one program and its tests under limits, in a process of its own. A script: standard library only.

The job is read from standard input: JSON with ``program``, ``tests``, ``token``, ``root`` (an empty folder) and the
limits. The verdict goes to the file descriptor ``report``: the token when all tests are through, else what happened.

Whatever Python code can reach of this process must not lead to the token, nor to what decides that the tests ran: by
``f_back`` a program gets at the frames below its own, and with them at local variables and globals of this module. So
the job's stages, of which the last holds the token, are kept by the loop's iterator alone. It lies on the frame's stack
of values, which only `gc` would show; ``guards`` refuses that. Native code would find it in memory.
"""

from __future__ import annotations

import ast
import builtins
import importlib
import json
import os
import resource
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from types import ModuleType
from typing import Any

FOLDER = os.path.dirname(os.path.abspath(__file__))
INSIDE = "inside"  # the argument of the second start, in the namespaces
Stage = tuple[str, Callable[[], object]]  # what to report if it raises, and the action


def main() -> None:
    """Read the job, shut the door, run."""
    with open(0, "rb", buffering=0, closefd=False) as file:  # without a buffer that would keep it
        job = json.load(file)
    with (
        suppress(OSError),
        open("/proc/self/oom_score_adj", "w") as score,
    ):  # Linux: if memory runs out, this goes first
        score.write("1000")
    try:
        folder = shut(job)
    except OSError as error:
        os.write(job["report"], f"{job['token']} {error}".encode())
        os._exit(1)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.environ.clear()
    os.environ.update(PATH="/usr/bin:/bin", HOME=folder, TMPDIR=folder, LANG="C.UTF-8")
    run(job)


def shut(job: dict[str, Any]) -> str:
    """Apply isolation and limits; the folder that the program may write to."""
    sys.path.insert(0, FOLDER)
    import guards  # the modules of this folder are found by this path alone

    apart, processes = job["isolation"] == "namespaces", job["processes"]
    if apart and sys.argv[1:] != [INSIDE]:
        import namespaces

        namespaces.enter(job["root"], disk=job["disk"], harness=FOLDER)
        # Begin again: this interpreter has loaded ctypes, whose classes every Python program can find.
        os.lseek(0, 0, os.SEEK_SET)
        script = f"{namespaces.HARNESS}/{os.path.basename(__file__)}"
        for file in (script, os.__file__):
            if not os.access(file, os.R_OK):
                raise OSError(f"the user nobody, as whom root runs programs, cannot read {file}: be another user")
        options = sys.orig_argv[1 : sys.orig_argv.index(__file__)]
        os.execve(sys.executable, [sys.executable, *options, script, INSIDE], dict(os.environ))
    if apart:
        folder = os.getcwd()
        processes += 2  # the two that wait for it
    else:
        folder, processes = job["root"], 0  # of one user's processes; 0: no new process or thread
        if os.getuid() == 0:
            os.chown(folder, guards.NOBODY, guards.NOBODY)
            guards.become_nobody()
        os.chdir(folder)
        if not os.access(os.__file__, os.R_OK):
            library = os.path.dirname(os.__file__)
            raise OSError(f"the user nobody, as whom root runs programs, cannot read {library}: be another user")
    limits = {"CPU": job["cpu"], "AS": job["memory"], "FSIZE": job["disk"], "NOFILE": job["files"], "NPROC": processes}
    for name, limit in {**limits, "CORE": 0}.items():
        resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (limit, limit + 1 if name == "CPU" else limit))
    del sys.path[0]
    if not apart:
        guards.install(folder)
    return folder


def run(job: dict[str, Any]) -> None:
    """Run ``program`` of `job` as a module, then ``tests`` in its names; report and end the process."""
    # Bound here: what the program puts in the place of these functions changes nothing below.
    write, end, process, report = os.write, os._exit, os.getpid, job["report"]
    show, out, quiet, caught, myself = traceback.print_exc, sys.stdout, suppress, BaseException, os.getpid()
    verdict = "error"
    try:
        # No variable may hold what is in this iterator. A step is taken from it and called at once.
        for verdict, stage in stages(job.pop("program"), job.pop("tests"), ballot(report, job.pop("token"))):  # noqa: B007
            stage()
    except SystemExit:
        verdict = "exit"
    except MemoryError:
        verdict = "memory"
    except caught:
        with quiet(caught):
            out.flush()
            show()
    if process() != myself:
        end(1)  # a fork of the program got here
    with quiet(caught):
        out.flush()
    write(report, verdict.encode())
    end(0)


def ballot(report: int, token: str) -> Callable[[], None]:
    """What reports success and ends the process. Nobody but the last stage may hold it."""
    write, end, process, out, quiet, caught = os.write, os._exit, os.getpid, sys.stdout, suppress, BaseException
    myself, text = os.getpid(), token.encode()

    def cast() -> None:
        if process() != myself:
            end(1)
        with quiet(caught):
            out.flush()
        write(report, text)
        end(0)

    return cast


def stages(program: str, tests: str, cast: Callable[[], None]) -> tuple[Stage, ...]:
    """The program, what comes between, the tests and the vote; only what is between is more than a C function."""
    sys.modules.pop("guards").refuse_inspection()  # before anything loads native code for the tests
    sys.settrace = partial(settrace, sys.settrace)
    restore = remember(tests)
    module = ModuleType("program")
    space, pristine, names, exact, text = vars(module), dict(vars(builtins)), dict[str, object](), type, str

    def prepare() -> None:
        restore()
        names.update({name: value for name, value in space.items() if exact(name) is text and name not in pristine})
        names.update(__builtins__=pristine, __name__="program")

    code = compile(program, "<program>", "exec", 0, True, 0)
    checks: Callable[[], object]
    try:
        checks = partial(exec, compile(tests, "<tests>", "exec", 0, True, 0), names)
    except Exception as error:
        checks = partial(exec, "raise error", {"error": error})  # when it is their turn
    sys.modules["program"] = sys.modules["__main__"] = module
    return ("error", partial(exec, code, space)), ("failed", prepare), ("failed", checks), ("exit", cast)


def settrace(original: Callable[[Any], None], function: object) -> None:
    """`sys.settrace`, which is refused, but for doing nothing, as doctest does."""
    if function is not None:
        original(function)


def remember(tests: str) -> Callable[[], None]:
    """Import what `tests` import; what is returned undoes a program's changes to these modules' names."""
    modules, kept, exact, text, every = sys.modules, list[tuple[Any, ...]](), type, str, list
    become = vars(object)["__class__"].__set__  # not by way of the module's own class
    for name in imported(tests):
        with suppress(Exception):  # the tests will fail of it, and say so
            module = importlib.import_module(name)
            kept.append((name, module, vars(module), dict(vars(module)), type(module)))

    def restore() -> None:
        for space in (modules, *(now for _, _, now, _, _ in kept)):
            for key in [key for key in every(space) if exact(key) is not text]:
                del space[key]  # it could be equal to a name at one time and not at another
        for name, module, now, before, kind in kept:
            if exact(module) is not kind:
                become(module, kind)
            modules[name] = module
            now.update(before)

    return restore


def imported(source: str) -> list[str]:
    """The modules that `source` imports by name; none if it does not compile."""
    with suppress(Exception):
        nodes = list(ast.walk(ast.parse(source)))
        names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
        return names + [node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module]
    return []


if __name__ == "__main__":
    main()
