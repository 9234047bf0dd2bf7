"""Kernel values against their formulas, and what each score can tell apart."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from ebft.errors import UsageError
from ebft.objectives.kernels import kernel_score_reward, kernel_values

FORMULAS = {
    ("linear",): lambda x, y: x @ y,
    ("cosine",): lambda x, y: x @ y / (x.norm() * y.norm()),
    ("polynomial", ("degree", 3), ("offset", 0.5)): lambda x, y: (x @ y + 0.5) ** 3,
    ("polynomial",): lambda x, y: (x @ y + 1) ** 2,
    ("rbf", ("bandwidth", 1.7)): lambda x, y: math.exp(-((x - y) @ (x - y)) / (2 * 1.7**2)),
    ("laplace", ("bandwidth", 1.7)): lambda x, y: math.exp(-(x - y).norm() / 1.7),
    ("energy",): lambda x, y: -(x - y).norm(),
    ("energy", ("power", 0.5)): lambda x, y: -((x - y).norm() ** 0.5),
}


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("case", FORMULAS, ids=str)
def test_values_are_the_formula(case: tuple) -> None:
    kernel, *options = case
    rollout, target = draw(2, 3, 4), draw(2, 4, seed=1)
    k_target, k_rollouts = kernel_values(rollout, target, kernel=kernel, **dict(options))
    assert k_target.shape == (2, 3)
    assert k_rollouts.shape == (2, 3, 3)
    for b in range(2):
        for i in range(3):
            expected = FORMULAS[case](rollout[b, i], target[b])
            assert float(k_target[b, i]) == pytest.approx(float(expected), rel=1e-12)
            for j in range(3):
                expected = FORMULAS[case](rollout[b, i], rollout[b, j])
                assert float(k_rollouts[b, i, j]) == pytest.approx(float(expected), rel=1e-12, abs=1e-12)


def test_reward_is_the_double_loop() -> None:
    k_target, k_rollouts = draw(2, 4), draw(2, 4, 4, seed=1)
    k_rollouts = k_rollouts + k_rollouts.mT
    found = kernel_score_reward(k_target, k_rollouts, diversity=0.6)
    for b in range(2):
        for j in range(4):
            others = sum(float(k_rollouts[b, j, i]) for i in range(4) if i != j) / 3
            assert float(found[b, j]) == pytest.approx(2 * float(k_target[b, j]) - 1.2 * others, rel=1e-12)


@pytest.mark.parametrize(
    ("kernel", "options", "moments", "strict"),
    [
        ("linear", {}, 1, False),
        ("polynomial", {"degree": 2}, 2, False),
        ("polynomial", {"degree": 4}, 4, True),
        ("rbf", {"bandwidth": 1.0}, None, True),
        ("laplace", {"bandwidth": 1.0}, None, True),
        ("energy", {}, None, True),
        ("energy", {"power": 1.9}, None, True),
    ],
)
def test_which_scores_are_strictly_proper(kernel: str, options: dict, moments: int | None, strict: bool) -> None:
    """Two laws on {-2..2} with the same mean, variance and third moment, differing in the fourth."""
    points = torch.arange(-2.0, 3.0, dtype=torch.float64)[:, None]
    data = torch.tensor([0.1, 0.2, 0.4, 0.2, 0.1], dtype=torch.float64)
    fourth = torch.tensor([1.0, -4.0, 6.0, -4.0, 1.0], dtype=torch.float64)  # orthogonal to 1, x, x², x³
    _, values = kernel_values(points, points[0], kernel=kernel, **options)
    discrepancy = 0.02 * fourth @ values @ (0.02 * fourth)  # score of data + 0.02 fourth, less that of the data
    assert (0.1 * discrepancy > 1e-9) if strict else discrepancy.abs() < 1e-12
    # proper: no other law beats the data
    other = torch.softmax(draw(50, 5), -1) - data
    assert torch.einsum("mi,ij,mj->m", other, values, other).min() > -1e-12


def test_cosine_sees_directions_only() -> None:
    rollout, target = draw(3, 4), draw(4, seed=1)
    scale = torch.tensor([0.1, 3.0, 20.0], dtype=torch.float64)[:, None]
    for ours, scaled in zip(
        kernel_values(rollout, target, kernel="cosine"),
        kernel_values(scale * rollout, 5 * target, kernel="cosine"),
        strict=True,
    ):
        torch.testing.assert_close(ours, scaled, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kernel", ["linear", "cosine", "polynomial", "rbf", "laplace", "energy"])
@pytest.mark.parametrize("count", [4, 40])
def test_zeros_and_duplicates_are_finite_and_exact(kernel: str, count: int) -> None:
    rollout = torch.zeros(2, count, 64)
    rollout[1] = draw(64).float()
    k_target, k_rollouts = kernel_values(rollout, rollout[:, 0], kernel=kernel)
    torch.testing.assert_close(k_rollouts, k_rollouts[:, :1, :1].expand_as(k_rollouts), rtol=1e-5, atol=0)
    torch.testing.assert_close(k_target, k_rollouts[..., 0], rtol=1e-5, atol=0)
    wanted = {"rbf": 1.0, "laplace": 1.0, "energy": 0.0}
    if kernel in wanted:
        assert (k_rollouts == wanted[kernel]).all()
    assert k_rollouts.isfinite().all()


def test_distances_of_close_rollouts_survive_float32() -> None:
    rollout = (draw(64) + 1e-4 * draw(40, 64, seed=1)).float()
    _, found = kernel_values(rollout, rollout[0], kernel="energy")
    _, exact = kernel_values(rollout.double(), rollout[0].double(), kernel="energy")
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=0)


@pytest.mark.parametrize("kernel", ["rbf", "laplace"])
def test_median_heuristic_is_the_median_of_the_distances(kernel: str) -> None:
    rollout, target = draw(2, 3, 4), draw(2, 4, seed=1)
    distances = []
    for b in range(2):
        points = [*rollout[b], target[b]]
        distances += [float((points[i] - points[j]).norm()) for i in range(4) for j in range(i)]
    median = sorted(distances)[(len(distances) - 1) // 2]  # the lower one, as torch has it
    for ours, fixed in zip(
        kernel_values(rollout, target, kernel=kernel),
        kernel_values(rollout, target, kernel=kernel, bandwidth=median),
        strict=True,
    ):
        torch.testing.assert_close(ours, fixed, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kernel", ["linear", "cosine", "polynomial", "rbf", "laplace", "energy"])
@pytest.mark.parametrize("garbage", [0.0, float("nan"), float("inf")])
def test_masked_anchors_change_nothing_and_get_zeros(kernel: str, garbage: float) -> None:
    rollout, target = draw(3, 4, 5), draw(3, 5, seed=1)
    alone = kernel_values(rollout[:2], target[:2], kernel=kernel)
    rollout[2], target[2] = garbage, garbage
    found = kernel_values(rollout, target, kernel=kernel, mask=torch.tensor([True, True, False]))
    for ours, expected in zip(found, alone, strict=True):
        torch.testing.assert_close(ours[:2], expected, rtol=1e-12, atol=1e-12)
        assert (ours[2] == 0).all()


def test_all_anchors_masked_is_finite() -> None:
    k_target, k_rollouts = kernel_values(draw(1, 2, 3), draw(1, 3), kernel="rbf", mask=torch.tensor([False]))
    assert (k_target == 0).all()
    assert (k_rollouts == 0).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kernel": "gauss"}, "kernel='gauss'.*linear, cosine, polynomial, rbf, laplace, energy"),
        ({"kernel": "linear", "bandwidth": 1.0}, "bandwidth=1.0.*kernel='linear'.*no options"),
        ({"kernel": "rbf", "power": 1.0}, "power=1.0.*kernel='rbf'.*bandwidth"),
        ({"kernel": "rbf", "bandwidth": 0.0}, "bandwidth=0.0.*above 0"),
        ({"kernel": "energy", "power": 2.0}, "power=2.0.*between 0 and 2"),
        ({"kernel": "polynomial", "degree": 1.5}, "degree=1.5.*whole number"),
        ({"kernel": "polynomial", "offset": -1.0}, "offset=-1.0.*at least 0"),
        ({"mask": torch.ones(3, dtype=torch.bool)}, r"mask has shape \[3\].*\[2\]"),
    ],
)
def test_bad_options_are_refused(arguments: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        kernel_values(draw(2, 3, 4), draw(2, 4), **arguments)
