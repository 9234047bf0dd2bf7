"""The obvious sampler: one full forward pass per prefix, rollout and token. Slow; the oracle of all others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ebft.draw import check_sampling, inverse_cdf, keyed_uniform, sampling_log_probs, until_eos


@torch.no_grad()
def sample(
    logits: Callable[[torch.Tensor], torch.Tensor],
    tokens: torch.Tensor,
    mask: torch.Tensor,
    anchors: torch.Tensor,
    anchor_mask: torch.Tensor,
    *,
    rollouts: int,
    horizon: int,
    seed: int | torch.Tensor,
    sequence_ids: torch.Tensor | None = None,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int | None = None,
    min_p: float | None = None,
    eos: int | None = None,
    document_ids: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Draw rollouts as `CausalPolicy.sample` does, for any model that gives logits.

    Args:
        logits: [T'] int64 context -> [V] logits of the next token.
        Others as in `ebft.policy.CausalPolicy.sample`, with the same random numbers.

    Returns:
        tokens [B,K,N,G] int64, log_prob [B,K,N,G] float32, mask [B,K,N,G] bool.
    """
    settings: dict[str, Any] = {"temperature": temperature, "top_p": top_p, "top_k": top_k, "min_p": min_p}
    check_sampling(**settings)
    if sequence_ids is None:
        sequence_ids = torch.arange(tokens.shape[0], device=tokens.device)
    shape = (*anchors.shape, rollouts, horizon)
    drawn, log_prob = torch.zeros(shape, dtype=torch.int64), torch.zeros(shape)
    uniform = torch.stack(
        [keyed_uniform(seed, sequence_ids, anchors, rollouts=rollouts, step=step) for step in range(horizon)], -1
    )
    for b, k in anchor_mask.nonzero().tolist():
        prefix = _context(tokens[b], int(anchors[b, k]), None if document_ids is None else document_ids[b])
        for n in range(rollouts):
            context = prefix
            for g in range(horizon):
                log_probs = sampling_log_probs(logits(context), **settings)
                token = inverse_cdf(log_probs, uniform[b, k, n, g : g + 1])
                drawn[b, k, n, g], log_prob[b, k, n, g] = token[0], log_probs[token[0]]
                context = torch.cat([context, token])
    alive = until_eos(drawn, eos) & anchor_mask[:, :, None, None]
    return drawn, log_prob.masked_fill(~alive, 0.0), alive


def _context(tokens: torch.Tensor, anchor: int, document_ids: torch.Tensor | None) -> torch.Tensor:
    """The prefix of length `anchor`, from the start of its last token's document."""
    start = 0
    if document_ids is not None:
        start = anchor - 1
        while start > 0 and document_ids[start - 1] == document_ids[start]:
            start -= 1
    return tokens[start:anchor]
