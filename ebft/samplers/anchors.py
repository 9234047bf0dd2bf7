"""Where rollouts start. Pure functions of masks; all return (anchors [B,K] int64, anchor_mask [B,K] bool).

An anchor is a prefix length a: the context is tokens[0:a], the target tokens[a : a+G]. Both must lie in one document,
and the target in the answer when there is an answer mask. K is the largest count of any row; shorter rows are masked.
A row without a valid anchor contributes nothing; only when no row has one is that an error.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ebft.errors import UsageError
from ebft.layout import document_starts


def strided(
    mask: torch.Tensor,
    *,
    stride: int,
    first: int,
    horizon: int,
    answer_mask: torch.Tensor | None = None,
    document_ids: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Anchors at `first`, `first + stride`, ... tokens into every document (arXiv 2603.12248, appendix F).

    Args:
        mask: [B,T] bool, right-padded.
        stride: tokens between neighbouring anchors, >= 1.
        first: context tokens of the first anchor, >= 1. Neither need divide anything.
        horizon: G; the whole target must fit.
        answer_mask: [B,T] bool, optional.
        document_ids: [B,T] int64, optional; equal neighbours are one document.

    Raises:
        UsageError: a number below 1, or no row has room for an anchor.
    """
    if stride < 1:
        raise UsageError(f"stride={stride}: expected a whole number >= 1")
    context, valid = _candidates(mask, first, horizon, answer_mask, document_ids)
    return _collect(valid & ((context - first) % stride == 0), mask, first, horizon, answer_mask)


def random(
    mask: torch.Tensor,
    *,
    count: int,
    first: int,
    horizon: int,
    generator: torch.Generator | Sequence[torch.Generator],
    answer_mask: torch.Tensor | None = None,
    document_ids: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`count` anchors of each row, uniform without replacement among all valid ones with >= `first` context tokens.

    An ablation of `strided` at equal cost. Rows with fewer valid places use them all. Arguments and errors as in
    `strided`; `generator` (of the CPU; or one for each row, so that a row's anchors depend on no other row) is the
    only source of randomness.
    """
    if count < 1:
        raise UsageError(f"count={count}: expected a whole number >= 1")
    _, valid = _candidates(mask, first, horizon, answer_mask, document_ids)
    batch, length = mask.shape
    generators = [generator] * batch if isinstance(generator, torch.Generator) else generator
    rows = [torch.rand(length, generator=g, dtype=torch.float64) for g in generators]
    key = torch.stack(rows).to(mask.device).masked_fill(~valid, -1.0)
    chosen = torch.zeros_like(valid).scatter(1, key.topk(min(count, key.shape[1]), 1).indices, True)
    return _collect(chosen & valid, mask, first, horizon, answer_mask)


def single(prompt_lengths: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """One anchor at the end of each prompt; [B] lengths, 0 for a row without a prompt.

    Raises:
        UsageError: no row has a prompt.
    """
    if not (prompt_lengths > 0).any():
        raise UsageError(f"prompt lengths {prompt_lengths.tolist()}: expected at least one prompt of 1 token or more")
    return prompt_lengths.clamp(min=1)[:, None].long(), (prompt_lengths > 0)[:, None]


def targets(
    tokens: torch.Tensor,
    mask: torch.Tensor,
    anchors: torch.Tensor,
    anchor_mask: torch.Tensor,
    *,
    horizon: int,
    answer_mask: torch.Tensor | None = None,
    document_ids: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """tokens[a : a+G] of every anchor: [B,K,G] int64, and their mask [B,K,G] bool.

    A target ends with its row, its document or, with an answer mask, its answer; at masked anchors it is empty.
    """
    index = torch.where(anchor_mask, anchors, 0)[..., None] + torch.arange(horizon, device=tokens.device)
    inside = anchor_mask[..., None] & (index < tokens.shape[1])
    rows = torch.arange(tokens.shape[0], device=tokens.device)[:, None, None]
    index = index.clamp(max=tokens.shape[1] - 1)
    usable = mask if answer_mask is None else mask & answer_mask
    inside &= usable[rows, index].cummin(-1).values
    if document_ids is not None:
        starts = document_starts(tokens, document_ids)
        inside &= starts[rows, index] == starts.gather(1, (anchors - 1).clamp(0, tokens.shape[1] - 1))[..., None]
    return tokens[rows, index], inside


def _candidates(mask, first, horizon, answer_mask, document_ids):
    """[B,T] context length inside the document of every prefix length a = 0..T-1, and whether a is a valid anchor."""
    for name, value in (("first", first), ("horizon", horizon)):
        if value < 1:
            raise UsageError(f"{name}={value}: expected a whole number >= 1")
    batch, length = mask.shape
    place = torch.arange(length, device=mask.device).expand(batch, -1)
    start = document_starts(place, document_ids)
    context = place - start
    usable = mask if answer_mask is None else mask & answer_mask
    # a run of usable target tokens of one document: its length up to and including each place
    breaks = torch.where(usable, start, place + 1).cummax(1).values
    run = place + 1 - breaks
    fits = torch.zeros_like(mask)
    if horizon <= length:
        fits[:, : length - horizon + 1] = run[:, horizon - 1 :] >= horizon
    return context, fits & (context >= first)


def _collect(chosen, mask, first, horizon, answer_mask) -> tuple[torch.Tensor, torch.Tensor]:
    """[B,T] bool -> the chosen places of each row in order, padded to the longest row with 1."""
    counts = chosen.sum(1)
    width = int(counts.max()) if counts.numel() else 0
    if width == 0 and answer_mask is not None:
        raise UsageError(
            f"no room for an anchor: no answer has a target of horizon={horizon} tokens with first={first} tokens of"
            f" context before it. The longest answers of a row are {int((mask & answer_mask).sum(1).max())} tokens in"
            " all. Give longer answers, a smaller first or a smaller horizon."
        )
    if width == 0:
        raise UsageError(
            f"no room for an anchor: first={first} context tokens and horizon={horizon} target tokens need"
            f" {first + horizon} tokens in one document, the longest row has {int(mask.sum(1).max())}."
            " Give longer text, a smaller first or a smaller horizon."
        )
    order = torch.argsort(~chosen, dim=1, stable=True)[:, :width]
    anchor_mask = torch.arange(width, device=mask.device) < counts[:, None]
    return torch.where(anchor_mask, order, 1), anchor_mask
