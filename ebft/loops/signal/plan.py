"""What is measured: configurations that share sampled rollouts and embedded features wherever they can."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from tensordict import TensorDictBase

from ebft import schema
from ebft.loops.stages import Stage

CROSS_ENTROPY = "cross-entropy"


@dataclass(frozen=True)
class Sampling:
    """A way to draw rollouts, and the settings under which their tokens are scored."""

    stage: Stage
    scoring: Mapping[str, float]


@dataclass(frozen=True)
class Embedding:
    """A feature map and what it costs: the share of a forward pass of the policy that a token takes."""

    stage: Stage
    share: float = 0.0


@dataclass(frozen=True)
class Configuration:
    """One policy gradient: whose rollouts, which features, and the stage that turns them into advantages.

    `parity` keeps every second anchor of a row, from the first (0) or the second (1) on; `rollouts` the first so many.
    """

    name: str
    sampling: str
    embedding: str
    reward: Stage
    parity: int | None = None
    rollouts: int | None = None


@dataclass(frozen=True)
class Plan:
    """Configurations and the parts that they name; cross-entropy of the same sequences comes last of itself."""

    samplings: Mapping[str, Sampling]
    embeddings: Mapping[str, Embedding]
    configurations: Sequence[Configuration]

    def names(self) -> list[str]:
        """Of all gradients that are measured, in order."""
        return [*(c.name for c in self.configurations), CROSS_ENTROPY]


def restricted(td: TensorDictBase, configuration: Configuration) -> TensorDictBase:
    """The anchors and rollouts of `td` that the configuration uses."""
    td = td.clone(False)
    if configuration.rollouts is not None:
        td[schema.ROLLOUT_TOKENS[0]] = td[schema.ROLLOUT_TOKENS[0]].apply(lambda x: x[:, :, : configuration.rollouts])
    if configuration.parity is not None:
        places = torch.arange(td[schema.ANCHORS].shape[1], device=td.device)
        td[schema.ANCHOR_MASK] = td[schema.ANCHOR_MASK] & (places % 2 == configuration.parity)
    return td


def token_forwards(td: TensorDictBase, *, share: float) -> float:
    """What an update from this batch costs, in tokens through the policy: sampling, embedding, scoring with backward.

    A backward pass counts as two forward passes. Encoders other than the policy's own layers are not counted.
    """
    trunk = int(td[schema.MASK].sum())
    real = td[schema.ROLLOUT_MASK] & td[schema.ANCHOR_MASK][..., None, None]
    teeth, fed = int(real.sum()), int(real[..., :-1].sum())  # nothing is fed after a last token
    return 4.0 * (trunk + fed) + share * (trunk + teeth)
