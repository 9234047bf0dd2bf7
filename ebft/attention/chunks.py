"""How the rows of a comb are cut into calls of attention, and what each sees."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ebft.attention.masks import partly_hidden
from ebft.layout import NestedPrefixLayout
from ebft.tuning import PerDevice

# Anchors per call: more read trunk that not all of them see, fewer make more and smaller products.
ANCHORS_PER_CALL = PerDevice(cpu=8, cuda=32)

# Trunk tokens per call, for the same reason.
TOKENS_PER_CALL = PerDevice(cpu=128, cuda=512)

# Added to a score: no weight is left beside any other key, but there is a sum of weights where there is no other.
FAR_BELOW = -1e30

# Rows of the batch per call: those of different documents or anchors see less in common.
ROWS_PER_CALL = PerDevice(cpu=1, cuda=1 << 20)


@dataclass(frozen=True, eq=False)
class Chunk:
    """Q neighbouring slots of b rows: tokens of the trunk, or all teeth of a few anchors.

    Attributes:
        rows: which b of the batch.
        start, stop: first slot, last slot + 1.
        reach: none of them sees the trunk from this slot on.
        own: G, tokens of the own tooth; 0 for a part of the trunk.
        begin: none of them sees the trunk before this slot.
        seen: all of them see the trunk from `begin` to this slot.
        hidden: [b,1,1,Q,reach-seen+own] bool: which of the trunk from `seen` on, and of the own tooth, is not visible.
    """

    rows: slice
    start: int
    stop: int
    reach: int
    own: int
    begin: int
    seen: int
    hidden: Tensor

    def bias(self, row: int) -> Tensor:
        """[1,1,Q,reach-begin] float32 of a row of the batch: 0 where the trunk is visible, `FAR_BELOW` where it is not.

        It is not -inf, with which a query that sees nothing of the trunk would have no normalizer.
        """
        return self._biases[row - self.rows.start, None, None]

    def own_hidden(self, row: int) -> Tensor:
        """[Q/G,G,G] bool of a row of the batch: which tokens of its own tooth a query does not see."""
        return self.hidden[row - self.rows.start, 0, 0, :, self.reach - self.seen :].unflatten(0, (-1, self.own))

    @cached_property
    def _biases(self) -> Tensor:
        """[b,Q,reach-begin]; kept, since all layers of a window share it."""
        hidden = self.hidden[:, 0, 0, :, : self.reach - self.seen]
        biases = torch.zeros(*hidden.shape[:2], self.reach - self.begin, device=hidden.device)
        biases[..., self.seen - self.begin :].masked_fill_(hidden, FAR_BELOW)
        return biases


def chunks_of(layout: NestedPrefixLayout, window: int | None) -> list[Chunk]:
    """All slots of all rows, in chunks."""
    length, per_anchor = layout.length, layout.rollouts * layout.horizon
    device = layout.anchors.device
    rows, few_tokens, few_anchors = (n.on(device) for n in (ROWS_PER_CALL, TOKENS_PER_CALL, ANCHORS_PER_CALL))
    all_anchors = layout.places() if per_anchor else [[]] * layout.batch
    parts, most = [], []  # of `Chunk`: rows, start, stop, reach, own; and how much of the trunk all may see
    for row in range(0, layout.batch, rows):
        few_rows = slice(row, row + rows)
        for start in range(0, length, few_tokens):
            stop = min(start + few_tokens, length)
            parts.append((few_rows, start, stop, stop, 0))
            most.append(start)  # its own tokens are the rest, of which there always is some
        anchors = [max(column) for column in zip(*all_anchors[few_rows], strict=True)]
        for k in range(0, len(anchors), few_anchors):
            few = anchors[k : k + few_anchors]
            start = length + k * per_anchor
            parts.append((few_rows, start, start + len(few) * per_anchor, max(few), layout.horizon))
            most.append(max(few) - 1)  # for a rest here, too, where none of them sees any of it
    visible = [_visible(layout, window, *part) for part in parts]
    hidden = partly_hidden(visible, most)
    return [Chunk(*part, *found) for part, found in zip(parts, hidden, strict=True)]


def _visible(
    layout: NestedPrefixLayout, window: int | None, few_rows: slice, start: int, stop: int, reach: int, own: int
) -> Tensor:
    """[b,Q,reach+own] bool: what the slots from `start` to `stop` see of the trunk and of their own tooth."""
    slots = torch.arange(start, stop, device=layout.anchors.device)
    keys = torch.arange(reach, device=slots.device).expand(len(slots), -1)
    if own:
        keys = torch.cat([keys, slots.view(-1, own).repeat_interleave(own, 0)], 1)
    rows = torch.arange(layout.batch, device=slots.device)[few_rows, None, None]
    return layout.visible(slots[:, None], keys, row=rows, window=window)
