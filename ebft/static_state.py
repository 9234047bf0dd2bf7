"""What decoding with static shapes reads and writes: tensors of few shapes, whatever a batch holds."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import pad

from ebft.attention import Prefill
from ebft.attention.decode import Kept
from ebft.attention.flex import bucketed
from ebft.layout import NestedPrefixLayout

LEAST_LENGTH, LEAST_ANCHORS = 64, 4  # that lengths of the trunk and numbers of anchors are multiples of


def trunk_length(longest: int, width: int) -> int:
    """The length that a trunk of `longest` tokens, of rows of `width`, is padded to: one of few."""
    return min(bucketed(longest, least=LEAST_LENGTH), width)


def anchor_count(anchors: int) -> int:
    """The number that so many anchors are padded to: one of few. Whole answers have one, which stays alone."""
    return anchors if anchors == 1 else bucketed(anchors, least=LEAST_ANCHORS)


def padded(layout: NestedPrefixLayout, *, width: int, document_ids: torch.Tensor | None) -> NestedPrefixLayout:
    """The layout with as long a trunk and as many anchors as others have; what is added is masked.

    Args:
        layout: its trunk ends at the last anchor.
        width, document_ids: of the rows, which may be longer: T, and [B,T] or None.
    """
    length, more = trunk_length(layout.length, width), anchor_count(layout.count) - layout.count
    return NestedPrefixLayout(
        pad(layout.anchors, (0, more), value=1),
        pad(layout.anchor_mask, (0, more), value=False),
        length=length,
        rollouts=layout.rollouts,
        horizon=layout.horizon,
        document_ids=None if document_ids is None else document_ids[:, :length],
    )


@dataclass(eq=False)
class State:
    """All that a step reads and writes, for R = B·K·N teeth.

    Attributes:
        layout: the comb over the padded trunk.
        trunk, own: keys and values by layer: [B,J,T,E], and [R,J,G-1,E] of the teeth.
        windows: sliding windows of the layers.
        seed, sequence_ids: [B] int64, of the keys of random numbers.
        position: [R] int64, of the first token of each tooth.
        step: [] int64, the place of `token` in its tooth.
        token, live: [R] int64 and bool: what was drawn last, and whether the rollout goes on.
        drawn, log_prob, alive: [R,G]: the results.
    """

    layout: NestedPrefixLayout
    trunk: Kept
    own: Kept
    windows: tuple[int | None, ...]
    seed: torch.Tensor
    sequence_ids: torch.Tensor
    position: torch.Tensor
    step: torch.Tensor
    token: torch.Tensor
    live: torch.Tensor
    drawn: torch.Tensor
    log_prob: torch.Tensor
    alive: torch.Tensor

    def key(self) -> tuple:
        """What all states that one graph serves have in common."""
        shapes = tuple((tuple(x.shape), x.dtype) for x in self.tensors())
        return shapes, self.windows, self.layout.rollouts, self.layout.horizon

    def tensors(self) -> Iterator[torch.Tensor]:
        """Every tensor, in an order of its own."""
        yield from self.layout.tensors()
        for kept in (self.trunk, self.own):
            for layer in sorted(kept):
                yield from kept[layer]
        yield from (self.seed, self.sequence_ids, self.position, *self.changed())

    def changed(self) -> list[torch.Tensor]:
        """Those that a step changes, but for the teeth's keys and values, of which it reads what it has written."""
        return [self.step, self.token, self.live, self.drawn, self.log_prob, self.alive]

    def results(self, count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Tokens, log-probs and mask of the first `count` anchors' rollouts, [B,K,N,G] each; copies."""
        shape = (self.layout.batch, self.layout.count, self.layout.rollouts, self.layout.horizon)
        drawn, log_prob, alive = (x.view(shape)[:, :count].clone() for x in (self.drawn, self.log_prob, self.alive))
        return drawn, log_prob, alive

    def load(self, other: State) -> None:
        """Take the values of a state with the same `key`, into the tensors that are there."""
        for mine, theirs in zip(self.tensors(), other.tensors(), strict=True):
            mine.copy_(theirs)


def begin(
    prefill: Prefill, layout: NestedPrefixLayout, first: tuple[torch.Tensor, ...], *, seed: Any, sequence_ids, eos
) -> State:
    """The state after the first tokens were drawn.

    Args:
        prefill: of the unpadded trunk; its keys and values are taken over.
        layout: over the padded trunk.
        first: the first tokens and their log-probs, [B·K,N].
    """
    token, log_prob = (x.flatten() for x in first)
    real = layout.anchor_mask[:, :, None].expand(-1, -1, layout.rollouts).flatten()
    trunk, own = {}, {}
    for layer in list(prefill.kept):
        kept = prefill.kept.pop(layer)
        trunk[layer] = tuple(pad(x, (0, 0, 0, layout.length - x.shape[2])) for x in kept)
        own[layer] = tuple(x.new_zeros(len(token), x.shape[1], layout.horizon - 1, x.shape[3]) for x in kept)
    if not isinstance(seed, torch.Tensor):
        seed = torch.full((1,), seed & (2**63 - 1), dtype=torch.int64, device=token.device)

    def started(values: torch.Tensor) -> torch.Tensor:
        found = values.new_zeros(len(values), layout.horizon)
        found[:, 0] = values
        return found

    token = torch.where(real, token, 0)
    return State(
        layout=layout,
        trunk=trunk,  # type: ignore[arg-type]
        own=own,  # type: ignore[arg-type]
        windows=prefill.windows,
        seed=seed.expand(len(sequence_ids)).clone(),
        sequence_ids=sequence_ids.clone(),
        position=layout.unpack(layout.positions())[1][..., 0].flatten(),
        step=torch.zeros((), dtype=torch.int64, device=token.device),
        token=token,
        live=real if eos is None else real & (token != eos),
        drawn=started(token),
        log_prob=started(torch.where(real, log_prob.float(), 0.0)),
        alive=started(real),
    )
