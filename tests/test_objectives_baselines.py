"""Every advantage estimator against the exact gradient, by enumeration of all groups of rollouts."""

from __future__ import annotations

import itertools
import warnings

import pytest
import torch
from torch import Tensor

from ebft.errors import UsageError
from ebft.objectives.baselines import advantage
from ebft.objectives.kernels import kernel_score_reward, kernel_values
from ebft.objectives.moments import moment_values
from tests.enumeration import TablePolicy, expected_update, expected_value, features, groups, score_parts

EXACT = {"rtol": 0, "atol": 1e-10}
KERNELS = {
    "linear": {},
    "cosine": {},
    "polynomial": {"degree": 3, "offset": 0.5},
    "rbf": {"bandwidth": 1.3},
    "laplace": {"bandwidth": 0.7},
    "energy": {"power": 1.4},
}


def setting(kernel: str = "linear", seed: int = 0) -> tuple[TablePolicy, Tensor, Tensor]:
    """A policy and the kernel values of all its outcomes with a target [Y] and with each other [Y,Y]."""
    policy, phi = TablePolicy(seed=seed), features(seed=seed + 1)
    target = features(seed=seed + 2, outcomes=1)[0]
    return policy, *kernel_values(phi, target, kernel=kernel, **KERNELS[kernel])


def update(policy: TablePolicy, k_target: Tensor, k_rollouts: Tensor, rollouts: int, **options) -> Tensor:
    def of_group(index: Tensor) -> Tensor:
        return advantage(k_target[index], k_rollouts[index[:, :, None], index[:, None, :]], **options)

    return expected_update(policy, rollouts, of_group)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("estimator", ["rloo", "none"])
@pytest.mark.parametrize("diversity", [0.0, 0.5, 1.0, 2.0])
def test_unbiased_for_every_kernel_and_diversity(kernel: str, estimator: str, diversity: float) -> None:
    policy, k_target, k_rollouts = setting(kernel)
    found = update(policy, k_target, k_rollouts, 3, estimator=estimator, diversity=diversity)
    alignment, spread = score_parts(policy, k_target, k_rollouts)
    torch.testing.assert_close(found, policy.gradient(alignment + diversity * spread), **EXACT)


@pytest.mark.filterwarnings("ignore:estimator='rloo' with 2 rollouts")
@pytest.mark.parametrize("rollouts", [2, 4])
@pytest.mark.parametrize("estimator", ["rloo", "none"])
def test_unbiased_for_other_group_sizes(rollouts: int, estimator: str) -> None:
    policy, k_target, k_rollouts = setting(seed=3)
    found = update(policy, k_target, k_rollouts, rollouts, estimator=estimator)
    torch.testing.assert_close(found, policy.gradient(sum(score_parts(policy, k_target, k_rollouts))), **EXACT)


@pytest.mark.parametrize("diversity", [0.0, 0.7])
def test_the_tuned_baseline_is_unbiased(diversity: float) -> None:
    """Its coefficients come from the other groups of the call: all draws of two groups of three, and a masked one."""
    policy, targets = TablePolicy(seed=0, horizon=1), features(seed=2, outcomes=2) + 1.0
    values = [kernel_values(features(seed=1, outcomes=len(policy.outcomes)), target) for target in targets]
    exact = sum(policy.gradient(a + diversity * b) for a, b in (score_parts(policy, *each) for each in values)) / 2
    index, weight = groups(policy, 3)  # [M,N]
    log_prob, mask = policy.log_prob().sum(-1), torch.tensor([True, True, False])
    apart, alone = [], []  # what the other group makes of the advantages of the first
    total = torch.zeros(())
    for a, b in itertools.product(range(len(index)), repeat=2):
        drawn = [index[a], index[b], index[b]]
        of = [values[0], values[1], values[1]]
        k_target = torch.stack([t[i] for (t, _), i in zip(of, drawn, strict=True)])
        k_rollouts = torch.stack([r[i[:, None], i] for (_, r), i in zip(of, drawn, strict=True)])
        k_target[2] = 100.0  # what is masked is not looked at
        tuned, plain = (
            advantage(k_target, k_rollouts, estimator=e, diversity=diversity, mask=mask) for e in ("rloo_tuned", "rloo")
        )
        apart.append(tuned[0])
        alone.append(plain[0])
        loss = -(tuned[:2] * log_prob[torch.stack(drawn[:2])]).mean()
        total = total + weight[a] * weight[b] * loss
    torch.testing.assert_close(policy.gradient(total), exact, **EXACT)
    tuned, plain = (torch.stack(x).unflatten(0, (len(index), -1)) for x in (apart, alone))
    assert (tuned - plain).abs().max() > 0.1  # the coefficients are not all 1,
    assert (tuned[:, :1] - tuned).abs().max() > 0.1  # and depend on the other group


def test_rloo_with_two_rollouts_warns_only_about_the_diversity_part() -> None:
    with pytest.warns(UserWarning, match="diversity part of the reward has no baseline"):
        advantage(torch.zeros(2), torch.zeros(2, 2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        advantage(torch.zeros(2), torch.zeros(2, 2), diversity=0.0)
        advantage(torch.zeros(3), torch.zeros(3, 3))


def test_unbiased_with_one_rollout_and_no_diversity() -> None:
    policy, k_target, k_rollouts = setting()
    found = update(policy, k_target, k_rollouts, 1, estimator="none", diversity=0.0)
    torch.testing.assert_close(found, policy.gradient(score_parts(policy, k_target, k_rollouts)[0]), **EXACT)


@pytest.mark.parametrize("rollouts", [2, 3, 4])
def test_mean_shrinks_the_diversity_part(rollouts: int) -> None:
    """The widespread leave-one-out mean of the rewards is correlated with the sample it corrects."""
    policy, k_target, k_rollouts = setting()
    found = update(policy, k_target, k_rollouts, rollouts, estimator="mean", diversity=0.8)
    alignment, spread = (policy.gradient(part) for part in score_parts(policy, k_target, k_rollouts))
    factor = (rollouts - 2) / (rollouts - 1)
    torch.testing.assert_close(found, alignment + 0.8 * factor * spread, **EXACT)
    assert (found - alignment - 0.8 * spread).abs().max() > 1e-2


def test_group_norm_is_biased_even_in_direction() -> None:
    policy, k_target, k_rollouts = setting()
    found = update(policy, k_target, k_rollouts, 3, estimator="group_norm")
    exact = policy.gradient(sum(score_parts(policy, k_target, k_rollouts)))
    assert torch.cosine_similarity(found, exact, dim=0) < 0.999
    assert abs(found.norm() / exact.norm() - 1) > 0.1


def test_rloo_has_less_variance_than_none_when_rewards_have_a_large_mean() -> None:
    policy, k_target, k_rollouts = setting()
    variance = {}
    for estimator in ("rloo", "none"):

        def squared(index: Tensor, estimator: str = estimator) -> Tensor:
            values = k_target[index] + 10.0, k_rollouts[index[:, :, None], index[:, None, :]]
            return advantage(*values, estimator=estimator).square()

        variance[estimator] = expected_value(policy, 3, squared).mean()
    assert variance["rloo"] < 0.1 * variance["none"]


@pytest.mark.parametrize("alignment", ["dot", "cosine"])
@pytest.mark.parametrize("rollouts", [3, 5])
def test_rloo_is_formula_94_written_out(alignment: str, rollouts: int) -> None:
    phi, target = features(seed=5, outcomes=rollouts), features(seed=6, outcomes=1)[0]
    k_target, k_rollouts = moment_values(phi, target, alignment=alignment)
    n, diversity = rollouts, 0.7
    first = [2 * float(k_target[j]) for j in range(n)]
    second = [2 / (n - 1) * sum(float(phi[j] @ phi[i]) for i in range(n) if i != j) for j in range(n)]
    expected = []
    for j in range(n):
        others = [i for i in range(n) if i != j]
        without_j = [(n - 1) / (n - 2) * second[i] - 2 / (n - 2) * float(phi[j] @ phi[i]) for i in others]
        baseline = sum(first[i] for i in others) / (n - 1) - diversity * sum(without_j) / (n - 1)
        expected.append(first[j] - diversity * second[j] - baseline)
    found = advantage(k_target, k_rollouts, estimator="rloo", diversity=diversity)
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-12)


def test_group_norm_is_over_the_rollouts_of_one_anchor() -> None:
    """Not over anchors: two anchors of four rollouts each, the second without spread."""
    reward = torch.tensor([[0.0, 1.0, 2.0, 3.0], [10.0, 10.0, 10.0, 10.0]])
    found = advantage(reward / 2, torch.zeros(2, 4, 4), estimator="group_norm", diversity=0.0)
    standard = (torch.arange(4.0) - 1.5) / (5 / 3) ** 0.5
    torch.testing.assert_close(found, torch.stack([standard, torch.zeros(4)]))


def test_group_norm_does_not_blow_up_rounding() -> None:
    """Equal rollouts whose rewards differ in the last bit have no advantage."""
    k_target = torch.tensor([1.0, 1.0, 1.0 + 2**-23])
    assert k_target[0] != k_target[2]
    for options in ({"diversity": 0.0}, {"diversity": 1.0}):
        found = advantage(k_target, torch.zeros(3, 3), estimator="group_norm", **options)
        assert torch.equal(found, torch.zeros(3))
    # ten thousand times that is a difference
    k_target[2] = 1.001
    assert advantage(k_target, torch.zeros(3, 3), estimator="group_norm")[2] > 1


@pytest.mark.parametrize("estimator", ["rloo", "mean", "group_norm", "none"])
def test_groups_do_not_mix_and_order_does_not_matter(estimator: str) -> None:
    generator = torch.Generator().manual_seed(0)
    phi = torch.randn(2, 3, 4, 5, generator=generator, dtype=torch.float64)
    target = torch.randn(2, 3, 5, generator=generator, dtype=torch.float64)
    values = moment_values(phi, target)
    found = advantage(*values, estimator=estimator)
    assert found.shape == (2, 3, 4)
    alone = advantage(*moment_values(phi[1, 2], target[1, 2]), estimator=estimator)
    torch.testing.assert_close(found[1, 2], alone, rtol=1e-12, atol=1e-12)
    order = torch.tensor([2, 0, 3, 1])
    permuted = advantage(*moment_values(phi[:, :, order], target), estimator=estimator)
    torch.testing.assert_close(permuted, found[:, :, order], rtol=1e-12, atol=1e-12)


def test_none_is_the_reward() -> None:
    values = moment_values(features(seed=1), features(seed=2, outcomes=1)[0])
    assert torch.equal(advantage(*values, estimator="none"), kernel_score_reward(*values))


@pytest.mark.parametrize("estimator", ["rloo", "mean", "group_norm"])
def test_one_rollout_is_refused_with_the_way_out(estimator: str) -> None:
    with pytest.raises(UsageError, match=f"{estimator}.*1 rollout.*estimator='none' and diversity=0"):
        advantage(torch.zeros(1), torch.zeros(1, 1), estimator=estimator, diversity=0.0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"estimator": "gae"}, "estimator='gae'.*rloo, rloo_tuned, mean, group_norm, none"),
        ({"diversity": -0.5}, "diversity=-0.5"),
        ({"diversity": float("nan")}, "diversity=nan"),
    ],
)
def test_bad_options_are_refused(arguments: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        advantage(torch.zeros(3), torch.zeros(3, 3), **arguments)


def test_bad_shapes_are_refused() -> None:
    with pytest.raises(UsageError, match=r"\[2, 3\].*\[3, 3\]"):
        advantage(torch.zeros(2, 3), torch.zeros(3, 3))
    with pytest.raises(UsageError, match="2 or more rollouts, or set diversity=0"):
        advantage(torch.zeros(1), torch.zeros(1, 1), estimator="none")
