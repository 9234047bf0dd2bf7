"""The kernel ``chunked``: the trunk causally, then the teeth of a few anchors per call.

A tooth sees the trunk before its anchor and its own tokens. Scores against the trunk are one matrix product per key
head, those against the own tooth one small product per tooth, so no product is spent on other teeth. Attention weights
live for one call only: backward computes them again, as it does in fused attention.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ebft.attention.masks import trunk_mask
from ebft.attention.rule import ScoreRule, attend, shape_scores, softmax
from ebft.layout import NestedPrefixLayout

# Anchors per call: more read trunk that not all of them see, fewer make more and smaller products.
ANCHORS_PER_CALL = 8


class Chunk(NamedTuple):
    """The teeth of a few neighbouring anchors: Q slots start..stop of the row.

    Attributes:
        start, stop: first slot, last slot + 1.
        reach: the furthest of the anchors; nobody sees the trunk from there on.
        seen: trunk slots before this one are visible to all Q, so `hidden` need not tell.
        hidden: [B,1,1,Q,reach-seen+G]: which of the trunk from `seen` on, and of the own tooth, is not visible.
    """

    start: int
    stop: int
    reach: int
    seen: int
    hidden: Tensor


def chunk_masks(layout: NestedPrefixLayout, window: int | None) -> tuple[Tensor | None, list[Chunk]]:
    """The trunk's mask as `masks.trunk_mask` gives it, and the chunks of anchors."""
    per_anchor = layout.rollouts * layout.horizon
    chunks = []
    if per_anchor:
        reach = layout.anchors.amax(0).tolist()
        for k in range(0, layout.count, ANCHORS_PER_CALL):
            stop = layout.length + min(k + ANCHORS_PER_CALL, layout.count) * per_anchor
            start = layout.length + k * per_anchor
            chunks.append(_chunk(layout, window, start, stop, max(reach[k : k + ANCHORS_PER_CALL])))
    return trunk_mask(layout, window), chunks


def _chunk(layout: NestedPrefixLayout, window: int | None, start: int, stop: int, reach: int) -> Chunk:
    slots = torch.arange(start, stop, device=layout.anchors.device)
    trunk = torch.arange(reach, device=slots.device)
    own = slots.view(-1, layout.horizon).repeat_interleave(layout.horizon, 0)  # [Q,G]: the slots of the query's tooth
    keys = torch.cat([trunk.expand(len(slots), -1), own], 1)
    rows = torch.arange(layout.batch, device=slots.device)[:, None, None]
    hidden = ~layout.visible(slots[:, None], keys, row=rows, window=window)  # [B,Q,reach+G]
    partly = hidden[..., :reach].flatten(0, 1).any(0).nonzero()
    seen = int(partly[0]) if len(partly) else reach
    return Chunk(start, stop, reach, seen, hidden[:, None, None, :, seen:])


def chunked_pass(
    layout: NestedPrefixLayout,
    masks: tuple[Tensor | None, list[Chunk]],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rule: ScoreRule,
) -> Tensor:
    """Attention of query [B,H,S,E] over key and value [B,J,S,E], J divides H."""
    on_trunk, chunks = masks
    trunk = attend(*(x[:, :, : layout.length] for x in (query, key, value)), on_trunk, rule)
    if not chunks:
        return trunk
    kind = query.device.type
    if torch.is_autocast_enabled(kind):  # as the fused attention of the trunk does
        query, key, value = (x.to(torch.get_autocast_dtype(kind)) for x in (query, key, value))
    return torch.cat([trunk, _Teeth.apply(query, key, value, rule.sinks, layout.horizon, chunks, rule)], 2)


class _Teeth(torch.autograd.Function):
    """Attention of the teeth, [B,H,S-T,E]; the derivative of the weights is autograd's, a chunk at a time."""

    @staticmethod
    def forward(ctx, query, key, value, sinks, horizon, chunks, rule):
        ctx.save_for_backward(query, key, value)
        ctx.horizon, ctx.chunks, ctx.rule = horizon, chunks, rule
        first = chunks[0].start
        out = query.new_empty(*query.shape[:2], query.shape[2] - first, value.shape[3])
        with torch.autocast(query.device.type, enabled=False):
            for chunk in chunks:
                parts = _inputs(chunk, query, key, horizon)
                weights = _weights(*parts, chunk, rule)
                part = _weighted(weights, *_on_trunk_and_own(chunk, value, horizon))
                out[:, :, chunk.start - first : chunk.stop - first] = part.flatten(1, 2)
        return out

    @staticmethod
    def backward(ctx, gradient):
        query, key, value = ctx.saved_tensors
        horizon, chunks, sinks = ctx.horizon, ctx.chunks, ctx.rule.sinks
        first, heads = chunks[0].start, key.shape[1]
        on_query, on_key, on_value = (torch.zeros_like(x) for x in (query, key, value))
        on_sinks = torch.zeros_like(sinks) if sinks is not None and ctx.needs_input_grad[3] else None
        with torch.autocast(query.device.type, enabled=False):
            for chunk in chunks:
                inputs = [x.detach().requires_grad_() for x in _inputs(chunk, query, key, horizon)]
                grouped = gradient[:, :, chunk.start - first : chunk.stop - first].unflatten(1, (heads, -1))
                with torch.enable_grad():
                    weights = _weights(*inputs, chunk, ctx.rule)
                wanted = inputs if on_sinks is None else [*inputs, sinks]
                trunk_value, own_value = _on_trunk_and_own(chunk, value, horizon)
                slope = _products(grouped, trunk_value, own_value)
                to_query, to_trunk, to_own, *to_sinks = torch.autograd.grad(weights, wanted, slope)
                on_query[:, :, chunk.start : chunk.stop] = to_query.flatten(1, 2)
                on_key[:, :, : chunk.reach] += to_trunk
                on_key[:, :, chunk.start : chunk.stop] = to_own.flatten(2, 3)
                rows = grouped.flatten(2, 3)
                on_value[:, :, : chunk.reach] += weights.detach()[..., : chunk.reach].flatten(2, 3).mT @ rows
                own = _by_tooth(weights.detach()[..., chunk.reach :], horizon).mT @ _by_tooth(grouped, horizon)
                on_value[:, :, chunk.start : chunk.stop] = own.flatten(2, 3)
                if on_sinks is not None:
                    on_sinks += to_sinks[0]
        return on_query, on_key, on_value, on_sinks, None, None, None


def _inputs(chunk: Chunk, query: Tensor, key: Tensor, horizon: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries [B,J,H/J,Q,E] of the chunk, its keys in the trunk [B,J,reach,E] and in the teeth [B,J,Q/G,G,E]."""
    grouped = query[:, :, chunk.start : chunk.stop].unflatten(1, (key.shape[1], -1))
    return (grouped, *_on_trunk_and_own(chunk, key, horizon))


def _on_trunk_and_own(chunk: Chunk, x: Tensor, horizon: int) -> tuple[Tensor, Tensor]:
    """[B,J,S,E] -> what the chunk sees: [B,J,reach,E] of the trunk and [B,J,Q/G,G,E] of its own teeth."""
    return x[:, :, : chunk.reach], x[:, :, chunk.start : chunk.stop].unflatten(2, (-1, horizon))


def _weights(query: Tensor, trunk_key: Tensor, own_key: Tensor, chunk: Chunk, rule: ScoreRule) -> Tensor:
    """Attention weights [B,J,H/J,Q,reach+G]."""
    scores = shape_scores(_products(query, trunk_key, own_key), rule)
    scores[..., chunk.seen :].masked_fill_(chunk.hidden, -torch.inf)
    return softmax(scores, rule, dtype=query.dtype)


def _products(rows: Tensor, trunk: Tensor, own: Tensor) -> Tensor:
    """Inner products of [B,J,H/J,Q,E] with [B,J,reach,E] and with the own tooth's of [B,J,Q/G,G,E]: [...,reach+G]."""
    # the query heads of a key head are folded into its rows: a broadcast product would copy the keys
    on_trunk = (rows.flatten(2, 3) @ trunk.mT).view(*rows.shape[:4], -1)
    on_own = _from_tooth(_by_tooth(rows, own.shape[3]) @ own.mT, rows.shape[2])
    return torch.cat([on_trunk, on_own], -1)


def _weighted(weights: Tensor, trunk: Tensor, own: Tensor) -> Tensor:
    """Weights [B,J,H/J,Q,reach+G] times values [B,J,reach,E] and [B,J,Q/G,G,E]: [B,J,H/J,Q,E]."""
    reach = trunk.shape[2]
    on_trunk = (weights[..., :reach].flatten(2, 3) @ trunk).view(*weights.shape[:4], -1)
    return on_trunk + _from_tooth(_by_tooth(weights[..., reach:], own.shape[3]) @ own, weights.shape[2])


def _by_tooth(x: Tensor, horizon: int) -> Tensor:
    """[B,J,H/J,Q,X] -> [B,J,Q/G,H/J·G,X]: the rows of each tooth together, for all query heads of a key head."""
    return x.unflatten(3, (-1, horizon)).transpose(2, 3).flatten(3, 4)


def _from_tooth(x: Tensor, heads: int) -> Tensor:
    """The inverse of `_by_tooth`."""
    return x.unflatten(3, (heads, -1)).transpose(2, 3).flatten(3, 4)
