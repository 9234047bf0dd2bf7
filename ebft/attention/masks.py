"""What the kernels share: masks from a layout, built once."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ebft.layout import NestedPrefixLayout


class PerKey(dict):
    """A dict that builds what is missing."""

    def __init__(self, build: Callable):
        super().__init__()
        self._build = build

    def __missing__(self, key):
        self[key] = self._build(key)
        return self[key]


def trunk_mask(layout: NestedPrefixLayout, window: int | None) -> torch.Tensor | None:
    """[B,T,T] visibility inside the trunk, None where plain causal attention says the same."""
    if not layout.has_documents and (window is None or window >= layout.length):
        return None
    slots = torch.arange(layout.length, device=layout.anchors.device)
    rows = torch.arange(layout.batch, device=slots.device)[:, None, None]
    return layout.visible(slots[:, None], slots[None], row=rows, window=window)


def partly_hidden(visible: torch.Tensor, *, columns: int | None = None) -> tuple[int, torch.Tensor]:
    """How many leading keys all queries see, and what is hidden of the others.

    Args:
        visible: [B,Q,S] bool.
        columns: only this many keys may be counted; None for all.

    Returns:
        seen, and hidden [B,1,1,Q,S-seen] bool.
    """
    hidden = ~visible
    partly = hidden[..., :columns].flatten(0, 1).any(0).nonzero()
    seen = int(partly[0]) if len(partly) else hidden[..., :columns].shape[-1]
    return seen, hidden[:, None, None, :, seen:]
