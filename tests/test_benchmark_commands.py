"""A benchmark and the command that it waits for are stopped together."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.commands import command, run_to_its_end

ROOT = Path(__file__).parents[1]

# Notes every signal, and ends a moment after the first, as a run does that saves.
PROGRAM = """
import pathlib, signal, sys, time
folder, asked = pathlib.Path(sys.argv[1]), []
def note(number, frame):
    asked.append(number)
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, note)
(folder / "ready").touch()
end = time.monotonic() + 60
while not asked and time.monotonic() < end:
    time.sleep(0.01)
time.sleep(0.3)
(folder / "saved").write_text(" ".join(str(int(number)) for number in asked))
sys.exit(130)
"""
CALLER = "import sys; from benchmarks.commands import run_to_its_end; run_to_its_end(sys.argv[1:])"


def started(folder):
    """A process that runs PROGRAM to its end, the latter under way."""
    arguments = [sys.executable, "-c", CALLER, sys.executable, "-c", PROGRAM, str(folder)]
    caller = subprocess.Popen(arguments, cwd=ROOT, stderr=subprocess.PIPE, text=True, process_group=0)
    end = time.monotonic() + 60
    while not (folder / "ready").exists():
        assert time.monotonic() < end, "the program did not start"
        time.sleep(0.01)
    return caller


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("whom", ["the caller", "its group, as a terminal does"])
def test_a_stop_is_passed_on_once_and_waited_for(tmp_path, number, whom):
    caller = started(tmp_path)
    if whom == "the caller":
        caller.send_signal(number)
    else:
        os.killpg(caller.pid, number)
    _, said = caller.communicate(timeout=60)
    assert (tmp_path / "saved").read_text() == str(int(number))  # written before the caller ended
    assert "KeyboardInterrupt" in said
    assert caller.returncode != 0


def test_handlers_are_put_back(tmp_path):
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    run_to_its_end([sys.executable, "-c", "pass"])
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_a_failure_is_told():
    with pytest.raises(subprocess.CalledProcessError, match="exit status 3"):
        run_to_its_end([sys.executable, "-c", "raise SystemExit(3)"])


def test_the_command_is_the_projects(capfd):
    command("--help")
    assert "signal" in capfd.readouterr().out
