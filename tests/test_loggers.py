"""Metrics in TensorBoard, Weights & Biases, MLflow and CSV files, and how a missing package is told."""

import csv
import importlib.machinery
import json
import shutil
import sys
import types

import pytest

from ebft.errors import UsageError
from ebft.loops import loggers
from tests.runs import go, metrics


@pytest.fixture
def short(options):
    return {**options, "steps": 3, "save_every": 1, "held_out": 4}


def test_tensorboard_holds_the_metrics_of_every_step_and_goes_on_after_a_resume(short, tmp_path):
    pytest.importorskip("tensorboard", reason="reads the events by tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out = tmp_path / "run"
    go({**short, "logger": "tensorboard"}, out)
    shutil.rmtree(out / "checkpoints" / "step-000003")
    go(short, out, resume=True)
    events = EventAccumulator(str(out / "logs" / "tensorboard"))
    events.Reload()
    rows = metrics(out)
    for name in ("loss", "reward", "kl"):
        found = {event.step: event.value for event in events.Scalars(name)}
        assert found == pytest.approx({int(row["step"]): float(row[name]) for row in rows}, rel=1e-6)  # float32
    measured = json.loads((out / "evaluation.json").read_text())["metrics"]
    (*_, last) = events.Scalars("held_out/cross_entropy/after")
    assert (last.step, last.value) == (3, pytest.approx(measured["cross_entropy"]["after"], rel=1e-6))


def test_csv_files(short, tmp_path):
    out = tmp_path / "run"
    go({**short, "logger": "csv"}, out)
    with open(out / "logs" / "csv" / "scalars" / "loss.csv", newline="") as file:
        rows = [(int(step), float(value)) for step, value in csv.reader(file)]
    assert rows == [(int(row["step"]), float(row["loss"])) for row in metrics(out)]


def fake(monkeypatch, name):
    module = types.ModuleType(name)
    module.__spec__ = importlib.machinery.ModuleSpec(name, None)
    monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(f"torchrl.record.loggers.{name}._has_{name}", True)
    return module


def test_weights_and_biases_gets_metrics_and_options_and_a_resumed_run_is_the_same_run(short, tmp_path, monkeypatch):
    started, logged, shown = [], [], []

    class Run:
        def __init__(self, **kwargs):
            started.append(kwargs)
            self.id, self.config = kwargs["id"], types.SimpleNamespace(update=lambda values, **_: shown.append(values))

        def log(self, values, **kwargs):
            logged.append({**values, **kwargs})

        def define_metric(self, *args, **kwargs):
            pass

        def finish(self):
            logged.append("finished")

    fake(monkeypatch, "wandb").init = Run
    out = tmp_path / "run"
    go({**short, "logger": "wandb"}, out)
    losses = [entry["loss"] for entry in logged if "loss" in entry]
    assert losses == [float(row["loss"]) for row in metrics(out)]
    assert any("held_out/kl/after" in entry for entry in logged)
    assert logged[-1] == "finished"
    assert shown[-1]["policy"] == short["policy"]
    go(short, out, resume=True)
    first, second = started
    assert first["id"] == second["id"]
    assert (first["resume"], first["name"], first["project"]) == ("allow", "run", "ebft")


def test_mlflow_gets_metrics_and_options_and_a_resumed_run_is_the_same_run(short, tmp_path, monkeypatch):
    import os

    logged, parameters, resumed, ended = [], [], [], []
    module = fake(monkeypatch, "mlflow")

    def start_run(experiment_id):
        resumed.append(os.environ.get("MLFLOW_RUN_ID"))
        return types.SimpleNamespace(info=types.SimpleNamespace(run_id=resumed[-1] or "run-17"))

    module.set_tracking_uri = lambda uri: logged.append(uri)
    module.get_experiment_by_name = lambda name: None
    module.create_experiment = lambda **kwargs: "experiment-1"
    module.set_experiment = lambda **kwargs: None
    module.start_run, module.end_run = start_run, lambda: ended.append(True)
    module.log_metrics = lambda values, step: logged.extend((key, value, step) for key, value in values.items())
    module.log_params = lambda values: parameters.append(values)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    out = tmp_path / "run"
    go({**short, "logger": "mlflow"}, out)
    assert logged[0] == f"sqlite:///{out / 'logs' / 'mlflow.db'}"
    losses = [(step, value) for key, value, step in logged[1:] if key == "loss"]
    assert losses == [(int(row["step"]), float(row["loss"])) for row in metrics(out)]
    go(short, out, resume=True)
    assert resumed == [None, "run-17"]
    assert len(parameters) == 1
    assert parameters[0]["policy"] == short["policy"]
    assert ended == [True, True]
    assert "MLFLOW_RUN_ID" not in os.environ


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "mlflow"])
def test_a_missing_package_is_named_before_anything_is_written(short, tmp_path, monkeypatch, name):
    monkeypatch.setattr(loggers, "find_spec", lambda package: None)
    with pytest.raises(UsageError, match=f"--logger {name} needs the package {name}.*pip install {name}"):
        go({**short, "logger": name}, tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_logger_is_refused(short, tmp_path):
    with pytest.raises(UsageError, match="--logger visdom: expected one of tensorboard, wandb, mlflow, csv"):
        go({**short, "logger": "visdom"}, tmp_path / "run")
