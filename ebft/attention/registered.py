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
    return comb(module.layer_idx, query, key, value, rule).transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, _attention)
