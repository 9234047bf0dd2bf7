"""The signature that all feature maps share, features at several horizons, and the adapter from functions of tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from ebft.errors import UsageError
from ebft.layout import document_starts

TokenFunction = Callable[[Tensor, Tensor], Tensor]
Features = tuple[Tensor, Tensor]  # of rollouts [B,K,N,D] and of targets [B,K,D]


class FeatureMap(Protocol):
    """Embeds the rollouts and the target of every anchor; the paper's φ_c (arXiv 2603.12248, section 2).

    A map has no gradient (it is frozen), runs under ``torch.no_grad()``, and treats a target exactly like a rollout:
    a rollout with the target's tokens has the target's features. The rollouts and targets of masked anchors, and
    masked tokens, never influence anything; their features are zeros.
    """

    def __call__(
        self,
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
        """Features of rollouts and targets.

        Args:
            tokens: [B,T] the sequences; ``mask`` [B,T] is True on real tokens.
            anchors: [B,K] prefix lengths; ``anchor_mask`` [B,K] is True on real anchors.
            rollout_tokens: [B,K,N,G]; ``rollout_mask`` [B,K,N,G] is True on a rollout's own tokens.
            target_tokens: [B,K,G]; ``target_mask`` [B,K,G] is True on a target's own tokens.
            document_ids: [B,T] which document a token belongs to; contexts end at document borders.

        Returns:
            Rollout features [B,K,N,D] and target features [B,K,D], float32.
        """
        ...


class HorizonMap:
    """A feature map that gives the features of the first g tokens, for several g, out of one pass over all of them.

    For maps whose network gives a token the same state whatever follows it.

    Args:
        embed: (the tensors of a `FeatureMap`, horizons, document_ids) -> features at each of the horizons.
    """

    def __init__(self, embed: Callable[..., list[Features]]) -> None:
        self._embed = embed

    def __call__(
        self,
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
    ) -> Features:
        """As every `FeatureMap`: the features at the longest horizon."""
        batch = (tokens, mask, anchors, anchor_mask, rollout_tokens, rollout_mask, target_tokens, target_mask)
        (found,) = self.at_horizons(*batch, horizons=[rollout_tokens.shape[-1]], document_ids=document_ids)
        return found

    @torch.no_grad()
    def at_horizons(
        self, *batch: Tensor, horizons: Sequence[int], document_ids: Tensor | None = None
    ) -> list[Features]:
        """For each g of `horizons` the features that `cut_to(batch, g)` has, but for rounding."""
        return self._embed(*batch, horizons=horizons, document_ids=document_ids)


def at_horizons(
    feature_map: FeatureMap, *batch: Tensor, horizons: Sequence[int], document_ids: Tensor | None = None
) -> list[Features]:
    """Features of the first g tokens of rollouts and targets, for each g of `horizons`.

    Of a map with a method `at_horizons` of its own (`HorizonMap`) at the cost of the longest; any other embeds anew for
    each, which is the definition.

    Args:
        batch: the tensors that a `FeatureMap` takes, in their order.

    Raises:
        UsageError: a horizon that the rollouts do not have.
    """
    longest = batch[4].shape[-1]
    if not all(1 <= g <= longest for g in horizons):
        raise UsageError(f"horizons={list(horizons)}: expected 1 to {longest}, the tokens of a rollout")
    own = getattr(feature_map, "at_horizons", None)
    if own is not None:
        return own(*batch, horizons=horizons, document_ids=document_ids)
    return [feature_map(*cut_to(batch, g), document_ids=document_ids) for g in horizons]


def cut_to(batch: Sequence[Tensor], horizon: int) -> tuple[Tensor, ...]:
    """The tensors that a `FeatureMap` takes, with the first `horizon` tokens of rollouts and targets."""
    return (*batch[:4], *(x[..., :horizon] for x in batch[4:]))


def own_masks(anchor_mask: Tensor, rollout_mask: Tensor, target_mask: Tensor) -> tuple[Tensor, Tensor]:
    """Rollout mask [B,K,N,G] and target mask [B,K,G], emptied where the anchor is masked."""
    return rollout_mask & anchor_mask[..., None, None], target_mask & anchor_mask[..., None]


def context_window(
    tokens: Tensor, mask: Tensor, anchors: Tensor, *, count: int, document_ids: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The last `count` tokens before every anchor: ids [B,K,C] and mask [B,K,C].

    Positions before the start of the sequence, unmasked-out tokens and tokens of another document than the one
    the context ends in are masked.
    """
    positions = anchors[..., None] - count + torch.arange(count, device=anchors.device)
    clamped = positions.clamp(0, tokens.shape[1] - 1)
    real = (positions >= 0) & _gather(mask, clamped)
    if document_ids is not None:
        document = document_starts(tokens, document_ids)
        real &= _gather(document, clamped) == _gather(document, (anchors - 1).clamp(min=0)[..., None])
    return _gather(tokens, clamped), real


def _gather(values: Tensor, positions: Tensor) -> Tensor:
    """values [B,T] at positions [B,K,C] -> [B,K,C]."""
    return values.gather(1, positions.flatten(1)).view_as(positions)


def from_token_function(function: TokenFunction, *, context_tokens: int = 0) -> FeatureMap:
    """A feature map out of a function of tokens, applied to rollouts and targets alike.

    Args:
        function: takes tokens [...,T'] and mask [...,T'] (True on real tokens, elsewhere the tokens are 0) and returns
            features [...,D]. T' is G plus `context_tokens`. Continuations without a token get zeros, whatever it
            returns.
        context_tokens: how many tokens of the anchor's context to put in front of each continuation.

    Raises:
        UsageError: `context_tokens` is negative; or, when called, the function returns another shape.
    """
    check_context_tokens(context_tokens)

    def continuation_features(context: Tensor, context_mask: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
        own = mask.any(-1)
        tokens, mask = torch.cat([context, tokens], -1), torch.cat([context_mask, mask], -1)
        features = function(tokens * mask, mask)
        if features.shape[:-1] != own.shape:
            raise UsageError(
                f"the feature function returned shape {list(features.shape)} for tokens of shape {list(tokens.shape)};"
                f" expected {list(own.shape)} and one more axis for the features"
            )
        return features.float().masked_fill(~own[..., None], 0.0)

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
        rollout_mask, target_mask = own_masks(anchor_mask, rollout_mask, target_mask)
        context, context_mask = context_window(tokens, mask, anchors, count=context_tokens, document_ids=document_ids)
        rollouts = rollout_tokens.shape[2]
        shared, shared_mask = (x[:, :, None].expand(-1, -1, rollouts, -1) for x in (context, context_mask))
        return (
            continuation_features(shared, shared_mask, rollout_tokens, rollout_mask),
            continuation_features(context, context_mask, target_tokens, target_mask),
        )

    return embed


def check_context_tokens(count: int) -> None:
    """Refuse a context length that is no natural number."""
    if not isinstance(count, int) or count < 0:
        raise UsageError(f"context_tokens={count!r}: expected a whole number of tokens, 0 or more")
