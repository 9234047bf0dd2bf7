"""Pairwise estimators and the jackknife against Gaussian gradients, whose signal and noise are known."""

from __future__ import annotations

import math

import pytest
import torch

from ebft.errors import UsageError
from ebft.loops.signal import statistics
from ebft.loops.signal.statistics import jackknife, moments, signal_to_noise, signal_to_noise_within

DIMENSION, BATCHES, REPLICATES = 12, 8, 2
MEAN, SEQUENCES, ROLLOUTS = 0.5, 0.7, 1.3  # ‖μ‖² and the standard deviations of s and e in each of D directions
SIGNAL = MEAN
WITHIN = MEAN + DIMENSION * SEQUENCES**2
SQUARE = WITHIN + DIMENSION * ROLLOUTS**2


def gradients(trials: int, *, batches: int = BATCHES, replicates: int = REPLICATES, seed: int = 0) -> torch.Tensor:
    """[trials,C=2,M,R,D]: μ + s + e, and as a second configuration μ' = -2μ with noise of its own."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    mu = torch.full((DIMENSION,), math.sqrt(MEAN / DIMENSION), dtype=torch.float64)
    base = torch.stack([mu, -2 * mu])[:, None, None]
    s = SEQUENCES * normal(trials, 2, batches, 1, DIMENSION)
    return base + s + ROLLOUTS * normal(trials, 2, batches, replicates, DIMENSION)


def gram(g: torch.Tensor) -> torch.Tensor:
    flat = g.flatten(0, -2)
    return (flat @ flat.T).view(*g.shape[:-1], *g.shape[:-1])


def test_moments_are_the_averages_by_hand() -> None:
    g = gradients(1)[0]
    found = moments(gram(g))
    for a in range(2):
        for c in range(2):
            cross = [
                g[a, i, r] @ g[c, j, s]
                for i in range(BATCHES) for j in range(BATCHES) if i != j
                for r in range(REPLICATES) for s in range(REPLICATES)
            ]  # fmt: skip
            torch.testing.assert_close(found.cross[a, c], torch.stack(cross).mean())
            within = [g[a, i, r] @ g[c, i, 1 - r] for i in range(BATCHES) for r in range(2)]
            torch.testing.assert_close(found.within[a, c], torch.stack(within).mean())
        torch.testing.assert_close(found.square[a], g[a].square().sum(-1).mean())


def test_moments_are_unbiased() -> None:
    trials = 1500
    found = [moments(gram(g)) for g in gradients(trials)]
    for values, exact in (
        ([m.cross[0, 0] for m in found], SIGNAL),
        ([m.cross[0, 1] for m in found], -2 * SIGNAL),
        ([m.within[0, 0] for m in found], WITHIN),
        ([m.square[0] for m in found], SQUARE),
    ):
        stacked = torch.stack(values)
        error = stacked.std() / trials**0.5
        assert abs(stacked.mean() - exact) < 3 * error
        assert error < 0.02 * SQUARE  # the check above is a sharp one
    # the square of the mean gradient, which is not the pairwise average, is far off
    plug_in = torch.stack([g[0].mean((0, 1)).square().sum() for g in gradients(trials)]).mean()
    assert plug_in > 2 * SIGNAL


def test_the_jackknife_error_is_as_known() -> None:
    """The pairwise average varies by 4 μᵀΣμ/M + 2 tr Σ²/(M(M-1)), Σ the covariance of a batch's mean gradient.

    The jackknife expects (M-1)/M times this at M-1 batches with the second term doubled (Efron and Stein 1981).
    """
    trials = 600
    estimates = [jackknife(gram(g), lambda m: m.cross[:1, 0])[0] for g in gradients(trials)]
    variance = SEQUENCES**2 + ROLLOUTS**2 / REPLICATES
    linear, quadratic = 4 * MEAN * variance, 2 * DIMENSION * variance**2
    exact = linear / BATCHES + quadratic / (BATCHES * (BATCHES - 1))
    fewer = BATCHES - 1
    wide = fewer / BATCHES * (linear / fewer + 2 * quadratic / (fewer * (fewer - 1)))
    seen = torch.tensor([e.error**2 for e in estimates]).mean().item()
    assert torch.tensor([e.value for e in estimates]).var().item() == pytest.approx(exact, rel=0.15)
    assert seen == pytest.approx(wide, rel=0.15)


def test_intervals_cover() -> None:
    trials = 400
    exact = {0: SIGNAL / (SQUARE - SIGNAL), 1: WITHIN / (SQUARE - WITHIN)}
    hits = {0: 0, 1: 0}
    for g in gradients(trials, batches=16, seed=1):
        found = jackknife(gram(g), lambda m: torch.stack([signal_to_noise(m)[0], signal_to_noise_within(m)[0]]))
        for number, estimate in enumerate(found):
            hits[number] += estimate.low <= exact[number] <= estimate.high
    for number in exact:
        assert 0.92 < hits[number] / trials <= 0.99


def test_cosines_and_the_signal_towards_a_reference() -> None:
    g = gradients(1, batches=400, seed=2)[0]
    m = moments(gram(g))
    torch.testing.assert_close(statistics.cosine(m, 0), torch.tensor([1.0, -1.0]).double(), atol=0.05, rtol=0)
    torch.testing.assert_close(statistics.single_cosine(m, 0)[0], (m.cross[0, 0] / m.square[0]).sqrt())
    towards = statistics.towards(m, 0)
    torch.testing.assert_close(towards[0], signal_to_noise(m)[0])  # towards itself all of it counts
    assert towards[1] < 0  # away from it
    assert towards[1].item() == pytest.approx(-4 * SIGNAL / (SQUARE - SIGNAL), rel=0.1)


def test_a_negative_estimate_of_a_norm_has_no_cosine() -> None:
    cross = torch.tensor([[1.0, 0.5], [0.5, -0.1]], dtype=torch.float64)
    m = statistics.Moments(cross, cross, torch.ones(2, dtype=torch.float64))
    assert statistics.cosine(m, 0).isnan().tolist() == [False, True]


def test_nothing_drawn_is_infinitely_sharp_within_a_batch() -> None:
    g = gradients(1)[0]
    g[1] = g[1, :, :1]  # the same in every replicate, as cross-entropy
    assert signal_to_noise_within(moments(gram(g))).isinf().tolist() == [False, True]


def test_one_replicate_has_no_within() -> None:
    m = moments(gram(gradients(1, replicates=1)[0]))
    assert m.within.isnan().all()
    assert m.cross.isfinite().all()


def test_bad_input_is_refused() -> None:
    with pytest.raises(UsageError, match=r"\[2, 8, 2\].*\[C,M,R,C,M,R\]"):
        moments(torch.zeros(2, 8, 2))
    with pytest.raises(UsageError, match="1 batch"):
        moments(torch.zeros(1, 1, 2, 1, 1, 2))
    with pytest.raises(UsageError, match="2 batches"):
        jackknife(torch.zeros(1, 2, 2, 1, 2, 2), signal_to_noise)
