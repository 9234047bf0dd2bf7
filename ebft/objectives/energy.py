"""The energy-based view: the policy that KL-regularised feature matching wants, without training one.

What minimises, for a reference q, (arXiv 2603.12248, (10), with the diversity coefficient α of (67))

    ‖E_ρ φ‖² - (2/α) E_ρ φ · E_p φ + (1/β) KL(ρ ‖ q)        [α = 1: ‖E_ρ φ - E_p φ‖² + KL/β, less a constant]

is the exponential tilt ρ(y|c) ∝ q(y|c) exp(-χᵀφ_c(y)) with χ = 2β (E_ρ φ - E_p φ / α) (appendix D there). χ is found
here by convex optimisation of the dual,

    D(χ) = log E_q exp(-χᵀφ) + χᵀ E_p φ / α + ‖χ‖² / 4β,

on rollouts of q. Its gradient is zero at that χ only. With ``max_norm`` in place of β it is theorem D.3's problem,
(77), maximum likelihood of the energy-based model under a bound on ‖χ‖ when α = 1.

A fitted energy reweights rollouts of the reference (best of N, importance sampling: an energy-based model at inference
time) and is a reward, -E, for a policy.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ebft.errors import UsageError

_HALVINGS = 40  # of a step that does not go down: as many as leave a trace in float64
_BISECTIONS = 100  # of the multiplier of the bound: far below float64's resolution


@dataclass(frozen=True)
class LinearEnergy:
    """E(y,c) = χᵀφ_c(y), low on what is likely (arXiv 2603.12248, section 2).

    Args:
        chi: [D], or [...,D] with one χ per context.
    """

    chi: Tensor

    def __call__(self, features: Tensor) -> Tensor:
        """Energies [...,N] of rollouts with features [...,N,D]; minus the energy is a reward.

        Raises:
            UsageError: shapes that disagree.
        """
        chi = self.chi
        fits = features.ndim >= 2 and chi.shape[-1:] == features.shape[-1:]
        if not (fits and (chi.ndim == 1 or chi.shape[:-1] == features.shape[:-2])):
            raise UsageError(
                f"features have shape {list(features.shape)} and chi {list(chi.shape)}; expected [...,N,D] with"
                " [D] or [...,D]"
            )
        return (features @ chi.to(features.dtype)[..., None]).squeeze(-1)


class Tilt(NamedTuple):
    """A fitted tilt of the reference."""

    energy: LinearEnergy
    log_weights: Tensor  # [...,N] of the rollouts it was fitted on, normalised
    effective_rollouts: Tensor  # [...] of N


def tilt_log_weights(features: Tensor, energy: LinearEnergy, *, log_base: Tensor | None = None) -> Tensor:
    """Weights that turn rollouts of the reference into rollouts of its tilt: log of exp(-E) normalised over N.

    Self-normalised importance sampling: consistent, with a bias of order 1/N.

    Args:
        features: [...,N,D] of rollouts of the reference.
        log_base: [...,N], weights that the rollouts have already (probabilities, when all outcomes are listed); equal
            ones when None.

    Returns:
        Log-weights [...,N], whose exponentials sum to 1.
    """
    values = -energy(features)
    return (values if log_base is None else values + log_base).log_softmax(-1)


def effective_sample_size(log_weights: Tensor) -> Tensor:
    """1 / Σ w² of normalised weights: [...,N] to [...], from 1 to N (Kong, "A note on importance sampling", 1992)."""
    return torch.exp(-(2 * log_weights.double()).logsumexp(-1)).to(log_weights.dtype)


def resample(log_weights: Tensor, *, count: int, generator: torch.Generator) -> Tensor:
    """Indices [...,count] of rollouts drawn with replacement by their weights [...,N]."""
    flat = log_weights.double().exp().reshape(-1, log_weights.shape[-1])
    return torch.multinomial(flat, count, replacement=True, generator=generator).view(*log_weights.shape[:-1], count)


def fit_tilt(
    rollout: Tensor,
    target: Tensor,
    *,
    beta: float | None = None,
    max_norm: float | None = None,
    diversity: float = 1.0,
    per_context: bool = False,
    mask: Tensor | None = None,
    log_base: Tensor | None = None,
    steps: int = 200,
    tolerance: float = 1e-9,
) -> Tilt:
    """χ of the tilt that matches features, from rollouts of the reference (see the head of this module).

    Args:
        rollout: [...,N,D] features of rollouts of the reference q; target: [...,D] features of the texts.
        beta: β > 0, inverse weight of the divergence; None: no divergence term, which asks for moments that are
            matched exactly and exist only if the mean target lies among the rollouts.
        max_norm: in place of `beta`, the largest ‖χ‖ (theorem D.3).
        diversity: α in (0, 1].
        per_context: one χ for each context, which then stands for a mean over its own rollouts only; otherwise one for
            all, the stationary point of the mean of the contexts' duals.
        mask: [...] bool, True on contexts that count; the others get χ = 0 (per context) and no say.
        log_base: as for :func:`tilt_log_weights`.
        steps: Newton steps at most.
        tolerance: largest norm of the dual's gradient, relative to 1 + ‖mean target‖ / α.

    Returns:
        Tilt; χ is [D], or [...,D] per context, in float64.

    Raises:
        UsageError: an option out of range, shapes that disagree, or no convergence.
    """
    _check(rollout, target, beta=beta, max_norm=max_norm, diversity=diversity, mask=mask)
    batch, (count, size) = target.shape[:-1], rollout.shape[-2:]
    shape = (-1, 1) if per_context else (1, -1)  # problems, contexts of each
    phi = rollout.detach().double().reshape(*shape, count, size)
    goal = target.detach().double().reshape(*shape, size) / diversity
    base = torch.zeros(phi.shape[:-1], dtype=phi.dtype, device=phi.device)
    if log_base is not None:
        base = log_base.detach().double().reshape(base.shape)
    share = torch.ones(goal.shape[:-1], dtype=phi.dtype, device=phi.device)
    if mask is not None:
        share = mask.reshape(share.shape).to(phi.dtype)
        phi, goal = (torch.where(share[(..., *[None] * (x.ndim - 2))] > 0, x, 0.0) for x in (phi, goal))
    share = share / share.sum(-1, keepdim=True).clamp(min=1)
    dual = _Dual(phi, goal, base, share)
    if max_norm is not None:
        chi = _bounded(dual, max_norm, steps, tolerance)
    else:
        ridge = phi.new_full((len(phi),), 0.0 if beta is None else 1 / (2 * beta))
        chi = _newton(dual, ridge, steps, tolerance)
    energy = LinearEnergy(chi.view(*batch, size) if per_context else chi[0])
    weights = tilt_log_weights(rollout.detach().double(), energy, log_base=log_base)
    return Tilt(energy, weights, effective_sample_size(weights))


class _Dual(NamedTuple):
    """D(χ) of P problems with C contexts each."""

    phi: Tensor  # [P,C,N,D]
    goal: Tensor  # [P,C,D], targets over α
    base: Tensor  # [P,C,N]
    share: Tensor  # [P,C], sums to 1, or 0 where nothing counts

    def value(self, chi: Tensor, ridge: Tensor) -> Tensor:
        """[P], up to a constant."""
        log_z = (self.base - torch.einsum("pcnd,pd->pcn", self.phi, chi)).logsumexp(-1)
        linear = torch.einsum("pcd,pd->pc", self.goal, chi)
        return (self.share * (log_z + linear)).sum(-1) + ridge / 2 * chi.square().sum(-1)

    def slopes(self, chi: Tensor, ridge: Tensor) -> tuple[Tensor, Tensor]:
        """Gradient [P,D] and Hessian [P,D,D]: mean differences and covariances of the features under the tilt."""
        weight = (self.base - torch.einsum("pcnd,pd->pcn", self.phi, chi)).softmax(-1)
        mean = torch.einsum("pcn,pcnd->pcd", weight, self.phi)
        gradient = torch.einsum("pc,pcd->pd", self.share, self.goal - mean) + ridge[:, None] * chi
        centred = self.phi - mean[:, :, None]
        hessian = torch.einsum("pc,pcn,pcnd,pcne->pde", self.share, weight, centred, centred)
        return gradient, hessian + ridge[:, None, None] * torch.eye(chi.shape[-1], dtype=chi.dtype, device=chi.device)


def _newton(dual: _Dual, ridge: Tensor, steps: int, tolerance: float) -> Tensor:
    """χ [P,D] by damped Newton steps; D is convex, so that going down is going there."""
    chi = dual.goal.new_zeros(len(dual.goal), dual.goal.shape[-1])
    enough = tolerance * (1 + torch.einsum("pc,pcd->pd", dual.share, dual.goal).norm(dim=-1))
    for _ in range(steps):
        gradient, hessian = dual.slopes(chi, ridge)
        if (gradient.norm(dim=-1) <= enough).all():
            return chi
        # the smallest curvature that float64 can tell from none keeps directions without features solvable
        floor = torch.finfo(chi.dtype).eps * (1 + hessian.diagonal(dim1=-2, dim2=-1).amax(-1))
        hessian.diagonal(dim1=-2, dim2=-1).add_(floor[:, None])
        step = torch.linalg.solve(hessian, gradient)
        descent, start = (step * gradient).sum(-1), dual.value(chi, ridge)
        size, slack = torch.ones_like(descent), 8 * torch.finfo(chi.dtype).eps * (1 + start.abs())
        for _ in range(_HALVINGS):
            fine = dual.value(chi - size[:, None] * step, ridge) <= start - 1e-4 * size * descent + slack
            if fine.all():
                break
            size = torch.where(fine, size, size / 2)
        chi = chi - size[:, None] * step
    gradient, _ = dual.slopes(chi, ridge)
    if (gradient.norm(dim=-1) <= enough).all():
        return chi
    raise UsageError(
        f"the tilt was not found in steps={steps}: the moments are still off by {gradient.norm(dim=-1).max():.3g}."
        " Without a divergence term they can only be matched when the targets lie among the rollouts: give beta (or a"
        " smaller one), a max_norm, more rollouts, or more steps"
    )


def _bounded(dual: _Dual, max_norm: float, steps: int, tolerance: float) -> Tensor:
    """χ [P,D] within the bound: its multiplier is a ridge, and ‖χ‖ falls as that grows."""
    problems = len(dual.goal)
    low, high = (dual.goal.new_full((problems,), value) for value in (-20.0, 20.0))  # log of the ridge
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        outside = _newton(dual, middle.exp(), steps, tolerance).norm(dim=-1) > max_norm
        low, high = torch.where(outside, middle, low), torch.where(outside, high, middle)
    return _newton(dual, high.exp(), steps, tolerance)


def _check(rollout, target, *, beta, max_norm, diversity, mask) -> None:
    if rollout.ndim < 2 or target.shape != rollout.shape[:-2] + rollout.shape[-1:]:
        raise UsageError(
            f"rollout features have shape {list(rollout.shape)} and target features {list(target.shape)};"
            " expected [...,N,D] and [...,D]"
        )
    if mask is not None and mask.shape != target.shape[:-1]:
        raise UsageError(f"mask has shape {list(mask.shape)}, expected one entry per context {list(target.shape[:-1])}")
    if beta is not None and max_norm is not None:
        raise UsageError(f"beta={beta!r} and max_norm={max_norm!r} are two ways to bound the tilt; give one")
    for name, value in (("beta", beta), ("max_norm", max_norm)):
        if value is not None and not (math.isfinite(value) and value > 0):
            raise UsageError(f"{name}={value!r}: expected a finite number above 0")
    if not 0 < diversity <= 1:
        raise UsageError(f"diversity={diversity!r}: expected α in (0, 1]")
