"""What stands in for namespaces where there are none. Runs inside the sandbox's launcher: standard library only.

An audit hook, which Python code cannot take out again, refuses what reaches outside. It is a guard and not a wall:
whoever gets native code to run, through a bug of the interpreter or of an extension module, gets past it. What the
kernel itself refuses in this mode are new processes and threads (see ``launcher``).
"""

from __future__ import annotations

import _socket  # the constant only; the module `socket` is large
import os
import sys
from collections.abc import Callable

PREFIXES = ("ctypes.", "resource.", "socket.", "sqlite3.", "subprocess.", "pty.", "syslog.")
PROCESSES = ("exec", "fork", "forkpty", "posix_spawn", "spawn", "system", "kill", "killpg")
FILES = ("mkdir", "chdir", "fchdir", "link", "symlink", "chmod", "chown", "setxattr", "removexattr")
EVENTS = frozenset(f"os.{name}" for name in PROCESSES + FILES)
CHANGES = frozenset(f"os.{name}" for name in ("rename", "remove", "rmdir", "truncate", "utime"))
LISTS = frozenset(f"os.{name}" for name in ("listdir", "scandir"))
INSPECTION = frozenset({"sys.settrace", "sys.setprofile", "gc.get_objects", "gc.get_referrers", "gc.get_referents"})
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


def install(folder: str) -> None:
    """Refuse, from now on, the network, new processes, native code, and files outside `folder`.

    Python's own library and the system's can be read.
    """
    own = (os.path.realpath(folder),)
    library = {os.path.realpath(path) for path in (sys.base_prefix, os.path.dirname(os.__file__))}
    readable = (*own, *library, "/usr", "/lib", "/lib64", "/dev/null", "/dev/zero", "/dev/urandom", "/dev/random")
    sys.addaudithook(_hook(own, readable))


def refuse_inspection() -> None:
    """Refuse, from now on, tracing, which can skip lines of the tests, and a look at all objects of the interpreter."""
    refused, error = INSPECTION, PermissionError

    def hook(event: str, arguments: tuple) -> None:
        if event in refused:
            raise error(f"refused in the sandbox: {event}")

    sys.addaudithook(hook)


def _hook(own: tuple[str, ...], readable: tuple[str, ...]) -> Callable[[str, tuple], None]:
    # Everything that decides is bound here, out of the program's reach by name.
    resolve, text, whole = os.path.realpath, os.fsdecode, isinstance
    prefixes, events, changes, lists, writing = PREFIXES, EVENTS, CHANGES, LISTS, WRITING
    local, error = _socket.AF_UNIX, PermissionError

    def within(path: object, roots: tuple[str, ...]) -> bool:
        if path is None:
            path = "."
        if whole(path, int):
            return True  # a file that is open already, or -1 for no folder
        real = resolve(text(path))  # type: ignore[arg-type]
        return any(real == root or real.startswith(root + "/") for root in roots)

    def hook(event: str, arguments: tuple) -> None:
        if event == "open":
            path, mode, flags = arguments
            write = flags & writing if whole(flags, int) else any(letter in (mode or "r") for letter in "wax+")
            allowed = within(path, own if write else readable)
        elif event in changes:
            allowed = all(within(path, own) for path in arguments if whole(path, (str, bytes)))
        elif event in lists:
            allowed = within(arguments[0], readable)
        elif event == "socket.__new__":
            allowed = arguments[1] == local  # what asyncio wakes itself up with; it cannot be bound or connected
        else:
            allowed = event not in events and not event.startswith(prefixes)
        if not allowed:
            raise error(f"refused in the sandbox: {event}")

    return hook
