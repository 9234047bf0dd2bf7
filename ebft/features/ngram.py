"""Hashed counts of token n-grams: features without a network."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize as unit_norm

from ebft.errors import UsageError
from ebft.features.contract import FeatureMap, from_token_function
from ebft.hashing import scramble


def ngram(n: int = 2, *, dimension: int = 512, seed: int = 0, normalize: bool = True) -> FeatureMap:
    """Counts of the n-grams of a continuation, hashed into `dimension` buckets.

    Exactly n-grams, no shorter ones: put ``ngram(1)`` and ``ngram(2)`` together with ``join``. A continuation of fewer
    than n tokens counts as a single gram, whole. Hence n >= G is one bucket per distinct rollout, up to collisions,
    so that its features separate rollouts like the one-hot features of the paper (arXiv 2603.12248, (3)).

    Args:
        n: tokens in a gram.
        dimension: D, the number of buckets.
        seed: key of the hash. The same seed gives the same buckets in every process and on every device.
        normalize: scale to unit norm; False leaves plain counts.

    Raises:
        UsageError: `n` or `dimension` is below 1.
    """
    for name, value in (("n", n), ("dimension", dimension)):
        if not isinstance(value, int) or value < 1:
            raise UsageError(f"{name}={value!r}: expected a whole number, 1 or more")

    def counts(tokens: Tensor, mask: Tensor) -> Tensor:
        buckets, real = _buckets(tokens, mask, n=n, dimension=dimension, seed=seed)
        features = torch.zeros(*tokens.shape[:-1], dimension, device=tokens.device)
        features.scatter_add_(-1, buckets, real.float())
        return unit_norm(features, dim=-1) if normalize else features

    return from_token_function(counts)


def _buckets(tokens: Tensor, mask: Tensor, *, n: int, dimension: int, seed: int) -> tuple[Tensor, Tensor]:
    """The bucket of the gram that starts at each token [...,G], and whether a whole gram starts there [...,G]."""
    tokens, mask = _left_align(tokens, mask)
    length = mask.sum(-1, keepdim=True)
    horizon = tokens.shape[-1]
    start = torch.arange(horizon, device=tokens.device)
    size = length.clamp(max=n)
    state = scramble(torch.full_like(tokens, seed) + scramble(size))
    for offset in range(min(n, horizon)):
        following = tokens.roll(-offset, -1)  # what wraps around lies past `length`, hence in no whole gram
        state = torch.where(offset < size, scramble(state ^ scramble(following + 1)), state)
    return (state >> 1 & _POSITIVE) % dimension, start + size <= length


def _left_align(tokens: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Own tokens first, in their order, zeros after them."""
    order = (~mask).int().argsort(dim=-1, stable=True)
    mask = mask.gather(-1, order)
    return tokens.gather(-1, order) * mask, mask


_POSITIVE = (1 << 62) - 1
