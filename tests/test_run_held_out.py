"""Held-out measurements during training: they change nothing, and a resumed run has the same ones."""

import csv
import json

import pytest

from ebft.loops.history import History
from tests.runs import go, metrics

STEPS = {"steps": 5, "eval_every": 2, "save_every": 2}


def held_out(folder):
    with open(folder / "held_out.csv", newline="") as file:
        return [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]


@pytest.fixture(scope="module")
def whole(options, tmp_path_factory):
    folder = tmp_path_factory.mktemp("held-out") / "whole"
    go({**options, **STEPS}, folder)
    return folder


def test_measured_before_in_between_and_after(whole):
    rows = held_out(whole)
    assert [row["step"] for row in rows] == [0, 2, 4, 5]
    for name, values in json.loads((whole / "evaluation.json").read_text())["metrics"].items():
        assert rows[0][name] == pytest.approx(values["before"])
        assert rows[0][f"{name}_change"] == 0
        assert rows[-1][name] == pytest.approx(values["after"])
        assert rows[-1][f"{name}_change"] == pytest.approx(values["difference"])
        assert rows[-1][f"{name}_standard_error"] == pytest.approx(values["standard_error"])
    assert len({row["cross_entropy"] for row in rows}) == 4
    assert "held out cross entropy" in (whole / "report.html").read_text()


def test_training_is_what_it_is_without(whole, options, tmp_path):
    go({**options, **STEPS, "eval_every": 0}, tmp_path / "without")
    assert metrics(tmp_path / "without") == metrics(whole)
    assert not (tmp_path / "without" / "held_out.csv").exists()


@pytest.mark.parametrize(
    ("method", "step"), [("append", 4), ("append", 5), ("append_held_out", 4), ("append_held_out", 5)]
)
def test_a_resumed_run_has_the_same_measurements(whole, options, tmp_path, monkeypatch, method, step):
    """Ended before a step is in the metrics, or between a checkpoint and the measurement that is due."""
    original = getattr(History, method)

    def end(self, row):
        if row["step"] == step:
            raise RuntimeError("the end")
        original(self, row)

    with monkeypatch.context() as patch:
        patch.setattr(History, method, end)
        with pytest.raises(RuntimeError, match="the end"):
            go({**options, **STEPS}, tmp_path / "run")
    go({**options, **STEPS}, tmp_path / "run", resume=True)
    assert (tmp_path / "run" / "held_out.csv").read_bytes() == (whole / "held_out.csv").read_bytes()
    assert metrics(tmp_path / "run") == metrics(whole)
