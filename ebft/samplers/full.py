"""Whole answers: from the end of every prompt to EOS, for question answering, verifiable rewards and evaluation."""

from __future__ import annotations

from functools import partial

import torch

from ebft.errors import UsageError
from ebft.policy import CausalPolicy
from ebft.samplers import snapshot
from ebft.samplers.anchors import single
from ebft.samplers.component import Engine


def prompt_lengths(mask: torch.Tensor, answer_mask: torch.Tensor | None = None) -> torch.Tensor:
    """[B] int64: tokens before the answer of every row, all tokens of a row without one.

    Args:
        mask: [B,T] bool, right-padded.
        answer_mask: [B,T] bool, optional: what follows the prompt; the prompt ends at its first token.
    """
    lengths = mask.long().sum(1)
    if answer_mask is None:
        return lengths
    answer = answer_mask & mask
    return torch.where(answer.any(1), answer.long().argmax(1), lengths)


def place(mask: torch.Tensor, *, answer_mask: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Anchors [B,1] and their mask [B,1]: the end of the prompt of every row, see `prompt_lengths`."""
    return single(prompt_lengths(mask, answer_mask))


def answer_lengths(mask: torch.Tensor, anchor_mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of rollouts with the mask [B,K,N,G]: their mean number of tokens and the share of those with all G, [B,K] each.

    Both are 0 where `anchor_mask` [B,K] is False.
    """
    tokens = mask.sum(-1)
    found = tokens.float().mean(-1), (tokens == mask.shape[-1]).float().mean(-1)
    lengths, at_limit = (torch.where(anchor_mask, value, 0.0) for value in found)
    return lengths, at_limit


def full_engine(policy: CausalPolicy) -> Engine:
    """What draws whole answers: the shared prefixes of `CausalPolicy.sample`, or copies of the model's own cache."""
    return partial(snapshot.sample, snapshot.cache_reader(policy)) if policy.not_shared else policy.sample


def sample(
    engine: Engine,
    tokens: torch.Tensor,
    mask: torch.Tensor,
    lengths: torch.Tensor,
    *,
    rollouts: int,
    max_new_tokens: int,
    eos: int,
    **options,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """N answers to every prompt, each until EOS or `max_new_tokens`.

    The N share the prompt, and finished ones cost nothing.

    Args:
        engine: `CausalPolicy.sample`, or `functools.partial(snapshot.sample, cache_reader(policy))`.
        tokens, mask: [B,T] int64, bool; right-padded, what follows the prompt is not read.
        lengths: [B] int64, of the prompts; 0 for a row without one, which gets nothing.
        eos: token that ends an answer; it counts.
        options: seed, sequence_ids, temperature, ... of the engine.

    Returns:
        tokens [B,1,N,G], log_prob [B,1,N,G] float32, mask [B,1,N,G], G = max_new_tokens; 0 where masked.

    Raises:
        UsageError: no row has a prompt, a prompt is longer than its row, or there is no EOS.
    """
    if eos is None:
        raise UsageError("eos=None: whole answers end at a token; give the tokenizer's eos_token_id, or another")
    if (lengths > mask.sum(1)).any():
        row = int((lengths > mask.sum(1)).nonzero()[0, 0])
        raise UsageError(f"the prompt of row {row} has {int(lengths[row])} tokens, its row {int(mask[row].sum())}")
    anchors, anchor_mask = single(lengths)
    return engine(tokens, mask, anchors, anchor_mask, rollouts=rollouts, horizon=max_new_tokens, eos=eos, **options)
