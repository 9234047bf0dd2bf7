"""The choice of a learning rate, from what candidates measured on the validation half."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ebft.errors import UsageError
from ebft.loops.study.arms import Arm

OWN = "own"
CRITERIA = (OWN, "cross_entropy", "feature_matching_loss")


def criterion(arm: Arm, name: str) -> tuple[str, str]:
    """(metric of a run, `lower` or `higher`): the arm's own, or the one that all arms are chosen by that measure it."""
    measured = not (arm.verified and name == "feature_matching_loss")
    return (name, "lower") if name != OWN and measured else arm.own


def choose(candidates: Mapping[float, Path], *, metric: str, better: str) -> dict[str, Any]:
    """The learning rate whose run has the best `metric` after training.

    Only what the runs themselves left is read, and they measure the validation half alone. A run that did not finish
    (a learning rate at which the loss is no number) is no candidate.

    Args:
        candidates: learning rate -> folder of its run.
        better: "lower" or "higher".

    Returns:
        lr, metric, better, values (of each finished candidate), and edge: whether the best one is at an end of the
        grid, so that a better one may lie beyond.

    Raises:
        UsageError: no candidate finished.
    """
    values = {}
    for rate, folder in candidates.items():
        path = folder / "evaluation.json"
        if path.is_file():
            value = json.loads(path.read_text(encoding="utf-8"))["metrics"][metric]["after"]
            if math.isfinite(value):
                values[rate] = value
    if not values:
        raise UsageError(
            f"none of the learning rates {', '.join(f'{rate:g}' for rate in candidates)} gave a finished run to choose"
            " from: see failures.json, and give smaller ones with --lr-grid"
        )
    sign = 1 if better == "lower" else -1
    best = min(values, key=lambda rate: sign * values[rate])
    ends = (min(candidates), max(candidates))
    return {
        "lr": best,
        "metric": metric,
        "better": better,
        "values": {f"{rate:g}": value for rate, value in values.items()},
        "edge": len(candidates) > 1 and best in ends,
    }
