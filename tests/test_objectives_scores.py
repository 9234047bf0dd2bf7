"""Rewards and advantages per token against the exact gradient of the sum of the losses at all horizons."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

from ebft.errors import UsageError
from ebft.objectives.baselines import advantage
from ebft.objectives.kernels import kernel_score_reward, kernel_values
from ebft.objectives.scores import credited, hold_last, rollout_scores, to_go, token_scores
from tests.enumeration import TablePolicy, groups

VOCABULARY, HORIZON, DIMENSION, END = 2, 3, 3, 1
EXACT = {"rtol": 0, "atol": 1e-10}
KERNELS = {"linear": {}, "polynomial": {"degree": 2}, "rbf": {"bandwidth": 1.3}, "energy": {"power": 1.4}}


class Setting:
    """A policy whose rollouts end with token 1, features of every prefix, and a target that ends after one token."""

    def __init__(self, *, ends: bool, seed: int = 0) -> None:
        self.policy = TablePolicy(seed=seed, vocabulary=VOCABULARY, horizon=HORIZON)
        outcomes = self.policy.outcomes
        ended = (outcomes == END).cumsum(-1) - (outcomes == END).long() > 0  # after the first end
        self.mask = ~ended if ends else torch.ones_like(ended)
        generator = torch.Generator().manual_seed(seed + 1)
        table = torch.randn(HORIZON, VOCABULARY**HORIZON, DIMENSION, generator=generator, dtype=torch.float64)
        place = VOCABULARY ** torch.arange(HORIZON)
        prefix = (outcomes * place).cumsum(-1)  # number of the first g tokens
        self.raw = table[torch.arange(HORIZON), prefix]  # [Y,G,D]
        self.phi = hold_last(self.raw, self.mask)
        self.target = torch.randn(HORIZON, DIMENSION, generator=generator, dtype=torch.float64)

    def loss(self, kernel: str, alpha: float) -> Tensor:
        """Σ_g of the exact scores, with gradient."""
        prob, total = self.policy.prob(), 0.0
        for g in range(HORIZON):
            k_target, k_rollouts = kernel_values(self.phi[:, g], self.target[g], kernel=kernel, **KERNELS[kernel])
            total = total - 2 * prob @ k_target + alpha * prob @ k_rollouts @ prob
        return total

    def update(self, kernel: str = "linear", rollouts: int = 3, **options) -> Tensor:
        """Expected gradient of the mean over rollouts of Σ_t -A_t log p_t."""
        index, weight = groups(self.policy, rollouts)
        values = partial(kernel_values, kernel=kernel, **KERNELS[kernel])
        phi = self.phi[index][:, None]  # [M,1,N,G,D]
        target = self.target.expand(len(index), 1, HORIZON, DIMENSION)
        scores = token_scores(values, phi, target, torch.ones(len(index), 1, dtype=torch.bool), **options)
        terms = -scores.advantage[:, 0] * torch.where(self.mask, self.policy.log_prob(), 0.0)[index]
        return self.policy.gradient((weight * terms.sum(-1).mean(-1)).sum())


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("credit", ["reward_to_go", "total"])
@pytest.mark.parametrize("ends", [False, True])
def test_unbiased_for_the_sum_over_horizons(kernel: str, credit: str, ends: bool) -> None:
    setting = Setting(ends=ends)
    for alpha in (0.5, 1.0):
        found = setting.update(kernel, estimator="rloo", diversity=alpha, credit=credit)
        torch.testing.assert_close(found, setting.policy.gradient(setting.loss(kernel, alpha)), **EXACT)


def test_unbiased_without_a_baseline() -> None:
    setting = Setting(ends=True)
    found = setting.update(estimator="none", credit="reward_to_go")
    torch.testing.assert_close(found, setting.policy.gradient(setting.loss("linear", 1.0)), **EXACT)


def test_credit_of_the_own_position_alone_is_biased() -> None:
    setting = Setting(ends=False)
    exact = setting.policy.gradient(setting.loss("linear", 1.0))
    assert (setting.update(credit="own") - exact).abs().max() > 0.1
    # but not for the last token, which leads to nothing
    later = slice(VOCABULARY + VOCABULARY**2, None)
    torch.testing.assert_close(setting.update(credit="own")[later], exact[later], **EXACT)


def test_features_of_a_finished_rollout_stay() -> None:
    """Zeros in their place would be another loss: its gradient differs."""
    setting = Setting(ends=True)
    exact = setting.policy.gradient(setting.loss("energy", 1.0))
    setting.phi = torch.where(setting.mask[..., None], setting.raw, 0.0)
    assert (setting.update("energy") - exact).abs().max() > 1e-2


def test_reward_is_the_formula_at_every_position() -> None:
    generator = torch.Generator().manual_seed(0)
    phi = torch.randn(2, 3, 4, 5, 6, generator=generator, dtype=torch.float64)  # [B,K,N,G,D]
    target = torch.randn(2, 3, 5, 6, generator=generator, dtype=torch.float64)
    scores = token_scores(kernel_values, phi, target, torch.ones(2, 3, dtype=torch.bool), diversity=0.7, credit="own")
    assert scores.reward.shape == scores.advantage.shape == (2, 3, 4, 5)
    for b, k, g in torch.cartesian_prod(torch.arange(2), torch.arange(3), torch.arange(5)).tolist():
        mine, y = phi[b, k, :, g], target[b, k, g]
        for j in range(4):
            others = sum(mine[j] @ mine[i] for i in range(4) if i != j) / 3
            torch.testing.assert_close(scores.reward[b, k, j, g], 2 * mine[j] @ y - 1.4 * others)
        expected = advantage(mine @ y, mine @ mine.T, diversity=0.7)
        torch.testing.assert_close(scores.advantage[b, k, :, g], expected)


def test_one_horizon_is_the_reward_per_rollout() -> None:
    generator = torch.Generator().manual_seed(0)
    phi, target = torch.randn(2, 3, 4, 6, generator=generator), torch.randn(2, 3, 6, generator=generator)
    mask = torch.ones(2, 3, dtype=torch.bool)
    whole = rollout_scores(kernel_values, phi, target, mask)
    for credit in ("reward_to_go", "total", "own"):
        tokens = token_scores(kernel_values, phi[..., None, :], target[..., None, :], mask, credit=credit)
        assert torch.equal(tokens.reward[..., 0], whole.reward)
        assert torch.equal(tokens.advantage[..., 0], whole.advantage)
        assert torch.equal(tokens.scale, whole.scale)
    k_target, k_rollouts = kernel_values(phi, target)
    assert torch.equal(whole.reward, kernel_score_reward(k_target, k_rollouts))
    torch.testing.assert_close(whole.reward.mean(-1), whole.alignment - whole.similarity)


def test_order_of_the_rollouts_does_not_matter_and_duplicates_and_zeros_are_finite() -> None:
    generator = torch.Generator().manual_seed(0)
    phi, target = torch.randn(1, 2, 4, 3, 5, generator=generator), torch.randn(1, 2, 3, 5, generator=generator)
    phi[0, 1, :2], target[0, 1] = phi[0, 1, 2:], 0.0
    phi[0, 1, 0, 1] = 0.0
    mask, order = torch.ones(1, 2, dtype=torch.bool), torch.tensor([2, 0, 3, 1])
    for values in (kernel_values, partial(kernel_values, kernel="cosine"), partial(kernel_values, kernel="energy")):
        scores = token_scores(values, phi, target, mask)
        permuted = token_scores(values, phi[:, :, order], target, mask)
        torch.testing.assert_close(permuted.reward, scores.reward[:, :, order])
        torch.testing.assert_close(permuted.advantage, scores.advantage[:, :, order], atol=1e-5, rtol=1e-5)
        assert all(part.isfinite().all() for part in scores)


def test_one_rollout() -> None:
    phi, target = torch.randn(1, 1, 1, 3, 5), torch.randn(1, 1, 3, 5)
    scores = token_scores(
        kernel_values, phi, target, torch.ones(1, 1, dtype=torch.bool), estimator="none", diversity=0.0
    )
    assert scores.reward.shape == (1, 1, 1, 3)
    assert scores.similarity.tolist() == [[0.0]]


def test_hold_last_by_hand() -> None:
    features = torch.arange(12.0).view(2, 3, 2)
    features[0, 2] = float("nan")
    mask = torch.tensor([[True, True, False], [False, False, False]])
    assert hold_last(features, mask).tolist() == [[[0, 1], [2, 3], [2, 3]], [[0, 0]] * 3]


def test_credits_by_hand() -> None:
    values = torch.tensor([[1.0, 2.0, 4.0]])
    assert to_go(values).tolist() == [[7.0, 6.0, 4.0]]
    assert credited(values, "reward_to_go").tolist() == [[7.0, 6.0, 4.0]]
    assert credited(values, "total").tolist() == [[7.0, 7.0, 7.0]]
    assert credited(values, "own").tolist() == [[1.0, 2.0, 4.0]]


def test_bad_input_is_refused() -> None:
    phi, target, mask = torch.zeros(1, 2, 3, 4, 5), torch.zeros(1, 2, 4, 5), torch.ones(1, 2, dtype=torch.bool)
    with pytest.raises(UsageError, match=r"credit='gae'.*reward_to_go, total, own"):
        token_scores(kernel_values, phi, target, mask, credit="gae")
    with pytest.raises(UsageError, match=r"\[1, 2, 3, 5\].*\[1, 2, 5\].*every token"):
        token_scores(kernel_values, phi[..., 0, :], target[..., 0, :], mask)
    with pytest.raises(UsageError, match=r"\[2, 4, 5\].*\[2, 3\]"):
        hold_last(torch.zeros(2, 4, 5), torch.ones(2, 3, dtype=torch.bool))
