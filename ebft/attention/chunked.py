"""The kernel ``chunked``: a few queries per call, against the part of the trunk that they see and their own teeth.

Trunk that all queries of a call see goes to fused attention where that tells its normalizer (`ebft.attention.fused`).
What remains is one matrix product per key head for the rest of the trunk and one small product per tooth for the own
tooth; none is spent on other teeth. With Z = Σ exp(s) over all keys, s = scaling·q·k, the parts add up as they do in
softmax: O = Σ_part O_part·Z_part/Z. Attention weights live for one call only: backward computes them again. With
weights P = exp(s)/Z, the output O and its gradient dO: dV = Pᵀ dO, dP = dO Vᵀ, ds = P (dP - dO·O), dQ = scaling·ds K,
dK = scaling·dsᵀ Q.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ebft.attention import fused
from ebft.attention.chunks import Chunk
from ebft.attention.rule import ScoreRule, cap, scaled_products


def chunked_pass(layout, chunks: list[Chunk], query: Tensor, key: Tensor, value: Tensor, rule: ScoreRule) -> Tensor:
    """Attention of query [B,H,S,E] over key and value [B,J,S,E], J divides H."""
    return _Chunked.apply(query, key, value, rule.sinks, chunks, rule)


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, sinks, chunks, rule):
        key, value = key.contiguous(), value.contiguous()
        # [B,S,H,E]: what follows wants the heads of a token side by side
        out = query.new_empty(query.shape[0], query.shape[2], query.shape[1], value.shape[3])
        normalizer = query.new_empty(query.shape[:3], dtype=torch.promote_types(query.dtype, torch.float32))
        with torch.autocast(query.device.type, enabled=False):
            for chunk in chunks:
                keys, values = (x[chunk.rows].flatten(0, 1) for x in (key, value))
                found, of_it = _attend(_rows(query, chunk, key.shape[1]), keys, values, chunk, rule)
                out[chunk.rows, chunk.start : chunk.stop] = _from_rows(found, chunk, query.shape[1])
                of_it = _from_rows(of_it[..., None], chunk, query.shape[1])[..., 0]
                normalizer[chunk.rows, :, chunk.start : chunk.stop] = of_it.transpose(1, 2)
        ctx.save_for_backward(query, key, value, out, normalizer)
        ctx.chunks, ctx.rule = chunks, rule
        return out.transpose(1, 2)

    @staticmethod
    def backward(ctx, gradient):
        query, key, value, out, normalizer = ctx.saved_tensors
        rule, heads = ctx.rule, key.shape[1]
        on_query, on_key, on_value = torch.empty_like(query), torch.zeros_like(key), torch.zeros_like(value)
        sinks_wanted = rule.sinks is not None and ctx.needs_input_grad[3]
        on_sinks = torch.zeros_like(rule.sinks) if sinks_wanted else None
        gradient = gradient.to(query.dtype)
        with torch.autocast(query.device.type, enabled=False):
            for chunk in ctx.chunks:
                keys, values, on_keys, on_values = (x[chunk.rows].flatten(0, 1) for x in (key, value, on_key, on_value))
                rows, slope, attended, of_it = (
                    _rows(x, chunk, heads) for x in (query, gradient, out.transpose(1, 2), normalizer[..., None])
                )
                found, of_sinks = _attend_backward(
                    slope, rows, keys, values, attended, of_it, chunk, rule, on_keys=on_keys, on_values=on_values
                )
                on_query[chunk.rows, :, chunk.start : chunk.stop] = _from_rows(found, chunk, query.shape[1]).transpose(
                    1, 2
                )
                if on_sinks is not None:
                    on_sinks += of_sinks.view(len(query[chunk.rows]), query.shape[1], -1).sum((0, 2))
        return on_query, on_key, on_value, on_sinks, None, None


def _rest(rows: Tensor, values: Tensor, chunk: Chunk, rule: ScoreRule) -> int:
    """The trunk slot from which on fused attention does not serve."""
    return chunk.seen if fused.serves(rows, values, rule) else chunk.begin


def _attend(rows: Tensor, keys: Tensor, values: Tensor, chunk: Chunk, rule: ScoreRule) -> tuple[Tensor, Tensor]:
    """Output [b·J,X,E] and log Z [b·J,X] of rows [b·J,X,E] over keys and values [b·J,S,E]."""
    rest = _rest(rows, values, chunk, rule)
    scores, _ = _scores(rows, keys, chunk, rest, rule)
    normalizer = scores.logsumexp(-1)
    if rest == chunk.begin:
        return _weighted(scores.sub_(normalizer[..., None]).exp_(), values, chunk, rest), normalizer
    seen = slice(chunk.begin, rest)
    part, of_part = fused.forward(_by_head(rows, chunk), keys[:, seen], values[:, seen], rule.scaling)
    part, of_part = part.flatten(1, 2), of_part.flatten(1, 2)
    normalizer = torch.logaddexp(normalizer, of_part)
    out = _weighted(scores.sub_(normalizer[..., None]).exp_(), values, chunk, rest)
    return part * (of_part - normalizer).exp_()[..., None] + out, normalizer


def _attend_backward(
    slope: Tensor,
    rows: Tensor,
    keys: Tensor,
    values: Tensor,
    out: Tensor,
    normalizer: Tensor,
    chunk: Chunk,
    rule: ScoreRule,
    *,
    on_keys: Tensor,
    on_values: Tensor,
) -> tuple[Tensor, Tensor]:
    """Gradients of rows [b·J,X,E] and of the scores of their sinks [b·J,X], zeros without any.

    Args:
        slope: gradient of `out`, [b·J,X,E]; normalizer: log Z [b·J,X,1]; the others as in `_attend`.
        on_keys, on_values: what the gradients of keys and values are added to.
    """
    rest = _rest(rows, values, chunk, rule)
    scores, shaping = _scores(rows, keys, chunk, rest, rule)
    weights = scores.sub_(normalizer).exp_()
    _add_transposed(on_values, weights.to(values.dtype), slope, chunk, rest, scaling=1.0)
    on_scores = _products(slope, values, chunk, rest, extra=weights.shape[-1], scaling=1.0).to(weights.dtype)
    on_scores.sub_((slope * out).sum(-1, keepdim=True, dtype=weights.dtype)).mul_(weights)
    of_sinks = on_scores[..., -1].clone() if rule.sinks is not None else on_scores.new_zeros(())
    if shaping is not None:
        on_scores.mul_(shaping)
    on_scores = on_scores.to(rows.dtype)
    found = _weighted(on_scores, keys, chunk, rest).mul_(rule.scaling)
    _add_transposed(on_keys, on_scores, rows, chunk, rest, scaling=rule.scaling)
    if rest > chunk.begin:
        seen = slice(chunk.begin, rest)
        by_head = (_by_head(x, chunk) for x in (slope, rows))
        of_out = _by_head(out, chunk), _by_head(normalizer, chunk)[..., 0]
        of_rows, of_keys, of_values = fused.backward(*by_head, keys[:, seen], values[:, seen], *of_out, rule.scaling)
        found += of_rows.flatten(1, 2)
        on_keys[:, seen] += of_keys
        on_values[:, seen] += of_values
    return found, of_sinks


# Rows are the chunk's queries of all query heads of a key head, [b·J, H/J·Q, E]: a broadcast product would copy keys.


def _rows(x: Tensor, chunk: Chunk, heads: int) -> Tensor:
    """[B,H,S,E] -> rows [b·J, H/J·Q, E] of the chunk."""
    part = x[chunk.rows, :, chunk.start : chunk.stop]
    return part.reshape(part.shape[0] * heads, -1, part.shape[3])


def _by_head(rows: Tensor, chunk: Chunk) -> Tensor:
    """Rows [b·J, H/J·Q, E] -> [b·J, H/J, Q, E]."""
    return rows.unflatten(1, (-1, chunk.stop - chunk.start))


def _from_rows(rows: Tensor, chunk: Chunk, heads: int) -> Tensor:
    """Rows [b·J, H/J·Q, E] -> [b,Q,H,E]."""
    return rows.view(-1, heads, chunk.stop - chunk.start, rows.shape[2]).transpose(1, 2)


def _scores(rows: Tensor, keys: Tensor, chunk: Chunk, rest: int, rule: ScoreRule) -> tuple[Tensor, Tensor | None]:
    """Scores of rows [b·J,X,E], in at least float32, and the slope of soft-capping where there is one.

    They are [b·J, X, reach-rest+own], and one more for the sink if the layer has sinks; -inf where hidden.
    """
    width = chunk.reach - rest + chunk.own
    scores = _products(rows, keys, chunk, rest, extra=width + (rule.sinks is not None), scaling=rule.scaling)
    scores = cap(scores, rule)
    shaping = None if rule.softcap is None else 1 - (scores / rule.softcap) ** 2
    queries = chunk.stop - chunk.start
    grouped = scores.view(len(chunk.hidden), -1, scores.shape[1] // queries, queries, scores.shape[2])  # [b,J,H/J,Q,…]
    grouped[..., chunk.seen - rest : width].masked_fill_(chunk.hidden, -torch.inf)
    if rule.sinks is not None:
        grouped[..., -1] = rule.sinks.to(scores.dtype).view(1, *grouped.shape[1:3], 1)
    return scores, shaping


def _products(rows: Tensor, keys: Tensor, chunk: Chunk, rest: int, *, extra: int, scaling: float) -> Tensor:
    """scaling · inner products of rows [b·J,X,E] with the rest of keys [b·J,S,E], in a tensor of width `extra`.

    Columns: the trunk from `rest` to `reach`, the own tooth, zeros.
    """
    own, trunk = chunk.own, chunk.reach - rest
    products = rows.new_empty(*rows.shape[:2], extra)
    scaled_products(rows, keys[:, rest : chunk.reach], scaling, out=products[..., :trunk])
    if own:
        teeth = keys[:, chunk.start : chunk.stop].unflatten(1, (-1, own))  # [b·J,Q/G,G,E]
        inner = _by_tooth(rows, chunk) @ teeth.mT
        products[..., trunk : trunk + own] = _from_tooth(inner.mul_(scaling), chunk)
    products[..., trunk + own :] = 0
    return products


def _weighted(weights: Tensor, values: Tensor, chunk: Chunk, rest: int) -> Tensor:
    """Weights [b·J,X,reach-rest+own,...] times the rest of values [b·J,S,E]: [b·J,X,E]."""
    own, trunk = chunk.own, chunk.reach - rest
    weights = weights.to(values.dtype)
    out = weights[..., :trunk] @ values[:, rest : chunk.reach]
    if own:
        teeth = values[:, chunk.start : chunk.stop].unflatten(1, (-1, own))
        out += _from_tooth(_by_tooth(weights[..., trunk : trunk + own], chunk) @ teeth, chunk)
    return out


def _add_transposed(total: Tensor, weights: Tensor, rows: Tensor, chunk: Chunk, rest: int, *, scaling: float) -> None:
    """Add scaling · weightsᵀ [b·J,reach-rest+own,X] · rows [b·J,X,E] to the rest of total [b·J,S,E]."""
    own, trunk = chunk.own, chunk.reach - rest
    total[:, rest : chunk.reach].baddbmm_(weights[..., :trunk].mT, rows, alpha=scaling)
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
