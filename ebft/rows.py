"""The kernel ``rows``: one plain forward pass for every rollout, each with a copy of its prefix.

No token shares its computation with another rollout, so any causal language model can be scored and embedded this way,
at K·N times the cost of a comb; where both are possible it is the oracle of the others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

from ebft.layout import NestedPrefixLayout

# (tokens [R,S], mask [R,S]) -> layer -> states [R,S,H]
Forward = Callable[[torch.Tensor, torch.Tensor], dict[int, torch.Tensor]]

TOKENS_PER_PASS = 4096

Row = TypeVar("Row")


@dataclass
class _Row:
    """A text to run: `tokens`, of which those from `keep` on go to `place` of the flat trunk or the flat teeth."""

    tokens: torch.Tensor
    keep: int
    place: tuple[str, int]


def row_states(
    forward: Forward, layout: NestedPrefixLayout, tokens: torch.Tensor, teeth: torch.Tensor
) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
    """States of the trunk and of all teeth, as a forward pass over the comb would give them.

    Args:
        forward: right-padded plain forward passes.
        tokens: [B,T] int64.
        teeth: [B,K,N,G] int64, G = layout.horizon.

    Returns:
        layer -> states of the trunk [B,T,H] and of the teeth [B,K,N,G,H], zeros at masked anchors.
    """
    rows = list(_documents(layout, tokens)) + list(_rollouts(layout, tokens, teeth))
    trunk_size, tooth_size = tokens.numel(), teeth.numel()
    index: dict[str, list[torch.Tensor]] = {"trunk": [], "teeth": []}
    parts: dict[int, dict[str, list[torch.Tensor]]] = {}
    for batch in batches_by_length(rows, lambda row: len(row.tokens)):
        padded = torch.nn.utils.rnn.pad_sequence([row.tokens for row in batch], batch_first=True)
        lengths = torch.tensor([len(row.tokens) for row in batch], device=tokens.device)
        real = torch.arange(padded.shape[1], device=tokens.device) < lengths[:, None]
        states = forward(padded, real)
        for number, row in enumerate(batch):
            kind, place = row.place
            count = len(row.tokens) - row.keep
            index[kind].append(torch.arange(place, place + count, device=tokens.device))
            for layer, state in states.items():
                kept = parts.setdefault(layer, {"trunk": [], "teeth": []})
                kept[kind].append(state[number, row.keep : row.keep + count])

    def assemble(pieces: list[torch.Tensor], places: list[torch.Tensor], size: int, like: torch.Tensor):
        whole = like.new_zeros(size, like.shape[-1])
        return whole.index_copy(0, torch.cat(places), torch.cat(pieces)) if pieces else whole

    found = {}
    for layer, kinds in parts.items():
        like = kinds["trunk"][0]
        on_trunk = assemble(kinds["trunk"], index["trunk"], trunk_size, like).view(*tokens.shape, -1)
        on_teeth = assemble(kinds["teeth"], index["teeth"], tooth_size, like).view(*teeth.shape, like.shape[-1])
        found[layer] = (on_trunk, on_teeth)
    return found


def _documents(layout: NestedPrefixLayout, tokens: torch.Tensor) -> Iterator[_Row]:
    """Every document of every row of the batch."""
    positions = layout.positions()[:, : layout.length]
    for b, row in enumerate(tokens):
        starts = (positions[b] == 0).nonzero()[:, 0].tolist()
        for start, end in zip(starts, [*starts[1:], layout.length], strict=True):
            yield _Row(row[start:end], 0, ("trunk", b * layout.length + start))


def _rollouts(layout: NestedPrefixLayout, tokens: torch.Tensor, teeth: torch.Tensor) -> Iterator[_Row]:
    """Every rollout of every valid anchor, behind the part of its document before the anchor."""
    _, count, rollouts, horizon = teeth.shape
    if not horizon:
        return
    for b, k in layout.anchor_mask.nonzero().tolist():
        anchor = int(layout.anchors[b, k])
        context = tokens[b, anchor - 1 - int(layout.positions()[b, anchor - 1]) : anchor]
        for n in range(rollouts):
            place = ((b * count + k) * rollouts + n) * horizon
            yield _Row(torch.cat([context, teeth[b, k, n]]), len(context), ("teeth", place))


def batches_by_length(rows: Sequence[Row], length: Callable[[Row], int]) -> Iterator[list[Row]]:
    """Rows of similar length together, at most `TOKENS_PER_PASS` tokens with padding (or one row) at a time."""
    batch: list[Row] = []
    for row in sorted(rows, key=length):
        if batch and (len(batch) + 1) * length(row) > TOKENS_PER_PASS:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch
