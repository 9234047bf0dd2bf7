"""The metrics of a run so far, in memory, in its checkpoints, and as `metrics.csv` and `rewards.csv` in its folder."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from tensordict import TensorDictBase

from ebft import schema
from ebft.files import clear_disk_errors, write_atomically

_TERMS = ("step", "loss", "loss_policy_gradient", "loss_cross_entropy", "loss_kl", "reward", "feature_matching_loss")
_WATCHED = ("cross_entropy", "kl", "distinct_rollouts", "gradient_norm", "learning_rate")
_TIMES = ("time_sample", "time_embed", "time_verify", "time_reward", "time_score", "time_update", "time_step")
COLUMNS = (*_TERMS, *_WATCHED, *_TIMES, "tokens_per_second")

METRICS, REWARDS, HELD_OUT = "metrics.csv", "rewards.csv", "held_out.csv"
REWARDS_KEPT = 32


class History:
    """One row of metrics a step, and the distribution of its rewards.

    The files are always those of the rows in memory: a new row is appended, and a state that is loaded, as a resumed
    run does, replaces what the files held. They are there for reading; a run goes on from its checkpoint alone.

    Args:
        folder: of the run; None for no files.
    """

    def __init__(self, folder: Path | None):
        self.rows: list[dict[str, float]] = []
        self._rewards: list[list[float]] = []  # first the step
        self._seen: tuple[torch.Tensor, torch.Tensor] | None = None  # rewards of a batch, and its anchor mask
        self.held_out: list[dict[str, float]] = []  # measurements between before and after, if there are any
        self._folder = folder
        self._columns: list[str] = []

    def observe(self, td: TensorDictBase) -> None:
        """Remember the rewards of a batch for the row that will be appended; no GPU is waited for before that."""
        reward = td.get(schema.REWARD, None)
        self._seen = None if reward is None else (reward, td[schema.ANCHOR_MASK])

    def append(self, row: Mapping[str, float]) -> None:
        """Add the row of one step to both files.

        Raises:
            UsageError: the disk is full or may not be written.
        """
        self.rows.append(dict(row))
        if set(row) <= set(self._columns):
            self._append(METRICS, [row.get(name, "") for name in self._columns])
        else:  # the first row with a stage of the user's own, or with a term that a schedule has just turned on
            self._write_metrics()
        if self._seen is not None and (found := order_statistics(*self._seen)):
            self._rewards.append([row["step"], *found])
            self._append(REWARDS, self._rewards[-1])
        self._seen = None

    def append_held_out(self, row: Mapping[str, float]) -> None:
        """Add a held-out measurement, by its step, and write `held_out.csv`.

        Raises:
            UsageError: the disk is full or may not be written.
        """
        self.held_out.append(dict(row))
        self._write_held_out()

    def write(self) -> None:
        """Write all files anew."""
        self._write_metrics()
        self._write_held_out()
        header = ["step", *(f"reward_{i}" for i in range(REWARDS_KEPT))]
        self._write(REWARDS, [header, *self._rewards])

    def state_dict(self) -> dict[str, Any]:
        """The rows."""
        return {
            "rows": [dict(row) for row in self.rows],
            "rewards": [list(row) for row in self._rewards],
            "held_out": [dict(row) for row in self.held_out],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state`; `write` brings the files in line with it."""
        self.rows, self._rewards, self.held_out = state["rows"], state["rewards"], state.get("held_out", [])

    def _write_held_out(self) -> None:
        if self.held_out:
            columns = list(self.held_out[0])
            lines = [[row[name] for name in columns] for row in self.held_out]
            self._write(HELD_OUT, [columns, *lines])
        elif self._folder is not None:  # one that a run left which was killed before it saved the step
            (self._folder / HELD_OUT).unlink(missing_ok=True)

    def _write_metrics(self) -> None:
        self._columns = list(dict.fromkeys([*COLUMNS, *(name for row in self.rows for name in row)]))
        lines = [[row.get(name, "") for name in self._columns] for row in self.rows]
        self._write(METRICS, [self._columns, *lines])

    def _write(self, name: str, lines: list[list[Any]]) -> None:
        if self._folder is not None:
            write_atomically(self._folder / name, _csv(lines))

    def _append(self, name: str, line: list[Any]) -> None:
        if self._folder is not None:
            _append(self._folder / name, line)


def order_statistics(reward: torch.Tensor, anchor_mask: torch.Tensor, *, count: int = REWARDS_KEPT) -> list[float]:
    """At most `count` of the sorted rewards, evenly spaced in rank: each stands for an equal share of the rollouts.

    Args:
        reward: [B,K,N], or [B,K,N,G] which is summed over the tokens.
        anchor_mask: [B,K].
    """
    per_rollout = reward.sum(-1) if reward.ndim == 4 else reward
    values = per_rollout[anchor_mask].flatten().float().sort().values.cpu()
    if len(values) > count:
        values = values[((torch.arange(count) + 0.5) * len(values) / count).long()]
    return [float(f"{value:.6g}") for value in values.tolist()]


def _csv(lines: list[list[Any]]) -> bytes:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(lines)
    return text.getvalue().encode()


def _append(path: Path, line: list[Any]) -> None:
    with clear_disk_errors(path), open(path, "ab", buffering=0) as file:
        file.write(_csv([line]))
