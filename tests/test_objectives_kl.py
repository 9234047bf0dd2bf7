"""Divergence estimators: expected values and gradients by enumeration, exact values, coefficients."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from ebft.errors import UsageError
from ebft.objectives.kl import exact_kl, kl_estimate
from ebft.objectives.kl_controllers import AdaptiveKL, ConstantKL
from tests.enumeration import TablePolicy

EXACT = {"rtol": 0, "atol": 1e-12}


def policies() -> tuple[TablePolicy, TablePolicy]:
    return TablePolicy(seed=0), TablePolicy(seed=1)


def next_token_divergence(policy: TablePolicy, reference: TablePolicy, direction: str) -> Tensor:
    """Σ_t E[KL between next-token distributions], contexts drawn from the policy and held fixed in the gradient."""
    steps = exact_kl(policy.logits(), reference.logits(), direction=direction)  # [Y,G]
    return (policy.prob().detach()[:, None] * steps).sum()


def rollout_divergence(first: TablePolicy, second: TablePolicy) -> Tensor:
    return (first.prob() * (first.log_prob().sum(-1) - second.log_prob().sum(-1))).sum()


def expected(policy: TablePolicy, reference: TablePolicy, estimator: str, *, summed: bool) -> Tensor:
    """Expectation of the estimate of a rollout; the gradient is of the estimate, not of the draw."""
    log_prob, other = policy.log_prob(), reference.log_prob()
    if summed:
        log_prob, other = log_prob.sum(-1, keepdim=True), other.sum(-1, keepdim=True)
    terms = kl_estimate(log_prob, other, estimator=estimator).sum(-1)
    return (policy.prob().detach() * terms).sum()


@pytest.mark.parametrize("estimator", ["k1", "k3"])
@pytest.mark.parametrize("summed", [False, True])
def test_k1_and_k3_have_the_value_of_the_rollout_divergence(estimator: str, summed: bool) -> None:
    policy, reference = policies()
    exact = rollout_divergence(policy, reference)
    torch.testing.assert_close(expected(policy, reference, estimator, summed=summed), exact, **EXACT)
    assert abs(expected(policy, reference, "k2", summed=summed) - exact) > 0.01


def test_gradient_per_token_is_that_of_the_next_token_divergence() -> None:
    policy, reference = policies()
    exact = {
        "k1": torch.zeros_like(policy.parameters),
        "k2": policy.gradient(next_token_divergence(policy, reference, "reverse")),
        "k3": policy.gradient(next_token_divergence(policy, reference, "forward")),
    }
    for estimator, gradient in exact.items():
        found = policy.gradient(expected(policy, reference, estimator, summed=False))
        torch.testing.assert_close(found, gradient, **EXACT)
    assert (exact["k2"] - exact["k3"]).abs().max() > 0.01


def test_gradient_of_summed_log_probs_is_that_of_the_rollout_divergence() -> None:
    policy, reference = policies()
    exact = {
        "k1": torch.zeros_like(policy.parameters),
        "k2": policy.gradient(rollout_divergence(policy, reference)),
        "k3": policy.gradient(rollout_divergence(reference, policy)),
    }
    for estimator, gradient in exact.items():
        found = policy.gradient(expected(policy, reference, estimator, summed=True))
        torch.testing.assert_close(found, gradient, **EXACT)
    myopic = policy.gradient(expected(policy, reference, "k2", summed=False))
    assert (myopic - exact["k2"]).abs().max() > 0.01  # per token misses that contexts change with the policy


def test_estimates_are_elementwise_and_k3_is_never_negative() -> None:
    log_prob, reference = -torch.rand(2, 3, 4), -torch.rand(2, 3, 4)
    ratio = log_prob - reference
    assert torch.equal(kl_estimate(log_prob, reference, estimator="k1"), ratio)
    assert torch.equal(kl_estimate(log_prob, reference), ratio**2 / 2)
    k3 = kl_estimate(log_prob, reference, estimator="k3")
    torch.testing.assert_close(k3, (-ratio).exp() - 1 + ratio, rtol=1e-4, atol=1e-6)
    assert (k3 >= 0).all()


def test_reference_gets_no_gradient() -> None:
    values = [torch.randn(3, 4, requires_grad=True) for _ in range(2)]
    (kl_estimate(*values).sum() + exact_kl(*values).sum() + exact_kl(*values, direction="forward").sum()).backward()
    assert values[0].grad is not None
    assert values[1].grad is None


@pytest.mark.parametrize("direction", ["reverse", "forward"])
def test_exact_kl_is_torchs(direction: str) -> None:
    logits, reference = (torch.randn(3, 7, dtype=torch.float64).requires_grad_() for _ in range(2))
    first, second = (logits, reference) if direction == "reverse" else (reference, logits)
    expected = torch.distributions.kl_divergence(
        torch.distributions.Categorical(logits=first), torch.distributions.Categorical(logits=second)
    )
    found = exact_kl(logits, reference, direction=direction)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(
        torch.autograd.grad(found.sum(), logits)[0], torch.autograd.grad(expected.sum(), logits)[0]
    )


def test_exact_kl_with_excluded_tokens() -> None:
    """Tokens with no probability in the first distribution count nothing; the other way round is infinite."""
    narrow = torch.tensor([0.3, -0.2, -math.inf], dtype=torch.float64, requires_grad=True)
    wide = torch.tensor([0.1, 0.4, 0.9], dtype=torch.float64)
    found = exact_kl(narrow, wide)
    p, q = narrow[:2].softmax(0), wide.softmax(0)[:2]
    torch.testing.assert_close(found, (p * (p / q).log()).sum())
    found.backward()
    assert narrow.grad.isfinite().all()
    assert exact_kl(narrow, wide, direction="forward") == math.inf
    assert exact_kl(narrow, narrow) == 0
    assert exact_kl(narrow, narrow, direction="forward") == 0


def test_adaptive_coefficient_rises_when_the_divergence_is_above_target() -> None:
    controller = AdaptiveKL(coefficient=0.5, target=2.0)
    assert controller.update(2.0) == 0.5
    assert controller.update(2.2) == pytest.approx(0.5 * 1.01)  # 10 % above: 0.1 · 0.1
    assert controller.update(100.0) == pytest.approx(0.5 * 1.01 * 1.02)  # at most 0.1 · 0.2
    assert controller.update(0.0) == pytest.approx(0.5 * 1.01 * 1.02 * 0.98)
    assert controller.coefficient > 0


def test_constant_coefficient_stays() -> None:
    controller = ConstantKL(0.0)
    assert controller.update(7.0) == 0.0
    assert controller.coefficient == 0.0


def test_a_constant_coefficient_is_an_option_and_no_state() -> None:
    fresh = ConstantKL(0.1)
    fresh.load_state_dict(ConstantKL(0.5).state_dict())
    assert fresh.coefficient == 0.1


def test_state_round_trip() -> None:
    controller, fresh = AdaptiveKL(0.5, 2.0), AdaptiveKL(0.1, 2.0)
    controller.update(3.0)
    fresh.load_state_dict(controller.state_dict())
    assert fresh.coefficient == controller.coefficient
    assert fresh.update(1.0) == controller.update(1.0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: kl_estimate(torch.zeros(2), torch.zeros(2), estimator="k4"), "'k4'.*'k1', 'k2' or 'k3'"),
        (lambda: kl_estimate(torch.zeros(2), torch.zeros(1)), r"\[1\].*\[2\]"),
        (lambda: exact_kl(torch.zeros(2), torch.zeros(2), direction="both"), "direction='both'"),
        (lambda: exact_kl(torch.zeros(2), torch.zeros(3)), r"\[3\].*\[2\]"),
        (lambda: ConstantKL(-1.0), "coefficient=-1.0"),
        (lambda: AdaptiveKL(0.0, 1.0), "coefficient=0.0"),
        (lambda: AdaptiveKL(1.0, 0.0), "target=0.0"),
        (lambda: AdaptiveKL(1.0, 1.0, rate=5.0), "rate=5.0.*below 5"),
        (lambda: AdaptiveKL(1.0, 1.0).update(math.nan), "kl=nan"),
    ],
)
def test_bad_input_is_refused(call, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        call()
