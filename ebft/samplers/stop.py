"""Stop sequences: an answer ends where it says one of them, as it ends at EOS."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ebft.samplers.component import Engine

Read = Callable[[list[int]], str]  # tokens -> their text, special tokens included


def cut_text(text: str, stop: Sequence[str]) -> str:
    """`text` up to the first place where one of the sequences begins."""
    places = [place for sequence in stop if (place := text.find(sequence)) >= 0]
    return text[: min(places)] if places else text


def cut_mask(tokens: Tensor, mask: Tensor, *, read: Read, stop: Sequence[str]) -> Tensor:
    """[...,G] bool: `mask` without what follows the token that completes a stop sequence, which itself counts.

    Like EOS the stop sequence is part of what the policy said, and so of the rollout; no later token had an influence
    on where it ends, so that the cut rollouts are drawn from the policy that stops there.

    Args:
        tokens, mask: [...,G] int64, bool; real tokens come first.
        read: text of the first tokens of a rollout.
        stop: sequences of characters, none of them empty.
    """
    cut = mask.clone()
    flat, kept = tokens.reshape(-1, tokens.shape[-1]).tolist(), cut.view(-1, cut.shape[-1])
    for row, (ids, length) in enumerate(zip(flat, kept.sum(-1).tolist(), strict=True)):

        def stopped(count: int, ids: list[int] = ids) -> bool:
            text = read(ids[:count])
            return any(sequence in text for sequence in stop)

        # once a prefix has said a sequence all longer ones have
        kept[row, bisect_left(range(length), True, key=lambda place: stopped(place + 1)) + 1 :] = False
    return cut


def stopping(engine: Engine, *, read: Read, stop: Sequence[str]) -> Engine:
    """An engine whose rollouts end at a stop sequence too; tokens and log-probs are 0 behind it.

    The engine draws on to EOS or its horizon before what follows is dropped, so that a sequence saves no time.
    """

    def sample(*args: object, **options: object) -> tuple[Tensor, Tensor, Tensor]:
        tokens, log_prob, mask = engine(*args, **options)
        cut = cut_mask(tokens, mask, read=read, stop=stop)
        return torch.where(cut, tokens, 0), torch.where(cut, log_prob, 0.0), cut

    return sample
