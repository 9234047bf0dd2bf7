"""An energy as a reward, and as a file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from tensordict.nn import TensorDictModule
from torch import Tensor

from ebft import schema
from ebft.errors import UsageError
from ebft.files import write_atomically
from ebft.objectives.energy import LinearEnergy
from ebft.objectives.verifiers import METRICS, plain_reward

_ABOUT = "about"  # entry of the file's metadata: JSON


def energy_reward(energy: LinearEnergy, *, estimator: str = "rloo") -> TensorDictModule:
    """A module that writes -E of every rollout as its reward, and the advantage, [B,K,N] and 0 at masked anchors.

    Without a divergence term the optimum of a linear reward is one rollout of least energy. With one from the start,
    of weight 1 and of whole rollouts (in the reward, or `kl_scope="rollout"`), it is the tilt of the start by
    exp(-E), which the energy was fitted for (arXiv 2603.12248, (72)).

    It also writes the metrics ``reward_spread`` and ``zero_spread_groups``, [B,K], as ``component.objective`` does.

    Args:
        energy: one χ [D] for all contexts, of features as the pipeline writes them.
        estimator: of ``baselines.advantage``; the reward of a rollout does not depend on the others.

    Raises:
        UsageError: one χ per context, which says nothing of other contexts; when called, features of another size.
    """
    if energy.chi.ndim != 1:
        raise UsageError(
            f"chi has shape {list(energy.chi.shape)}, one for each context: as a reward an energy has to be one for"
            " all, [D]"
        )

    def reward_and_advantage(features: Tensor, anchor_mask: Tensor) -> tuple[Tensor, ...]:
        chi = LinearEnergy(energy.chi.to(features.device))
        return plain_reward(torch.where(anchor_mask[..., None], -chi(features), 0.0), anchor_mask, estimator=estimator)

    return TensorDictModule(
        reward_and_advantage,
        in_keys=[schema.ROLLOUT_FEATURES, schema.ANCHOR_MASK],
        out_keys=[schema.REWARD, schema.ADVANTAGE, *map(schema.metric, METRICS)],
        strict=True,
    )


def save_energy(path: Path, energy: LinearEnergy, about: Mapping[str, Any]) -> None:
    """Write χ as safetensors, with `about` (anything that is JSON) in the file's metadata."""
    metadata = {_ABOUT: json.dumps(about)}
    write_atomically(path, safetensors.torch.save({"chi": energy.chi.detach().cpu().contiguous()}, metadata=metadata))


def load_energy(path: Path) -> tuple[LinearEnergy, dict[str, Any]]:
    """The energy in a file of :func:`save_energy`, and what it says of itself.

    Raises:
        UsageError: the file is not there, or is no such file.
    """
    if not path.is_file():
        raise UsageError(f"{path}: no such file; expected an energy.safetensors as `tilt` writes it")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            chi, about = file.get_tensor("chi"), json.loads((file.metadata() or {})[_ABOUT])
    except (safetensors.SafetensorError, KeyError, ValueError) as error:
        raise UsageError(f"{path} holds no energy: expected an energy.safetensors as `tilt` writes it") from error
    return LinearEnergy(chi), about
