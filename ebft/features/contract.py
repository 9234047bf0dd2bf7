"""The signature that all feature maps share, and the adapters to and from it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from tensordict.nn import TensorDictModule
from torch import Tensor

from ebft import schema
from ebft.distributed import by_rows
from ebft.errors import UsageError
from ebft.layout import document_starts

TokenFunction = Callable[[Tensor, Tensor], Tensor]


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


def as_module(feature_map: FeatureMap, *, documents: bool = False) -> TensorDictModule:
    """A feature map as a pipeline step that reads and writes the schema's keys.

    Of several processes each embeds its own rows (`ebft.distributed`); all write all features.

    Args:
        feature_map: the map.
        documents: also read ``document_ids`` [B,T], which must then be there.
    """
    in_keys = [
        schema.TOKENS,
        schema.MASK,
        schema.ANCHORS,
        schema.ANCHOR_MASK,
        schema.ROLLOUT_TOKENS,
        schema.ROLLOUT_MASK,
        schema.TARGET_TOKENS,
        schema.TARGET_MASK,
    ]

    def embed(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        if documents:
            return by_rows(feature_map, *tensors[:-1], document_ids=tensors[-1])
        return by_rows(feature_map, *tensors)

    return TensorDictModule(
        embed,
        in_keys=[*in_keys, schema.DOCUMENT_IDS] if documents else in_keys,
        out_keys=[schema.ROLLOUT_FEATURES, schema.TARGET_FEATURES],
        strict=True,
    )


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
