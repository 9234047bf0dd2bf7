"""Block-parallel rollouts as the authors of EBFT run them, written plainly: what the comb is measured against.

N copies of the row; the tokens drawn so far stand behind the sequence in the order in which they were drawn (first
token of all K anchors, then the second of all, ...), a dense mask says what each of them sees, and every step is a full
forward pass over all of it: N·Σ_g (T + K·g) token-forwards to sample and N·(T + K·G) to score (arXiv 2603.12248,
appendix F). There is no cache. The model is a plain Hugging Face model with its own attention, logits come at all
places and become log-probabilities only where they are read.

It shares no code with `ebft.layout` and `ebft.attention`: it is a second opinion on them as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ebft.draw import inverse_cdf, keyed_uniform
from ebft.errors import UsageError


def positions(anchors: torch.Tensor, *, length: int, steps: int) -> torch.Tensor:
    """[B,K] anchors -> [B,T+K·steps] int64: every drawn token continues the positions of its own prefix."""
    step = torch.arange(steps, device=anchors.device)
    drawn = anchors[:, None, :] + step[:, None]  # [B,steps,K]
    return torch.cat([torch.arange(length, device=anchors.device).expand(len(anchors), -1), drawn.flatten(1)], 1)


def visibility(anchors: torch.Tensor, *, length: int, steps: int) -> torch.Tensor:
    """[B,K] anchors -> [B,S,S] bool, S = T+K·steps: which slot (row of the mask) sees which (column).

    A slot of the sequence sees those up to itself; a drawn token sees its prefix, the earlier ones of its own block and
    itself.
    """
    slot = torch.arange(length + anchors.shape[1] * steps, device=anchors.device)
    # the sequence is a block of its own
    block = torch.cat([slot.new_full((length,), -1), slot[: anchors.shape[1]].repeat(steps)])
    prefix = torch.cat([(slot[:length] + 1).expand(len(anchors), -1), anchors.repeat(1, steps)], 1)  # [B,S]
    same_block = (block[:, None] == block) & (slot <= slot[:, None])
    return (slot < prefix[..., None]) | same_block


@torch.no_grad()
def sample(
    model: Any, tokens: torch.Tensor, anchors: torch.Tensor, *, rollouts: int, horizon: int, seed: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw N rollouts of G tokens from every prefix at temperature 1, with the random numbers of `CausalPolicy.sample`.

    Args:
        model: a causal LM with sdpa attention and no sliding window; under autocast or not, as the caller wishes.
        tokens: [B,T] int64, no padding; anchors: [B,K] int64, all of them real.
        rollouts, horizon, seed: N, G and the seed of the keyed random numbers.

    Returns:
        tokens [B,K,N,G] int64 and their log_prob [B,K,N,G] float32.

    Raises:
        UsageError: the model does not take the mask as it is meant.
    """
    _refuse_other_attention(model)
    (batch, length), count = tokens.shape, anchors.shape[1]
    position = positions(anchors, length=length, steps=horizon - 1).repeat_interleave(rollouts, 0)
    mask = _mask(anchors, length=length, steps=horizon - 1, rollouts=rollouts)
    sequence_ids = torch.arange(batch, device=tokens.device)
    row = tokens.repeat_interleave(rollouts, 0)  # [B·N,T], a step longer by K
    last = (anchors - 1).repeat_interleave(rollouts, 0)  # [B·N,K], the slots that predict the next tokens
    log_probs = []
    for step in range(horizon):
        size = row.shape[1]
        log_prob = _log_probs_at(_logits(model, row, position[:, :size], mask[..., :size, :size]), last)
        uniform = keyed_uniform(seed, sequence_ids, anchors, rollouts=rollouts, step=step)  # [B,K,N]
        drawn = inverse_cdf(log_prob.exp(), uniform.transpose(1, 2).flatten(0, 1)[..., None])  # [B·N,K,1]
        log_probs.append(log_prob.gather(-1, drawn)[..., 0])
        row = torch.cat([row, drawn[..., 0]], 1)
        last = torch.arange(size, size + count, device=row.device).expand(batch * rollouts, -1)
    drawn, log_prob = row[:, length:], torch.cat(log_probs, 1)
    return _by_anchor(drawn, batch=batch, horizon=horizon), _by_anchor(log_prob, batch=batch, horizon=horizon)


def score(
    model: Any, tokens: torch.Tensor, anchors: torch.Tensor, rollout_tokens: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities at temperature 1 of all rollouts and of the sequence, in one pass with gradient.

    Args:
        model, tokens, anchors: as in `sample`.
        rollout_tokens: [B,K,N,G] int64.

    Returns:
        log_prob [B,K,N,G] and token_log_prob [B,T-1] (of tokens[:, 1:], from the first copy), both float32.

    Raises:
        UsageError: the model does not take the mask as it is meant.
    """
    _refuse_other_attention(model)
    (batch, length), (_, count, rollouts, horizon) = tokens.shape, rollout_tokens.shape
    row, position, mask = _whole_row(tokens, anchors, rollout_tokens)
    drawn = row[:, length:]
    logits = _logits(model, row, position, mask)
    later = torch.arange(length, length + count * (horizon - 1), device=row.device).expand(batch, -1)
    predecessors = torch.cat([anchors - 1, later], 1).repeat_interleave(rollouts, 0)  # [B·N,G·K]
    log_prob = _log_probs_at(logits, predecessors).gather(-1, drawn[..., None])[..., 0]
    token_log_prob = logits[::rollouts, : length - 1].float().log_softmax(-1).gather(-1, tokens[:, 1:, None])[..., 0]
    return _by_anchor(log_prob, batch=batch, horizon=horizon), token_log_prob


@torch.no_grad()
def hidden_states(
    model: Any, tokens: torch.Tensor, anchors: torch.Tensor, rollout_tokens: torch.Tensor, layers: Sequence[int]
) -> tuple[dict[int, torch.Tensor], dict[int, torch.Tensor]]:
    """States at the last tokens of all rollouts and targets: a full pass of the whole model, without its head.

    Args:
        model, tokens, anchors, rollout_tokens: as in `score`.
        layers: which of the states that the model reports; the last of these has gone through its final norm.

    Returns:
        layer -> [B,K,N,H] of the rollouts, layer -> [B,K,H] of the targets (from the first copy).
    """
    _refuse_other_attention(model)
    (batch, length), (_, count, rollouts, horizon) = tokens.shape, rollout_tokens.shape
    row, position, mask = _whole_row(tokens, anchors, rollout_tokens)
    states = model.base_model(
        input_ids=row, position_ids=position, attention_mask=mask, use_cache=False, output_hidden_states=True
    ).hidden_states
    rows = torch.arange(batch, device=row.device)[:, None]
    last = {layer: states[layer][:, length + (horizon - 1) * count :] for layer in layers}
    return (
        {layer: state.unflatten(0, (batch, rollouts)).transpose(1, 2) for layer, state in last.items()},
        {layer: states[layer][::rollouts][rows, anchors + horizon - 1] for layer in layers},
    )


def _whole_row(
    tokens: torch.Tensor, anchors: torch.Tensor, rollout_tokens: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The rows [B·N,T+G·K] with all that was drawn in the order of drawing, their positions and their mask."""
    (batch, length), (_, _, rollouts, horizon) = tokens.shape, rollout_tokens.shape
    drawn = rollout_tokens.permute(0, 2, 3, 1).reshape(batch * rollouts, -1)  # [B·N,G·K]
    row = torch.cat([tokens.repeat_interleave(rollouts, 0), drawn], 1)
    position = positions(anchors, length=length, steps=horizon).repeat_interleave(rollouts, 0)
    return row, position, _mask(anchors, length=length, steps=horizon, rollouts=rollouts)


def _logits(model: Any, row: torch.Tensor, position: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return model(input_ids=row, position_ids=position, attention_mask=mask, use_cache=False).logits  # [B·N,S,V]


def _log_probs_at(logits: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    """[R,S,V] logits and [R,Q] slots -> [R,Q,V] float32 log-probabilities."""
    rows = torch.arange(len(logits), device=logits.device)[:, None]
    return logits[rows, slots].float().log_softmax(-1)


def _mask(anchors: torch.Tensor, *, length: int, steps: int, rollouts: int) -> torch.Tensor:
    """[B·N,1,S,S]; for one sequence [1,1,S,S], which attention broadcasts over the copies."""
    seen = visibility(anchors, length=length, steps=steps)[:, None]
    return seen if len(anchors) == 1 else seen.repeat_interleave(rollouts, 0)


def _by_anchor(drawn: torch.Tensor, *, batch: int, horizon: int) -> torch.Tensor:
    """[B·N,G·K] in the order of drawing -> [B,K,N,G]."""
    return drawn.unflatten(1, (horizon, -1)).unflatten(0, (batch, -1)).permute(0, 3, 1, 2)


def _refuse_other_attention(model: Any) -> None:
    """transformers hands a 4-D mask on as it is: eager attention adds a bool one, sliding windows are lost with it."""
    config = model.config.get_text_config()
    if config._attn_implementation != "sdpa":
        raise UsageError(f"attention {config._attn_implementation!r}: the reference's bool mask is right with 'sdpa'")
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    window = getattr(config, "sliding_window", None) if not hasattr(config, "layer_types") else None
    if kinds != {"full_attention"} or window is not None:
        raise UsageError(
            f"{type(model).__name__} has other layers than full attention ({sorted(kinds)}, window {window}):"
            " the reference's one mask would be wrong for them"
        )
