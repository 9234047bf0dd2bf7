"""The kernel ``chunked``: a few queries per call, against the part of the trunk that they see and their own teeth.

Where fused attention serves, it does most of it (`ebft.attention.fused_comb`). Elsewhere: scores against the trunk are
one matrix product per key head, those against the own tooth one small product per tooth, so none is spent on other
teeth. Attention weights live for one call only: backward computes them again, as it does in fused attention. With
weights P = softmax(s), s = scaling·QKᵀ, output O = PV and the gradient dO: dV = Pᵀ dO, dP = dO Vᵀ,
ds = P (dP - Σ P dP), dQ = scaling·ds K, dK = scaling·dsᵀ Q.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ebft.attention import fused
from ebft.attention.chunks import Chunk
from ebft.attention.fused_comb import fused_pass
from ebft.attention.rule import ScoreRule, cap, scaled_products


def chunked_pass(layout, chunks: list[Chunk], query: Tensor, key: Tensor, value: Tensor, rule: ScoreRule) -> Tensor:
    """Attention of query [B,H,S,E] over key and value [B,J,S,E], J divides H."""
    if fused.serves(query, value, rule):
        return fused_pass(chunks, query, key, value, rule)
    return _Chunked.apply(query, key, value, rule.sinks, chunks, rule)


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, sinks, chunks, rule):
        key, value = key.contiguous(), value.contiguous()
        ctx.save_for_backward(query, key, value)
        ctx.chunks, ctx.rule = chunks, rule
        # [B,S,H,E]: what follows wants the heads of a token side by side
        out = query.new_empty(query.shape[0], query.shape[2], query.shape[1], value.shape[3])
        with torch.autocast(query.device.type, enabled=False):
            for chunk in chunks:
                keys, values = (_of_rows(x, chunk) for x in (key, value))
                weights, _ = _weights(_rows(query, chunk, key.shape[1]), keys, chunk, rule)
                found = _weighted(weights, values, chunk)
                out[chunk.rows, chunk.start : chunk.stop] = _from_rows(found, chunk, query.shape[1])
        return out.transpose(1, 2)

    @staticmethod
    def backward(ctx, gradient):
        query, key, value = ctx.saved_tensors
        rule, heads = ctx.rule, key.shape[1]
        on_query, on_key, on_value = torch.empty_like(query), torch.zeros_like(key), torch.zeros_like(value)
        sinks_wanted = rule.sinks is not None and ctx.needs_input_grad[3]
        on_sinks = torch.zeros_like(rule.sinks) if sinks_wanted else None
        with torch.autocast(query.device.type, enabled=False):
            for chunk in ctx.chunks:
                rows, slope = _rows(query, chunk, heads), _rows(gradient.to(query.dtype), chunk, heads)
                keys, values, on_keys, on_values = (_of_rows(x, chunk) for x in (key, value, on_key, on_value))
                weights, shaping = _weights(rows, keys, chunk, rule)
                _add_transposed(on_values, weights.to(value.dtype), slope, chunk, scaling=1.0)
                on_weights = _products(slope, values, chunk, extra=weights.shape[-1], scaling=1.0)
                on_scores = torch._softmax_backward_data(on_weights.to(weights.dtype), weights, -1, weights.dtype)
                if on_sinks is not None:
                    on_sinks += on_scores[..., -1].view(len(chunk.hidden), query.shape[1], -1).sum((0, 2))
                if shaping is not None:
                    on_scores.mul_(shaping)
                on_scores = on_scores.to(query.dtype)
                found = _from_rows(_weighted(on_scores, keys, chunk).mul_(rule.scaling), chunk, query.shape[1])
                on_query[chunk.rows, :, chunk.start : chunk.stop] = found.transpose(1, 2)
                _add_transposed(on_keys, on_scores, rows, chunk, scaling=rule.scaling)
        return on_query, on_key, on_value, on_sinks, None, None


# Rows are the chunk's queries of all query heads of a key head, [b·J, H/J·Q, E]: a broadcast product would copy keys.


def _rows(x: Tensor, chunk: Chunk, heads: int) -> Tensor:
    """[B,H,S,E] -> rows [b·J, H/J·Q, E] of the chunk."""
    part = x[chunk.rows, :, chunk.start : chunk.stop]
    return part.reshape(part.shape[0] * heads, -1, part.shape[3])


def _from_rows(rows: Tensor, chunk: Chunk, heads: int) -> Tensor:
    """Rows [b·J, H/J·Q, E] -> [b,Q,H,E]."""
    return rows.view(-1, heads, chunk.stop - chunk.start, rows.shape[2]).transpose(1, 2)


def _of_rows(x: Tensor, chunk: Chunk) -> Tensor:
    """Keys or values [B,J,S,E] -> a view [b·J,S,E] of those of the chunk's rows of the batch."""
    return x[chunk.rows].flatten(0, 1)


def _weights(rows: Tensor, keys: Tensor, chunk: Chunk, rule: ScoreRule) -> tuple[Tensor, Tensor | None]:
    """Attention weights of rows [b·J,X,E], in at least float32, and the slope of soft-capping where there is one.

    The weights are [b·J, X, reach-begin+own], and one more for the sink if the layer has sinks.
    """
    width = chunk.reach - chunk.begin + chunk.own
    scores = _products(rows, keys, chunk, extra=width + (rule.sinks is not None), scaling=rule.scaling)
    scores = cap(scores, rule)
    shaping = None if rule.softcap is None else 1 - (scores / rule.softcap) ** 2
    queries = chunk.stop - chunk.start
    grouped = scores.view(len(chunk.hidden), -1, scores.shape[1] // queries, queries, scores.shape[2])  # [b,J,H/J,Q,…]
    grouped[..., chunk.seen - chunk.begin : width].masked_fill_(chunk.hidden, -torch.inf)
    if rule.sinks is not None:
        grouped[..., -1] = rule.sinks.to(scores.dtype).view(1, *grouped.shape[1:3], 1)
    return scores.softmax(-1), shaping


def _products(rows: Tensor, keys: Tensor, chunk: Chunk, *, extra: int, scaling: float) -> Tensor:
    """scaling · inner products of rows [b·J,X,E] with what they see of keys [b·J,S,E], in a tensor of width `extra`.

    Columns: the trunk from `begin` to `reach`, the own tooth, zeros.
    """
    own, trunk = chunk.own, chunk.reach - chunk.begin
    products = rows.new_empty(*rows.shape[:2], extra)
    scaled_products(rows, keys[:, chunk.begin : chunk.reach], scaling, out=products[..., :trunk])
    if own:
        teeth = keys[:, chunk.start : chunk.stop].unflatten(1, (-1, own))  # [b·J,Q/G,G,E]
        inner = _by_tooth(rows, chunk) @ teeth.mT
        products[..., trunk : trunk + own] = _from_tooth(inner.mul_(scaling), chunk)
    products[..., trunk + own :] = 0
    return products


def _weighted(weights: Tensor, values: Tensor, chunk: Chunk) -> Tensor:
    """Weights [b·J,X,reach-begin+own,...] times what the rows see of values [b·J,S,E]: [b·J,X,E]."""
    own, trunk = chunk.own, chunk.reach - chunk.begin
    weights = weights.to(values.dtype)
    out = weights[..., :trunk] @ values[:, chunk.begin : chunk.reach]
    if own:
        teeth = values[:, chunk.start : chunk.stop].unflatten(1, (-1, own))
        out += _from_tooth(_by_tooth(weights[..., trunk : trunk + own], chunk) @ teeth, chunk)
    return out


def _add_transposed(total: Tensor, weights: Tensor, rows: Tensor, chunk: Chunk, *, scaling: float) -> None:
    """Add scaling · weightsᵀ [b·J,reach-begin+own,X] · rows [b·J,X,E] to what the rows see of total [b·J,S,E]."""
    own, trunk = chunk.own, chunk.reach - chunk.begin
    total[:, chunk.begin : chunk.reach].baddbmm_(weights[..., :trunk].mT, rows, alpha=scaling)
    if own:
        inner = _by_tooth(weights[..., trunk : trunk + own], chunk).mT @ _by_tooth(rows, chunk)
        total[:, chunk.start : chunk.stop].add_(inner.flatten(1, 2), alpha=scaling)


def _by_tooth(x: Tensor, chunk: Chunk) -> Tensor:
    """Rows [B·J, H/J·Q, X] -> [B·J, Q/G, H/J·G, X]: those of each tooth together."""
    teeth = (chunk.stop - chunk.start) // chunk.own
    return x.unflatten(1, (-1, teeth, chunk.own)).transpose(1, 2).flatten(2, 3)


def _from_tooth(x: Tensor, chunk: Chunk) -> Tensor:
    """The inverse of `_by_tooth`."""
    return x.unflatten(2, (-1, chunk.own)).transpose(1, 2).flatten(1, 3)
