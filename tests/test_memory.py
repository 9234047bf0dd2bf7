"""Keeping freed memory: what glibc is told, seen from outside."""

import platform
import subprocess
import sys

import pytest

from ebft.memory import keep_freed_memory

RESIDENT = """
import sys, torch
from pathlib import Path
from ebft.memory import keep_freed_memory

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

if sys.argv[1] == "keep":
    assert keep_freed_memory()
before = resident()
block = torch.ones(64 * 2**20)  # 256 MiB
del block
print(resident() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc alone has these settings")
def test_freed_memory_is_kept_only_when_asked_for():
    def left(how):
        run = subprocess.run([sys.executable, "-c", RESIDENT, how], capture_output=True, text=True, check=True)
        return int(run.stdout)

    assert left("keep") > 250 * 2**20
    assert left("leave") < 50 * 2**20


def test_another_c_library_is_left_alone(monkeypatch):
    monkeypatch.setattr(platform, "libc_ver", lambda: ("musl", "1.2"))
    assert keep_freed_memory() is False
