"""Attention of a step of sampling in shapes that never change: all teeth, whole buffers of own keys, one trunk."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ebft.attention.decode import Kept
from ebft.attention.rule import ScoreRule, cap, scaled_products, softmax
from ebft.tuning import PerDevice

# Teeth per call of attention: what is computed at once holds [B, heads, this many, T + G] scores.
COLUMNS_PER_CALL = PerDevice(cpu=256, cuda=512)

Hidden = Mapping[int | None, tuple[torch.Tensor, torch.Tensor]]


class StaticDecode:
    """Attention of one new token of each of R = B·K·N teeth: over the trunk and over the tooth's own buffer.

    It computes what `Decode` does, with what nobody sees masked instead of left out.

    Args:
        trunk: keys and values [B,J,T,E] of every layer.
        own: of every layer the keys and values of the teeth, [R,J,S,E]; the new ones are written into them.
        hidden: by sliding window, what the teeth do not see: of the trunk [B,K·N,T] and of their own [B,K·N,S] bool.
        step: [] int64, the place of the new token in its tooth.
    """

    def __init__(self, trunk: Kept, own: Kept, hidden: Hidden, step: torch.Tensor):
        self._trunk, self._own, self._hidden, self._step = trunk, own, hidden, step

    def __call__(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, rule: ScoreRule
    ) -> torch.Tensor:
        query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))  # [R,H,E], [R,J,E]
        own_key, own_value = self._own[layer]
        for buffer, new in ((own_key, key), (own_value, value)):
            buffer.index_copy_(2, self._step[None], new[:, :, None])
        trunk_key, trunk_value = self._trunk[layer]
        of_trunk, of_own = self._hidden[rule.window]
        batch, columns, length = of_trunk.shape
        query = query.unflatten(1, (key.shape[1], -1))  # [R,J,H/J,E]
        on_grid = query.unflatten(0, (batch, columns)).permute(0, 2, 3, 1, 4)  # [B,J,H/J,C,E]
        to_own = (query @ own_key.mT * rule.scaling).unflatten(0, (batch, columns)).permute(0, 2, 3, 1, 4)
        on_trunk, on_own, few = [], [], COLUMNS_PER_CALL.on(query.device)
        for start in range(0, columns, few):
            part = slice(start, min(start + few, columns))
            # the query heads of a key head are folded into its rows: a broadcast product would copy the keys
            grouped = on_grid[:, :, :, part]
            rows = grouped.flatten(2, 3).flatten(0, 1)
            scores = scaled_products(rows, trunk_key.flatten(0, 1), rule.scaling).view(*grouped.shape[:4], length)
            scores = cap(torch.cat([scores, to_own[:, :, :, part]], -1), rule)
            unseen = torch.cat([of_trunk[:, part], of_own[:, part]], -1)[:, None, None]
            weights = softmax(scores.masked_fill(unseen, -torch.inf), rule, dtype=query.dtype)
            out = (weights[..., :length].flatten(2, 3) @ trunk_value).unflatten(2, grouped.shape[2:4])
            on_trunk.append(out.permute(0, 3, 1, 2, 4))  # [B,C,J,H/J,E]
            on_own.append(weights[..., length:].permute(0, 3, 1, 2, 4))
        out = torch.cat(on_trunk, 1).flatten(0, 1) + torch.cat(on_own, 1).flatten(0, 1) @ own_value
        return out.flatten(1, 2).transpose(0, 1)[None]
