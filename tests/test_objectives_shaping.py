"""What is done to advantages, weights that follow the step, and what ends a training."""

from __future__ import annotations

import math

import pytest
import torch

from ebft.errors import UsageError
from ebft.objectives.diagnostics import gradient_signal_to_noise, signal_to_noise_of_sums
from ebft.objectives.kl_controllers import AdaptiveKL, ConstantKL, StopAbove
from ebft.objectives.schedules import schedule
from ebft.objectives.shaping import clip, keep_groups, standardise


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_dropped_groups_leave_the_mean_over_the_kept_ones() -> None:
    gain = draw(2, 3, 4)
    mask = torch.tensor([[True, True, False], [True, True, True]])
    drop = torch.tensor([[False, True, False], [False, True, False]])
    kept = keep_groups(gain, drop, mask)
    chosen = mask & ~drop
    assert not kept[~chosen].any()
    wanted = gain[chosen].sum() / chosen.sum()
    torch.testing.assert_close(kept.sum() / mask.sum(), wanted)
    per_token = keep_groups(gain[..., None].expand(2, 3, 4, 5), drop, mask)
    torch.testing.assert_close(per_token, kept[..., None].expand(2, 3, 4, 5))


def test_all_groups_dropped_is_zero() -> None:
    kept = keep_groups(draw(1, 2, 3), torch.ones(1, 2, dtype=torch.bool), torch.ones(1, 2, dtype=torch.bool))
    assert not kept.any()


def test_standard_scores_over_the_entries_that_count() -> None:
    gain, mask = 5 + 3 * draw(2, 3, 4), torch.rand(2, 3, 4, generator=torch.Generator().manual_seed(1)) > 0.3
    polluted = torch.where(mask, gain, torch.nan)
    scores = standardise(polluted, mask)
    torch.testing.assert_close(scores[mask], (gain[mask] - gain[mask].mean()) / gain[mask].std())
    assert not scores[~mask].any()


@pytest.mark.parametrize("value", [0.0, 0.1, 1e9])
def test_no_spread_is_zero(value: float) -> None:
    gain = torch.full((2, 2, 3), value)
    assert not standardise(gain, torch.ones_like(gain, dtype=torch.bool)).any()
    one = torch.zeros_like(gain, dtype=torch.bool)
    one[0, 0, 0] = True
    assert not standardise(gain, one).any()


def test_clip_bounds_both_sides() -> None:
    assert clip(torch.tensor([-3.0, -0.5, 0.0, 2.0]), 1.0).tolist() == [-1.0, -0.5, 0.0, 1.0]
    for limit in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(UsageError, match="clip_advantage"):
            clip(torch.zeros(1), limit)


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("constant", [2, 2, 2, 2]),
        ("linear_decay", [2, 1.5, 1, 0.5]),
        ("linear_decay:0.5", [2, 1.75, 1.5, 1.25]),
        ("linear_decay:1", [2, 2, 2, 2]),
        ("warm_up:0.5", [1, 2, 2, 2]),
        ("warm_up:1", [0.5, 1, 1.5, 2]),
        ("warm_up", [2, 2, 2, 2]),
    ],
)
def test_schedules_by_hand(text: str, values: list[float]) -> None:
    weight = schedule(text, 2.0, steps=4)
    assert [weight(step) for step in range(4)] == pytest.approx(values)


@pytest.mark.parametrize(
    "text", ["cosine", "constant:1", "warm_up:", "warm_up:2", "linear_decay:-1", "warm_up:nan", ""]
)
def test_unknown_schedules_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match=f"schedule {text!r}"):
        schedule(text, 1.0, steps=10)


def test_stopping_is_for_good_and_passes_the_coefficient_on() -> None:
    controller = StopAbove(AdaptiveKL(1.0, target=0.1), limit=0.5)
    controller.update(0.2)
    assert (controller.stopped, controller.coefficient) == (False, pytest.approx(1.02))
    controller.update(0.6)
    assert (controller.stopped, controller.coefficient) == (True, pytest.approx(1.02))
    controller.update(0.0)
    assert controller.stopped
    fresh = StopAbove(AdaptiveKL(5.0, target=0.1), limit=0.5)
    fresh.load_state_dict(controller.state_dict())
    assert (fresh.stopped, fresh.coefficient) == (True, pytest.approx(1.02))


def test_a_divergence_that_is_no_number_stops() -> None:
    controller = StopAbove(ConstantKL(1.0), limit=0.5)
    controller.update(math.nan)
    assert controller.stopped


@pytest.mark.parametrize("limit", [0.0, -1.0, math.inf, math.nan])
def test_limits_out_of_range_are_refused(limit: float) -> None:
    with pytest.raises(UsageError, match="limit"):
        StopAbove(ConstantKL(1.0), limit=limit)


def test_signal_to_noise_of_known_gradients() -> None:
    mean, spread, draws = draw(50), 2.0, draw(4000, 50, seed=1)
    found = gradient_signal_to_noise(mean + spread * draws)
    exact = mean.square().sum() / (spread**2 * 50)
    assert abs(found - exact) < 4 * 2 * (exact / 50 / 4000) ** 0.5  # the mean's error dominates: sd of 2 mean·noise


def test_signal_to_noise_is_the_ratio_over_pairs() -> None:
    """Signal is the mean product of different draws; noise the mean square less that."""
    gradients = draw(6, 9)
    products = gradients @ gradients.T
    pairs = (products.sum() - products.trace()) / 30
    torch.testing.assert_close(gradient_signal_to_noise(gradients), pairs / (products.trace() / 6 - pairs))


def test_pure_noise_has_no_signal_on_average() -> None:
    values = torch.stack([gradient_signal_to_noise(draw(8, 40, seed=seed)) for seed in range(300)])
    assert abs(values.mean()) < 4 * values.std() / 300**0.5


def test_too_few_draws_are_refused() -> None:
    with pytest.raises(UsageError, match=r"\[1, 3\]"):
        gradient_signal_to_noise(torch.zeros(1, 3))


@pytest.mark.parametrize("shares", [[0.5, 1.0], [0.25, 0.5, 1.0], [0.3, 0.6, 0.9, 1.0]], ids=str)
def test_signal_and_noise_from_running_sums_are_right_on_average(shares) -> None:
    """S and V by many batches of unequal parts; each part's gradient is a sum over its rows."""
    rows, size, batches = 20, 6, 4000
    mean = draw(size) * 0.4
    single = mean / rows + draw(batches, rows, size, seed=1) / rows  # of a row: S = ‖mean‖², V = size / rows
    ends = [round(rows * share) for share in shares]
    norms = torch.stack([single[:, :end].sum(1).square().sum(-1) for end in ends], -1)
    ratios = torch.tensor([signal_to_noise_of_sums(own.tolist(), shares) for own in norms], dtype=torch.float64)
    signal = norms[:, -1] * ratios / (1 + ratios)  # back to S and V of every batch
    noise = norms[:, -1] - signal
    for values, wanted in ((signal, mean.square().sum()), (noise, size / rows)):
        assert abs(values.mean() - wanted) < 4 * values.std() / batches**0.5
        assert values.std() / batches**0.5 < 0.1 * wanted


def test_signal_and_noise_from_any_parts_are_right_on_average() -> None:
    """Running sums of two processes, each of its own rows, and the whole."""
    rows, size, batches = 20, 6, 4000
    mean = draw(size) * 0.4
    single = mean / rows + draw(batches, rows, size, seed=2) / rows
    parts = [(0, 4), (0, 10), (10, 17), (10, 20), (0, 20)]
    norms = torch.stack([single[:, a:b].sum(1).square().sum(-1) for a, b in parts], -1)
    shares = [(b - a) / rows for a, b in parts]
    ratios = torch.tensor([signal_to_noise_of_sums(own.tolist(), shares) for own in norms], dtype=torch.float64)
    signal = norms[:, -1] * ratios / (1 + ratios)
    assert abs(signal.mean() - mean.square().sum()) < 4 * signal.std() / batches**0.5
    assert signal.std() / batches**0.5 < 0.1 * mean.square().sum()


@pytest.mark.parametrize(
    ("norms", "shares"), [([1.0], [1.0]), ([1.0, 2.0], [0.5]), ([1.0, 2.0], [1.0, 0.5]), ([1.0, 2.0], [0.5, 0.9])]
)
def test_sums_that_are_none_are_refused(norms, shares) -> None:
    with pytest.raises(UsageError, match="expected 2 or more, with shares below 1 but for the last, which is 1"):
        signal_to_noise_of_sums(norms, shares)
