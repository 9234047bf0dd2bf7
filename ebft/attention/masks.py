"""What the kernels share: masks from a layout, built once."""

from __future__ import annotations

from collections.abc import Callable, Sequence

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


def partly_hidden(visible: Sequence[torch.Tensor], columns: Sequence[int]) -> list[tuple[int, int, torch.Tensor]]:
    """Which leading keys no query sees, which next ones all see, and what is hidden of the others.

    Args:
        visible: [B,Q,S] bool of each of several groups.
        columns: of each, only so many keys may be counted.

    Returns:
        For each group begin, seen, and hidden [B,1,1,Q,S-seen] bool: keys before `begin` are visible to none of its
        queries, those from there to `seen` to all. One transfer for all groups.
    """
    bounds = []
    for each, most in zip(visible, columns, strict=True):
        counted = each[..., :most].flatten(0, 1)
        begin = _first(counted.any(0))
        after = torch.arange(most, device=each.device) >= begin
        bounds += [begin, _first(~counted.all(0) & after)]
    found = torch.stack(bounds).view(-1, 2).tolist() if bounds else []
    return [(begin, seen, ~each[:, None, None, :, seen:]) for (begin, seen), each in zip(found, visible, strict=True)]


def _first(which: torch.Tensor) -> torch.Tensor:
    """The first True of [S], S where there is none."""
    return torch.cat([which, which.new_ones(1)]).int().argmax()
