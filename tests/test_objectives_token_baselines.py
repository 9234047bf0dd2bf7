"""Baselines of tokens and weights of horizons: exactly unbiased by enumeration, or biased by a known amount."""

from __future__ import annotations

import itertools
import warnings
from functools import partial

import pytest
import torch
from torch import Tensor

from ebft.errors import UsageError
from ebft.objectives import scores
from ebft.objectives.component import objective
from ebft.objectives.horizons import horizon_weights
from ebft.objectives.kernels import kernel_values
from ebft.objectives.scores import token_scores
from ebft.objectives.token_baselines import generalised_advantage, ridge_values, states_before
from tests.enumeration import TablePolicy
from tests.test_objectives_scores import EXACT, HORIZON, Setting

SEQUENCES, ROLLOUTS, VOCABULARY, LENGTH, DIMENSION = 2, 2, 2, 2, 3


class Sequences:
    """Two sequences with one anchor each, one policy, features of every prefix and a target for each sequence."""

    def __init__(self) -> None:
        self.policy = TablePolicy(seed=0, vocabulary=VOCABULARY, horizon=LENGTH)
        generator = torch.Generator().manual_seed(1)
        outcomes = self.policy.outcomes
        table = torch.randn(LENGTH, len(outcomes), DIMENSION, generator=generator, dtype=torch.float64)
        prefix = (outcomes * VOCABULARY ** torch.arange(LENGTH)).cumsum(-1)
        self.phi = table[torch.arange(LENGTH), prefix]  # [Y,G,D]
        self.target = torch.randn(SEQUENCES, 1, LENGTH, DIMENSION, generator=generator, dtype=torch.float64)

    def loss(self, alpha: float) -> Tensor:
        """Mean over the sequences of Σ_g L_g, with gradient."""
        prob, total = self.policy.prob(), 0.0
        for target in self.target[:, 0]:
            for g in range(LENGTH):
                k_target, k_rollouts = kernel_values(self.phi[:, g], target[g])
                total = total - 2 * prob @ k_target + alpha * prob @ k_rollouts @ prob
        return total / SEQUENCES

    def update(self, **options) -> Tensor:
        """Expected gradient over all rollouts of both sequences."""
        prob, log_prob = self.policy.prob().detach(), self.policy.log_prob()
        mask = torch.ones(SEQUENCES, 1, dtype=torch.bool)
        total = torch.zeros(())
        for drawn in itertools.product(range(len(prob)), repeat=SEQUENCES * ROLLOUTS):
            index = torch.tensor(drawn).view(SEQUENCES, 1, ROLLOUTS)
            found = token_scores(kernel_values, self.phi[index], self.target, mask, **options)
            total = total - prob[index].prod() * (found.advantage * log_prob[index]).sum() / (SEQUENCES * ROLLOUTS)
        return self.policy.gradient(total)


@pytest.mark.parametrize("estimator", ["rloo", "rloo_tuned"])
@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_ridge_is_unbiased(alpha: float, estimator: str) -> None:
    setting = Sequences()
    exact = setting.policy.gradient(setting.loss(alpha))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the diversity of 2 rollouts goes without a baseline
        found = setting.update(diversity=alpha, token_baseline="ridge", estimator=estimator)
    torch.testing.assert_close(found, exact, **EXACT)
    assert exact.norm() > 0.1


@pytest.mark.parametrize("cheat", ["own sequence", "own token"])
def test_a_baseline_that_saw_the_token_is_biased(monkeypatch, cheat: str) -> None:
    """The enumeration notices a regression that is not cross-fitted, and regressors from the token's own position."""
    setting = Sequences()

    def whole(regressors, returns, mask):  # every sequence among the fitted ones
        doubled = [torch.cat([x, x]) for x in regressors]
        return ridge_values(doubled, torch.cat([returns, returns]), torch.cat([mask, mask]))[:SEQUENCES]

    def late(rollout, target, gain):
        return [rollout, *states_before(rollout, target, gain)[1:]]

    monkeypatch.setattr(scores, *(("ridge_values", whole) if cheat == "own sequence" else ("states_before", late)))
    found = setting.update(diversity=0.0, token_baseline="ridge")
    assert (found - setting.policy.gradient(setting.loss(0.0))).abs().max() > 1e-2


@pytest.mark.parametrize("ends", [False, True])
@pytest.mark.parametrize("horizons", ["last", "geometric:0.5", "uniform"])
def test_weights_are_those_of_the_losses(horizons: str, ends: bool) -> None:
    setting = Setting(ends=ends)
    prob, exact = setting.policy.prob(), 0.0
    for g, weight in enumerate(horizon_weights(horizons, HORIZON).tolist()):
        k_target, k_rollouts = kernel_values(setting.phi[:, g], setting.target[g])
        exact = exact + weight * (prob @ k_rollouts @ prob - 2 * prob @ k_target)
    for credit in ("reward_to_go", "total"):
        found = setting.update(horizons=horizons, credit=credit)
        torch.testing.assert_close(found, setting.policy.gradient(exact), **EXACT)


def test_traces() -> None:
    """λ = 1 is the return, λ = 0 the reward of the own position; between them the gradient is biased."""
    setting = Setting(ends=False)
    exact = setting.policy.gradient(setting.loss("linear", 1.0))
    torch.testing.assert_close(setting.update(trace=1.0), exact, **EXACT)
    torch.testing.assert_close(setting.update(trace=0.0), setting.update(credit="own"), **EXACT)
    half = (setting.update(trace=0.5) - exact).abs().max()
    assert 1e-2 < half < (setting.update(trace=0.0) - exact).abs().max()


def test_generalised_advantage_by_hand() -> None:
    reward, value = torch.tensor([1.0, 2.0, 4.0]), torch.tensor([0.5, 3.0, 1.0])
    # δ = (1 + 3 - .5, 2 + 1 - 3, 4 - 1) = (3.5, 0, 3)
    assert generalised_advantage(reward, value, trace=0.5).tolist() == [4.25, 1.5, 3.0]
    assert generalised_advantage(reward, value, trace=1.0).tolist() == [6.5, 3.0, 3.0]
    assert generalised_advantage(reward, value, trace=0.0).tolist() == [3.5, 0.0, 3.0]


def test_ridge_finds_a_linear_return_and_lowers_the_spread() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(6, 5, 4, 3, 8, generator=generator)
    slope = torch.randn(8, generator=generator)
    returns = x @ slope + 2 + 0.1 * torch.randn(6, 5, 4, 3, generator=generator)
    mask = torch.ones_like(returns, dtype=torch.bool)
    mask[0, 0, 0, 2] = False
    returns[0, 0, 0, 2] = 1e6  # never looked at
    values = ridge_values([x], returns, mask)
    rest = (returns - values)[..., 1:][mask[..., 1:]]
    assert rest.std() < 0.15
    assert values[..., 0].abs().max() == 0
    assert values[0, 0, 0, 2] == 0
    noise = torch.randn(returns.shape, generator=generator)
    useless = ridge_values([x], noise, mask)  # nothing to be found: the penalty is large
    assert (noise - useless)[..., 1:].std() < 1.05 * noise[..., 1:].std()  # 8 regressors, 80 rows


def test_a_sequence_is_predicted_by_the_others_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    x, returns = torch.randn(3, 2, 4, 2, 5, generator=generator), torch.randn(3, 2, 4, 2, generator=generator)
    mask = torch.ones_like(returns, dtype=torch.bool)
    before = ridge_values([x], returns, mask)
    returns[1] += torch.randn(2, 4, 2, generator=generator)
    after = ridge_values([x], returns, mask)
    assert torch.equal(before[1], after[1])
    assert not torch.equal(before[0], after[0])


def test_regressors_are_known_before_the_token() -> None:
    generator = torch.Generator().manual_seed(0)
    phi, target = torch.randn(1, 1, 2, 4, 3, generator=generator), torch.randn(1, 1, 4, 3, generator=generator)
    gain = torch.randn(1, 1, 2, 4, generator=generator)
    blocks = states_before(phi, target, gain)
    assert [x.shape[-1] for x in blocks] == [3, 1, 1, 1]
    assert all(x[..., 0, :].abs().max() == 0 for x in blocks)
    expected = [phi[0, 0, 1, 1], gain[0, 0, 1, 1], phi[0, 0, 1, 1] @ target[0, 0, 2], phi[0, 0, 1, 1] @ target[0, 0, 3]]
    for block, value in zip(blocks, expected, strict=True):
        torch.testing.assert_close(block[0, 0, 1, 2].flatten(), value.flatten())


def test_constant_returns_and_zero_regressors_are_finite() -> None:
    zeros = torch.zeros(2, 1, 3, 2, 4)
    returns = torch.ones(2, 1, 3, 2)
    values = ridge_values([zeros], returns, torch.ones_like(returns, dtype=torch.bool))
    assert values.tolist() == torch.tensor([0.0, 1.0]).expand(2, 1, 3, 2).tolist()


def test_a_block_that_is_rounding_noise_where_it_is_fitted_is_not_blown_up_elsewhere() -> None:
    generator = torch.Generator().manual_seed(0)
    returns = torch.randn(2, 3, 4, 2, generator=generator, dtype=torch.float64)
    usual = torch.randn(2, 3, 4, 2, 5, generator=generator, dtype=torch.float64)
    sparse = torch.randn(2, 3, 4, 2, 1, generator=generator, dtype=torch.float64)
    sparse[0] *= 1e-16  # as advantages are where all rollouts of an anchor have one reward
    values = ridge_values([usual, sparse], returns, torch.ones(2, 3, 4, 2, dtype=torch.bool))
    assert values.abs().max() < 10 * returns.abs().max()


def test_horizon_weights_by_hand() -> None:
    assert horizon_weights("uniform", 3).tolist() == [1, 1, 1]
    assert horizon_weights("last", 3).tolist() == [0, 0, 1]
    assert horizon_weights("geometric:0.5", 3).tolist() == [1, 0.5, 0.25]


@pytest.mark.parametrize("text", ["first", "geometric", "geometric:x", "geometric:-1", "geometric:inf", "power:2"])
def test_unknown_weights_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match=r"expected uniform, last, or geometric:RATIO"):
        horizon_weights(text, 3)


def test_bad_input_is_refused() -> None:
    phi, target, mask = torch.zeros(1, 2, 3, 4, 5), torch.zeros(1, 2, 4, 5), torch.ones(1, 2, dtype=torch.bool)
    call = partial(token_scores, kernel_values, phi, target, mask)
    with pytest.raises(UsageError, match=r"token_baseline='mlp'.*none, ridge"):
        call(token_baseline="mlp")
    with pytest.raises(UsageError, match=r"trace=1\.5"):
        call(trace=1.5)
    with pytest.raises(UsageError, match="credit='total'"):
        call(token_baseline="ridge", credit="total")
    with pytest.raises(UsageError, match="batch of 2 or more"):
        call(token_baseline="ridge")
    with pytest.raises(UsageError, match="want credit='reward_to_go'"):
        objective(kernel_values, horizons="last")
    with pytest.raises(UsageError, match=r"\[2, 2\].*the same"):
        generalised_advantage(torch.zeros(2, 3), torch.zeros(2, 2))
    with pytest.raises(UsageError, match=r"\[B,K,N,G,R\]"):
        ridge_values([torch.zeros(2, 1, 3, 4)], torch.zeros(2, 1, 3, 4), torch.ones(2, 1, 3, 4, dtype=torch.bool))
