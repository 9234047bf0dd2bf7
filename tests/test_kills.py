"""A run killed at any moment and resumed is the run that was never stopped, bit for bit."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
KILLS = 24


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the harness forks, and reads /proc")
def test_a_run_killed_at_any_moment_and_resumed_is_the_run_that_was_not(tmp_path):
    """In a process of its own, since the threads of this one do not survive a fork."""
    command = [sys.executable, "-m", "benchmarks.kills", "--kills", str(KILLS), "--seed", "1", "--out", tmp_path]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((tmp_path / "kills.json").read_text())
    assert result["kills"] >= KILLS
    assert result["differences"] == []
    where = result["where"]
    assert where["at a random moment"] >= 3
    for needed in ("half save_file", "half save optimizer.pt", "before rename .step", "after rename .step", "fsync"):
        assert any(needed in place for place in where), where


def test_the_comparison_sees_a_bit():
    from benchmarks.kills import same

    weights = {"w": torch.tensor([1.0, 2.0]), "rows": [{"loss": 0.1}]}
    assert same(weights, {"w": torch.tensor([1.0, 2.0]), "rows": [{"loss": 0.1}]})
    assert not same(weights, {**weights, "w": torch.tensor([1.0, 2.0000002])})
    assert not same(weights, {**weights, "w": weights["w"].double()})
    assert not same(weights, {**weights, "rows": [{"loss": 0.1 + 1e-16}]}) or 0.1 + 1e-16 == 0.1
    assert not same(weights, {**weights, "rows": []})
