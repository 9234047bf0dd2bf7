"""Baselines of single tokens: the return that the state before a token foretells, regressed on other sequences."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ebft.errors import UsageError

_PENALTIES = torch.logspace(-3, 4, 15, dtype=torch.float64)  # shares of the kernel's mean diagonal


def generalised_advantage(reward: Tensor, value: Tensor, *, trace: float = 1.0) -> Tensor:
    """Advantages of tokens from rewards and values [...,G]: Σ_l λ^l δ_{t+l}, δ_t = r_t + V_{t+1} - V_t, V_{G+1} = 0.

    (Schulman et al., arXiv 1506.02438, (16), without discount.) λ = 1 is the return less the value, unbiased for any
    value that does not depend on the token or those after it. Below 1 the value stands in for later rewards: less
    variance, biased unless the value is the expected return; with values 0 it discounts later rewards by λ.

    Args:
        reward: r_t [...,G]; value: V_t of the state before token t [...,G]; trace: λ in [0, 1].

    Raises:
        UsageError: shapes that disagree, or λ out of its range.
    """
    check_trace(trace)
    if value.shape != reward.shape:
        raise UsageError(f"values have shape {list(value.shape)}, rewards {list(reward.shape)}; expected the same")
    after = torch.cat([value[..., 1:], torch.zeros_like(value[..., :1])], -1)
    advantage, tail = [], torch.zeros_like(reward[..., 0])
    for delta in reversed((reward + after - value).unbind(-1)):
        tail = delta + trace * tail
        advantage.append(tail)
    return torch.stack(advantage[::-1], -1)


def check_trace(trace: float) -> None:
    """Check λ."""
    if not 0 <= trace <= 1:
        raise UsageError(f"trace={trace!r}: λ of generalised advantage estimation is a number from 0 to 1")


def states_before(rollout: Tensor, target: Tensor, gain: Tensor) -> list[Tensor]:
    """What is known before each token: features of the tokens so far, what they gained, how near the target they are.

    Args:
        rollout: [B,K,N,G,D], features after each token; target: [B,K,G,D]; gain: [B,K,N,G], advantages of positions.

    Returns:
        Regressors [B,K,N,G,R] in four blocks: the features (R = D), the last gain, and the products with the target's
        next and last features (R = 1). Those of the first token are 0: before it all rollouts of an anchor are alike.
    """
    next_target, last_target = target[:, :, None, 1:], target[:, :, None, -1:]
    before = rollout[..., :-1, :]
    scalars = [gain[..., :-1], (before * next_target).sum(-1), (before * last_target).sum(-1)]
    blocks = [before, *(x[..., None] for x in scalars)]
    return [torch.cat([torch.zeros_like(x[..., :1, :]), x], -2) for x in blocks]


def ridge_values(regressors: Sequence[Tensor], returns: Tensor, mask: Tensor) -> Tensor:
    """Cross-fitted predictions of the return: a ridge regression for each position and each held-out sequence.

    Every sequence is predicted from the regression on the others, so no rollout of it helps to predict itself or its
    neighbours, and the value of a token depends on its own rollout through the regressors alone. In closed form over
    the kernel of the rows, with an intercept. Blocks of regressors have equal weight over all rows, also those that are
    predicted: a block that is rounding noise in the fitted rows would otherwise be blown up in the others. The penalty
    is the one of least generalised cross-validation error over the fitted rows. The first token's value is 0, the mean
    of returns that have a baseline per anchor already.

    Args:
        regressors: blocks [B,K,N,G,R] of what is known before each token.
        returns: [B,K,N,G]; mask: [B,K,N,G] bool, True on real tokens.

    Returns:
        Values [B,K,N,G], 0 where masked.

    Raises:
        UsageError: shapes that disagree, or a single sequence.
    """
    if returns.ndim != 4 or {mask.shape, *(block.shape[:-1] for block in regressors)} != {returns.shape}:
        raise UsageError(
            f"regressors have shapes {[list(block.shape) for block in regressors]}, returns {list(returns.shape)} and"
            f" mask {list(mask.shape)}; expected [B,K,N,G,R], [B,K,N,G] and [B,K,N,G]"
        )
    sequences, _, _, horizon = returns.shape
    if sequences < 2:
        raise UsageError(
            "a token baseline is fitted on the other sequences of the batch, and there is 1: give a batch of 2 or more"
        )
    values = torch.zeros_like(returns, dtype=torch.float64)
    for position in range(1, horizon):
        x = [block[..., position, :].double().flatten(0, 2) for block in regressors]
        y = returns[..., position].double().flatten()
        real = mask[..., position].flatten()
        group = torch.arange(sequences, device=y.device).repeat_interleave(len(y) // sequences)
        found = torch.zeros_like(y)
        kernel = torch.stack([_of_unit_size(block @ block.T, real) for block in x]).sum(0)
        for held in range(sequences):
            fit, own = real & (group != held), real & (group == held)
            if fit.sum() > 1 and own.any():
                found[own] = _predict(kernel[fit][:, fit], y[fit], kernel[own][:, fit])
        values[..., position] = found.view(values.shape[:-1])
    return values.to(returns.dtype)


def _of_unit_size(kernel: Tensor, real: Tensor) -> Tensor:
    """A kernel [n,n] over the mean square of its `real` rows [n]; 0 stays 0."""
    size = kernel.diagonal()[real].mean() if real.any() else kernel.new_zeros(())
    return kernel / torch.where(size > 0, size, 1.0)


def _predict(kernel: Tensor, y: Tensor, across: Tensor) -> Tensor:
    """Kernel ridge regression with an intercept: products [n,n] of the fitted rows and [m,n] with others, to [m]."""
    column, mean = kernel.mean(0), kernel.mean()
    centred = kernel - column - column[:, None] + mean
    others = across - across.mean(1, keepdim=True) - column + mean
    level, scale = y.mean(), centred.diagonal().mean()
    if scale <= 0:
        return level.expand(len(across))
    eigenvalues, vectors = torch.linalg.eigh(centred)
    eigenvalues = eigenvalues.clamp(min=0)
    inside = vectors.T @ (y - level)
    penalties = _PENALTIES.to(y.device) * scale
    shrink = penalties / (eigenvalues[:, None] + penalties)  # what is left of each direction, [n, penalties]
    rest = shrink.sum(0) - 1  # an intercept takes one more
    error = (shrink * inside[:, None]).square().sum(0) / rest.clamp(min=1e-9).square()
    best = error.argmin()
    weights = vectors @ (inside / (eigenvalues + penalties[best]))
    return level + others @ weights
