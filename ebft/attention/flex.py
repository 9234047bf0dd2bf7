"""The kernel ``flex``: torch's FlexAttention over a BlockMask of the layout's visibility."""

from __future__ import annotations

from functools import lru_cache

import torch
import torch._dynamo
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, create_block_mask, flex_attention
from torch.nn.functional import pad

from ebft.attention.rule import ScoreRule
from ebft.errors import UsageError
from ebft.layout import NestedPrefixLayout

# Scoring, its reference and embedding, each for a few sizes, with and without a sliding window.
_GRAPHS = 48


def bucketed(size: int, *, least: int = 128) -> int:
    """The next of few sizes, at most an eighth above: what is compiled for one of them serves all rows up to it."""
    step = max(least, 1 << max(0, size.bit_length() - 4))
    return -(-size // step) * step


def flex_masks(
    layout: NestedPrefixLayout, window: int | None, *, block: int = 128, size: int | None = None
) -> BlockMask:
    """The BlockMask of `layout.visible`, [B,1,S,S] in blocks of `block` slots.

    S is `size`, or `bucketed` of the row's own: slots behind the row see themselves alone.
    """
    size = bucketed(layout.size) if size is None else size
    padded = layout.padded(size)

    def visible(row, head, query, key):
        return padded.visible(query, key, row=row, window=window)

    def mask_of(number: int) -> BlockMask:
        def visible_there(row, head, query, key):
            return visible(row + number, head, query, key)

        return create_block_mask(visible_there, 1, None, size, size, device=layout.anchors.device, BLOCK_SIZE=block)

    # a row at a time: torch fills in all of its [S,S] before it looks at the blocks
    rows = [mask_of(number) for number in range(layout.batch)]
    names = ("kv_num_blocks", "kv_indices", "full_kv_num_blocks", "full_kv_indices")
    numbers, places, full_numbers, full_places = (torch.cat([getattr(row, name) for row in rows]) for name in names)
    return BlockMask.from_kv_blocks(
        numbers, places, full_numbers, full_places, BLOCK_SIZE=block, mask_mod=visible, seq_lengths=(size, size)
    )


def flex_pass(layout, mask: BlockMask, query, key, value, rule: ScoreRule) -> torch.Tensor:
    """Attention of query [B,H,S,E] over key and value [B,J,S,E].

    Raises:
        UsageError: a gradient is wanted on a device other than a GPU, where FlexAttention has none; or there are more
            than `_GRAPHS` sizes. Where the compiler gives up torch's own error stands. Otherwise the same would be
            computed in silence by what holds all of [S,S] at once.
    """
    on_gpu = query.device.type == "cuda"
    if not on_gpu and torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value)):
        raise UsageError(
            f"attention kernel 'flex' has no gradient on {query.device.type}: use 'chunked' there, or a GPU"
        )

    cap = rule.softcap

    def capped(score, row, head, query_slot, key_slot):
        return score if cap is None else cap * torch.tanh(score / cap)

    size = query.shape[2]
    query, key, value = (pad(x, (0, 0, 0, mask.seq_lengths[0] - size)) for x in (query, key, value))
    attend = _compiled() if on_gpu else flex_attention
    try:
        with torch._dynamo.config.patch(recompile_limit=_GRAPHS):
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
    except torch._dynamo.exc.FailOnRecompileLimitHit as error:
        raise UsageError(
            f"attention kernel 'flex': {tuple(query.shape)} would have it compiled for more than {_GRAPHS} shapes."
            " Use 'chunked', or rows of fewer lengths and numbers"
        ) from error
    out, lse = out[:, :, :size], extra.lse[:, :, :size]
    if rule.sinks is None:
        return out
    # a sink adds exp(sink) to the softmax's denominator: out·Z/(Z + exp(sink))
    return out * torch.sigmoid(lse - rule.sinks.to(lse.dtype)[:, None])[..., None].to(out.dtype)


@lru_cache(maxsize=1)
def _compiled(backend: str = "inductor"):
    """One compiled kernel of our own: that of transformers is compiled anew whenever training mode is switched.

    A whole graph: where that cannot be had, or no longer, it raises.
    """
    return torch.compile(flex_attention, dynamic=False, fullgraph=True, backend=backend)
