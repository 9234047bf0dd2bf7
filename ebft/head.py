"""Log-probabilities of chosen tokens from hidden states, without ever holding a [tokens, vocabulary] tensor."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch.utils.checkpoint import checkpoint

from ebft.draw import is_truncated, sampling_log_probs
from ebft.tuning import PerDevice

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
    """Log-probs of Q tokens from each of R hidden states, `rows` states at a time, and the entropy on request.

    Args:
        logits: the head, [R,H] -> [R,V].
        hidden: [R,H], with gradient.
        tokens: [R,Q] int64.
        settings: temperature, top_p, ... of `ebft.draw.sampling_log_probs`.
        weight: [V,H], when the head is ``hidden @ weight.T`` and nothing else. The gradient is then written out: of a
            frozen weight it is found on the way, of a trained one from the logits computed a second time. Any other
            head goes through autograd with its logits computed a second time.
        entropy: also return the entropy of each state's distribution.

    Returns:
        log-probs [R,Q] and entropies [R] (None unless asked for) in nats; float32 (float64 for a float64 model).
    """
    temperature = settings.get("temperature", 1.0)
    smooth = temperature > 0 and not is_truncated(settings) and torch.is_grad_enabled()
    if weight is not None and smooth and (hidden.requires_grad or weight.requires_grad):
        matrix = weight.to(_product_dtype(weight))  # once, not for every chunk; its gradient is cast back
        head = _TrainedHead if weight.requires_grad else _FrozenHead
        chosen, spread = head.apply(hidden, matrix, tokens, temperature, rows, entropy)
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


def _product_dtype(weight: torch.Tensor) -> torch.dtype:
    """The dtype in which the surrounding autocast multiplies."""
    kind = weight.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype


# Rows of logits handled at once: a few of a large vocabulary fit into a processor's cache. On a GPU: all there are.
ROWS_IN_CACHE = PerDevice(cpu=8, cuda=1 << 20)


def _logits(hidden: torch.Tensor, weight: torch.Tensor, temperature: float) -> torch.Tensor:
    """h Wᵀ/τ [R,V] in at least float32."""
    logits = (hidden @ weight.T).to(torch.promote_types(weight.dtype, torch.float32))
    return logits if temperature == 1 else logits.div_(temperature)


def _log_normalisers(logits: torch.Tensor) -> torch.Tensor:
    """[R,V] -> log Σ_v exp z_v, [R,1]."""
    return torch.cat([rows.logsumexp(-1, keepdim=True) for rows in logits.split(ROWS_IN_CACHE.on(logits.device))])


def _log_softmax(hidden: torch.Tensor, weight: torch.Tensor, temperature: float) -> torch.Tensor:
    """log softmax(h Wᵀ/τ) [R,V] in at least float32, computed in place."""
    logits = _logits(hidden, weight, temperature)
    for rows in logits.split(ROWS_IN_CACHE.on(logits.device)):
        rows.sub_(rows.logsumexp(-1, keepdim=True))
    return logits


class _FrozenHead(torch.autograd.Function):
    """log softmax(h Wᵀ/τ)[tokens] and its entropy H for a frozen W.

    ∂ log p(y)/∂h = (W_y - Σ_v p_v W_v)/τ and ∂H/∂h = -Σ_v p_v (log p_v + H) W_v/τ: two rows [R,H] are all that
    backward needs.
    """

    @staticmethod
    def forward(ctx, hidden, weight, tokens, temperature, rows, entropy):
        picks, spreads, means, tilts = [], [], [], []
        for part, picked in zip(hidden.split(rows), tokens.split(rows), strict=True):
            log_probs = _log_softmax(part.to(weight.dtype), weight, temperature)
            picks.append(log_probs.gather(-1, picked))
            if entropy:
                probs = log_probs.exp()
                spreads.append(-(probs * log_probs).sum(-1))
                tilts.append((probs * (log_probs + spreads[-1][:, None])).to(weight.dtype) @ weight)
                means.append(probs.to(weight.dtype) @ weight)
            else:
                means.append(log_probs.exp_().to(weight.dtype) @ weight)
        chosen, spread = torch.cat(picks), torch.cat(spreads) if entropy else hidden.new_empty(0)
        ctx.save_for_backward(weight, tokens, torch.cat(means), *([torch.cat(tilts)] if entropy else []))
        ctx.temperature, ctx.dtype = temperature, hidden.dtype
        return chosen, spread

    @staticmethod
    def backward(ctx, gradient, on_entropy):
        weight, tokens, mean_row, *tilt = ctx.saved_tensors
        rows = (gradient[..., None].to(weight.dtype) * weight[tokens]).sum(-2, dtype=gradient.dtype)
        rows = rows - gradient.sum(-1, keepdim=True) * mean_row.to(gradient.dtype)
        if tilt:
            rows = rows - on_entropy[:, None] * tilt[0].to(gradient.dtype)
        return (rows / ctx.temperature).to(ctx.dtype), None, None, None, None, None


# Every chunk adds a whole [V,H] to the weight's gradient, so in backward its chunks are larger.
ROWS_OF_A_WEIGHT_GRADIENT = 512


class _TrainedHead(torch.autograd.Function):
    """The same for a W that is trained: backward computes the logits again, a chunk at a time.

    With z = h Wᵀ/τ: ∂ log p(y)/∂z = e_y - p and ∂H/∂z = -p (log p + H). The weight's gradient is summed over the
    chunks in at least float32.
    """

    @staticmethod
    def forward(ctx, hidden, weight, tokens, temperature, rows, entropy):
        chosen, normalisers, spreads = [], [], []
        for part, picked in zip(hidden.split(rows), tokens.split(rows), strict=True):
            logits = _logits(part.to(weight.dtype), weight, temperature)
            normalisers.append(_log_normalisers(logits))
            chosen.append(logits.gather(-1, picked) - normalisers[-1])
            if entropy:
                spreads.append(_entropy(logits - normalisers[-1]))
        spread = torch.cat(spreads) if entropy else hidden.new_empty(0)
        ctx.save_for_backward(hidden, weight, tokens, torch.cat(normalisers), spread)
        ctx.temperature, ctx.rows, ctx.entropy = temperature, rows, entropy
        return torch.cat(chosen), spread

    @staticmethod
    def backward(ctx, gradient, on_entropy):
        hidden, weight, tokens, normaliser, spread = ctx.saved_tensors
        compute = torch.promote_types(weight.dtype, torch.float32)
        gradient, on_entropy = gradient / ctx.temperature, on_entropy / ctx.temperature
        on_hidden = torch.empty_like(hidden)
        on_weight = torch.zeros_like(weight, dtype=compute)
        rows = max(ctx.rows, ROWS_OF_A_WEIGHT_GRADIENT)
        for start in range(0, len(hidden), rows):
            part = slice(start, start + rows)
            states = hidden[part].to(weight.dtype)
            slope = _logits(states, weight, ctx.temperature)
            inside = [slope, normaliser[part], gradient[part].sum(-1, keepdim=True)]
            inside += [on_entropy[part, None], spread[part, None]] if ctx.entropy else []
            few = ROWS_IN_CACHE.on(slope.device)
            for log_probs, own, pull, *more in zip(*(x.split(few) for x in inside), strict=True):
                log_probs.sub_(own)
                if more:
                    on_spread, own_spread = more
                    pull = pull + on_spread * (log_probs + own_spread)
                log_probs.exp_().mul_(-pull)
            slope = slope.scatter_add_(-1, tokens[part], gradient[part]).to(weight.dtype)
            on_hidden[part] = slope @ weight
            if weight.dtype == compute:
                torch.addmm(on_weight, slope.T, states, out=on_weight)
            else:
                on_weight += slope.T @ states
        return on_hidden, on_weight.to(weight.dtype), None, None, None, None
