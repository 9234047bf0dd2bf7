"""What the interpreter refuses to a program. Runs inside the sandbox's launcher: standard library only, no ctypes.

Audit hooks, which Python code cannot take out again. :func:`refuse_inspection` holds in every isolation, for the
verdict's sake; :func:`install` stands in for namespaces where there are none. It is a guard and not a wall: whoever
gets native code to run, through a bug of the interpreter or of an extension module, gets past it. What the kernel
itself refuses in that mode are new processes and threads (see ``launcher``).

A program sees the frame of a hook in the traceback of what was refused, and replaces functions of `builtins` and `os`.
So a hook calls nothing but C functions that were bound before, as defaults, and looks only at what cannot be changed:
a Python function, a closure or a dictionary among its variables could be. Strings of the program are copied first,
whose class may lie.
"""

from __future__ import annotations

import _socket  # the constant only; the module `socket` is large
import os
import stat
import sys
from typing import Any

NOBODY = 65534

PREFIXES = ("resource.", "socket.", "sqlite3.", "subprocess.", "pty.", "syslog.")
PROCESSES = ("exec", "fork", "forkpty", "posix_spawn", "spawn", "system", "kill", "killpg")
FILES = ("mkdir", "chdir", "fchdir", "link", "symlink", "chmod", "chown", "setxattr", "removexattr")
EVENTS = frozenset(f"os.{name}" for name in PROCESSES + FILES)
# The number of paths among the arguments, and where folders (dir_fd) are, to which the paths would be relative.
CHANGES = (("os.rename", 2, (2, 3)), ("os.remove", 1, (1,)), ("os.rmdir", 1, (1,)), ("os.truncate", 1, ()),
           ("os.utime", 1, (3,)))  # fmt: skip
LISTS = frozenset({"os.listdir", "os.scandir"})
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
LINKS = 40  # symbolic links in one path, as many as Linux follows

INSPECTION = frozenset(
    {
        *("sys.settrace", "sys.setprofile", "sys.monitoring.register_callback", "sys.addaudithook"),
        *("sys._current_frames", "sys._current_exceptions", "sys.remote_exec"),
        *("gc.get_objects", "gc.get_referrers", "gc.get_referents"),
        "cpython.PyInterpreterState_New",  # hooks do not hold in another interpreter
    }
)
NATIVE = ("_ctypes", "_test", "_xx", "_interp")  # beginnings of modules that reach memory or other interpreters


def become_nobody() -> None:
    """From root to a user who owns nothing."""
    os.setgroups([])
    os.setresgid(NOBODY, NOBODY, NOBODY)
    os.setresuid(NOBODY, NOBODY, NOBODY)


def refuse_inspection() -> None:
    """Refuse, from now on, what shows objects that no name leads to, tracing, which skips lines, and native code.

    Extension modules are those of Python's own library.
    """
    folders = frozenset(sys.path)

    def hook(
        event: str,
        arguments: tuple,
        *,
        refused=INSPECTION,
        native=NATIVE,
        folders=folders,
        exact=str.__str__,
        error=PermissionError,
        missing=ImportError,
    ) -> None:
        if event == "import":
            name, path = exact(arguments[0]), arguments[1]
            if name.rpartition(".")[2].startswith(native):
                raise missing(f"refused in the sandbox: {name}")
            if path is not None and exact(path).rpartition("/")[0] not in folders:
                raise missing(f"refused in the sandbox: {name}, an extension module outside of Python's library")
        elif event in refused or event.startswith("ctypes."):
            raise error(f"refused in the sandbox: {event}")

    sys.addaudithook(hook)


def install(folder: str) -> None:
    """Refuse, from now on, the network, new processes, and files outside `folder`.

    Python's own library and the system's can be read, file by file: a folder that is open would be a way to write.
    """
    own = (os.path.realpath(folder),)
    library = {os.path.realpath(path) for path in (sys.base_prefix, os.path.dirname(os.__file__))}
    readable = (*own, *library, "/usr", "/lib", "/lib64", "/dev/null", "/dev/zero", "/dev/urandom", "/dev/random")

    def hook(
        event: str,
        arguments: tuple,
        *,
        own=own,
        readable=readable,
        prefixes=PREFIXES,
        events=EVENTS,
        changes=CHANGES,
        lists=LISTS,
        writing=WRITING,
        local=_socket.AF_UNIX,
        links=LINKS,
        kind=type,
        under=issubclass,
        number=int,
        words=str,
        exact=str.__str__,
        octets=bytes,
        decode=bytes.decode,
        follow=os.readlink,
        here=os.getcwd,
        status=os.stat,
        is_folder=stat.S_ISDIR,
        error=PermissionError,
        failure=OSError,
    ) -> None:
        paths: tuple[Any, ...] = ()
        roots, allowed = own, True
        opened = event == "open"
        if opened:
            paths, flags = arguments[:1], arguments[2]
            roots = own if flags & writing else readable
        elif event in lists:
            paths, roots = arguments[:1], readable
        elif event == "socket.__new__":
            allowed = arguments[1] == local  # what asyncio wakes itself up with; it cannot be bound or connected
        else:
            allowed = event not in events and not event.startswith(prefixes)
            for name, count, folders in changes:
                if event == name:
                    paths = arguments[:count]
                    for index in folders:
                        allowed = allowed and arguments[index] == -1
        for path in paths:
            sort = kind(path)  # what it says of its own class may be a lie
            if under(sort, number):
                continue  # a file that is open already
            if path is None:
                path = "."
            elif under(sort, words):
                path = exact(path)
            elif under(sort, octets):
                path = decode(path, "utf-8", "surrogateescape")
            else:
                raise error(f"refused in the sandbox: {event} of what is not a path")
            # os.path.realpath, of functions that cannot be replaced
            left: list[str] = path.split("/")[::-1]
            real, followed = "", 0
            if not path.startswith("/"):
                left += here().split("/")[::-1]
            while left:
                part = left.pop()
                if part == "..":
                    real = real.rpartition("/")[0]
                elif part not in ("", "."):
                    try:
                        target = follow(f"{real}/{part}")
                    except failure:
                        real = f"{real}/{part}"
                        continue
                    followed += 1
                    if followed > links:
                        raise error(f"refused in the sandbox: {event} by too many links")
                    real = "" if target.startswith("/") else real
                    left += target.split("/")[::-1]
            inside = False
            for root in roots:
                inside = inside or real == root or real.startswith(f"{root}/")
            allowed = allowed and inside
            if opened and allowed and real != own[0] and not real.startswith(f"{own[0]}/"):
                try:
                    allowed = not is_folder(status(real).st_mode)
                except failure:
                    continue  # there is nothing to open
        if not allowed:
            raise error(f"refused in the sandbox: {event}")

    sys.addaudithook(hook)
