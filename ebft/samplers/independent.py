"""The obvious sampler: one full forward pass per prefix, rollout and token. Slow; the oracle of all others."""

from __future__ import annotations

from typing import Any

import torch

from ebft.draw import check_sampling, draw, keyed_uniform, until_eos
from ebft.layout import document_starts, layout_to_the_last_anchor
from ebft.policy import CausalPolicy


@torch.no_grad()
def sample(
    policy: CausalPolicy,
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
    """Draw rollouts as `CausalPolicy.sample` does, from the plain logits of any model.

    Args: as in `CausalPolicy.sample`, with the same random numbers.

    Returns:
        tokens [B,K,N,G] int64, log_prob [B,K,N,G] float32, mask [B,K,N,G] bool.

    Raises:
        UsageError: a setting is out of range, or the text is too long for the model.
    """
    settings: dict[str, Any] = {"temperature": temperature, "top_p": top_p, "top_k": top_k, "min_p": min_p}
    check_sampling(**settings)
    layout = layout_to_the_last_anchor(
        anchors, anchor_mask, rollouts=rollouts, horizon=horizon, document_ids=document_ids
    )
    policy.check_positions(layout)
    if sequence_ids is None:
        sequence_ids = torch.arange(tokens.shape[0], device=tokens.device)
    shape = (*anchors.shape, rollouts, horizon)
    drawn = torch.zeros(shape, dtype=torch.int64, device=tokens.device)
    log_prob = torch.zeros(shape, device=tokens.device)
    uniform = torch.stack(
        [keyed_uniform(seed, sequence_ids, anchors, rollouts=rollouts, step=step) for step in range(horizon)], -1
    )
    starts = document_starts(tokens, document_ids)
    for b, k, n in anchor_mask[:, :, None].expand(shape[:3]).nonzero().tolist():
        anchor = int(anchors[b, k])
        context = tokens[b, starts[b, anchor - 1] : anchor]
        for g in range(horizon):
            with policy.plain() as model:
                logits = model(input_ids=context[None], use_cache=False).logits[0, -1]
            token, chosen = draw(logits.clone(), uniform[b, k, n, g : g + 1], **settings)
            drawn[b, k, n, g], log_prob[b, k, n, g] = token[0], chosen[0]
            context = torch.cat([context, token])
    alive = until_eos(drawn, eos) & anchor_mask[:, :, None, None]
    return drawn.masked_fill(~alive, 0), log_prob.masked_fill(~alive, 0.0), alive
