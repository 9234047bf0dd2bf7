"""Attention over whole rows ``[trunk | teeth]`` with gradient: one signature, three kernels."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType

import torch

from ebft.attention.flex import flex_masks, flex_pass
from ebft.attention.masks import PerKey, trunk_mask
from ebft.attention.rule import ScoreRule, attend
from ebft.errors import UsageError
from ebft.layout import NestedPrefixLayout

# Anchors per call of the chunked kernel. Measured on two CPU cores at T=1024, N=4, G=8: 4 to 16 take the same time
# within 5 %, 2 and 32 a third more.
ANCHORS_PER_CALL = 8


class Score:
    """Differentiable attention over whole rows ``[trunk | teeth]``.

    Args:
        layout: the comb.
        kernel: a name of `KERNELS`. ``dense``: one call with the whole [S,S] mask, the reference. ``chunked``: the
            trunk causally, then a few anchors per call, whose keys are the trunk up to the furthest of them and their
            own teeth. ``flex``: torch's FlexAttention, which skips blocks of the row that nobody sees; with gradient
            on GPUs only.

    Raises:
        UsageError: an unknown kernel.
    """

    def __init__(self, layout: NestedPrefixLayout, kernel: str = "chunked"):
        if kernel not in KERNELS:
            raise UsageError(f"attention kernel {kernel!r}: expected one of {', '.join(KERNELS)}")
        build, self._kernel = KERNELS[kernel]
        # masks are built once per window and serve all layers
        self._layout, self._masks = layout, PerKey(partial(build, layout))

    def __call__(self, layer, query, key, value, rule):
        return self._kernel(self._layout, self._masks[rule.window], query, key, value, rule)


def default_kernel(device: torch.device) -> str:
    """The kernel of a device when none is named: ``chunked``, the fastest measured on a CPU.

    On a GPU ``flex`` may win; no GPU has been measured, so the kernel that needs no compiler is kept there as well.
    """
    return "chunked"


# ---- dense


def _dense_mask(layout: NestedPrefixLayout, window: int | None) -> torch.Tensor:
    return layout.dense_mask(window=window)


def _dense(layout, mask, query, key, value, rule: ScoreRule) -> torch.Tensor:
    return attend(query, key, value, mask, rule)


# ---- chunked


def _chunks(layout: NestedPrefixLayout) -> list[tuple[int, int, int]]:
    """(first slot, last slot + 1, furthest anchor) of every chunk of anchors."""
    per_anchor = layout.rollouts * layout.horizon
    if not per_anchor:
        return []
    reach = layout.anchors.amax(0).tolist()
    return [
        (
            layout.length + k * per_anchor,
            layout.length + min(k + ANCHORS_PER_CALL, layout.count) * per_anchor,
            max(reach[k : k + ANCHORS_PER_CALL]),
        )
        for k in range(0, layout.count, ANCHORS_PER_CALL)
    ]


def _chunk_masks(layout: NestedPrefixLayout, window: int | None):
    """The trunk's mask, then (first slot, last slot + 1, reach, mask) of every chunk."""
    slots = torch.arange(layout.size, device=layout.anchors.device)
    rows = torch.arange(layout.batch, device=slots.device)[:, None, None]
    chunks = []
    for start, stop, reach in _chunks(layout):
        keys = torch.cat([slots[:reach], slots[start:stop]])
        mask = layout.visible(slots[start:stop, None], keys[None], row=rows, window=window)
        chunks.append((start, stop, reach, mask))
    return trunk_mask(layout, window), chunks


def _chunked(layout, masks, query, key, value, rule: ScoreRule) -> torch.Tensor:
    on_trunk, chunks = masks
    trunk = [x[:, :, : layout.length] for x in (query, key, value)]
    parts = [attend(trunk[0], trunk[1], trunk[2], on_trunk, rule)]
    for start, stop, reach, mask in chunks:
        own_key, own_value = (torch.cat([x[:, :, :reach], x[:, :, start:stop]], 2) for x in (key, value))
        parts.append(attend(query[:, :, start:stop], own_key, own_value, mask, rule))
    return torch.cat(parts, 2)


# name -> (masks of a layout and a window, the pass itself)
KERNELS: Mapping[str, tuple[Callable, Callable]] = MappingProxyType(
    {"dense": (_dense_mask, _dense), "chunked": (_chunk_masks, _chunked), "flex": (flex_masks, flex_pass)}
)
