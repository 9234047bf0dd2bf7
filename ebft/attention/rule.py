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
    scores = (grouped @ key[:, :, None].mT).to(torch.promote_types(query.dtype, torch.float32)) * rule.scaling
    if rule.softcap is not None:
        scores = rule.softcap * torch.tanh(scores / rule.softcap)
    scores = scores.masked_fill(~visible[:, None, None], -torch.inf)
    weights = softmax(scores, rule, dtype=query.dtype)
    return (weights @ value[:, :, None]).flatten(1, 2)


def scaled_products(
    rows: torch.Tensor, keys: torch.Tensor, scaling: float, *, out: torch.Tensor | None = None
) -> torch.Tensor:
    """scaling · rows [X,Q,E] · keysᵀ [X,S,E], rounded once: [X,Q,S].

    Args:
        out: where to write it, which may be a part of something wider.
    """
    nothing = rows.new_zeros(1, 1, 1) if out is None else out
    return torch.baddbmm(nothing, rows, keys.mT, beta=0, alpha=scaling, out=out)


def cap(scores: torch.Tensor, rule: ScoreRule) -> torch.Tensor:
    """Scores in at least float32, soft-capped where the layer caps; may be computed in place."""
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    return scores if rule.softcap is None else scores.div_(rule.softcap).tanh_().mul_(rule.softcap)


def softmax(scores: torch.Tensor, rule: ScoreRule, *, dtype: torch.dtype) -> torch.Tensor:
    """Attention weights of scores [B,J,R,Q,S], R = H/J, with the layer's sinks if it has any."""
    if rule.sinks is None:
        return scores.softmax(-1).to(dtype)
    sink = rule.sinks.to(scores.dtype).view(1, *scores.shape[1:3], 1, 1).expand(*scores.shape[:-1], 1)
    return torch.cat([scores, sink], -1).softmax(-1)[..., :-1].to(dtype)
