"""The benchmark of recipes: what it runs, and what it makes of the results (no model is loaded)."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from benchmarks import progress

SECONDS = {"paper": 2.0, "plain": 1.0, "mean of the rollout": 4.0, "all horizons": 3.0}


@pytest.fixture
def calls(monkeypatch) -> list[tuple[str, ...]]:
    """The commands that were run; each leaves what the real one leaves, as far as it is read."""
    made: list[tuple[str, ...]] = []

    def command(*arguments: str) -> None:
        made.append(arguments)
        out = Path(arguments[arguments.index("--out") + 1])
        out.mkdir(parents=True, exist_ok=True)
        if arguments[0] == "run":
            name = next(n for n in progress.RECIPES if out.name.startswith(n.replace(" ", "-")))
            times = [100.0, SECONDS[name], SECONDS[name] + 1, SECONDS[name] - 1]  # the first step is slow
            (out / "metrics.csv").write_text("time_step\n" + "\n".join(map(str, times)) + "\n")
            (out / "evaluation.json").write_text("{}")
            (out / "config.json").write_text(json.dumps({"machine": {"name": "a machine"}}))
            return
        folders = arguments[2 : arguments.index("--evaluate")]
        with open(out / "compare.csv", "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["table", "policy", "metric", "of", "value", "low", "high", "standard_error"])
            for folder in folders:
                value = -0.01 if "paper" in folder else -0.03
                value += {"0": 0.001, "1": -0.001}[folder[-1]]
                writer.writerow(["value", folder, "feature_matching_loss", "hidden", 9, 9, 9, 9])
                writer.writerow(["difference", folder, "cross_entropy", "all", 9, 9, 9, 9])
                writer.writerow(["difference", folder, "feature_matching_loss", "hidden", value, -1, 1, 0.005])

    monkeypatch.setattr(progress, "command", command)
    return made


def test_every_recipe_gets_the_same_time(calls, tmp_path):
    progress.main(tmp_path, 2.0, [0, 1])
    results = json.loads((tmp_path / "progress.json").read_text())
    assert {name: row["steps"] for name, row in results["recipes"].items()} == {
        name: int(120 / seconds) for name, seconds in SECONDS.items()
    }
    runs = [call for call in calls if call[0] == "run"]
    assert len(runs) == len(progress.RECIPES) * 3
    assert all(call[call.index("--ce") + 1] == "0" for call in runs)


def test_changes_are_those_of_the_feature_matching_loss(calls, tmp_path):
    progress.main(tmp_path, 2.0, [0, 1])
    results = json.loads((tmp_path / "progress.json").read_text())
    assert [c["value"] for c in results["recipes"]["plain"]["changes"]] == pytest.approx([-0.029, -0.031])
    (plain,) = [line for line in (tmp_path / "progress.md").read_text().splitlines() if line.startswith("| plain")]
    # t(1 degree of freedom) = 12.706; s/sqrt(2) = 0.001
    assert "| -0.0300 ± 0.0127 | 3.00 |" in plain


def test_what_is_done_is_not_done_again(calls, tmp_path):
    progress.main(tmp_path, 2.0, [0, 1])
    calls.clear()
    (tmp_path / "runs" / "plain-1" / "evaluation.json").unlink()
    progress.main(tmp_path, 2.0, [0, 1])
    ((name, *rest),) = calls
    assert name == "run"
    assert rest[-1] == "--resume"
    assert rest[rest.index("--out") + 1].endswith("plain-1")
