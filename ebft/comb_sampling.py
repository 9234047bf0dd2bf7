"""Sampling over combs: rollouts from every nested prefix, the prefixes shared."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from ebft import attention, static_state
from ebft.draw import check_sampling, draw, keyed_uniform, sampling_log_probs
from ebft.head_blocks import all_logits, product_dtype
from ebft.layout import NestedPrefixLayout, layout_to_the_last_anchor

if TYPE_CHECKING:
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
    first: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Draw N rollouts of G tokens from every nested prefix, sharing the prefixes.

    Each token is computed once: T token-forwards (up to the last anchor) and K·N·(G-1) more, fewer when rollouts
    end early and `policy.decode` is ``eager``.

    Args:
        tokens, mask: [B,T] int64, bool; right-padded.
        anchors, anchor_mask: [B,K] int64, bool.
        rollouts, horizon: N, G.
        seed, sequence_ids: an integer or [B] int64, and [B] int64: with the anchor, the rollout and the step, the
            key of each random number; without `sequence_ids` the sequences are called 0..B-1.
        temperature, top_p, top_k, min_p: see `ebft.draw.sampling_log_probs`; temperature 0 is greedy.
        eos: token that ends a rollout; it counts, what follows is masked. None: rollouts never end early.
        document_ids: [B,T] int64; contexts stay inside their document.
        first: chooses the first tokens of an anchor's rollouts together, from log-probs [R,V] and uniform numbers
            [R,N] to tokens [R,N] (`ebft.samplers.first_tokens`); None draws them independently. `log_prob` is the
            policy's in any case.

    Returns:
        tokens [B,K,N,G] int64, log_prob [B,K,N,G] float32 (of the distribution really sampled from; float64 for a
        float64 model that decodes ``eager``), mask [B,K,N,G] bool (False at masked anchors and after EOS); tokens and
        log-probs are 0 where it is False.

    Raises:
        UsageError: the model cannot share prefixes, a setting is out of range, the text is too long for it, or it
            cannot be decoded as `policy.decode` says.
    """
    policy.require_shared()
    settings: dict[str, Any] = {"temperature": temperature, "top_p": top_p, "top_k": top_k, "min_p": min_p}
    check_sampling(**settings)
    if sequence_ids is None:
        sequence_ids = torch.arange(len(anchors), device=tokens.device)
    layout = layout_to_the_last_anchor(
        anchors, anchor_mask, rollouts=rollouts, horizon=horizon, document_ids=document_ids
    )
    length = layout.length
    policy.check_positions(layout)
    with policy.computing():
        prefill = attention.Prefill(layout)
        states = policy.backbone(tokens[:, :length], layout.positions()[:, :length], prefill)
        if policy.static is None:
            uniform = partial(keyed_uniform, seed, sequence_ids, layout.anchors, rollouts=rollouts)
            return _shrinking(policy, layout, prefill, states, uniform, settings, eos, first)
        padded = static_state.padded(layout, width=tokens.shape[1], document_ids=document_ids)
        numbers = keyed_uniform(seed, sequence_ids, padded.anchors, rollouts=rollouts, step=0).flatten(0, 1)
        at_anchors = states.gather(1, (padded.anchors - 1)[..., None].expand(-1, -1, states.shape[-1])).flatten(0, 1)
        drawn = _draw(policy, at_anchors, numbers, settings, first)
        state = static_state.begin(prefill, padded, drawn, seed=seed, sequence_ids=sequence_ids, eos=eos)
        return policy.static.run(state, settings, eos).results(layout.count)


def _shrinking(
    policy: CausalPolicy,
    layout: NestedPrefixLayout,
    prefill: attention.Prefill,
    states: torch.Tensor,
    uniform: Callable[..., torch.Tensor],
    settings: dict[str, Any],
    eos: int | None,
    first: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """All tokens from the hidden states [B,T,H] of the trunk; what has ended is left out of every later step."""
    anchor_mask, horizon = layout.anchor_mask, layout.horizon
    drawn = torch.zeros(*anchor_mask.shape, layout.rollouts, horizon, dtype=torch.int64, device=states.device)
    log_prob = torch.zeros(drawn.shape, dtype=torch.promote_types(states.dtype, torch.float32), device=drawn.device)
    alive = torch.zeros(drawn.shape, dtype=torch.bool, device=drawn.device)
    first_position = layout.unpack(layout.positions())[1][..., 0].flatten()
    # the live rollouts, as places of the flat [B*K*N]
    live = anchor_mask[:, :, None].expand(-1, -1, layout.rollouts).flatten().nonzero()[:, 0]
    # at step 0 the N rollouts of an anchor share one distribution, afterwards each has its own
    rows, columns = anchor_mask.nonzero(as_tuple=True)
    states, shared = states[rows, layout.anchors[rows, columns] - 1], layout.rollouts
    for step in range(horizon):
        numbers = uniform(step=step).flatten()[live].view(-1, shared)
        token, chosen = _draw(policy, states, numbers, settings, None if step else first)
        token, chosen = token.flatten(), chosen.flatten()
        chosen = chosen.to(log_prob.dtype)
        for whole, new in ((drawn, token), (log_prob, chosen), (alive, torch.ones_like(live).bool())):
            whole.view(-1, horizon)[live, step] = new
        keep = torch.ones_like(live, dtype=torch.bool) if eos is None else token != eos
        live = live[keep]
        if step == horizon - 1 or not len(live):
            break
        if step == 0:
            decode = attention.Decode(layout, prefill.kept, live)
        else:
            decode.advance(keep)
        states = policy.backbone(token[keep][None], (first_position[live] + step)[None], decode)[0]
        shared = 1
    return drawn, log_prob, alive


def _draw(
    policy: CausalPolicy,
    hidden: torch.Tensor,
    uniform: torch.Tensor,
    settings: dict,
    choose: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden rows [R,H] and Q uniform numbers for each [R,Q] -> tokens and their log-probs [R,Q]."""
    weight = policy.head_weight
    logits: Callable[[torch.Tensor], torch.Tensor] = policy.logits
    # a weight that autocast casts is left to it: it casts once for all calls
    if weight is not None and weight.dtype == product_dtype(weight):
        logits = partial(all_logits, weight=weight)

    def tokens_of(rows: torch.Tensor, numbers: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if choose is None:
            return draw(logits(rows), numbers, **settings)
        log_probs = sampling_log_probs(logits(rows), **settings)
        tokens = choose(log_probs, numbers)
        return tokens, log_probs.gather(-1, tokens)

    parts = zip(hidden.split(policy.head_rows), uniform.split(policy.head_rows), strict=True)
    drawn = [tokens_of(rows, numbers) for rows, numbers in parts]
    return torch.cat([tokens for tokens, _ in drawn]), torch.cat([log_probs for _, log_probs in drawn])
