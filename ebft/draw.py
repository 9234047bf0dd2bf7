"""From logits to tokens: truncation, keyed uniform numbers, the inverse CDF. Pure functions.

Every sampled token uses one uniform number that is a counter-based hash of (seed, sequence id, anchor, rollout,
step). So a token depends on its key and its distribution only: not on how a batch was split, on which other rollouts
were drawn, or on a device's generator; and two policies sampled with the same keys share their random numbers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ebft.errors import UsageError
from ebft.hashing import finalise, scramble, shift_right


def check_sampling(
    *, temperature: float = 1.0, top_p: float = 1.0, top_k: int | None = None, min_p: float | None = None
) -> None:
    """Raise UsageError on settings outside their range; temperature 0 means greedy."""
    if not 0 <= temperature < float("inf"):
        raise UsageError(f"temperature={temperature}: expected a number > 0, or 0 for greedy decoding")
    if not 0 < top_p <= 1:
        raise UsageError(f"top_p={top_p}: expected a number in (0, 1]; 1 keeps every token")
    if top_k is not None and top_k < 1:
        raise UsageError(f"top_k={top_k}: expected a whole number >= 1, or nothing to keep every token")
    if min_p is not None and not 0 <= min_p <= 1:
        raise UsageError(f"min_p={min_p}: expected a number in [0, 1], or nothing to keep every token")


def is_truncated(settings: Mapping[str, Any]) -> bool:
    """Whether any of top_p, top_k, min_p of `settings` may drop a token."""
    return settings.get("top_p", 1.0) < 1 or settings.get("top_k") is not None or bool(settings.get("min_p"))


def draw(logits: torch.Tensor, uniform: torch.Tensor, **settings) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw tokens by the inverse CDF and say how likely they were.

    Args:
        logits: [..., V]; a float32 or float64 tensor may be overwritten.
        uniform: [..., Q] float64 in [0, 1): Q draws from each distribution.
        settings: temperature, top_p, top_k, min_p of `sampling_log_probs`.

    Returns:
        tokens [..., Q] int64 and their log-probs [..., Q] under the distribution sampled from.
    """
    if is_truncated(settings) or settings.get("temperature", 1.0) == 0:
        log_probs = sampling_log_probs(logits, **settings)
        tokens = inverse_cdf(log_probs.exp(), uniform)
        return tokens, log_probs.gather(-1, tokens)
    # every token may be drawn: one pass of exp over the vocabulary does, instead of one for the log-probs and another
    scaled = logits if logits.dtype == torch.float64 else logits.float()
    if settings.get("temperature", 1.0) != 1:
        scaled = scaled.div_(settings["temperature"])
    weights = scaled.sub_(scaled.amax(-1, keepdim=True)).exp_()
    tokens = inverse_cdf(weights, uniform)
    return tokens, (weights.gather(-1, tokens) / weights.sum(-1, keepdim=True)).log()


def sampling_log_probs(
    logits: torch.Tensor,
    *,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int | None = None,
    min_p: float | None = None,
) -> torch.Tensor:
    """Log-probabilities of the distribution really sampled from: tempered, truncated, renormalised.

    Truncations apply in the order top-k, top-p, min-p, each to the tempered distribution that the one before left.
    Temperature 0 (greedy) puts all mass on the most likely token, the first one among ties.

    Args:
        logits: [..., V] of any float dtype.

    Returns:
        [..., V] float32 (float64 for float64 logits), -inf where truncated. Differentiable in the kept logits.
    """
    logits = logits if logits.dtype == torch.float64 else logits.float()
    if temperature == 0:
        best = logits.argmax(-1, keepdim=True)
        return torch.full_like(logits, -torch.inf).scatter(-1, best, 0.0)
    scaled = logits / temperature if temperature != 1 else logits
    if top_k is not None and top_k < logits.shape[-1]:
        kept = torch.zeros_like(scaled, dtype=torch.bool).scatter(-1, scaled.topk(top_k, -1).indices, True)
        scaled = scaled.masked_fill(~kept, -torch.inf)
    if top_p < 1:
        ordered, order = scaled.sort(dim=-1, descending=True, stable=True)
        before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)
        dropped = torch.zeros_like(scaled, dtype=torch.bool).scatter(-1, order, before >= top_p)
        scaled = scaled.masked_fill(dropped, -torch.inf)
    log_probs = scaled.log_softmax(-1)
    if min_p:
        floor = log_probs.detach().amax(-1, keepdim=True) + torch.log(torch.tensor(min_p, dtype=log_probs.dtype))
        log_probs = log_probs.masked_fill(log_probs < floor, -torch.inf).log_softmax(-1)
    return log_probs


def inverse_cdf(weights: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """The token at which the cumulative distribution first exceeds each uniform number.

    Args:
        weights: [..., V] probabilities up to a factor.
        uniform: [..., Q] float64 in [0, 1): Q draws from each distribution.

    Returns:
        [..., Q] int64, never a token of probability zero.
    """
    # Two levels, blocks of tokens and tokens of a block: a running sum over V = 49k in float64 takes four times as
    # long, and in float32 its rounding is larger than many of the probabilities.
    size = weights.shape[-1]
    if size % _BLOCK:
        weights = torch.nn.functional.pad(weights, (0, -size % _BLOCK))
    blocks = weights.unflatten(-1, (-1, _BLOCK))
    block, rest = _locate(blocks.sum(-1).double(), uniform, fraction=True)
    inside = blocks.gather(-2, block[..., None].expand(*block.shape, _BLOCK)).double()  # [..., Q, _BLOCK]
    token, _ = _locate(inside, rest[..., None], fraction=False)
    return block * _BLOCK + token[..., 0]


_BLOCK = 128


def _locate(masses: torch.Tensor, level: torch.Tensor, *, fraction: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Where the running sum of `masses` [..., M] first exceeds each `level` [..., Q], and what is left of the level.

    The level is a fraction of the total, or a mass. It is kept strictly below the total, whatever the rounding, so
    that a trailing zero mass is never chosen.
    """
    running = masses.cumsum(-1)
    total = running[..., -1:]
    level = torch.minimum(level * total if fraction else level, torch.nextafter(total, torch.zeros_like(total)))
    index = torch.searchsorted(running, level.contiguous(), right=True)
    # running - masses may round above the sum before it: what is left is never negative
    return index, (level - (running - masses).gather(-1, index)).clamp(min=0)


def keyed_uniform(
    seed: int | torch.Tensor,
    sequence_ids: torch.Tensor,
    anchors: torch.Tensor,
    *,
    rollouts: int,
    step: int | torch.Tensor,
) -> torch.Tensor:
    """One uniform number for each rollout of each anchor at one step.

    Args:
        seed: any integer, or [B] int64, one for each sequence.
        sequence_ids: [B] int64, what the sequences are called (not where they stand in the batch).
        anchors: [B,K] int64 prefix lengths.
        rollouts: N.
        step: index of the token in its rollout, 0 <= step < G; an integer, or [] int64.

    Returns:
        [B,K,N] float64, multiples of 2^-53 in [0, 1).
    """
    device = sequence_ids.device
    if not isinstance(seed, torch.Tensor):
        seed = torch.full((1,), seed & (2**63 - 1), dtype=torch.int64, device=device)
    state = finalise(seed[:, None, None])
    for part in (
        sequence_ids[:, None, None],
        anchors[:, :, None],
        torch.arange(rollouts, device=device)[None, None, :],
        step.view(1, 1, 1) if isinstance(step, torch.Tensor) else torch.full((1, 1, 1), step, device=device),
    ):
        state = finalise(state ^ scramble(part))
    return shift_right(state, 11).double() * 2.0**-53


def until_eos(tokens: torch.Tensor, eos: int | None) -> torch.Tensor:
    """[...,G] tokens -> [...,G] bool: True up to and including the first EOS."""
    if eos is None:
        return torch.ones_like(tokens, dtype=torch.bool)
    ended = (tokens == eos).long().cumsum(-1)
    return (ended - (tokens == eos).long()) == 0
