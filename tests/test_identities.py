"""Identities of the paper (arXiv 2603.12248), on distributions small enough to write out, and one by sampling."""

from __future__ import annotations

import pytest
import torch

from ebft.objectives.baselines import advantage
from ebft.objectives.moments import conditional_feature_matching_loss, feature_matching_profile, moment_values
from tests.enumeration import TablePolicy, features

EXACT = {"rtol": 0, "atol": 1e-12}


def distribution(size: int, *, seed: int) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).softmax(-1)


def test_one_token_with_one_hot_features_is_the_squared_distance_of_probabilities():
    """(3), from rollouts: Σ_y over the text of the estimate, less the variance of (2), is Σ_v (p_θ(v) - p(v))²."""
    policy, text = distribution(5, seed=0), distribution(5, seed=1)
    one_hot = torch.eye(5, dtype=torch.float64)
    pairs = torch.cartesian_prod(torch.arange(5), torch.arange(5))
    weight = policy[pairs].prod(-1)
    loss = sum(
        text[y] * (weight * conditional_feature_matching_loss(one_hot[pairs], one_hot[y].expand(25, -1))).sum()
        for y in range(5)
    )
    variance = (text * (one_hot - text).square().sum(-1)).sum()
    torch.testing.assert_close(loss - variance, (policy - text).square().sum(), **EXACT)
    assert loss - variance > 0.01


def test_whitening_by_the_policy_turns_the_loss_into_chi_squared():
    """(24)-(31): with features that see everything (μ_P - μ_Q)ᵀ Σ_Q⁻¹ (μ_P - μ_Q) is χ²(P‖Q), otherwise less."""
    p, q = distribution(6, seed=2), distribution(6, seed=3)
    chi_squared = ((p - q).square() / q).sum()

    def value(phi: torch.Tensor) -> torch.Tensor:
        second = phi.T @ (q[:, None] * phi)
        gap = phi.T @ (p - q)
        weight = torch.linalg.solve(second, gap)
        dual = 2 * (weight @ gap) - (q * (phi @ weight).square()).sum()  # (24) at the w of (30)
        torch.testing.assert_close(dual, gap @ weight, **EXACT)
        for seed in range(5):  # no other w does better
            other = weight + 0.1 * torch.randn(len(weight), generator=torch.Generator().manual_seed(seed)).double()
            assert 2 * (other @ gap) - (q * (phi @ other).square()).sum() < dual
        return gap @ weight

    torch.testing.assert_close(value(torch.eye(6, dtype=torch.float64)), chi_squared, **EXACT)
    few = features(seed=4, outcomes=6, dimension=3)
    assert 0 < value(few) < chi_squared - 1e-3


def test_the_whitened_moments_of_group_whitening_are_that_loss():
    """(32): whitened by the policy's own second moment, the plain distance of the means is the quadratic form."""
    p, q = distribution(6, seed=5), distribution(6, seed=6)
    phi = features(seed=7, outcomes=6, dimension=3)
    values, vectors = torch.linalg.eigh(phi.T @ (q[:, None] * phi))
    white = phi @ (vectors * values.rsqrt()) @ vectors.T
    plain = (white.T @ (p - q)).square().sum()
    gap = phi.T @ (p - q)
    torch.testing.assert_close(plain, gap @ torch.linalg.solve(phi.T @ (q[:, None] * phi), gap), **EXACT)


def test_the_floor_of_the_loss_rises_with_the_horizon():
    """Lemma A.1: a stationary source whose contexts are distributed like continuations, features of the last tokens.

    At each horizon the perfect policy's loss is the variance of the features given the context, and never above their
    variance over the text. The estimate from rollouts agrees.
    """
    random = torch.Generator().manual_seed(0)
    move = (2 * torch.randn(4, 4, generator=random, dtype=torch.float64)).softmax(-1)
    stationary = torch.linalg.matrix_power(move, 200)[0]
    torch.testing.assert_close(stationary @ move, stationary, **EXACT)
    phi = features(seed=1, outcomes=4, dimension=3)  # of the text so far: its last token
    total = (stationary @ phi.square()).sum() - (stationary @ phi).square().sum()
    horizon = 6
    floor = []
    for step in range(1, horizon + 1):
        after = torch.linalg.matrix_power(move, step)  # [context's last token, token `step` later]
        mean = after @ phi
        floor.append((stationary * ((after @ phi.square()).sum(-1) - mean.square().sum(-1))).sum())
    rising = torch.stack(floor)
    assert (rising.diff() > 0).all()
    assert rising[-1] < total

    contexts, rollouts = 20_000, 4
    last = torch.multinomial(stationary, contexts, replacement=True, generator=random)
    state = last[:, None].expand(-1, rollouts + 1).reshape(-1)
    paths = []
    for _ in range(horizon):
        state = torch.multinomial(move[state], 1, generator=random)[:, 0]
        paths.append(state.view(contexts, rollouts + 1))
    drawn = phi[torch.stack(paths, -1)]  # [contexts, rollouts + 1, horizon, D]
    profile = feature_matching_profile(drawn[:, 1:], drawn[:, 0])
    error = profile.std(0) / contexts**0.5
    assert ((profile.mean(0) - rising).abs() < 4 * error).all()
    assert (error < 0.05 * rising).all()


@pytest.mark.parametrize("estimator", ["rloo", "rloo_tuned", "none"])
@pytest.mark.parametrize("diversity", [1.0, 0.5])
def test_a_monte_carlo_average_of_updates_is_the_gradient_of_the_loss(estimator, diversity):
    """Autograd of the exact loss, within 4 standard errors in every parameter; and the errors are small."""
    policy, phi, target = TablePolicy(seed=3), features(seed=4), features(seed=5, outcomes=1)[0]
    batches, groups, rollouts = 400, 64, 4
    jacobian = torch.stack([policy.gradient(value) for value in policy.log_prob().sum(-1)])
    index = torch.multinomial(
        policy.prob().detach(),
        batches * groups * rollouts,
        replacement=True,
        generator=torch.Generator().manual_seed(0),
    ).view(batches, groups, rollouts)
    k_target, k_rollouts = moment_values(phi[index], target.expand(batches, groups, -1))
    gains = [
        advantage(own, pairs, estimator=estimator, diversity=diversity)
        for own, pairs in zip(k_target, k_rollouts, strict=True)
    ]
    updates = -torch.einsum("bgn,bgnw->bw", torch.stack(gains), jacobian[index]) / (groups * rollouts)
    mean = policy.prob() @ phi
    gradient = policy.gradient(diversity * (mean - target / diversity).square().sum())
    error = updates.std(0) / batches**0.5
    assert ((updates.mean(0) - gradient).abs() < 4 * error).all()
    assert error.norm() < 0.05 * gradient.norm()
