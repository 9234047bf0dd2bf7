"""Log-probabilities of chosen tokens from hidden states, without ever holding a [tokens, vocabulary] tensor."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch.utils.checkpoint import checkpoint

from ebft.draw import sampling_log_probs


def chosen_log_probs(
    logits: Callable[[torch.Tensor], torch.Tensor],
    hidden: torch.Tensor,
    tokens: torch.Tensor,
    *,
    rows: int,
    settings: Mapping,
    weight: torch.Tensor | None = None,
) -> torch.Tensor:
    """Log-probs of Q tokens from each hidden state, `rows` states at a time.

    Args:
        logits: the head, [R,H] -> [R,V].
        hidden: [...,H], with gradient.
        tokens: [...,Q] int64.
        settings: temperature, top_p, ... of `ebft.draw.sampling_log_probs`.
        weight: [V,H], when the head is ``hidden @ weight.T`` with a frozen weight and nothing else: the gradient is
            then found on the way, instead of computing the logits a second time.

    Returns:
        [...,Q] float32 (float64 for a float64 model).
    """
    flat, wanted = hidden.flatten(0, -2), tokens.flatten(0, -2)
    truncated = any(settings.get(name) not in (None, 1.0) for name in ("top_p", "top_k", "min_p"))
    temperature = settings.get("temperature", 1.0)

    def chunk(part: torch.Tensor, picked: torch.Tensor) -> torch.Tensor:
        if weight is not None and part.requires_grad and not truncated and temperature > 0:
            return _FrozenHead.apply(part, weight, picked, temperature)
        return sampling_log_probs(logits(part), **settings).gather(-1, picked)

    parts = zip(flat.split(rows), wanted.split(rows), strict=True)
    if weight is None and torch.is_grad_enabled():
        return torch.cat([checkpoint(chunk, *part, use_reentrant=False) for part in parts]).view(tokens.shape)
    return torch.cat([chunk(*part) for part in parts]).view(tokens.shape)


class _FrozenHead(torch.autograd.Function):
    """log softmax(h Wᵀ/τ)[tokens] for a frozen W.

    ∂ log p(y)/∂h = (W_y - Σ_v p_v W_v)/τ, so the mean row Σ_v p_v W_v [R,H] is all that backward needs.
    """

    @staticmethod
    def forward(ctx, hidden, weight, tokens, temperature):
        compute = weight.dtype if weight.dtype == torch.float64 else torch.float32
        log_probs = sampling_log_probs((hidden.to(weight.dtype) @ weight.T).to(compute), temperature=temperature)
        chosen = log_probs.gather(-1, tokens)
        ctx.save_for_backward(weight, tokens, log_probs.exp_().to(weight.dtype) @ weight)
        ctx.temperature = temperature
        ctx.dtype = hidden.dtype
        return chosen

    @staticmethod
    def backward(ctx, gradient):
        weight, tokens, mean_row = ctx.saved_tensors
        rows = (gradient[..., None].to(weight.dtype) * weight[tokens]).sum(-2, dtype=gradient.dtype)
        rows = rows - gradient.sum(-1, keepdim=True) * mean_row.to(gradient.dtype)
        return (rows / ctx.temperature).to(ctx.dtype), None, None, None
