"""Feature-matching reward and loss against loops, exact expectations and identities."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ebft.errors import UsageError
from ebft.objectives.kernels import kernel_score_reward, kernel_values
from ebft.objectives.moments import (
    alignment_part,
    conditional_feature_matching_loss,
    distinct_rollouts,
    diversity_part,
    feature_matching_reward,
    moment_values,
)
from tests.enumeration import TablePolicy, expected_update, expected_value, features

EXACT = {"rtol": 1e-12, "atol": 1e-12}


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("alignment", ["dot", "cosine"])
@pytest.mark.parametrize("diversity", [0.0, 0.5, 1.0])
def test_reward_is_the_double_loop(alignment: str, diversity: float) -> None:
    rollout, target = draw(2, 3, 4, 5), draw(2, 3, 5, seed=1)
    found = feature_matching_reward(rollout, target, diversity=diversity, alignment=alignment)
    assert found.shape == (2, 3, 4)
    for b in range(2):
        for k in range(3):
            for j in range(4):
                mine, y = rollout[b, k, j], target[b, k]
                scale = mine.norm() * y.norm() if alignment == "cosine" else 1.0
                expected = 2 * (mine * y).sum() / scale
                for i in range(4):
                    if i != j:
                        expected = expected - diversity * 2 / 3 * (mine * rollout[b, k, i]).sum()
                torch.testing.assert_close(found[b, k, j], expected, **EXACT)


def test_reward_is_its_parts_and_the_linear_kernel_score() -> None:
    rollout, target = draw(2, 4, 5), draw(2, 5, seed=1)
    reward = feature_matching_reward(rollout, target, diversity=0.3)
    torch.testing.assert_close(reward, alignment_part(rollout, target) - 0.3 * diversity_part(rollout), **EXACT)
    kernel = kernel_score_reward(*kernel_values(rollout, target, kernel="linear"), diversity=0.3)
    torch.testing.assert_close(reward, kernel, **EXACT)
    for ours, theirs in zip(moment_values(rollout, target), kernel_values(rollout, target), strict=True):
        torch.testing.assert_close(ours, theirs, **EXACT)


def test_both_parts_are_on_one_scale_whatever_the_norm() -> None:
    """Three unit vectors side by side have norm √3: rollouts equal to the target still get 2·3 - 2·3 = 0."""
    target = torch.nn.functional.normalize(draw(2, 3, 6), dim=-1).flatten(1)
    rollout = target[:, None].expand(2, 4, 18)
    torch.testing.assert_close(diversity_part(rollout), torch.full((2, 4), 6.0, dtype=torch.float64), **EXACT)
    torch.testing.assert_close(
        feature_matching_reward(rollout, target), torch.zeros(2, 4, dtype=torch.float64), **EXACT
    )


@pytest.mark.parametrize("alignment", ["dot", "cosine"])
def test_unit_features_equal_to_the_target_have_no_reward(alignment: str) -> None:
    target = torch.nn.functional.normalize(draw(3, 7), dim=-1)
    reward = feature_matching_reward(target[:, None].expand(3, 5, 7), target, alignment=alignment)
    torch.testing.assert_close(reward, torch.zeros_like(reward), **EXACT)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.permutations(range(4)), st.sampled_from(["dot", "cosine"]))
def test_order_of_the_rollouts_does_not_matter(seed: int, order: list[int], alignment: str) -> None:
    rollout, target = draw(2, 4, 3, seed=seed), draw(2, 3, seed=seed + 1)
    reward = feature_matching_reward(rollout, target, alignment=alignment)
    permuted = feature_matching_reward(rollout[:, order], target, alignment=alignment)
    torch.testing.assert_close(permuted, reward[:, order], **EXACT)


@pytest.mark.parametrize("alignment", ["dot", "cosine"])
def test_zeros_and_duplicates_are_finite(alignment: str) -> None:
    rollout = torch.zeros(3, 4, 5)
    rollout[1] = 1.0
    rollout[2, :2] = 2.0
    target = torch.zeros(3, 5)
    target[2] = 1.0
    reward = feature_matching_reward(rollout, target, alignment=alignment)
    assert torch.equal(reward[0], torch.zeros(4))
    assert torch.equal(reward[1], torch.full((4,), -10.0))
    assert reward.isfinite().all()


def test_policy_gradient_of_the_reward_is_that_of_the_loss() -> None:
    """And the loss exceeds L_FM by the data's variance, which no parameter touches (2)."""
    policy, phi = TablePolicy(seed=0), features(seed=1)
    data = torch.tensor([0.5, 0.2, 0.3], dtype=torch.float64)  # p(y|c) on three targets
    targets = features(seed=2, outcomes=3)

    def reward(index: Tensor, target: Tensor) -> Tensor:
        return feature_matching_reward(phi[index], target.expand(len(index), -1))

    found = sum(p * expected_update(policy, 3, lambda i, y=y: reward(i, y)) for p, y in zip(data, targets, strict=True))
    mean = policy.prob() @ phi
    conditional = (data * (mean - targets).square().sum(-1)).sum()
    matching = (mean - data @ targets).square().sum()
    variance = (data * (targets - data @ targets).square().sum(-1)).sum()
    torch.testing.assert_close(matching, conditional - variance, **EXACT)
    torch.testing.assert_close(found, policy.gradient(conditional), rtol=0, atol=1e-10)
    torch.testing.assert_close(
        policy.gradient((policy.prob() @ phi - data @ targets).square().sum()), found, rtol=0, atol=1e-10
    )


@pytest.mark.parametrize("alpha", [0.5, 1.0])
def test_diversity_is_the_bias_of_the_target(alpha: float) -> None:
    """α‖E φ - φ(y)/α‖², (65)."""
    policy, phi, target = TablePolicy(seed=4), features(seed=5), features(seed=6, outcomes=1)[0]
    found = expected_update(
        policy, 2, lambda i: feature_matching_reward(phi[i], target.expand(len(i), -1), diversity=alpha)
    )
    loss = alpha * (policy.prob() @ phi - target / alpha).square().sum()
    torch.testing.assert_close(found, policy.gradient(loss), rtol=0, atol=1e-10)


@pytest.mark.parametrize("rollouts", [2, 3])
def test_loss_is_unbiased_and_the_plug_in_is_not(rollouts: int) -> None:
    policy, phi, target = TablePolicy(seed=7), features(seed=8), features(seed=9, outcomes=1)[0]
    mean = policy.prob().detach() @ phi
    exact = (mean - target).square().sum()
    spread = policy.prob().detach() @ (phi - mean).square().sum(-1)

    estimate = expected_value(
        policy, rollouts, lambda i: conditional_feature_matching_loss(phi[i], target.expand(len(i), -1))
    )
    torch.testing.assert_close(estimate, exact, **EXACT)
    plug_in = expected_value(policy, rollouts, lambda i: (phi[i].mean(1) - target).square().sum(-1))
    torch.testing.assert_close(plug_in, exact + spread / rollouts, **EXACT)
    assert spread / rollouts > 0.1


def test_loss_averages_over_rollouts_and_not_over_anchors() -> None:
    """Two rollouts on either side of the target: the mean is right, so the loss is far below their distances."""
    rollout = torch.tensor([[[[3.0, 0.0], [-1.0, 0.0]]]])  # [1,1,2,2]
    target = torch.tensor([[[1.0, 0.0]]])
    # 1 - mean_j(AT_j) + φ_1·φ_2 = 1 - 2 - 3
    assert conditional_feature_matching_loss(rollout, target).tolist() == [[-4.0]]


def test_loss_of_rollouts_equal_to_the_target_is_zero() -> None:
    target = draw(3, 4)
    loss = conditional_feature_matching_loss(target[:, None].expand(3, 5, 4), target)
    torch.testing.assert_close(loss, torch.zeros(3, dtype=torch.float64), **EXACT)


def test_distinct_rollouts_ignores_masked_tokens() -> None:
    tokens = torch.tensor([[[5, 6, 7], [5, 6, 8], [5, 6, 7], [5, 0, 0]], [[1, 2, 3]] * 4])
    mask = torch.ones_like(tokens, dtype=torch.bool)
    assert distinct_rollouts(tokens, mask).tolist() == [3, 1]
    mask[0, :, 2] = False
    assert distinct_rollouts(tokens, mask).tolist() == [2, 1]
    mask[1, 0, 2] = False  # a shorter rollout is another one, also next to token 0 in its place
    tokens[1, 1:, 2] = 0
    assert distinct_rollouts(tokens, mask).tolist() == [2, 2]


def test_one_rollout() -> None:
    rollout, target = draw(2, 1, 3), draw(2, 3, seed=1)
    torch.testing.assert_close(
        feature_matching_reward(rollout, target, diversity=0.0), 2 * (rollout[:, 0] * target).sum(-1)[:, None], **EXACT
    )
    with pytest.raises(UsageError, match="2 or more rollouts, or set diversity=0"):
        feature_matching_reward(rollout, target)
    with pytest.raises(UsageError, match="2 or more rollouts"):
        conditional_feature_matching_loss(rollout, target)
    with pytest.raises(UsageError, match="2 or more rollouts"):
        diversity_part(rollout)


def test_bad_input_is_refused() -> None:
    with pytest.raises(UsageError, match=r"alignment='cos'.*'dot', 'cosine', 'unit_target'"):
        feature_matching_reward(draw(2, 3, 4), draw(2, 4), alignment="cos")
    with pytest.raises(UsageError, match=r"\[2, 3, 4\].*\[3, 4\]"):
        feature_matching_reward(draw(2, 3, 4), draw(3, 4))
    with pytest.raises(UsageError, match=r"\[2, 3\].*\[2, 4\]"):
        distinct_rollouts(torch.zeros(2, 3).long(), torch.ones(2, 4).bool())
