"""The kernel ``chunked``: a few queries per call, against the part of the trunk that they see and their own teeth.

Scores against the trunk are one matrix product per key head, those against the own tooth one small product per tooth,
so none is spent on other teeth. Attention weights live for one call only: backward computes them again, as it does in
fused attention. With weights P = softmax(s), s = scaling·QKᵀ, output O = PV and the gradient dO:
dV = Pᵀ dO, dP = dO Vᵀ, ds = P (dP - Σ P dP), dQ = scaling·ds K, dK = scaling·dsᵀ Q.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ebft.attention.masks import partly_hidden
from ebft.attention.rule import ScoreRule, cap, scaled_products
from ebft.layout import NestedPrefixLayout
from ebft.tuning import PerDevice

# Anchors per call: more read trunk that not all of them see, fewer make more and smaller products.
ANCHORS_PER_CALL = PerDevice(cpu=8, cuda=32)

# Trunk tokens per call, for the same reason.
TOKENS_PER_CALL = PerDevice(cpu=128, cuda=512)


class Chunk(NamedTuple):
    """Q neighbouring slots of the row: tokens of the trunk, or all teeth of a few anchors.

    Attributes:
        start, stop: first slot, last slot + 1.
        reach: none of them sees the trunk from this slot on.
        own: G, tokens of the own tooth; 0 for a part of the trunk.
        seen: trunk slots before this one are visible to all Q, so `hidden` need not tell.
        hidden: [B,1,1,Q,reach-seen+own] bool: which of the trunk from `seen` on, and of the own tooth, is not visible.
    """

    start: int
    stop: int
    reach: int
    own: int
    seen: int
    hidden: Tensor


def chunks_of(layout: NestedPrefixLayout, window: int | None) -> list[Chunk]:
    """All slots of a row, in chunks."""
    length, per_anchor = layout.length, layout.rollouts * layout.horizon
    tokens_at_once, anchors_at_once = (few.on(layout.anchors.device) for few in (TOKENS_PER_CALL, ANCHORS_PER_CALL))
    stops = [(start, min(start + tokens_at_once, length)) for start in range(0, length, tokens_at_once)]
    parts = [(start, stop, stop, 0) for start, stop in stops]  # of `Chunk`: start, stop, reach, own
    anchors = layout.anchors.amax(0).tolist() if per_anchor else []
    for k in range(0, len(anchors), anchors_at_once):
        few = anchors[k : k + anchors_at_once]
        start = length + k * per_anchor
        parts.append((start, start + len(few) * per_anchor, max(few), layout.horizon))
    visible = [_visible(layout, window, *part) for part in parts]
    hidden = partly_hidden(visible, [reach for *_, reach, _ in parts])
    return [Chunk(*part, *found) for part, found in zip(parts, hidden, strict=True)]


def _visible(layout: NestedPrefixLayout, window: int | None, start: int, stop: int, reach: int, own: int) -> Tensor:
    """[B,Q,reach+own] bool: what the slots from `start` to `stop` see of the trunk and of their own tooth."""
    slots = torch.arange(start, stop, device=layout.anchors.device)
    keys = torch.arange(reach, device=slots.device).expand(len(slots), -1)
    if own:
        keys = torch.cat([keys, slots.view(-1, own).repeat_interleave(own, 0)], 1)
    rows = torch.arange(layout.batch, device=slots.device)[:, None, None]
    return layout.visible(slots[:, None], keys, row=rows, window=window)


def chunked_pass(layout, chunks: list[Chunk], query: Tensor, key: Tensor, value: Tensor, rule: ScoreRule) -> Tensor:
    """Attention of query [B,H,S,E] over key and value [B,J,S,E], J divides H."""
    return _Chunked.apply(query, key, value, rule.sinks, chunks, rule)


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, sinks, chunks, rule):
        key, value = key.contiguous(), value.contiguous()
        ctx.save_for_backward(query, key, value)
        ctx.chunks, ctx.rule = chunks, rule
        shape = (query.shape[0], query.shape[2], query.shape[1], value.shape[3])
        out = query.new_empty(shape)  # [B,S,H,E]: what follows wants the heads of a token side by side
        with torch.autocast(query.device.type, enabled=False):
            for chunk in chunks:
                rows = _rows(query, chunk, key.shape[1])
                weights, _ = _weights(rows, key, chunk, rule)
                out[:, chunk.start : chunk.stop] = _from_rows(_weighted(weights, value, chunk), shape)
        return out.transpose(1, 2)

    @staticmethod
    def backward(ctx, gradient):
        query, key, value = ctx.saved_tensors
        rule, heads = ctx.rule, key.shape[1]
        on_query, on_key, on_value = torch.empty_like(query), torch.zeros_like(key), torch.zeros_like(value)
        sinks_wanted = rule.sinks is not None and ctx.needs_input_grad[3]
        on_sinks = torch.zeros_like(rule.sinks) if sinks_wanted else None
        shape = (query.shape[0], query.shape[2], query.shape[1], query.shape[3])
        with torch.autocast(query.device.type, enabled=False):
            for chunk in ctx.chunks:
                rows, slope = _rows(query, chunk, heads), _rows(gradient.to(query.dtype), chunk, heads)
                weights, shaping = _weights(rows, key, chunk, rule)
                _add_transposed(on_value, weights.to(value.dtype), slope, chunk, scaling=1.0)
                on_weights = _products(slope, value, chunk, extra=weights.shape[-1], scaling=1.0)
                on_scores = torch._softmax_backward_data(on_weights.to(weights.dtype), weights, -1, weights.dtype)
                if on_sinks is not None:
                    on_sinks += on_scores[..., -1].view(len(query), query.shape[1], -1).sum((0, 2))
                if shaping is not None:
                    on_scores.mul_(shaping)
                on_scores = on_scores.to(query.dtype)
                part = _weighted(on_scores, key, chunk).mul_(rule.scaling)
                on_query[:, :, chunk.start : chunk.stop] = _from_rows(part, shape).transpose(1, 2)
                _add_transposed(on_key, on_scores, rows, chunk, scaling=rule.scaling)
        return on_query, on_key, on_value, on_sinks, None, None


# Rows are the chunk's queries of all query heads of a key head, [B·J, H/J·Q, E]: a broadcast product would copy keys.


def _rows(x: Tensor, chunk: Chunk, heads: int) -> Tensor:
    """[B,H,S,E] -> rows [B·J, H/J·Q, E] of the chunk."""
    part = x[:, :, chunk.start : chunk.stop]
    return part.reshape(part.shape[0] * heads, -1, part.shape[3])


def _from_rows(rows: Tensor, shape: tuple[int, int, int, int]) -> Tensor:
    """Rows [B·J, H/J·Q, E] -> [B,Q,H,E] for the `shape` [B,S,H,E]."""
    batch, _, heads, size = shape
    return rows.view(batch, heads, -1, size).transpose(1, 2)


def _weights(rows: Tensor, key: Tensor, chunk: Chunk, rule: ScoreRule) -> tuple[Tensor, Tensor | None]:
    """Attention weights of rows [B·J,X,E], in at least float32, and the slope of soft-capping where there is one.

    The weights are [B·J, X, reach+own], and one more for the sink if the layer has sinks.
    """
    extra = chunk.reach + chunk.own + (rule.sinks is not None)
    scores = _products(rows, key, chunk, extra=extra, scaling=rule.scaling)
    scores = cap(scores, rule)
    shaping = None if rule.softcap is None else 1 - (scores / rule.softcap) ** 2
    heads, queries = key.shape[1], chunk.stop - chunk.start
    grouped = scores.view(-1, heads, scores.shape[1] // queries, queries, extra)  # [B,J,H/J,Q,...]
    grouped[..., chunk.seen : chunk.reach + chunk.own].masked_fill_(chunk.hidden, -torch.inf)
    if rule.sinks is not None:
        grouped[..., -1] = rule.sinks.to(scores.dtype).view(1, heads, -1, 1)
    return scores.softmax(-1), shaping


def _products(rows: Tensor, keys: Tensor, chunk: Chunk, *, extra: int, scaling: float) -> Tensor:
    """scaling · inner products of rows [B·J,X,E] with what they see of keys [B,J,S,E], in a tensor of width `extra`.

    Columns: the trunk before `reach`, the own tooth, zeros.
    """
    reach, own = chunk.reach, chunk.own
    products = rows.new_empty(*rows.shape[:2], extra)
    flat = keys.flatten(0, 1)
    scaled_products(rows, flat[:, :reach], scaling, out=products[..., :reach])
    if own:
        teeth = flat[:, chunk.start : chunk.stop].unflatten(1, (-1, own))  # [B·J,Q/G,G,E]
        inner = _by_tooth(rows, chunk) @ teeth.mT
        products[..., reach : reach + own] = _from_tooth(inner.mul_(scaling), chunk)
    products[..., reach + own :] = 0
    return products


def _weighted(weights: Tensor, values: Tensor, chunk: Chunk) -> Tensor:
    """Weights [B·J,X,reach+own,...] times what the rows see of values [B,J,S,E]: [B·J,X,E]."""
    reach, own, flat = chunk.reach, chunk.own, values.flatten(0, 1)
    weights = weights.to(values.dtype)
    out = weights[..., :reach] @ flat[:, :reach]
    if own:
        teeth = flat[:, chunk.start : chunk.stop].unflatten(1, (-1, own))
        out += _from_tooth(_by_tooth(weights[..., reach : reach + own], chunk) @ teeth, chunk)
    return out


def _add_transposed(total: Tensor, weights: Tensor, rows: Tensor, chunk: Chunk, *, scaling: float) -> None:
    """Add scaling · weightsᵀ [B·J,reach+own,X] · rows [B·J,X,E] to what the rows see of total [B,J,S,E]."""
    reach, own, flat = chunk.reach, chunk.own, total.view(-1, *total.shape[2:])
    flat[:, :reach].baddbmm_(weights[..., :reach].mT, rows, alpha=scaling)
    if own:
        inner = _by_tooth(weights[..., reach : reach + own], chunk).mT @ _by_tooth(rows, chunk)
        flat[:, chunk.start : chunk.stop].add_(inner.flatten(1, 2), alpha=scaling)


def _by_tooth(x: Tensor, chunk: Chunk) -> Tensor:
    """Rows [B·J, H/J·Q, X] -> [B·J, Q/G, H/J·G, X]: those of each tooth together."""
    teeth = (chunk.stop - chunk.start) // chunk.own
    return x.unflatten(1, (-1, teeth, chunk.own)).transpose(1, 2).flatten(2, 3)


def _from_tooth(x: Tensor, chunk: Chunk) -> Tensor:
    """The inverse of `_by_tooth`."""
    return x.unflatten(2, (-1, chunk.own)).transpose(1, 2).flatten(1, 3)
