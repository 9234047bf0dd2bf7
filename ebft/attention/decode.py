"""Attention of a step of sampling: the trunk is read once, then one token for every live tooth."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial

import torch

from ebft.attention import fused
from ebft.attention.masks import PerKey, partly_hidden, trunk_mask
from ebft.attention.rule import attend, cap, scaled_products, softmax
from ebft.layout import NestedPrefixLayout
from ebft.tuning import PerDevice

Kept = dict[int, tuple[torch.Tensor, torch.Tensor]]

# Teeth per call of attention: more read trunk that not all of them see, fewer make more and smaller products. Of 16,
# 32, 64 and 128 the last two were the fastest and equal (SmolLM2-135M, 1024 tokens, two cores).
COLUMNS_PER_CALL = PerDevice(cpu=64, cuda=512)

# Tokens that the buffers of a tooth hold at first.
SHORT_TOOTH = 32


@dataclass(eq=False)
class Prefill:
    """Attention over the trunk alone, keeping every layer's keys and values [B,J,T,E] in `kept`."""

    layout: NestedPrefixLayout
    kept: Kept = field(default_factory=dict)

    def __post_init__(self):
        self._masks = PerKey(partial(trunk_mask, self.layout))

    @property
    def windows(self) -> tuple[int | None, ...]:
        """The sliding windows of the layers that were run, each once."""
        return tuple(self._masks)

    def __call__(self, layer, query, key, value, rule):
        self.kept[layer] = (key.contiguous(), value.contiguous())
        return attend(query, key, value, self._masks[rule.window], rule)


class Decode:
    """Attention of one new token per live tooth: over its prefix in the trunk and over its own tooth.

    The model sees the R live teeth as one row of R tokens, so a finished rollout costs nothing. Attention puts them on
    a grid, a row for each row of the batch, its teeth in the order of their anchors, and takes a few columns at a time:
    their anchors are near each other, so little of the trunk is read in vain.

    Args:
        layout: the comb.
        trunk: keys and values [B,J,T,E] of every layer, from `Prefill`; taken over.
        live: [R] int64, ascending: which of the B·K·N teeth, in the order b, k, n, take part.
    """

    def __init__(self, layout: NestedPrefixLayout, trunk: Kept, live: torch.Tensor):
        self._layout, self._trunk, self._live = layout, trunk, live
        self._own: Kept = {}
        self._step = 0
        self._batch_rows = torch.arange(layout.batch, device=live.device)  # those that `trunk` still holds
        self._masks = PerKey(self._build_masks)
        self._arrange()

    def advance(self, keep: torch.Tensor) -> None:
        """Go on to the next token, without the teeth where `keep` [R] is False."""
        self._step += 1
        self._masks.clear()
        if not keep.all():
            self._live = self._live[keep]
            self._own = {layer: (key[keep], value[keep]) for layer, (key, value) in self._own.items()}
            self._arrange()

    def _arrange(self) -> None:
        """Where each live tooth stands on the grid, and the batch rows that still have one."""
        layout = self._layout
        teeth = layout.count * layout.rollouts
        rows, anchors = self._live // teeth, layout.anchors.flatten()[self._live // layout.rollouts]
        order = torch.argsort(rows * (layout.length + 1) + anchors, stable=True)
        present, grid_row, counts = rows[order].unique_consecutive(return_inverse=True, return_counts=True)
        if len(present) < len(self._batch_rows):
            still = torch.isin(self._batch_rows, present)
            self._trunk = {layer: (key[still], value[still]) for layer, (key, value) in self._trunk.items()}
            self._batch_rows = present
        width = int(counts.max())
        column = torch.arange(len(order), device=order.device) - (counts.cumsum(0) - counts)[grid_row]
        self._place = torch.empty_like(order)
        self._place[order] = grid_row * width + column
        # rows with fewer teeth are filled up with their last one
        last = (counts.cumsum(0) - 1)[:, None]
        first = last - counts[:, None] + 1
        self._grid = order[torch.minimum(first + torch.arange(width, device=order.device), last)]
        reach, few = anchors[self._grid].amax(0).tolist(), COLUMNS_PER_CALL.on(anchors.device)
        self._columns = [
            (start, min(start + few, width), max(reach[start : start + few])) for start in range(0, width, few)
        ]

    def __call__(self, layer, query, key, value, rule):
        query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))  # [R,H,E], [R,J,E]
        own_key, own_value = self._append(layer, key, value)
        query = query.unflatten(1, (key.shape[1], -1))  # [R,J,H/J,E]
        own_hidden, trunk_hidden = self._masks[rule.window]
        to_own = (query @ own_key.mT).mul_(rule.scaling)
        trunk_key, trunk_value = (x.flatten(0, 1) for x in self._trunk[layer])  # [B·J,T,E]
        on_trunk, on_own, fuses = [], [], fused.serves(query, value, rule)
        for (start, stop, reach), (begin, seen, hidden) in zip(self._columns, trunk_hidden, strict=True):
            teeth = self._grid[:, start:stop]
            grouped = query[teeth].permute(0, 2, 3, 1, 4)  # [B,J,H/J,C,E]
            # the query heads of a key head are folded into its rows: a broadcast product would copy the keys
            rows = grouped.flatten(2, 3).flatten(0, 1)
            rest = seen if fuses else begin
            width, own, further = reach - rest, to_own.shape[-1], int(rest > begin)
            # columns: the rest of the trunk, the own tooth, and one key that stands for the trunk from begin to rest
            scores = rows.new_empty(*rows.shape[:2], width + own + further)
            scaled_products(rows, trunk_key[:, rest:reach], rule.scaling, out=scores[..., :width])
            scores = scores.view(*grouped.shape[:4], -1)
            scores[..., width : width + own] = to_own[teeth].permute(0, 2, 3, 1, 4)
            scores = cap(scores, rule)
            scores[..., seen - rest : width].masked_fill_(hidden, -torch.inf)
            scores[..., width : width + own].masked_fill_(own_hidden[teeth].permute(0, 2, 3, 1, 4), -torch.inf)
            if further:
                keys, values = trunk_key[:, begin:rest], trunk_value[:, begin:rest]
                part, of_part = fused.forward(grouped.flatten(0, 1), keys, values, rule.scaling)
                scores[..., -1] = of_part.view(scores.shape[:-1])
            weights = softmax(scores, rule, dtype=query.dtype)
            out = weights[..., :width].flatten(2, 3).flatten(0, 1) @ trunk_value[:, rest:reach]
            out = out.view(*grouped.shape[:4], -1)
            if further:
                out.addcmul_(weights[..., -1:], part.view(grouped.shape))
            on_trunk.append(out.permute(0, 3, 1, 2, 4))  # [B,C,J,H/J,E]
            on_own.append(weights[..., width : width + own].permute(0, 3, 1, 2, 4))
        weights = torch.cat(on_own, 1).flatten(0, 1)[self._place]
        out = torch.cat(on_trunk, 1).flatten(0, 1)[self._place] + weights @ own_value
        return out.flatten(1, 2).transpose(0, 1)[None]

    def _append(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keep this step's keys and values [R,J,E] behind those of the tooth: [R,J,step+1,E]."""
        kept = self._own.get(layer, (key[:, :, None, :][:, :, :0], value[:, :, None, :][:, :, :0]))
        if kept[0].shape[2] == self._step:
            # room for a short tooth at once, for a long one by doubling
            room = min(self._layout.horizon, max(SHORT_TOOTH, 2 * self._step)) - self._step
            kept = (_with_room(kept[0], room), _with_room(kept[1], room))
            self._own[layer] = kept
        for buffer, new in zip(kept, (key, value), strict=True):
            buffer[:, :, self._step] = new
        return kept[0][:, :, : self._step + 1], kept[1][:, :, : self._step + 1]

    def _build_masks(self, window: int | None) -> tuple[torch.Tensor, list[tuple[int, int, torch.Tensor]]]:
        """What is hidden: own teeth [R,1,1,step+1]; of the trunk, per call, what `partly_hidden` finds."""
        layout, device = self._layout, self._live.device
        teeth = layout.count * layout.rollouts
        first = layout.length + (self._live % teeth) * layout.horizon
        rows = self._live // teeth
        own = first[:, None] + torch.arange(self._step + 1, device=device)
        seen = layout.visible((first + self._step)[:, None], own, row=rows[:, None], window=window)
        on_trunk = []
        for start, stop, reach in self._columns:
            query = (first + self._step)[self._grid[:, start:stop], None]
            keys = torch.arange(reach, device=device)
            on_trunk.append(layout.visible(query, keys, row=self._batch_rows[:, None, None], window=window))
        return ~seen[:, None, None], partly_hidden(on_trunk, [reach for *_, reach in self._columns])


def _with_room(kept: torch.Tensor, room: int) -> torch.Tensor:
    """[R,J,S,E] -> [R,J,S+room,E], uninitialised behind."""
    return torch.cat([kept, kept.new_empty(*kept.shape[:2], room, kept.shape[3])], 2)
