"""The tensors of a sharded run in a checkpoint: each process writes its own shares, any number of processes reads them.

By `torch.distributed.checkpoint`, as safetensors files `shard-*.safetensors` whose headers say which part of which
tensor they hold. What is not sharded stays with the rest of the states.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.tensor import DTensor

from ebft.sharding import cut

FILES = "shard-*.safetensors"
_WEIGHTS, _OPTIMIZER = "weights", "optimizer"


def write_shards(folder: Path, weights: Mapping[str, Tensor], states: Mapping[str, Any]) -> dict[str, Any]:
    """Write what is sharded of the trained weights and of `states` (see `split`); all processes call it.

    Returns:
        What is left of `states`.
    """
    tensors, rest = split(states, list(weights))
    tensors |= {f"{_WEIGHTS}/{name}": weight.detach() for name, weight in weights.items()}
    with _plain_errors():
        dcp.save(tensors, storage_writer=HuggingFaceStorageWriter(str(folder), save_distributed=True))
    return rest


def shapes(folder: Path) -> dict[str, list[int]]:
    """The weights that a checkpoint holds in shares, by name; none of a checkpoint without."""
    start = f"{_WEIGHTS}/"
    found = _stored(folder).items()
    return {name.removeprefix(start): list(stored.size) for name, stored in found if name.startswith(start)}


def read_shards(
    folder: Path, weights: Mapping[str, Tensor], states: Mapping[str, Any]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Weights and states of a checkpoint in shares, cut as `weights` are: sharded over any processes, or not at all.

    Args:
        states: what is left of them, as `write_shards` returned it.
    """
    targets: dict[str, Tensor] = {}
    for key, stored in _stored(folder).items():
        like = weights[key.split("/")[1]].detach()
        targets[key] = torch.zeros_like(like, dtype=stored.properties.dtype)
    with _plain_errors():
        dcp.load(targets, storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=True)
    return merge(targets, states, list(weights))


def split(states: Mapping[str, Any], names: list[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Sharded tensors by `<part>/<weight>[/<entry>]`, and the states without them.

    Args:
        states: by part; that of the optimizer as `torch.optim` gives it, others flat.
        names: of the weights, in the order in which the optimizer has them.
    """
    tensors: dict[str, Tensor] = {}
    rest: dict[str, Any] = {}
    for part, state in states.items():
        if part == _OPTIMIZER:
            entries = {(place, key): v for place, own in state["state"].items() for key, v in own.items()}
            cut_ones = {index: v for index, v in entries.items() if isinstance(v, DTensor)}
            tensors |= {f"{part}/{names[place]}/{key}": v for (place, key), v in cut_ones.items()}
            left: dict[int, dict] = {place: {} for place in state["state"]}
            for (place, key), v in entries.items():
                if (place, key) not in cut_ones:
                    left[place][key] = v
            rest[part] = {**state, "state": left}
        elif isinstance(state, dict):
            tensors |= {f"{part}/{name}": v.detach() for name, v in state.items() if isinstance(v, DTensor)}
            rest[part] = {name: v for name, v in state.items() if not isinstance(v, DTensor)}
        else:
            rest[part] = state
    return tensors, rest


def merge(
    tensors: Mapping[str, Tensor], rest: Mapping[str, Any], names: list[str]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The inverse of `split`: the weights, and the whole states."""
    weights: dict[str, Tensor] = {}
    states = {part: dict(state) if isinstance(state, dict) else state for part, state in rest.items()}
    states[_OPTIMIZER]["state"] = {place: dict(own) for place, own in states[_OPTIMIZER]["state"].items()}
    for key, tensor in tensors.items():
        part, name, *entry = key.split("/")
        if part == _WEIGHTS:
            weights[name] = tensor
        elif part == _OPTIMIZER:
            states[part]["state"][names.index(name)][entry[0]] = tensor
        else:
            states[part][name] = tensor
    return weights, states


def cut_states(states: Mapping[str, Any], weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """Whole states of a checkpoint that is not in shares, cut as `weights` are."""
    ordered = list(weights.values())

    def as_weight(value: Any, like: Tensor | None) -> Any:
        fits = like is not None and isinstance(value, Tensor) and value.shape == like.shape
        return cut(value, like) if fits and isinstance(like, DTensor) else value

    found = {}
    for part, state in states.items():
        if part == _OPTIMIZER:
            own = {
                place: {key: as_weight(v, ordered[place]) for key, v in entries.items()}
                for place, entries in state["state"].items()
            }
            found[part] = {**state, "state": own}
        elif isinstance(state, dict):
            found[part] = {name: as_weight(v, weights.get(name)) for name, v in state.items()}
        else:
            found[part] = state
    return found


def _stored(folder: Path) -> dict[str, Any]:
    if not list(folder.glob(FILES)):
        return {}
    return dict(HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata)


@contextmanager
def _plain_errors() -> Iterator[None]:
    """What went wrong in a process, in place of torch's collection of what went wrong in each."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that no process group is needed
        try:
            yield
        except CheckpointException as error:
            cause, _ = next(iter(error.failures.values()))
            raise cause from error
