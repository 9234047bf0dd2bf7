"""Several feature maps side by side."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ebft.errors import UsageError
from ebft.features.contract import FeatureMap, Features, HorizonMap, at_horizons


def join(maps: Sequence[FeatureMap], weights: Sequence[float] | None = None) -> HorizonMap:
    """One map whose features are those of `maps`, each brought to unit norm and scaled, one after the other.

    Map i is scaled by sqrt(w_i), so that the dot product of two joined features is Σ_i w_i cos_i, with cos_i the
    cosine under map i. Vectors of zeros stay zeros. At several horizons each map embeds as often as it must.

    Args:
        maps: one or more feature maps with features [B,K,N,D_i] and [B,K,D_i].
        weights: w_i >= 0, one for each map; all 1 when left out.

    Raises:
        UsageError: no maps; another number of weights than maps; a weight that is negative or not finite; or, when
            called, a map whose rollout and target features have different dimensions.
    """
    maps = tuple(maps)
    weights = (1.0,) * len(maps) if weights is None else tuple(weights)
    if not maps:
        raise UsageError("join got no feature maps: expected one or more")
    if len(weights) != len(maps):
        raise UsageError(
            f"weights={list(weights)} has {len(weights)} values for {len(maps)} feature maps: give one each"
        )
    if not all(math.isfinite(w) and w >= 0 for w in weights):
        raise UsageError(f"weights={list(weights)}: every weight must be finite and 0 or more")

    def embed(*batch: Tensor, horizons: Sequence[int], document_ids: Tensor | None) -> list[Features]:
        found = [at_horizons(m, *batch, horizons=horizons, document_ids=document_ids) for m in maps]
        return [_side_by_side(parts, weights) for parts in zip(*found, strict=True)]

    return HorizonMap(embed)


def _side_by_side(parts: Sequence[Features], weights: Sequence[float]) -> Features:
    """Features of every map, joined."""
    rollout, target = [], []
    for number, ((r, t), weight) in enumerate(zip(parts, weights, strict=True)):
        if r.shape[-1] != t.shape[-1]:
            raise UsageError(
                f"feature map {number} gives rollout features of shape {list(r.shape)} and target features of"
                f" shape {list(t.shape)}: the last axes must be equal"
            )
        rollout.append(math.sqrt(weight) * normalize(r.float(), dim=-1))
        target.append(math.sqrt(weight) * normalize(t.float(), dim=-1))
    return torch.cat(rollout, -1), torch.cat(target, -1)
