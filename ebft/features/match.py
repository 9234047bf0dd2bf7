"""Which tokens stand where: features whose products count equal tokens, or the tokens of a common beginning."""

from __future__ import annotations

import torch
from torch import Tensor

from ebft.errors import UsageError
from ebft.features.contract import FeatureMap, from_token_function, own_masks
from ebft.hashing import scramble

KINDS = ("prefix", "position")


def match(kind: str = "prefix", *, dimension: int = 2048, pooling: str = "sum") -> FeatureMap:
    """Features of a continuation's tokens at their places, hashed into `dimension` buckets, of norm 1.

    * "prefix": for every g, an indicator of the first g tokens. The product of two continuations is the share of their
      tokens in the common beginning. The last indicator is that of the whole continuation and of no other, so the
      features of different continuations are linearly independent and (diversity 1, but for collisions) the score of
      their mean is strictly proper: only the data's own distribution is best.
    * "position": for every g, an indicator of token g. The product is the share of places with equal tokens; the score
      is proper, and blind beyond the distribution of the token at each place.

    Shares are of G tokens, of the geometric mean of the lengths where continuations end early.

    Args:
        kind: "prefix" or "position".
        dimension: D, the number of buckets; two different indicators collide with probability 1/D.
        pooling: "sum" for one vector per continuation, D; "none" for one per token, [B,K,N,G,D] and [B,K,G,D]: the
            indicator at that token, for rewards of tokens.

    Raises:
        UsageError: an option out of its range.
    """
    if kind not in KINDS:
        raise UsageError(f"match={kind!r}: expected one of {', '.join(KINDS)}")
    if pooling not in ("sum", "none"):
        raise UsageError(f"pooling={pooling!r} of match: expected sum or none")
    if not isinstance(dimension, int) or dimension < 1:
        raise UsageError(f"dimension={dimension!r}: expected a whole number, 1 or more")

    def indicators(tokens: Tensor, mask: Tensor) -> Tensor:
        """[...,G] to [...,G,D]."""
        buckets = _buckets(tokens, kind=kind, dimension=dimension)
        found = torch.zeros(*tokens.shape, dimension, device=tokens.device)
        return found.scatter_(-1, buckets[..., None], mask[..., None].float())

    def summed(tokens: Tensor, mask: Tensor) -> Tensor:
        features = torch.zeros(*tokens.shape[:-1], dimension, device=tokens.device)
        features.scatter_add_(-1, _buckets(tokens, kind=kind, dimension=dimension), mask.float())
        return features / mask.sum(-1, keepdim=True).clamp(min=1).sqrt()

    if pooling == "sum":
        return from_token_function(summed)

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
        return indicators(rollout_tokens, rollout_mask), indicators(target_tokens, target_mask)

    return embed


def _buckets(tokens: Tensor, *, kind: str, dimension: int) -> Tensor:
    """The bucket of the indicator at each token [...,G]."""
    state, found = scramble(torch.zeros_like(tokens[..., 0])), []
    for place, token in enumerate(tokens.unbind(-1)):
        before = state if kind == "prefix" else torch.full_like(state, place)
        state = scramble(scramble(before + 1) ^ scramble(token + 1))
        found.append((state >> 1 & _POSITIVE) % dimension)
    return torch.stack(found, -1)


_POSITIVE = (1 << 62) - 1
