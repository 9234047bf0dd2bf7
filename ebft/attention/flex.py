"""The kernel ``flex``: torch's FlexAttention over a BlockMask of the layout's visibility."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, create_block_mask, flex_attention

from ebft.attention.rule import ScoreRule
from ebft.errors import UsageError
from ebft.layout import NestedPrefixLayout


def flex_masks(layout: NestedPrefixLayout, window: int | None, *, block: int = 128) -> BlockMask:
    """The BlockMask of `layout.visible`, [B,1,S,S] in blocks of `block` slots."""

    def visible(row, head, query, key):
        return layout.visible(query, key, row=row, window=window)

    size = layout.size
    return create_block_mask(visible, layout.batch, None, size, size, device=layout.anchors.device, BLOCK_SIZE=block)


def flex_pass(layout, mask: BlockMask, query, key, value, rule: ScoreRule) -> torch.Tensor:
    """Attention of query [B,H,S,E] over key and value [B,J,S,E].

    Raises:
        UsageError: a gradient is wanted on a device other than a GPU, where FlexAttention has none.
    """
    on_gpu = query.device.type == "cuda"
    if not on_gpu and torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value)):
        raise UsageError(
            f"attention kernel 'flex' has no gradient on {query.device.type}: use 'chunked' there, or a GPU"
        )

    cap = rule.softcap

    def capped(score, row, head, query_slot, key_slot):
        return score if cap is None else cap * torch.tanh(score / cap)

    attend = _compiled() if on_gpu else flex_attention
    out, extra = attend(
        query,
        key,
        value,
        score_mod=None if cap is None else capped,
        block_mask=mask,
        scale=rule.scaling,
        enable_gqa=query.shape[1] != key.shape[1],
        return_aux=AuxRequest(lse=True),
    )
    if rule.sinks is None:
        return out
    # a sink adds exp(sink) to the softmax's denominator: out·Z/(Z + exp(sink))
    return out * torch.sigmoid(extra.lse - rule.sinks.to(extra.lse.dtype)[:, None])[..., None].to(out.dtype)


@lru_cache(maxsize=1)
def _compiled():
    """One compiled kernel of our own: that of transformers is compiled anew whenever training mode is switched."""
    return torch.compile(flex_attention, dynamic=False)
