"""Checkpoints: everything that determines the future of a run, complete or absent.

A checkpoint is a folder `step-000040` with the trained weights (safetensors), the states of the optimizer and of every
other part that has one, and a manifest with the SHA-256 of each file. It is written beside its final name and renamed.
Of a sharded policy (`ebft.sharding`) each process writes its shares, see `ebft.loops.checkpoint_shards`; any number of
processes, sharded or not, goes on from either kind.

A checkpoint says what was reached, the options say how it goes on: hyperparameters are those of the optimizer that is
restored into, and the scheduler is a function of the step. All random numbers of a run, and its order of the data, are
keyed by its seed and step, so there is no generator and no position to save but the step.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Protocol
from warnings import catch_warnings, simplefilter

import torch
from safetensors.torch import load_file, save_file

from ebft.distributed import from_all, from_first, is_first, rank, size
from ebft.errors import UsageError
from ebft.files import clear_disk_errors, remove_folder, temporary, write_folder_atomically, write_json
from ebft.loops.checkpoint_shards import FILES, cut_states, read_shards, shapes, write_shards
from ebft.policy import CausalPolicy
from ebft.sharding import cut

_WEIGHTS, _STATES, _MANIFEST = "weights.safetensors", "optimizer.pt", "manifest.json"
_KIND = "kind of optimizer"
_NAME = re.compile(r"step-\d+")


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
    stateful: Mapping[str, Stateful] | None = None,
    keep: int = 2,
) -> Path:
    """Write the checkpoint of `step` into `folder`, then remove all but the newest `keep` up to it.

    `stateful` are the other parts with a state, by name. Checkpoints of later steps are removed too: they are of a
    future that was given up, damaged as a rule. Of a sharded policy all processes call it.

    Raises:
        UsageError: no disk space; the checkpoints that were there are untouched.
    """

    sharded = policy.sharded is not None
    writes = is_first() or not sharded

    def fill(target: Path) -> None:
        parts: dict[str, Stateful] = {"optimizer": optimizer, **(stateful or {})}
        states, weights = {name: part.state_dict() for name, part in parts.items()}, policy.trainable()
        if sharded:
            from_first(None)  # the folder is there
            states = write_shards(target, weights, states)
        else:
            whole = {name: parameter.detach().cpu().contiguous() for name, parameter in weights.items()}
            save_file(whole, target / _WEIGHTS)
        if writes:
            with open(target / _STATES, "wb") as file:  # a file of ours, so that a full disk is told as such
                torch.save({_KIND: type(optimizer).__name__, **states}, file)
        hashes = _hashes(target, together=sharded)
        if writes:
            write_json(target / _MANIFEST, {"step": step, "sha256": hashes})

    path = folder / f"step-{step:06d}"
    if not writes:
        with clear_disk_errors(path):
            fill(temporary(path))
        return path
    write_folder_atomically(path, fill)
    prune(folder, step, keep=keep)
    return path


def prune(folder: Path, step: int, *, keep: int) -> None:
    """Remove the checkpoints of `folder` but for the newest `keep` up to `step`."""
    kept = [path for path in _checkpoints(folder) if step_of(path) <= step][:keep]
    for path in _checkpoints(folder):
        if path not in kept:
            remove_folder(path)


def newest(folder: Path, *, warn: Callable[[str], Any] = print) -> Path | None:
    """The newest intact checkpoint of `folder`, None when there is none; the damaged ones after it are named."""
    for path in _checkpoints(folder):
        damage = _damage(path)
        if not damage:
            return path
        warn(f"checkpoint {path} is damaged ({damage}); trying the one before it")
    return None


def restore(
    folder: Path,
    *,
    policy: CausalPolicy,
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LRScheduler,
    stateful: Mapping[str, Stateful] | None = None,
    warn: Callable[[str], Any] = print,
) -> int:
    """Load the newest intact checkpoint of `folder` and return its step; 0, and nothing loaded, when there is none.

    A damaged checkpoint is named through `warn` and the one before it is used. A part whose state is not there, or is
    that of another kind of part, starts anew and is named through `warn`: so it is after a change of options.

    Args:
        optimizer, scheduler: newly made, with the hyperparameters to go on with.

    Raises:
        UsageError: the checkpoint is of another model (its weights have other names or shapes), or the scheduler is
            beyond its step.
    """
    path = from_first(newest(folder, warn=warn) if is_first() else None)
    if path is None:
        return 0
    step, trainable = step_of(path), policy.trainable()
    weights, state = _read(path, trainable)
    with torch.no_grad():
        for name, parameter in trainable.items():
            parameter.copy_(weights[name])
    hyperparameters = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    if state[_KIND] == type(optimizer).__name__:
        optimizer.load_state_dict(state["optimizer"])
        for group, own in zip(optimizer.param_groups, hyperparameters, strict=True):
            group.update(own)
    else:
        warn(f"checkpoint {path} is of the optimizer {state[_KIND]}: {type(optimizer).__name__} starts anew")
    for name, part in (stateful or {}).items():
        try:
            part.load_state_dict(state[name])
        except (KeyError, UsageError) as error:
            warn(f"checkpoint {path} holds no state for this {name} ({error}): it starts anew")
    _advance(scheduler, step)
    return step


def _read(path: Path, trainable: Mapping[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Weights and states of a checkpoint of either kind, in the shares of `trainable` if that is sharded."""
    shares = shapes(path)
    whole = {} if shares else load_file(path / _WEIGHTS)
    found = shares or {name: list(tensor.shape) for name, tensor in whole.items()}
    wanted = {name: list(parameter.shape) for name, parameter in trainable.items()}
    if found != wanted:
        different = sorted(name for name in {*found, *wanted} if found.get(name) != wanted.get(name))
        raise UsageError(f"checkpoint {path} is of another model: {len(different)} weights differ, as {different[0]}")
    state = torch.load(path / _STATES, map_location="cpu", weights_only=True)
    if shares:
        return read_shards(path, trainable, state)
    return {name: cut(tensor, trainable[name]) for name, tensor in whole.items()}, cut_states(state, trainable)


def _hashes(folder: Path, *, together: bool) -> dict[str, str]:
    """The SHA-256 of each file; with `together` all processes have written there and share the work."""
    if together:
        from_all(None)  # all have written
    names = sorted(path.name for path in folder.iterdir())
    own = names[rank() :: size()] if together else names
    found = {name: _sha256(folder / name) for name in own}
    return {name: value for part in (from_all(found) if together else [found]) for name, value in part.items()}


def _advance(scheduler: torch.optim.lr_scheduler.LRScheduler, step: int) -> None:
    """Bring a scheduler to `step` through the same arithmetic as training does."""
    if scheduler.last_epoch > step:
        raise UsageError(f"the scheduler is at step {scheduler.last_epoch}, the checkpoint at {step}: make a new one")
    with catch_warnings():
        simplefilter("ignore", UserWarning)  # that no optimizer step came before
        for _ in range(step - scheduler.last_epoch):
            scheduler.step()


def _checkpoints(folder: Path) -> list[Path]:
    """Newest first."""
    folders = [path for path in folder.glob("step-*") if path.is_dir() and _NAME.fullmatch(path.name)]
    return sorted(folders, key=step_of, reverse=True)


def step_of(path: Path) -> int:
    """The step of the checkpoint `path`."""
    return int(path.name.removeprefix("step-"))


def _damage(path: Path) -> str | None:
    """What is wrong with a checkpoint, None if nothing is."""
    try:
        manifest = json.loads((path / _MANIFEST).read_text())
        hashes, step = dict(manifest["sha256"]), manifest["step"]
        _ = hashes[_STATES]
        if _WEIGHTS not in hashes and not any(fnmatch(name, FILES) for name in hashes):
            raise KeyError(_WEIGHTS)
    except (OSError, ValueError, KeyError, TypeError):
        return f"{_MANIFEST} cannot be read"
    if step != step_of(path):
        return f"{_MANIFEST} is of step {step}"
    for name, expected in hashes.items():
        if not (path / name).is_file():
            return f"{name} is missing"
        if _sha256(path / name) != expected:
            return f"{name} does not have the recorded SHA-256"
    return None


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
