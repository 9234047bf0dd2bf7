"""Log-probabilities of chosen tokens from hidden states, without ever holding a [tokens, vocabulary] tensor."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch.utils.checkpoint import checkpoint

from ebft.draw import is_truncated, sampling_log_probs
from ebft.head_blocks import FrozenHead, TrainedHead, product_dtype

Compare = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # logits [R,V] of two models -> [R]


def chosen_log_probs(
    logits: Callable[[torch.Tensor], torch.Tensor],
    hidden: torch.Tensor,
    tokens: torch.Tensor,
    *,
    rows: int,
    settings: Mapping,
    weight: torch.Tensor | None = None,
    entropy: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Log-probs of Q tokens from each of R hidden states, some states at a time, and the entropy on request.

    Args:
        logits: the head, [R,H] -> [R,V].
        hidden: [R,H], with gradient.
        tokens: [R,Q] int64.
        rows: states whose logits are computed at once, unless `weight` is given.
        settings: temperature, top_p, ... of `ebft.draw.sampling_log_probs`.
        weight: [V,H], when the head is ``hidden @ weight.T`` and nothing else. Then a few tokens of the vocabulary are
            handled at a time, and the gradient is written out (`ebft.head_blocks`). Any other head goes through
            autograd with its logits computed a second time.
        entropy: also return the entropy of each state's distribution.

    Returns:
        log-probs [R,Q] and entropies [R] (None unless asked for) in nats; float32 (float64 for a float64 model).
    """
    temperature = settings.get("temperature", 1.0)
    if weight is not None and temperature > 0 and not is_truncated(settings):
        wanted = torch.is_grad_enabled() and hidden.requires_grad
        head = FrozenHead if wanted and not weight.requires_grad else TrainedHead  # for values alone the latter, too
        # cast once, not for every chunk; the gradient of a trained weight is cast back
        chosen, spread = head.apply(hidden, weight.to(product_dtype(weight)), tokens, temperature, entropy)
        return chosen, spread if entropy else None

    def chunk(part: torch.Tensor, picked: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        log_probs = sampling_log_probs(logits(part), **settings)
        spread = _entropy(log_probs) if entropy else log_probs.new_empty(0)
        return log_probs.gather(-1, picked), spread

    parts = list(zip(hidden.split(rows), tokens.split(rows), strict=True))
    if torch.is_grad_enabled():
        results = [checkpoint(chunk, *part, use_reentrant=False) for part in parts]
    else:
        results = [chunk(*part) for part in parts]
    return torch.cat([r[0] for r in results]), torch.cat([r[1] for r in results]) if entropy else None


def compared(
    function: Compare,
    logits: Callable[[torch.Tensor], torch.Tensor],
    hidden: torch.Tensor,
    reference_logits: Callable[[torch.Tensor], torch.Tensor],
    reference_hidden: torch.Tensor,
    *,
    rows: int,
    temperature: float = 1.0,
) -> torch.Tensor:
    """A function of two models' next-token distributions, `rows` states at a time, computed again in backward.

    Args:
        function: logits [R,V] of the model and of the reference, over the temperature -> [R].
        logits, reference_logits: their heads, [R,H] -> [R,V].
        hidden: [R,H], with gradient; reference_hidden: [R,H'], without.

    Returns:
        Values [R], float32 (float64 for a float64 model).
    """

    def chunk(ours: torch.Tensor, theirs: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            reference = reference_logits(theirs) / temperature
        return function(logits(ours) / temperature, reference)

    parts = zip(hidden.split(rows), reference_hidden.split(rows), strict=True)
    if torch.is_grad_enabled():
        return torch.cat([checkpoint(chunk, *part, use_reentrant=False) for part in parts])
    return torch.cat([chunk(*part) for part in parts])


def _entropy(log_probs: torch.Tensor) -> torch.Tensor:
    """[R,V] -> [R]; a token of probability zero adds nothing."""
    finite = log_probs.masked_fill(log_probs == -torch.inf, 0.0)
    return -(log_probs.exp() * finite).sum(-1)
