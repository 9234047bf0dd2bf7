"""The comb: one row ``[trunk | teeth]`` that holds a sequence and all rollouts of all its nested prefixes once.

The trunk is the sequence. A tooth is one rollout of G tokens that hangs at its anchor and continues the anchor's
prefix: it sees the trunk before the anchor and its own earlier tokens, nothing else. Teeth are stored anchor-major
(k, then n, then g). This order is private to this module, which also owns its inverse: no other module flattens
rollout tokens into a row.
"""

from __future__ import annotations

import copy

import numpy as np
import torch

from ebft.errors import UsageError


def document_starts(tokens: torch.Tensor, document_ids: torch.Tensor | None) -> torch.Tensor:
    """[B,T] int64: the index at which the document of each token of `tokens` [B,T] starts; 0 without `document_ids`.

    A run of equal ids is a document, so an id that comes back later is another document.
    """
    index = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
    if document_ids is None:
        return torch.zeros_like(index)
    opens = torch.ones_like(document_ids, dtype=torch.bool)
    opens[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    return torch.where(opens, index, 0).cummax(1).values


class NestedPrefixLayout:
    """Order, positions, predecessors and visibility of the tokens of ``[trunk | teeth]`` rows. Knows no model.

    Args:
        anchors: [B,K] int64 prefix lengths a_k, 1 <= a_k <= T.
        anchor_mask: [B,K] bool; masked anchors may hold any number, they are placed at 1 and never read back.
        length: T, tokens of the trunk.
        rollouts: N, rollouts per anchor.
        horizon: G, tokens per tooth; 0 gives a row without teeth.
        document_ids: [B,T] int64, optional; equal neighbours belong to one document. Attention stays inside the
            document and positions restart there.
        read: `anchors` and `anchor_mask` on the host, where they have been read already: a device is not asked again.

    Raises:
        UsageError: an unmasked anchor lies outside [1, T].
    """

    def __init__(
        self,
        anchors: torch.Tensor,
        anchor_mask: torch.Tensor,
        *,
        length: int,
        rollouts: int,
        horizon: int,
        document_ids: torch.Tensor | None = None,
        read: tuple[np.ndarray, np.ndarray] | None = None,
    ):
        values, real = (anchors, anchor_mask) if read is None else read
        outside = real & ((values < 1) | (values > length))
        if outside.any():
            raise UsageError(
                f"anchor {int(values[outside][0])} lies outside [1, {length}]: an anchor is a prefix length"
            )
        self._read = None if read is None else np.where(read[1], read[0], 1)
        self.anchors = torch.where(anchor_mask, anchors, 1)
        self.anchor_mask = anchor_mask
        self.length, self.rollouts, self.horizon = length, rollouts, horizon
        self.batch, self.count = anchors.shape
        self.has_documents = document_ids is not None
        self.size = length + self.count * rollouts * horizon
        self._describe_slots(document_ids)

    def _describe_slots(self, document_ids: torch.Tensor | None) -> None:
        """Precompute, for every slot of a row, what `visible` compares: all [B, S]."""
        device, teeth = self.anchors.device, self.count * self.rollouts
        index = torch.arange(self.length, device=device).expand(self.batch, -1)
        start = document_starts(index, document_ids)
        document = start  # where it starts tells a document from the others of its row
        context = self.anchors - 1
        step = torch.arange(self.horizon, device=device)

        def along_teeth(per_anchor: torch.Tensor, per_step: torch.Tensor) -> torch.Tensor:
            """[B,K] + [G] -> [B, K*N*G]."""
            both = per_anchor[:, :, None, None] + per_step
            return both.expand(-1, -1, self.rollouts, -1).reshape(self.batch, -1)

        nothing = torch.zeros_like(step)
        self._position = torch.cat([index - start, along_teeth((index - start).gather(1, context) + 1, step)], 1)
        self._document = torch.cat([document, along_teeth(document.gather(1, context), nothing)], 1)
        # a slot sees the trunk slots before `limit`, and of the teeth only its own up to itself
        self._limit = torch.cat([index + 1, along_teeth(self.anchors, nothing)], 1)
        tooth = torch.arange(teeth, device=device).repeat_interleave(self.horizon)
        self._tooth = torch.cat([torch.full((self.length,), -1, device=device), tooth])

    def places(self) -> list[list[int]]:
        """`anchors` as numbers on the host."""
        return (self.anchors if self._read is None else self._read).tolist()

    def positions(self) -> torch.Tensor:
        """[B,S] int64: the position of every slot inside its document; a tooth continues its prefix."""
        return self._position

    def tensors(self) -> tuple[torch.Tensor, ...]:
        """All that tells this layout from others of the same sizes."""
        described = (self._position, self._document, self._limit, self._tooth)
        return self.anchors, self.anchor_mask, *described

    def pack(self, trunk: torch.Tensor, teeth: torch.Tensor) -> torch.Tensor:
        """[B,T,...] and [B,K,N,G,...] -> [B,S,...]."""
        return torch.cat([trunk, teeth.flatten(1, 3)], 1)

    def unpack(self, row: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """[B,S,...] -> [B,T,...] and [B,K,N,G,...], the inverse of `pack`."""
        shape = (self.count, self.rollouts, self.horizon)
        return row[:, : self.length], row[:, self.length :].unflatten(1, shape)

    def predecessors(self) -> torch.Tensor:
        """[B,K,N,G] int64: the slot whose output predicts each rollout token.

        The trunk slot a_k - 1 for the first token of a tooth, the tooth's own previous slot for the others.
        """
        slots = torch.arange(self.length, self.size, device=self.anchors.device)
        slots = slots.view(1, self.count, self.rollouts, self.horizon).repeat(self.batch, 1, 1, 1) - 1
        if self.horizon:
            slots[..., 0] = (self.anchors - 1)[:, :, None]
        return slots

    def visible(
        self, query: torch.Tensor, key: torch.Tensor, *, row: torch.Tensor | int, window: int | None = None
    ) -> torch.Tensor:
        """Whether slot `query` attends to slot `key` in batch row `row`: the one truth for every kernel.

        Args:
            query, key, row: int64 slots and rows of any shapes that broadcast together.
            window: sliding window W: only keys fewer than W *positions* back are seen (slots of a tooth are far
                from their prefix in the row, not in the text).

        Returns:
            bool, broadcast shape.
        """
        in_trunk = (self._tooth[key] < 0) & (key < self._limit[row, query])
        in_own_tooth = (self._tooth[key] >= 0) & (self._tooth[key] == self._tooth[query]) & (key <= query)
        seen = (in_trunk & (self._document[row, key] == self._document[row, query])) | in_own_tooth
        if window is not None:
            seen = seen & (self._position[row, query] - self._position[row, key] < window)
        return seen

    def padded(self, size: int) -> NestedPrefixLayout:
        """The layout whose `visible` is of `size` slots a row: those behind see themselves, and nobody else sees them.

        What it compares has the shapes of `size`, so that what is compiled for that serves all rows up to it.
        """
        more, wider = size - self.size, copy.copy(self)
        wider.size = size
        # each slot behind is a tooth of its own, which sees none of the trunk
        behind = torch.arange(more, device=self.anchors.device) + self.count * self.rollouts
        wider._tooth = torch.cat([self._tooth, behind])
        wider._limit, wider._document, wider._position = (
            torch.nn.functional.pad(values, (0, more)) for values in (self._limit, self._document, self._position)
        )
        return wider

    def dense_mask(self, *, window: int | None = None) -> torch.Tensor:
        """[B,S,S] bool of `visible` over all pairs."""
        slots = torch.arange(self.size, device=self.anchors.device)
        rows = torch.arange(self.batch, device=self.anchors.device)[:, None, None]
        return self.visible(slots[:, None], slots[None, :], row=rows, window=window)


def layout_to_the_last_anchor(
    anchors: torch.Tensor,
    anchor_mask: torch.Tensor,
    *,
    rollouts: int,
    horizon: int,
    document_ids: torch.Tensor | None = None,
) -> NestedPrefixLayout:
    """The layout of a row that ends at the last anchor: of what follows it, [B,T], nothing is seen by a tooth."""
    length = int(torch.where(anchor_mask, anchors, 1).max())
    documents = None if document_ids is None else document_ids[:, :length]
    return NestedPrefixLayout(
        anchors, anchor_mask, length=length, rollouts=rollouts, horizon=horizon, document_ids=documents
    )
