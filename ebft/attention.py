"""Attention over a comb, as one function registered with transformers.

A forward pass is told what it is part of by a keyword argument, ``comb``, which transformers hands through every
decoder layer to the registered function. No 4-D mask, no cache class, no patching of models. There are three kinds:

* `Score`: one differentiable pass over whole rows ``[trunk | teeth]``,
* `Prefill`: one pass over the trunk that keeps keys and values,
* `Decode`: one token for every tooth, against the kept keys and values.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from ebft.errors import UsageError
from ebft.layout import NestedPrefixLayout

NAME = "ebft"

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


# A kernel maps (layer, query [B,H,S,E], key [B,J,S,E], value [B,J,S,E], rule) to [B,H,S,E]; J divides H.
Kernel = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor, ScoreRule], torch.Tensor]


def _attention(module, query, key, value, attention_mask, *, comb: Kernel | None = None, scaling=None, **options):
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


def attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, visible: torch.Tensor | None, rule: ScoreRule
) -> torch.Tensor:
    """Plain attention of query [B,H,Q,E] over key and value [B,J,S,E]; `visible` [B,Q,S] bool, None for causal."""
    repeat = query.shape[1] // key.shape[1]
    if rule.softcap is None and rule.sinks is None:
        mask = None if visible is None else visible[:, None]
        if repeat > 1:
            key, value = key.repeat_interleave(repeat, 1), value.repeat_interleave(repeat, 1)
        return scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=visible is None, scale=rule.scaling
        )
    if visible is None:
        visible = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device).tril()[None]
    grouped = query.unflatten(1, (key.shape[1], repeat))
    scores = shape_scores(grouped @ key[:, :, None].mT, rule).masked_fill(~visible[:, None, None], -torch.inf)
    weights = softmax(scores, rule, dtype=query.dtype)
    return (weights @ value[:, :, None]).flatten(1, 2)


def shape_scores(products: torch.Tensor, rule: ScoreRule) -> torch.Tensor:
    """q·k -> attention scores, in at least float32."""
    scores = products.to(torch.promote_types(products.dtype, torch.float32)) * rule.scaling
    return scores if rule.softcap is None else rule.softcap * torch.tanh(scores / rule.softcap)


def softmax(scores: torch.Tensor, rule: ScoreRule, *, dtype: torch.dtype) -> torch.Tensor:
    """Attention weights of scores [B,J,R,Q,S], with the layer's sinks if it has any."""
    if rule.sinks is None:
        return scores.softmax(-1).to(dtype)
    sink = rule.sinks.to(scores.dtype).view(1, *scores.shape[1:3], 1, 1).expand(*scores.shape[:-1], 1)
    return torch.cat([scores, sink], -1).softmax(-1)[..., :-1].to(dtype)


def _trunk_mask(layout: NestedPrefixLayout, window: int | None) -> torch.Tensor | None:
    """[B,T,T] visibility inside the trunk, None where plain causal attention says the same."""
    if not layout.has_documents and (window is None or window >= layout.length):
        return None
    slots = torch.arange(layout.length, device=layout.anchors.device)
    rows = torch.arange(layout.batch, device=slots.device)[:, None, None]
    return layout.visible(slots[:, None], slots[None], row=rows, window=window)


class _PerKey(dict):
    """A dict that builds what is missing: masks are built once per window and serve all layers."""

    def __init__(self, build: Callable):
        super().__init__()
        self._build = build

    def __missing__(self, key):
        self[key] = self._build(key)
        return self[key]


@dataclass(eq=False)
class Score:
    """Differentiable attention over whole rows ``[trunk | teeth]``.

    Attributes:
        layout: the comb.
        kernel: ``dense``: one call with the whole [S,S] mask, the reference. ``chunked``: the trunk causally, then a
            few anchors per call, whose keys are the trunk up to the furthest of them and their own teeth.
        chunk: anchors per call of the chunked kernel.
    """

    layout: NestedPrefixLayout
    kernel: str = "chunked"
    chunk: int = 8

    def __post_init__(self):
        if self.kernel not in ("dense", "chunked"):
            raise UsageError(f"attention kernel {self.kernel!r}: expected 'dense' or 'chunked'")
        self._masks = _PerKey(self._build_masks)

    def __call__(self, layer, query, key, value, rule):
        masks = self._masks[rule.window]
        if self.kernel == "dense":
            return attend(query, key, value, masks, rule)
        length = self.layout.length
        trunk = [x[:, :, :length] for x in (query, key, value)]
        parts = [attend(trunk[0], trunk[1], trunk[2], masks[0], rule)]
        for (start, stop, reach), mask in zip(self._chunks(), masks[1:], strict=True):
            own_key, own_value = (torch.cat([x[:, :, :reach], x[:, :, start:stop]], 2) for x in (key, value))
            parts.append(attend(query[:, :, start:stop], own_key, own_value, mask, rule))
        return torch.cat(parts, 2)

    def _chunks(self) -> list[tuple[int, int, int]]:
        """(first slot, last slot + 1, furthest anchor) of every chunk of anchors."""
        layout = self.layout
        per_anchor = layout.rollouts * layout.horizon
        if not per_anchor:
            return []
        reach = layout.anchors.amax(0).tolist()
        firsts = range(0, layout.count, self.chunk)
        return [
            (
                layout.length + k * per_anchor,
                layout.length + min(k + self.chunk, layout.count) * per_anchor,
                max(reach[k : k + self.chunk]),
            )
            for k in firsts
        ]

    def _build_masks(self, window: int | None):
        layout = self.layout
        if self.kernel == "dense":
            return layout.dense_mask(window=window)
        slots = torch.arange(layout.size, device=layout.anchors.device)
        rows = torch.arange(layout.batch, device=slots.device)[:, None, None]
        masks = [_trunk_mask(layout, window)]
        for start, stop, reach in self._chunks():
            keys = torch.cat([slots[:reach], slots[start:stop]])
            masks.append(layout.visible(slots[start:stop, None], keys[None], row=rows, window=window))
        return masks


@dataclass(eq=False)
class Prefill:
    """Attention over the trunk alone, keeping every layer's keys and values [B,J,T,E] in `kept`."""

    layout: NestedPrefixLayout
    kept: dict[int, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)

    def __post_init__(self):
        self._masks = _PerKey(partial(_trunk_mask, self.layout))

    def __call__(self, layer, query, key, value, rule):
        self.kept[layer] = (key, value)
        return attend(query, key, value, self._masks[rule.window], rule)


@dataclass(eq=False)
class Decode:
    """Attention of one new token per tooth, M = K·N queries: over its prefix in `trunk` and over its own tooth.

    The prefix keys of a row are read once for all of its M queries. Call `advance` between tokens.
    """

    layout: NestedPrefixLayout
    trunk: dict[int, tuple[torch.Tensor, torch.Tensor]]
    own: dict[int, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)
    step: int = 0

    def __post_init__(self):
        self._masks = _PerKey(self._build_masks)

    def advance(self) -> None:
        self.step += 1
        self._masks.clear()

    def __call__(self, layer, query, key, value, rule):
        trunk_key, trunk_value = self.trunk[layer]
        own_key, own_value = self._append(layer, key, value)
        hidden_trunk, hidden_own = self._masks[rule.window]
        kv_heads = key.shape[1]
        grouped = query.unflatten(1, (kv_heads, -1))  # [B,J,R,M,E]
        # the R query heads of a key head are folded into its rows: a broadcast product would copy the keys R times
        to_trunk = shape_scores(grouped.flatten(2, 3) @ trunk_key.mT, rule).view(*grouped.shape[:4], -1)  # [B,J,R,M,T]
        to_own = torch.einsum("bjrme,bjmge->bjrmg", grouped, own_key)
        scores = torch.cat(
            [
                to_trunk.masked_fill_(hidden_trunk, -torch.inf),
                shape_scores(to_own, rule).masked_fill_(hidden_own, -torch.inf),
            ],
            -1,
        )
        weights = softmax(scores, rule, dtype=query.dtype)
        length = self.layout.length
        out = (weights[..., :length].flatten(2, 3) @ trunk_value).view_as(grouped)
        out = out + torch.einsum("bjrmg,bjmge->bjrme", weights[..., length:], own_value)
        return out.flatten(1, 2)

    def _append(self, layer, key, value):
        """Keep this step's keys and values [B,J,M,E] behind those of the tooth: [B,J,M,step+1,E]."""
        if layer not in self.own:
            shape = (*key.shape[:3], self.layout.horizon, key.shape[3])
            self.own[layer] = (key.new_empty(shape), value.new_empty(shape))
        for buffer, new in zip(self.own[layer], (key, value), strict=True):
            buffer[:, :, :, self.step] = new
        return tuple(buffer[:, :, :, : self.step + 1] for buffer in self.own[layer])

    def _build_masks(self, window: int | None) -> tuple[torch.Tensor, torch.Tensor]:
        """What is hidden from this step of each tooth: [B,1,1,M,T] of the trunk, [B,1,1,M,step+1] of the tooth."""
        layout, step = self.layout, self.step
        device = layout.anchors.device
        row = torch.arange(layout.batch, device=device)[:, None, None]
        first = layout.length + torch.arange(layout.count * layout.rollouts, device=device) * layout.horizon
        query = (first + step)[:, None]
        trunk = layout.visible(query, torch.arange(layout.length, device=device)[None], row=row, window=window)
        own = layout.visible(query, first[:, None] + torch.arange(step + 1, device=device), row=row, window=window)
        return ~trunk[:, None, None], ~own[:, None, None]
