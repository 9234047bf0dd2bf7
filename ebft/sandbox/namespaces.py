"""Linux namespaces for a program that nobody has read. Runs inside the sandbox's launcher: standard library only.

What the program then sees: its own processes and no others, a network of its own that leads nowhere, and a file system
made of an empty root with the system's programs and libraries, Python's library and the harness read-only, and one
writable folder in memory; no ``/proc``, through which it could read memory, its own and its relatives'. It has no
capability, and no way back to the old root, which is no longer mounted for it.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

from guards import NOBODY, become_nobody

CLONE_NEWNS, CLONE_NEWUTS, CLONE_NEWIPC = 0x00020000, 0x04000000, 0x08000000
CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 0x10000000, 0x20000000, 0x40000000
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_BIND, MS_REC, MS_PRIVATE = 1, 2, 4, 4096, 16384, 1 << 18
MNT_DETACH = 2
SYS_MOUNT_SETATTR, AT_FDCWD, AT_RECURSIVE = 442, -100, 0x8000  # the same number on every architecture
PR_SET_PDEATHSIG, PR_SET_NO_NEW_PRIVS = 1, 38

FOLDER, HARNESS = "/work", "/harness"  # in the new root: the program's own folder, and this one
SYSTEM = ("/usr", "/bin", "/lib", "/lib32", "/lib64", "/nix/store", "/etc/ld.so.cache")
DEVICES = ("/dev/null", "/dev/zero", "/dev/random", "/dev/urandom")


def enter(root: str, *, disk: int, harness: str) -> None:
    """Go on as the only program of new namespaces; what was the process before waits for it and exits as it does.

    Args:
        root: an empty folder, where the new root is put together.
        disk: bytes that fit into the writable folder.
        harness: a folder to show, read-only, as `HARNESS`.

    Raises:
        OSError: the system does not permit it, or does not have it.
    """
    user, group = os.getuid(), os.getgid()
    apart = CLONE_NEWNS | CLONE_NEWUTS | CLONE_NEWIPC | CLONE_NEWPID | CLONE_NEWNET
    if user != 0:
        _call("unshare", apart | CLONE_NEWUSER)
        _map_user(user, group)
    else:
        _call("unshare", apart)
        user = group = NOBODY
    _leave_child()  # the first process of the new namespace: when it ends, the kernel ends all others
    _new_root(root, disk=disk, harness=harness, user=user, group=group)
    _leave_child()
    os.setsid()  # signals to the program's own process group reach nobody else
    if os.getuid() == 0:
        become_nobody()
        _call("unshare", CLONE_NEWUSER)  # the limit on processes counts within it; nobody needs no name there
    _drop_capabilities()


def _leave_child() -> None:
    """Fork, and go on in the child. The parent kills the child when told to end, and ends as the child does."""
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    child = os.fork()
    if child:
        signal.signal(signal.SIGTERM, lambda *_: os.kill(child, signal.SIGKILL))
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])
        while True:
            ended, status = os.wait()  # the first process of a namespace inherits orphans
            if ended == child:
                code = os.waitstatus_to_exitcode(status)
                os._exit(code if code >= 0 else 128 - code)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])
    _call("prctl", PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def _map_user(user: int, group: int) -> None:
    for name, text in (("setgroups", "deny"), ("uid_map", f"{user} {user} 1"), ("gid_map", f"{group} {group} 1")):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)


def _new_root(root: str, *, disk: int, harness: str, user: int, group: int) -> None:
    _mount(None, "/", None, MS_REC | MS_PRIVATE)
    _mount("tmpfs", root, "tmpfs", MS_NOSUID | MS_NODEV, "size=1m,mode=755")
    for path in (*SYSTEM, *DEVICES, sys.base_prefix):
        _show(path, root)
    os.mkdir(root + HARNESS)
    _mount(harness, root + HARNESS, None, MS_BIND | MS_REC)
    _read_only(root)
    # Mounted last, so that it is the one thing that can be written to.
    options = f"size={disk},nr_inodes=4096,mode=700,uid={user},gid={group}"
    _mount("tmpfs", root + FOLDER, "tmpfs", MS_NOSUID | MS_NODEV, options)
    os.chdir(root)
    _call("pivot_root", b".", b".")
    _call("umount2", b".", MNT_DETACH)
    os.chdir(FOLDER)


def _show(path: str, root: str) -> None:
    """Make the file or folder `path` visible in the new root, by the same name."""
    inside = root + path
    if not os.path.exists(path) or os.path.lexists(inside):
        return
    os.makedirs(os.path.dirname(inside), exist_ok=True)
    os.makedirs(root + FOLDER, exist_ok=True)
    if os.path.islink(path):
        os.symlink(os.readlink(path), inside)
        return
    if os.path.isdir(path):
        os.mkdir(inside)
    else:
        os.close(os.open(inside, os.O_CREAT | os.O_WRONLY))
    _mount(path, inside, None, MS_BIND | MS_REC)


def _read_only(root: str) -> None:
    """The mount at `root` and all below it."""
    attributes = (ctypes.c_uint64 * 4)(MS_RDONLY | MS_NOSUID, 0, 0, 0)  # struct mount_attr: set, clear, ...
    _call("syscall", SYS_MOUNT_SETATTR, AT_FDCWD, root.encode(), AT_RECURSIVE, attributes, ctypes.sizeof(attributes))


def _drop_capabilities() -> None:
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # version 3, this process
    _call("capset", header, (ctypes.c_uint32 * 6)())
    _call("prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    _call("prctl", PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)  # a change of user cleared it


def _mount(source: str | None, target: str, kind: str | None, flags: int, options: str | None = None) -> None:
    texts = [None if text is None else text.encode() for text in (source, target, kind, options)]
    _call("mount", *texts[:3], ctypes.c_ulong(flags), texts[3])


def _call(name: str, *arguments: object) -> None:
    function = getattr(ctypes.CDLL(None, use_errno=True), name, None)
    if function is None:
        raise OSError(f"the C library has no {name}")
    if function(*arguments) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")
