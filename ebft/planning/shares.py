"""What `run --shard` holds of the weights beyond a process's own share of them, and when."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from ebft.architectures import decoder_layers


@dataclass(frozen=True)
class Gathered:
    """Bytes of weights that are gathered at once; all 0 where nothing is shared.

    Args:
        whole: of the policy, and of its start.
        layer: of one decoder layer; rest: of what is outside of the layers.
        gradient: of one layer's gradient.
    """

    whole: float = 0.0
    layer: float = 0.0
    rest: float = 0.0
    gradient: float = 0.0

    @property
    def forward(self) -> float:
        """In a pass without gradient that all processes make together: a layer at work and the next on its way."""
        return self.rest + 2 * self.layer

    @property
    def backward(self) -> float:
        """In one with gradient: also a gradient of a layer, computed and sent. (The stage has that of the rest.)"""
        return self.forward + 2 * self.gradient


def gathered(config: Any, *, whole: int, trained: int, frozen_bytes: int, trained_bytes: int, lora: bool) -> Gathered:
    """For `whole` weights, adapters aside, and `trained` ones (those of the adapters, with `lora`).

    Raises:
        UsageError: no list of decoder layers is found.
    """
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(copy.deepcopy(config), attn_implementation="sdpa")
    layers = decoder_layers(model)
    in_layers = sum(weight.numel() for weight in layers.parameters())
    adapters = trained * trained_bytes * lora
    return Gathered(
        whole=whole * frozen_bytes + adapters,
        layer=(in_layers * frozen_bytes + adapters) / len(layers),
        rest=(whole - in_layers) * frozen_bytes,
        gradient=(trained if lora else in_layers) * trained_bytes / len(layers),
    )
