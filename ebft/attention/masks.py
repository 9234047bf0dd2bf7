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


def partly_hidden(visible: Sequence[torch.Tensor], columns: Sequence[int]) -> list[tuple[int, torch.Tensor]]:
    """How many leading keys all queries see, and what is hidden of the others: of several groups, in one transfer.

    Args:
        visible: [B,Q,S] bool of each group.
        columns: of each, only so many keys may be counted.

    Returns:
        For each seen, and hidden [B,1,1,Q,S-seen] bool.
    """
    hidden = [~each for each in visible]
    partly = [each[..., :most].flatten(0, 1).any(0) for each, most in zip(hidden, columns, strict=True)]
    first = [torch.where(each.any(), each.int().argmax(), most) for each, most in zip(partly, columns, strict=True)]
    seen = torch.stack(first).tolist()
    return [(count, each[:, None, None, :, count:]) for count, each in zip(seen, hidden, strict=True)]
