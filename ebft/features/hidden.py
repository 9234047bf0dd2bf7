"""Hidden states of a frozen causal language model: the paper's feature map."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ebft.errors import UsageError
from ebft.features.contract import Features, HorizonMap, own_masks
from ebft.features.pooling import WITH_CONTEXT, check_pooling, last, mean_with_context
from ebft.features.pooling import pooling as pooling_called
from ebft.layout import document_starts

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
) -> HorizonMap:
    """A feature map of the hidden states of `backbone` after some of its layers (arXiv 2603.12248, section 4).

    Target features are the states of the sequence itself at positions a_k .. a_k+G-1: they cost nothing.

    Args:
        backbone: the frozen network, usually a copy of the policy at the start.
        layers: numbers of layers (int, 0 is the embeddings), fractions of the depth (float in (0,1], rounded down,
            at least layer 1), "last", or "mean" for the mean over all layers. Several layers are put side by side,
            D = H times their number.
        normalization: per token, "layer" makes each layer's vector a unit vector (the paper), "joint" the vector of
            all layers (the authors' code), "none" neither. For "mean", "layer" acts before the mean, "joint" after it.
        pooling: a name of ``ebft.features.pooling``, over the continuation's own tokens, or over those and its context
            ("mean_with_context"). "none" keeps one vector per token: [B,K,N,G,D] and [B,K,G,D].

    A rollout that equals its target gets the target's features to the last bit. At several horizons the backbone goes
    over the longest once.

    Raises:
        UsageError: a layer out of range, or an unknown pooling or normalisation.
    """
    wanted = layer_numbers(layers, backbone.num_layers)
    join_layers = layer_joiner(normalization, average=layers == "mean")
    check_pooling(pooling)

    def pooled(states: list[Tensor], mask: Tensor, context: tuple[Tensor, Tensor] | None) -> Tensor:
        if context is not None:
            return mean_with_context(join_layers(states), mask, *context)
        return pool_layers(states, mask, join_layers, how=pooling)

    def embed(*batch: Tensor, horizons: Sequence[int], document_ids: Tensor | None) -> list[Features]:
        tokens, mask, anchors, anchor_mask, rollout_tokens, rollout_mask, target_tokens, target_mask = batch
        rollout_states, trunk_states = backbone.hidden_states(
            tokens, mask, anchors, anchor_mask, rollout_tokens, rollout_mask,
            layers=sorted(set(wanted)), document_ids=document_ids,
        )  # fmt: skip
        rollout_mask, target_mask = own_masks(anchor_mask, rollout_mask, target_mask)
        context = of_rollouts = None
        if pooling == WITH_CONTEXT:
            trunk = join_layers([trunk_states[layer] for layer in wanted])
            context = _context_sums(trunk, mask, torch.where(anchor_mask, anchors, 1), document_ids)
            of_rollouts = context[0][:, :, None], context[1][:, :, None]
        target_states = {
            layer: _at_targets(states, anchors, target_mask.shape[-1]) for layer, states in trunk_states.items()
        }
        # The states of a rollout and of its target come from different places of the row, and round differently.
        same = _equal_so_far(rollout_tokens, rollout_mask, target_tokens[:, :, None], target_mask[:, :, None])

        def first(g: int) -> Features:
            """A token's states do not depend on what follows it: cut, they are those of the first g tokens."""
            rollout = pooled(cut(rollout_states, g), rollout_mask[..., :g], of_rollouts)
            target = pooled(cut(target_states, g), target_mask[..., :g], context)
            copies = same[..., :g] if pooling == "none" else same[..., g - 1]
            return torch.where(copies[..., None], target[:, :, None], rollout), target

        return [first(g) for g in horizons]

    def cut(states: Mapping[int, Tensor], g: int) -> list[Tensor]:
        return [states[layer][..., :g, :] for layer in wanted]

    return HorizonMap(embed)


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


def _equal_so_far(tokens: Tensor, mask: Tensor, other_tokens: Tensor, other_mask: Tensor) -> Tensor:
    """Whether the first g tokens are the same, for each g: [...,G] bool."""
    same = (mask == other_mask) & ((tokens == other_tokens) | ~mask)
    return same.cummin(-1).values


def _context_sums(states: Tensor, mask: Tensor, anchors: Tensor, document_ids: Tensor | None) -> tuple[Tensor, Tensor]:
    """Sum [B,K,D] and number [B,K] of the tokens before each anchor, in its document, from states [B,T,D]."""
    sums = (states * mask[..., None]).double().cumsum(1)  # differences of long sums follow: float32 would round them
    counts = mask.long().cumsum(1)
    rows = torch.arange(len(states), device=states.device)[:, None]
    end = anchors - 1
    before = document_starts(anchors.new_zeros(mask.shape), document_ids)[rows, end] - 1
    opened = before >= 0
    before = before.clamp(min=0)
    total = sums[rows, end] - sums[rows, before] * opened[..., None]
    return total.float(), counts[rows, end] - counts[rows, before] * opened


def layer_joiner(normalization: str, *, average: bool) -> Callable[[list[Tensor]], Tensor]:
    """From states per layer, each [...,H], to features of each token [...,D], float32; arguments as of :func:`hidden`.

    Raises:
        UsageError: an unknown normalisation.
    """
    if normalization not in _NORMALIZATIONS:
        raise UsageError(f"normalization={normalization!r} is unknown: choose one of {', '.join(_NORMALIZATIONS)}")

    def join_layers(states: list[Tensor]) -> Tensor:
        states = [x.float() for x in states]
        if normalization == "layer":
            states = [normalize(x, dim=-1) for x in states]
        joined = torch.stack(states).mean(0) if average else torch.cat(states, -1)
        return normalize(joined, dim=-1) if normalization == "joint" else joined

    return join_layers


def pool_layers(
    states: list[Tensor], mask: Tensor, join_layers: Callable[[list[Tensor]], Tensor], *, how: str
) -> Tensor:
    """States per layer, each [...,G,H], to features [...,D] pooled over the tokens where mask [...,G] is True."""
    if how == "last":  # the same result from one token as from G, with 1/G of the memory
        return join_layers([last(x, mask) for x in states])
    return pooling_called(how)(join_layers(states), mask)
