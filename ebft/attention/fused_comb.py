"""The kernel ``chunked`` where fused attention serves: the trunk by it, own teeth by small products.

Fused attention computes what the queries of a chunk see of the trunk; what they see of their own tooth is added as
softmax adds: with Z = Σ exp(s) over all keys, s = scaling·q·k, O = Σ_part O_part·Z_part/Z. Backward computes weights
again, P = exp(s)/Z, and with the output O and its gradient dO: dV = Pᵀ dO, ds = P (dO Vᵀ - dO·O), dQ = scaling·ds K,
dK = scaling·dsᵀ Q; of the trunk fused attention does it, given O and log Z.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ebft.attention import fused
from ebft.attention.chunks import Chunk
from ebft.attention.rule import ScoreRule


def fused_pass(chunks: Sequence[Chunk], query: Tensor, key: Tensor, value: Tensor, rule: ScoreRule) -> Tensor:
    """Attention of query [B,H,S,E] over key and value [B,J,S,E], J divides H."""
    return _FusedComb.apply(query, key, value, rule.sinks, chunks, rule)


class _FusedComb(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, sinks, chunks, rule):
        key, value = key.contiguous(), value.contiguous()
        # [B,S,H,E]: what follows wants the heads of a token side by side
        out = query.new_empty(query.shape[0], query.shape[2], query.shape[1], query.shape[3]).transpose(1, 2)
        normalizer = query.new_empty(query.shape[:3], dtype=torch.promote_types(query.dtype, torch.float32))
        with torch.autocast(query.device.type, enabled=False):
            for chunk, row in _rows(chunks, len(query)):
                found, of_it = _attend(_part(query, row, chunk, key), key[row], value[row], chunk, row, rule)
                _part(out, row, chunk, key).copy_(found)
                _part(normalizer, row, chunk, key).copy_(of_it)
        ctx.save_for_backward(query, key, value, out, normalizer)
        ctx.chunks, ctx.rule = chunks, rule
        return out

    @staticmethod
    def backward(ctx, gradient):
        query, key, value, out, normalizer = ctx.saved_tensors
        rule = ctx.rule
        on_query, on_key, on_value = torch.empty_like(query), torch.zeros_like(key), torch.zeros_like(value)
        on_sinks = torch.zeros_like(rule.sinks) if rule.sinks is not None and ctx.needs_input_grad[3] else None
        gradient = gradient.to(query.dtype)
        with torch.autocast(query.device.type, enabled=False):
            for chunk, row in _rows(ctx.chunks, len(query)):
                slope, own, attended, of_it = (_part(x, row, chunk, key) for x in (gradient, query, out, normalizer))
                pull = None  # dO·O, [J,R,Q]: fused attention computes its own
                if chunk.own or on_sinks is not None:
                    pull = (slope * attended).sum(-1, dtype=normalizer.dtype)
                found = _attend_backward(
                    slope, own, key[row], value[row], attended, of_it, pull, chunk, row, rule,
                    on_key=on_key[row], on_value=on_value[row],
                )  # fmt: skip
                _part(on_query, row, chunk, key).copy_(found)
                if on_sinks is not None:
                    assert pull is not None
                    share = (_sinks(rule, of_it) - of_it).exp_()
                    on_sinks -= (share * pull).sum(-1).flatten()
        return on_query, on_key, on_value, on_sinks, None, None


def _rows(chunks: Sequence[Chunk], batch: int) -> Iterator[tuple[Chunk, int]]:
    """Every chunk with each of its rows of the batch: the heads of a key head are a dimension of their own here."""
    return ((chunk, row) for chunk in chunks for row in range(*chunk.rows.indices(batch)))


def _part(x: Tensor, row: int, chunk: Chunk, key: Tensor) -> Tensor:
    """[B,H,S,...] -> a view [J,H/J,Q,...] of the chunk's queries in a row."""
    return x[row, :, chunk.start : chunk.stop].unflatten(0, (key.shape[1], -1))


def _attend(
    query: Tensor, key: Tensor, value: Tensor, chunk: Chunk, row: int, rule: ScoreRule
) -> tuple[Tensor, Tensor]:
    """Output [J,R,Q,E] and log Z [J,R,Q] of query [J,R,Q,E] over key and value [J,S,E] of its row."""
    seen = slice(chunk.begin, chunk.reach)
    out, normalizer = fused.forward(query, key[:, seen], value[:, seen], rule.scaling, bias=chunk.bias(row))
    if rule.sinks is not None:
        total = torch.logaddexp(normalizer, _sinks(rule, normalizer))
        out, normalizer = out * (normalizer - total).exp_()[..., None], total
    if not chunk.own:
        return out, normalizer
    teeth = slice(chunk.start, chunk.stop)
    scores = _own_scores(query, key[:, teeth], chunk, row, rule)
    total = torch.logaddexp(normalizer, _regroup(scores.logsumexp(-1), chunk))
    weights = scores.sub_(_regroup(total, chunk)[..., None]).exp_().to(value.dtype)
    own = _regroup(weights @ value[:, teeth].unflatten(1, (-1, chunk.own)), chunk)
    return out * (normalizer - total).exp_()[..., None] + own, total


def _attend_backward(
    slope: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    normalizer: Tensor,
    pull: Tensor | None,
    chunk: Chunk,
    row: int,
    rule: ScoreRule,
    *,
    on_key: Tensor,
    on_value: Tensor,
) -> Tensor:
    """The gradient of query [J,R,Q,E].

    Args:
        slope: gradient dO of `out`, [J,R,Q,E]; normalizer: log Z [J,R,Q]; pull: dO·O [J,R,Q], for queries with a tooth.
        query, key, value, chunk, row, rule: as in `_attend`.
        on_key, on_value: [J,S,E], what the gradients of key and value are added to.
    """
    seen = slice(chunk.begin, chunk.reach)
    found, on_seen_key, on_seen_value = fused.backward(
        slope, query, key[:, seen], value[:, seen], out, normalizer, rule.scaling, bias=chunk.bias(row)
    )
    on_key[:, seen] += on_seen_key
    on_value[:, seen] += on_seen_value
    if not chunk.own:
        return found
    assert pull is not None
    teeth = slice(chunk.start, chunk.stop)
    own_key, own_value = (x[:, teeth].unflatten(1, (-1, chunk.own)) for x in (key, value))
    rows, slopes = _regroup(query, chunk), _regroup(slope, chunk)
    weights = _own_scores(query, key[:, teeth], chunk, row, rule).sub_(_regroup(normalizer, chunk)[..., None]).exp_()
    on_scores = ((slopes @ own_value.mT) - _regroup(pull, chunk)[..., None]).mul_(weights).to(query.dtype)
    on_value[:, teeth] += (weights.to(value.dtype).mT @ slopes).flatten(1, 2)
    on_key[:, teeth] += (on_scores.mT @ rows).flatten(1, 2).mul_(rule.scaling)
    return found + _regroup((on_scores @ own_key).mul_(rule.scaling), chunk)


def _own_scores(query: Tensor, key: Tensor, chunk: Chunk, row: int, rule: ScoreRule) -> Tensor:
    """Scores [J,Q/G,R·G,G] of query [J,R,Q,E] against the own teeth of key [J,Q,E], in at least float32."""
    scores = _regroup(query, chunk) @ key.unflatten(1, (-1, chunk.own)).mT
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32)).mul_(rule.scaling)
    by_head = scores.unflatten(2, (-1, chunk.own))  # [J,Q/G,R,G,G]
    return by_head.masked_fill_(chunk.own_hidden(row)[None, :, None], -torch.inf).flatten(2, 3)


def _regroup(x: Tensor, chunk: Chunk) -> Tensor:
    """[J,R,Q,...] -> [J,Q/G,R·G,...], the queries of each tooth together; and back: it is its own inverse."""
    return x.unflatten(2, (-1, chunk.own)).transpose(1, 2).flatten(2, 3)


def _sinks(rule: ScoreRule, like: Tensor) -> Tensor:
    """The layer's sinks [H] as [J,R,1], for normalizers `like` [J,R,Q]."""
    assert rule.sinks is not None
    return rule.sinks.to(like.dtype).view(*like.shape[:2], 1)
