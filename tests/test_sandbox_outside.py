"""Programs that reach for what lies outside their folder: files, secrets, the network."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

from ebft import sandbox
from ebft.sandbox import Result
from tests.sandboxed import isolation, run

__all__ = ["isolation"]


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
    attempt(lambda: open({str(Path(tempfile.gettempdir(), "new"))!r}, "w"))
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
