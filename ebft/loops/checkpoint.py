"""Checkpoints: everything that determines the future of a run, complete or absent.

A checkpoint is a folder `step-000040` with the trained weights (safetensors), the optimizer's and scheduler's state
and a manifest with the SHA-256 of each file. It is written beside its final name and renamed; all random numbers of
a run are keyed by its seed and step, so there is no generator to save.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import load_file, save_file

from ebft.errors import UsageError
from ebft.files import write_folder_atomically, write_json
from ebft.policy import CausalPolicy

_MANIFEST = "manifest.json"


class Stateful(Protocol):
    """Anything with a state of its own that changes during a run: a controller, a running moment."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


def save(
    folder: Path,
    step: int,
    *,
    policy: CausalPolicy,
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LRScheduler,
    stateful: Mapping[str, Stateful] | None = None,
    keep: int = 2,
) -> Path:
    """Write the checkpoint of `step` into `folder`, then remove all but the newest `keep`.

    `stateful` are the other parts with a state, by name.

    Raises:
        UsageError: no disk space; the checkpoints that were there are untouched.
    """

    def fill(target: Path) -> None:
        weights = {name: parameter.detach().cpu().contiguous() for name, parameter in policy.trainable().items()}
        save_file(weights, target / "weights.safetensors")
        with open(target / "optimizer.pt", "wb") as file:  # a file of ours, so that a full disk is told as such
            states: dict[str, Stateful] = {"optimizer": optimizer, "scheduler": scheduler, **(stateful or {})}
            torch.save({name: part.state_dict() for name, part in states.items()}, file)
        hashes = {path.name: _sha256(path) for path in sorted(target.iterdir())}
        write_json(target / _MANIFEST, {"step": step, "sha256": hashes})

    path = folder / f"step-{step:06d}"
    write_folder_atomically(path, fill)
    for old in _checkpoints(folder)[keep:]:
        shutil.rmtree(old)
    return path


def restore(
    folder: Path,
    *,
    policy: CausalPolicy,
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LRScheduler,
    stateful: Mapping[str, Stateful] | None = None,
    warn=print,
) -> int:
    """Load the newest intact checkpoint of `folder` and return its step; 0, and nothing loaded, when there is none.

    A damaged checkpoint is named through `warn` and the one before it is used.

    Raises:
        UsageError: the checkpoint is of another model (its weights have other names or shapes).
    """
    for path in _checkpoints(folder):
        damage = _damage(path)
        if damage:
            warn(f"checkpoint {path} is damaged ({damage}); trying the one before it")
            continue
        weights, trainable = load_file(path / "weights.safetensors"), policy.trainable()
        found = {name: list(tensor.shape) for name, tensor in weights.items()}
        wanted = {name: list(parameter.shape) for name, parameter in trainable.items()}
        if found != wanted:
            different = sorted(name for name in {*found, *wanted} if found.get(name) != wanted.get(name))
            raise UsageError(
                f"checkpoint {path} is of another model: {len(different)} weights differ, as {different[0]}"
            )
        with torch.no_grad():
            for name, parameter in trainable.items():
                parameter.copy_(weights[name])
        state = torch.load(path / "optimizer.pt", map_location="cpu", weights_only=True)
        parts: dict[str, Stateful] = {"optimizer": optimizer, "scheduler": scheduler, **(stateful or {})}
        for name, part in parts.items():
            part.load_state_dict(state[name])
        return int(json.loads((path / _MANIFEST).read_text())["step"])
    return 0


def _checkpoints(folder: Path) -> list[Path]:
    """Newest first."""
    return sorted((path for path in folder.glob("step-*") if path.is_dir()), reverse=True)


def _damage(path: Path) -> str | None:
    """What is wrong with a checkpoint, None if nothing is."""
    try:
        hashes = json.loads((path / _MANIFEST).read_text())["sha256"]
    except (OSError, ValueError, KeyError):
        return f"{_MANIFEST} cannot be read"
    for name, expected in hashes.items():
        if not (path / name).is_file():
            return f"{name} is missing"
        if _sha256(path / name) != expected:
            return f"{name} does not have the recorded SHA-256"
    return None


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
