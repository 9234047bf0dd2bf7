"""Attention over whole rows ``[trunk | teeth]`` with gradient: one signature, three kernels."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType

import torch

from ebft.attention.chunked import chunked_pass
from ebft.attention.chunks import chunks_of
from ebft.attention.flex import flex_masks, flex_pass
from ebft.attention.masks import PerKey
from ebft.attention.rule import ScoreRule, attend
from ebft.errors import UsageError
from ebft.layout import NestedPrefixLayout


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


# name -> (masks of a layout and a window, the pass itself)
KERNELS: Mapping[str, tuple[Callable, Callable]] = MappingProxyType(
    {"dense": (_dense_mask, _dense), "chunked": (chunks_of, chunked_pass), "flex": (flex_masks, flex_pass)}
)
