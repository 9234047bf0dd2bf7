"""Plain attention as one layer wants it: scaling, soft-capping, sinks. No layout."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn.functional import scaled_dot_product_attention


@dataclass(frozen=True)
class ScoreRule:
    """How a layer turns q·k into attention weights.

    Attributes:
        scaling: factor on q·k.
        window: sliding window in positions, or None.
        softcap: c in c·tanh(s/c) (Gemma 2), or None.
        sinks: [H] logits of the empty key (gpt-oss), or None.
    """

    scaling: float
    window: int | None = None
    softcap: float | None = None
    sinks: torch.Tensor | None = None


def attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, visible: torch.Tensor | None, rule: ScoreRule
) -> torch.Tensor:
    """Attention of query [B,H,Q,E] over key and value [B,J,S,E], J divides H; `visible` [B,Q,S], None for causal."""
    if rule.softcap is None and rule.sinks is None:
        mask = None if visible is None else visible[:, None]
        return scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask,
            is_causal=visible is None,
            scale=rule.scaling,
            enable_gqa=query.shape[1] != key.shape[1],
        )
    if visible is None:
        visible = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device).tril()[None]
    grouped = query.unflatten(1, (key.shape[1], -1))
    scores = shape_scores(grouped @ key[:, :, None].mT, rule).masked_fill(~visible[:, None, None], -torch.inf)
    weights = softmax(scores, rule, dtype=query.dtype)
    return (weights @ value[:, :, None]).flatten(1, 2)


def shape_scores(products: torch.Tensor, rule: ScoreRule) -> torch.Tensor:
    """q·k -> attention scores, in at least float32."""
    scores = products.to(torch.promote_types(products.dtype, torch.float32)) * rule.scaling
    return scores if rule.softcap is None else rule.softcap * torch.tanh(scores / rule.softcap)


def softmax(scores: torch.Tensor, rule: ScoreRule, *, dtype: torch.dtype) -> torch.Tensor:
    """Attention weights of scores [B,J,R,Q,S], R = H/J, with the layer's sinks if it has any."""
    if rule.sinks is None:
        return scores.softmax(-1).to(dtype)
    sink = rule.sinks.to(scores.dtype).view(1, *scores.shape[1:3], 1, 1).expand(*scores.shape[:-1], 1)
    return torch.cat([scores, sink], -1).softmax(-1)[..., :-1].to(dtype)
