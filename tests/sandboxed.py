"""What the tests of the sandbox share: every isolation that this machine permits, and a short way to run."""

from __future__ import annotations

import os
import shutil
import tempfile
import textwrap
from pathlib import Path

import pytest

from ebft import sandbox
from ebft.sandbox import Result, SandboxError

WRONG = "assert answer() == 42"  # no program of the tests satisfies it


@pytest.fixture(scope="module", params=sandbox.ISOLATIONS)
def isolation(request):
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as folder:
        if request.param == "limits":
            patch.setattr(sandbox, "PYTHON", readable_python(Path(folder)))
        try:
            sandbox.run("", "", isolation=request.param, timeout=60)
        except SandboxError as error:
            pytest.skip(str(error))
        yield request.param


def readable_python(folder: Path) -> str:
    """A Python whose library everyone can read: where root's own is hidden from `nobody`, a copy of it in `folder`."""
    library = Path(os.__file__).parent
    if os.getuid() != 0 or all(path.stat().st_mode & 0o001 for path in library.parents):
        return sandbox.PYTHON
    folder.chmod(0o755)
    left_out = shutil.ignore_patterns("site-packages", "test", "idlelib", "tkinter", "lib2to3", "config-*", "ensurepip")
    shutil.copytree(library, folder / "lib" / library.name, ignore=left_out)
    (folder / "bin").mkdir()
    return shutil.copy(os.path.realpath(sandbox.PYTHON), folder / "bin" / library.name)


def run(program: str, tests: str = "", *, timeout: float = 10.0, **options) -> Result:
    return sandbox.run(textwrap.dedent(program), tests, timeout=timeout, **options)
