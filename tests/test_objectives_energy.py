"""The exponential tilt, against direct optimisation of the objective it solves, over an enumerated vocabulary."""

from __future__ import annotations

import math

import pytest
import torch

from ebft.errors import UsageError
from ebft.objectives.energy import LinearEnergy, effective_sample_size, fit_tilt, resample, tilt_log_weights
from tests.enumeration import TablePolicy, features

BETA = 0.7


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture(scope="module")
def world():
    """log q [Y] over nine outcomes, their features [Y,D], and the data's mean feature [D]."""
    return TablePolicy(seed=0).log_prob().sum(-1).detach(), features(seed=1), features(seed=2, outcomes=1)[0] / 2


def minimise(objective, size: int) -> torch.Tensor:
    """Log-probs [Y] of the minimum over all distributions, found by a general-purpose optimiser."""
    logits = torch.zeros(size, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [logits], max_iter=2000, tolerance_grad=1e-13, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def closure():
        optimizer.zero_grad()
        value = objective(logits.log_softmax(-1))
        value.backward()
        return value

    optimizer.step(closure)
    return logits.detach().log_softmax(-1)


@pytest.mark.parametrize("alpha", [1.0, 0.5])
def test_regularised_feature_matching_lands_on_the_tilt(world, alpha: float) -> None:
    log_q, phi, goal = world

    def objective(log_rho):
        rho = log_rho.exp()
        mean = rho @ phi
        return mean.square().sum() - 2 / alpha * mean @ goal + (rho * (log_rho - log_q)).sum() / BETA

    log_rho = minimise(objective, len(log_q))
    tilt = fit_tilt(phi, goal, beta=BETA, diversity=alpha, log_base=log_q)
    chi = 2 * BETA * (log_rho.exp() @ phi - goal / alpha)
    torch.testing.assert_close(tilt.energy.chi, chi, rtol=0, atol=1e-6)
    torch.testing.assert_close(tilt.log_weights, log_rho, rtol=0, atol=1e-6)
    own = 2 * BETA * (tilt.log_weights.exp() @ phi - goal / alpha)
    torch.testing.assert_close(tilt.energy.chi, own, rtol=0, atol=1e-8)
    assert chi.norm() > 0.5


def test_a_bound_on_the_norm_is_maximum_likelihood_within_it(world) -> None:
    """Theorem D.3 at α = 1, against a search over directions; its β̃ is the norm at the β that belongs to it (85)."""
    log_q, phi, goal = world
    free = fit_tilt(phi, goal, beta=BETA, log_base=log_q)
    bound = float(free.energy.chi.norm())
    found = fit_tilt(phi, goal, max_norm=bound, log_base=log_q)
    torch.testing.assert_close(found.energy.chi, free.energy.chi, rtol=0, atol=1e-7)

    def likelihood(chi):  # E_p log ρ_χ up to a constant
        return -goal @ chi - (log_q - phi @ chi).logsumexp(-1)

    others = torch.nn.functional.normalize(draw(2000, phi.shape[1]), dim=-1) * bound
    assert all(likelihood(chi) < likelihood(found.energy.chi) for chi in others)


def test_a_wide_bound_matches_the_moments(world) -> None:
    log_q, phi, _ = world
    goal = torch.softmax(draw(len(phi), seed=5), -1) @ phi  # a mean that some distribution has
    tilt = fit_tilt(phi, goal, log_base=log_q)
    torch.testing.assert_close(tilt.log_weights.exp() @ phi, goal, rtol=0, atol=1e-8)
    same = fit_tilt(phi, goal, max_norm=1e3, log_base=log_q)
    torch.testing.assert_close(same.energy.chi, tilt.energy.chi, rtol=1e-5, atol=1e-5)


def test_little_diversity_tilts_straight_to_the_data(world) -> None:
    """(79): χ → -β̃ E_p φ / ‖E_p φ‖ as α → 0, and the tilt then collapses."""
    log_q, phi, goal = world
    tilt = fit_tilt(phi, goal, max_norm=30.0, diversity=1e-6, log_base=log_q)
    torch.testing.assert_close(tilt.energy.chi, -30 * goal / goal.norm(), rtol=0, atol=1e-2)
    assert tilt.effective_rollouts < 1.5 < fit_tilt(phi, goal, beta=BETA, log_base=log_q).effective_rollouts


def test_sampled_rollouts_estimate_the_enumerated_tilt(world) -> None:
    log_q, phi, goal = world
    exact = fit_tilt(phi, goal, beta=BETA, log_base=log_q).energy.chi
    found = []
    for seed in range(20):
        random = torch.Generator().manual_seed(seed)
        drawn = phi[torch.multinomial(log_q.exp(), 2000, replacement=True, generator=random)]
        found.append(fit_tilt(drawn, goal, beta=BETA).energy.chi)
    estimates = torch.stack(found)
    error = estimates.std(0) / 20**0.5
    assert (estimates.mean(0) - exact).abs().le(4 * error + 0.01).all()
    assert estimates.std(0).max() < 0.2


def test_one_energy_for_all_contexts_is_stationary_on_average() -> None:
    phi, goal = draw(2, 3, 6, 4), draw(2, 3, 4, seed=1)
    mask = torch.tensor([[True, True, False], [True, False, True]])
    tilt = fit_tilt(torch.where(mask[..., None, None], phi, torch.nan), goal, beta=BETA, mask=mask)
    weights = tilt_log_weights(phi, tilt.energy).exp()
    means = (weights[..., None] * phi).sum(-2)
    wanted = 2 * BETA * (means - goal)[mask].mean(0)
    torch.testing.assert_close(tilt.energy.chi, wanted, rtol=0, atol=1e-8)


def test_one_energy_per_context_is_each_context_alone() -> None:
    phi, goal = draw(2, 3, 6, 4), draw(2, 3, 4, seed=1)
    mask = torch.ones(2, 3, dtype=torch.bool)
    mask[0, 1] = False
    tilt = fit_tilt(phi, goal, beta=BETA, per_context=True, mask=mask)
    assert tilt.energy.chi.shape == (2, 3, 4)
    assert not tilt.energy.chi[0, 1].any()
    alone = fit_tilt(phi[1, 2], goal[1, 2], beta=BETA)
    torch.testing.assert_close(tilt.energy.chi[1, 2], alone.energy.chi, rtol=0, atol=1e-8)
    torch.testing.assert_close(tilt.log_weights[1, 2], alone.log_weights, rtol=0, atol=1e-8)


def test_weights_and_effective_sample_size() -> None:
    energy = LinearEnergy(torch.tensor([1.0, 0.0]))
    phi = torch.tensor([[0.0, 5.0], [math.log(3), 7.0]])
    weights = tilt_log_weights(phi, energy)
    torch.testing.assert_close(weights.exp(), torch.tensor([0.75, 0.25]))
    torch.testing.assert_close(effective_sample_size(weights), torch.tensor(1 / (0.75**2 + 0.25**2)))
    torch.testing.assert_close(effective_sample_size(torch.zeros(5).log_softmax(-1)), torch.tensor(5.0))
    chosen = resample(weights, count=4000, generator=torch.Generator().manual_seed(0))
    assert abs(chosen.double().mean() - 0.25) < 4 * (0.75 * 0.25 / 4000) ** 0.5


def test_unreachable_moments_are_refused_with_the_way_out() -> None:
    with pytest.raises(UsageError, match="give beta"):
        fit_tilt(draw(5, 3), 100 + draw(3), steps=50)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta": 0.0}, "beta=0.0"),
        ({"max_norm": -1.0}, "max_norm=-1.0"),
        ({"beta": 1.0, "max_norm": 1.0}, "give one"),
        ({"beta": 1.0, "diversity": 0.0}, "diversity=0.0"),
        ({"beta": 1.0, "diversity": 1.5}, "diversity=1.5"),
        ({"beta": 1.0, "mask": torch.ones(2, dtype=torch.bool)}, r"\[2\]"),
    ],
)
def test_bad_options_are_refused(options: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        fit_tilt(draw(5, 3), draw(3), **options)


def test_bad_shapes_are_refused() -> None:
    with pytest.raises(UsageError, match=r"\[5, 3\].*\[4\]"):
        fit_tilt(draw(5, 3), draw(4), beta=1.0)
    with pytest.raises(UsageError, match=r"\[2\]"):
        LinearEnergy(draw(2))(draw(5, 3))
