"""Metrics to where people watch several runs: TensorBoard, Weights & Biases, MLflow or plain CSV files, by torchrl."""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ebft.errors import UsageError
from ebft.files import make_folder, write_json

if TYPE_CHECKING:
    from torchrl.record.loggers import Logger

PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb", "mlflow": "mlflow", "csv": None}  # what each needs


def check_logger(name: str | None) -> None:
    """Refuse a logger that is not known or whose package is not installed.

    Raises:
        UsageError: says which package to install.
    """
    if name is None:
        return
    if name not in PACKAGES:
        raise UsageError(f"--logger {name}: expected one of {', '.join(PACKAGES)}")
    package = PACKAGES[name]
    if package is not None and find_spec(package) is None:
        raise UsageError(f"--logger {name} needs the package {package}, which is not installed: pip install {package}")


def open_logger(name: str | None, out: Path, options: Mapping[str, Any]) -> Logger | None:
    """The logger `name` of the run in `out`, its files in `out`/logs; None where none is wanted.

    A resumed run goes on in the same place: the same folder, the same run of Weights & Biases or MLflow. Steps that
    were logged and not saved are logged once more, with the same values. MLflow writes to the server of
    MLFLOW_TRACKING_URI, or else into a file.

    Args:
        options: of the run, shown beside it by Weights & Biases and MLflow.

    Raises:
        UsageError: see `check_logger`.
    """
    check_logger(name)
    if name is None:
        return None
    from torchrl.record.loggers import get_logger

    folder = out / "logs"
    make_folder(folder)
    known = _read(folder / "runs.json")
    if name == "mlflow":
        return _open_mlflow(out, folder, known, options)
    extra: dict[str, Any] = {}
    if name == "wandb":
        known.setdefault("wandb", uuid.uuid4().hex[:12])
        write_json(folder / "runs.json", known)  # before the run is opened, so that no kill forgets it
        extra["wandb_kwargs"] = {"id": known["wandb"], "project": "ebft", "log_env_packages": False}
    logger = get_logger(name, logger_name=str(folder), experiment_name=out.name if name == "wandb" else name, **extra)
    assert logger is not None
    if name == "wandb":
        logger.log_hparams(dict(options))
    return logger


def _open_mlflow(out: Path, folder: Path, known: dict[str, str], options: Mapping[str, Any]) -> Logger:
    """torchrl's own `get_logger` always asks for a folder of files, which MLflow no longer writes."""
    import mlflow
    from torchrl.record.loggers.mlflow import MLFlowLogger

    uri = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{(folder / 'mlflow.db').resolve()}"
    before = os.environ.get("MLFLOW_RUN_ID")
    try:
        if "mlflow" in known:
            os.environ["MLFLOW_RUN_ID"] = known["mlflow"]  # which MLflow then goes on with
        logger = MLFlowLogger(exp_name="ebft", tracking_uri=uri, tags={"run": out.name})
        run_id = logger.experiment.info.run_id
    finally:
        if before is None:
            os.environ.pop("MLFLOW_RUN_ID", None)
        else:
            os.environ["MLFLOW_RUN_ID"] = before
    if known.get("mlflow") != run_id:
        write_json(folder / "runs.json", {**known, "mlflow": run_id})
        mlflow.log_params(dict(options))  # torchrl's own log_hparams wants omegaconf
    return logger


def log_step(logger: Logger | None, record: Mapping[str, float]) -> None:
    """Log the metrics of a training step."""
    if logger is not None:
        values = {name: value for name, value in record.items() if name != "step"}
        logger.log_metrics(values, step=int(record["step"]))


def log_result(logger: Logger | None, metrics: Mapping[str, Mapping[str, float]], *, step: int) -> None:
    """Log the held-out measurement of the end as `held_out/<metric>/<before, after, ...>`."""
    if logger is not None:
        flat = {f"held_out/{name}/{key}": value for name, row in metrics.items() for key, value in row.items()}
        logger.log_metrics(flat, step=step)


def close_logger(logger: Logger | None) -> None:
    """Write what is not written yet."""
    if logger is None:
        return
    experiment = getattr(logger, "experiment", None)
    for name in ("finish", "close"):  # of Weights & Biases, of TensorBoard
        if hasattr(experiment, name):
            getattr(experiment, name)()
            return
    if type(logger).__name__ == "MLFlowLogger":
        import mlflow

        mlflow.end_run()


def _read(path: Path) -> dict[str, str]:
    return json.loads(path.read_text()) if path.is_file() else {}
