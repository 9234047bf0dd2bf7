"""A head that is a matrix and nothing else, a few tokens of its vocabulary at a time.

Logits z = h Wᵀ/τ [R,C] of R hidden states and C neighbouring tokens fit into a processor's cache, where their
exponentials are taken, and a block [C,H] of the weight is read once for all states. What the blocks have in common, the
normalizer log Σ_v exp z_v, grows from block to block; what was found with a smaller one is scaled, as the softmax of
fused attention is.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ebft.tuning import PerDevice

# Tokens of the vocabulary handled at once, and states with each block of them. On a CPU their logits are 2 MiB, which
# its caches hold, and products of this shape are as fast as larger ones. On a GPU a block has all tokens.
TOKENS_PER_BLOCK = PerDevice(cpu=1024, cuda=1 << 20)
STATES_PER_BLOCK = PerDevice(cpu=512, cuda=512)

# The normalizer of no token: finite, so that its difference to another one, times zero, is zero.
_OF_NOTHING = -1e30


def product_dtype(weight: Tensor) -> torch.dtype:
    """The dtype in which the surrounding autocast multiplies."""
    kind = weight.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype


def all_logits(hidden: Tensor, weight: Tensor) -> Tensor:
    """h Wᵀ [R,V] of hidden [R,H] and weight [V,H] in at least float32, without a gradient."""
    logits = hidden.new_empty(len(hidden), len(weight), dtype=_at_least_float32(weight))
    hidden = hidden.to(weight.dtype)
    for block in _blocks(weight):
        if logits.dtype == weight.dtype:
            torch.mm(hidden, weight[block].T, out=logits[:, block])
        else:
            logits[:, block] = hidden @ weight[block].T
    return logits


class FrozenHead(torch.autograd.Function):
    """log softmax(h Wᵀ/τ)[tokens] [R,Q] and its entropy H [R] for a frozen W.

    ∂ log p(y)/∂h = (W_y - Σ_v p_v W_v)/τ and ∂H/∂h = -Σ_v p_v (log p_v + H) W_v/τ: two rows [R,H] are all that
    backward needs, and forward finds them.
    """

    @staticmethod
    def forward(ctx, hidden, weight, tokens, temperature, entropy):
        chosen, normalizer, inner = _begin(hidden, weight, tokens)
        states = hidden.to(weight.dtype)
        mean = hidden.new_zeros(hidden.shape, dtype=normalizer.dtype)  # Σ p W over the tokens so far
        tilt = torch.zeros_like(mean) if entropy else None  # Σ p log p W
        for block, part in _tiles(weight, hidden):
            logits = _logits(states[part], weight[block], temperature)
            chosen[part] += _of_chosen(logits, tokens[part], block)
            lost = _grow(normalizer[part], logits)
            probs = log_probs = logits.sub_(normalizer[part])
            if tilt is not None:
                probs = log_probs.exp()
                log_probs.mul_(probs)
                _rescale(inner[part], lost).add_(log_probs.sum(-1, keepdim=True))
                tilt[part].addcmul_(mean[part], lost).mul_(lost.exp())
                _add_product(tilt[part], log_probs.to(weight.dtype), weight[block])
            else:
                probs.exp_()
            _add_product(mean[part].mul_(lost.exp()), probs.to(weight.dtype), weight[block])
        if tilt is not None:
            tilt.addcmul_(mean, inner, value=-1)  # Σ p (log p + H) W
        ctx.save_for_backward(weight, tokens, mean, *([] if tilt is None else [tilt]))
        ctx.temperature, ctx.dtype = temperature, hidden.dtype
        return chosen - normalizer, -inner[:, 0]

    @staticmethod
    def backward(ctx, *gradients):
        gradient, on_entropy = gradients
        weight, tokens, mean, *tilt = ctx.saved_tensors
        rows = (gradient[..., None].to(weight.dtype) * weight[tokens]).sum(-2, dtype=gradient.dtype)
        rows = rows - gradient.sum(-1, keepdim=True) * mean
        if tilt:
            rows = rows - on_entropy[:, None] * tilt[0]
        return (rows / ctx.temperature).to(ctx.dtype), None, None, None, None


class TrainedHead(torch.autograd.Function):
    """The same for a W that is trained: backward computes the logits again.

    With z = h Wᵀ/τ: ∂ log p(y)/∂z = e_y - p and ∂H/∂z = -p (log p + H). Gradients are summed in at least float32.
    """

    @staticmethod
    def forward(ctx, hidden, weight, tokens, temperature, entropy):
        chosen, normalizer, inner = _begin(hidden, weight, tokens)
        states = hidden.to(weight.dtype)
        for block, part in _tiles(weight, hidden):
            logits = _logits(states[part], weight[block], temperature)
            chosen[part] += _of_chosen(logits, tokens[part], block)
            lost = _grow(normalizer[part], logits)
            if entropy:
                log_probs = logits.sub_(normalizer[part])
                _rescale(inner[part], lost).add_((log_probs.exp() * log_probs).sum(-1, keepdim=True))
        ctx.save_for_backward(hidden, weight, tokens, normalizer, inner)
        ctx.temperature, ctx.entropy = temperature, entropy
        return chosen - normalizer, -inner[:, 0]

    @staticmethod
    def backward(ctx, *gradients):
        hidden, weight, tokens, normalizer, inner = ctx.saved_tensors
        states = hidden.to(weight.dtype)
        gradient, on_entropy = (found / ctx.temperature for found in gradients)
        pull = gradient.sum(-1, keepdim=True)
        on_hidden = hidden.new_zeros(hidden.shape, dtype=normalizer.dtype)
        on_weight = torch.zeros_like(weight, dtype=normalizer.dtype)
        for block, part in _tiles(weight, hidden):
            log_probs = _logits(states[part], weight[block], ctx.temperature).sub_(normalizer[part])
            own_pull = pull[part]
            if ctx.entropy:
                own_pull = own_pull + on_entropy[part, None] * (log_probs - inner[part])
            slope = log_probs.exp_().mul_(-own_pull)
            places, inside = _places(tokens[part], block)
            slope = slope.scatter_add_(-1, places, gradient[part] * inside).to(weight.dtype)
            _add_product(on_hidden[part], slope, weight[block])
            _add_product(on_weight[block], slope.T, states[part])
        return on_hidden.to(hidden.dtype), on_weight.to(weight.dtype), None, None, None


def _at_least_float32(weight: Tensor) -> torch.dtype:
    return torch.promote_types(weight.dtype, torch.float32)


def _blocks(weight: Tensor) -> Iterator[slice]:
    """Neighbouring tokens of the vocabulary of weight [V,H]."""
    few, size = TOKENS_PER_BLOCK.on(weight.device), len(weight)
    return (slice(start, min(start + few, size)) for start in range(0, size, few))


def _tiles(weight: Tensor, hidden: Tensor) -> Iterator[tuple[slice, slice]]:
    """Blocks of the vocabulary of weight [V,H], and for each all states of hidden [R,H], some at a time."""
    few = STATES_PER_BLOCK.on(hidden.device)
    return ((block, slice(start, start + few)) for block in _blocks(weight) for start in range(0, len(hidden), few))


def _begin(hidden: Tensor, weight: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What no token adds up to: logits of the chosen ones [R,Q], the normalizer [R,1], Σ_v p_v log p_v [R,1]."""
    fine: Any = {"dtype": _at_least_float32(weight)}
    normalizer = hidden.new_full((len(hidden), 1), _OF_NOTHING, **fine)
    return hidden.new_zeros(tokens.shape, **fine), normalizer, torch.zeros_like(normalizer)


def _logits(hidden: Tensor, weight: Tensor, temperature: float) -> Tensor:
    """h Wᵀ/τ [R,C] of hidden [R,H] in the weight's dtype, in at least float32."""
    logits = (hidden @ weight.T).to(_at_least_float32(weight))
    return logits if temperature == 1 else logits.div_(temperature)


def _grow(normalizer: Tensor, logits: Tensor) -> Tensor:
    """Add logits [R,C] to the normalizer [R,1], in place: the log of the share that is left to what it had, [R,1]."""
    grown = torch.logaddexp(normalizer, logits.logsumexp(-1, keepdim=True))
    lost = normalizer - grown
    normalizer.copy_(grown)
    return lost


def _rescale(inner: Tensor, lost: Tensor) -> Tensor:
    """Σ p log p of tokens whose p add up to 1, in place: with p·exp(lost) instead of p."""
    return inner.add_(lost).mul_(lost.exp())


def _places(tokens: Tensor, block: slice) -> tuple[Tensor, Tensor]:
    """Where tokens [R,Q] stand in the block, some place for those that do not, and which do."""
    places, width = tokens - block.start, block.stop - block.start
    return places.clamp(0, width - 1), (places >= 0) & (places < width)


def _of_chosen(logits: Tensor, tokens: Tensor, block: slice) -> Tensor:
    """[R,Q] of the block's logits [R,C]: those of the tokens that are in it, 0 for the others."""
    places, inside = _places(tokens, block)
    return logits.gather(-1, places).where(inside, 0.0)


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left @ right."""
    if total.dtype == left.dtype:
        torch.addmm(total, left, right, out=total)
    else:
        total += left @ right
