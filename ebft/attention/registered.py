"""The function that transformers calls in every attention layer."""

from __future__ import annotations

from collections.abc import Callable

import torch
from transformers import AttentionInterface

from ebft.attention.rule import ScoreRule
from ebft.errors import UsageError

NAME = "ebft"

# A comb maps (layer, query [B,H,S,E], key [B,J,S,E], value [B,J,S,E], rule) to [B,H,S,E]; J divides H.
Comb = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor, ScoreRule], torch.Tensor]

# What models pass along that does not change the result of attention without dropout.
_HARMLESS = {
    "dropout",
    "is_causal",
    "position_ids",
    "use_cache",
    "output_attentions",
    "past_key_values",
    "cache_position",
}


def _attention(module, query, key, value, attention_mask, *, comb: Comb | None = None, scaling=None, **options):
    if comb is None:
        raise RuntimeError(
            "this model's attention is driven by ebft.CausalPolicy; for a plain forward pass use `with policy.plain():`"
        )
    if attention_mask is not None:
        raise RuntimeError("a comb forward got an attention mask as well; the layout alone decides what is visible")
    rule = ScoreRule(
        scaling=query.shape[-1] ** -0.5 if scaling is None else scaling,
        window=options.pop("sliding_window", None),
        softcap=options.pop("softcap", None),
        sinks=options.pop("s_aux", None),
    )
    unknown = {name for name, value in options.items() if value is not None} - _HARMLESS
    if unknown:
        raise UsageError(
            f"{type(module).__name__} passes {sorted(unknown)} to its attention, which no kernel here serves"
        )
    query, key, value = rounded(query, key, value)
    return comb(module.layer_idx, query, key, value, rule).transpose(1, 2).contiguous(), None


def rounded(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """In the dtype in which the surrounding autocast computes, as fused attention takes them.

    Rotary positions give queries and keys the dtype of the weights. Sampling keeps keys, and a kernel may make products
    that autocast does not know of: rounded once, here, they are the same for all kernels, of sampling and of scoring.
    """
    kind = tensors[0].device.type
    if not torch.is_autocast_enabled(kind):
        return tensors
    return tuple(x.to(torch.get_autocast_dtype(kind)) for x in tensors)


AttentionInterface.register(NAME, _attention)
