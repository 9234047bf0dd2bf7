"""Hidden states of a frozen causal language model: the paper's feature map."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ebft.errors import UsageError
from ebft.features.contract import FeatureMap, own_masks
from ebft.features.pooling import last, pooling

_NORMALIZATIONS = ("layer", "joint", "none")


class Backbone(Protocol):
    """What is needed of the model; ``ebft.policy.CausalPolicy`` has it."""

    @property
    def num_layers(self) -> int:
        """Number of decoder layers."""
        ...

    def hidden_states(
        self,
        tokens: Tensor,
        mask: Tensor,
        anchors: Tensor,
        anchor_mask: Tensor,
        rollout_tokens: Tensor,
        rollout_mask: Tensor,
        *,
        layers: Sequence[int],
        document_ids: Tensor | None = None,
    ) -> tuple[Mapping[int, Tensor], Mapping[int, Tensor]]:
        """Per layer (0 is the embeddings): rollout states [B,K,N,G,H] and trunk states [B,T,H]."""
        ...


def hidden(
    backbone: Backbone,
    *,
    layers: Sequence[int | float] | str = (0.25, 0.5, 0.75),
    normalization: str = "layer",
    pooling: str = "last",
) -> FeatureMap:
    """A feature map of the hidden states of `backbone` after some of its layers (arXiv 2603.12248, section 4).

    Target features are the states of the sequence itself at positions a_k .. a_k+G-1: they cost nothing.

    Args:
        backbone: the frozen network, usually a copy of the policy at the start.
        layers: numbers of layers (int, 0 is the embeddings), fractions of the depth (float in (0,1], rounded down,
            at least layer 1), "last", or "mean" for the mean over all layers. Several layers are put side by side,
            D = H times their number.
        normalization: per token, "layer" makes each layer's vector a unit vector (the paper), "joint" the vector of
            all layers (the authors' code), "none" neither. For "mean", "layer" acts before the mean, "joint" after it.
        pooling: a name of ``ebft.features.pooling``, over the continuation's own tokens. "none" keeps one vector per
            token: [B,K,N,G,D] and [B,K,G,D].

    Raises:
        UsageError: a layer out of range, or an unknown pooling or normalisation.
    """
    if normalization not in _NORMALIZATIONS:
        raise UsageError(f"normalization={normalization!r} is unknown: choose one of {', '.join(_NORMALIZATIONS)}")
    wanted = layer_numbers(layers, backbone.num_layers)
    combine = _combiner(pooling, normalization, average=layers == "mean")

    @torch.no_grad()
    def embed(
        tokens: Tensor,
        mask: Tensor,
        anchors: Tensor,
        anchor_mask: Tensor,
        rollout_tokens: Tensor,
        rollout_mask: Tensor,
        target_tokens: Tensor,
        target_mask: Tensor,
        *,
        document_ids: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        rollout_states, trunk_states = backbone.hidden_states(
            tokens, mask, anchors, anchor_mask, rollout_tokens, rollout_mask,
            layers=sorted(set(wanted)), document_ids=document_ids,
        )  # fmt: skip
        rollout_mask, target_mask = own_masks(anchor_mask, rollout_mask, target_mask)
        target_states = {
            layer: _at_targets(states, anchors, target_mask.shape[-1]) for layer, states in trunk_states.items()
        }
        return (
            combine([rollout_states[layer] for layer in wanted], rollout_mask),
            combine([target_states[layer] for layer in wanted], target_mask),
        )

    return embed


def layer_numbers(layers: Sequence[int | float] | str, depth: int) -> tuple[int, ...]:
    """The layer numbers that `layers` (see :func:`hidden`) means in a network of `depth` layers.

    Raises:
        UsageError: a number or fraction out of range, an unknown word, or no layer at all.
    """
    words = {"last": (depth,), "mean": tuple(range(1, depth + 1))}
    if isinstance(layers, str):
        if layers not in words:
            raise UsageError(f"layers={layers!r} is unknown: choose last, mean, numbers or fractions of the depth")
        return words[layers]
    if not layers:
        raise UsageError("layers is empty: choose last, mean, numbers or fractions of the depth")
    return tuple(_layer_number(layer, depth) for layer in layers)


def _layer_number(layer: int | float, depth: int) -> int:
    if isinstance(layer, float) and 0 < layer <= 1:
        return max(1, math.floor(layer * depth))
    if isinstance(layer, int) and not isinstance(layer, bool) and 0 <= layer <= depth:
        return layer
    raise UsageError(
        f"layer {layer!r} is out of range: expected a whole number from 0 to {depth}, or a fraction of the depth, a"
        " float above 0.0 and up to 1.0"
    )


def _at_targets(states: Tensor, anchors: Tensor, horizon: int) -> Tensor:
    """Trunk states [B,T,H] at the target positions of each anchor: [B,K,G,H]."""
    positions = anchors[..., None] + torch.arange(horizon, device=anchors.device)
    positions = positions.clamp(max=states.shape[1] - 1)  # places past the end are masked
    rows = torch.arange(len(states), device=states.device)[:, None, None]
    return states[rows, positions]


def _combiner(how: str, normalization: str, *, average: bool) -> Callable[[list[Tensor], Tensor], Tensor]:
    """From states per layer, each [...,G,H], and mask [...,G] to pooled features [...,D]."""
    pool = pooling(how)

    def combine(states: list[Tensor], mask: Tensor) -> Tensor:
        if how == "last":  # the same result from one token as from G, with 1/G of the memory
            states = [last(x, mask)[..., None, :] for x in states]
            mask = mask.any(-1, keepdim=True)
        states = [x.float() for x in states]
        if normalization == "layer":
            states = [normalize(x, dim=-1) for x in states]
        joined = torch.stack(states).mean(0) if average else torch.cat(states, -1)
        if normalization == "joint":
            joined = normalize(joined, dim=-1)
        return pool(joined, mask)

    return combine
