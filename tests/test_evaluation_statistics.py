"""Intervals, pass@k and best-of-k against closed forms, enumeration and other libraries."""

import itertools
import math

import numpy as np
import pytest
import scipy.stats
import torch
from sacrebleu.metrics import BLEU

from ebft.errors import UsageError
from ebft.loops.evaluate import paired_difference
from ebft.loops.evaluation.answers import best_of_k, bleu_statistics, corpus_bleu, pass_at_k
from ebft.loops.evaluation.bootstrap import bootstrap, ratio, resamples
from ebft.objectives.programs import compiles

RNG = np.random.default_rng(0)


def units(values, counts=None):
    values = torch.as_tensor(values, dtype=torch.float64)[:, None]
    return values, torch.ones_like(values) if counts is None else torch.as_tensor(counts, dtype=torch.float64)[:, None]


# ---- bootstrap


def test_standard_error_of_a_mean_is_the_closed_form():
    """Over all resamples the variance of the mean is Σ(x - x̄)²/M²; R of them give it to about 1/√(2R)."""
    values = RNG.exponential(size=23)
    found = bootstrap(*units(values), replicates=20_000).standard_error.item()
    assert found == pytest.approx(values.std() / math.sqrt(23), rel=4 / math.sqrt(2 * 20_000))


@pytest.mark.parametrize(("successes", "trials"), [(7, 20), (19, 30)])
def test_percentile_interval_of_a_share_is_the_binomial_one(successes, trials):
    """A resample of 0s and 1s has Binomial(M, c/M) ones, so the quantiles are known exactly."""
    data = [1.0] * successes + [0.0] * (trials - successes)
    found = bootstrap(*units(data), replicates=40_000, method="percentile", level=0.9)
    exact = scipy.stats.binom(trials, successes / trials).ppf([0.05, 0.95]) / trials
    assert [found.low.item(), found.high.item()] == pytest.approx(exact.tolist(), abs=1e-12)


def test_agrees_with_scipy_on_a_ratio_of_totals():
    """A few very skewed units, where the corrections for bias and skewness move the ends a good way."""
    rng = np.random.default_rng(5)
    counts = rng.integers(1, 9, size=14).astype(float)
    sums = np.exp(1.5 * rng.normal(size=14)) * counts
    ours, theirs = {}, {}
    for method, name in (("percentile", "percentile"), ("bca", "BCa")):
        found = bootstrap(*units(sums, counts), replicates=60_000, method=method)
        ours[method] = [found.low.item(), found.high.item()]
        other = scipy.stats.bootstrap(
            (sums, counts), lambda s, c, axis: s.sum(axis) / c.sum(axis), paired=True, vectorized=True,
            n_resamples=60_000, method=name, rng=np.random.default_rng(1),
        )  # fmt: skip
        theirs[method] = list(other.confidence_interval)
        assert found.standard_error.item() == pytest.approx(other.standard_error, rel=0.02)
    width = theirs["percentile"][1] - theirs["percentile"][0]
    for method in ours:
        assert ours[method] == pytest.approx(theirs[method], abs=0.03 * width)
    assert min(abs(a - b) for a, b in zip(ours["bca"], ours["percentile"], strict=True)) > 0.05 * width


def test_intervals_scale_with_the_data():
    values = np.random.default_rng(6).exponential(size=15)
    one, hundred = (bootstrap(*units(scale * values), replicates=500) for scale in (1, 100))
    for a, b in ((one.low, hundred.low), (one.high, hundred.high), (one.standard_error, hundred.standard_error)):
        assert b.item() == pytest.approx(100 * a.item(), rel=1e-9)


def test_covers_as_often_as_it_says():
    """Skewed units, 30 at a time: 95 % intervals cover about as often, and BCa no less than percentiles."""
    trials, covered = 500, {"bca": 0, "percentile": 0}
    for trial in range(trials):
        data = units(np.random.default_rng(trial).exponential(size=30))
        for method in covered:
            found = bootstrap(*data, replicates=500, method=method, seed=trial)
            covered[method] += bool(found.low <= 1.0 <= found.high)
    # a share of 0.95 over 500 trials has a standard error of 0.01; the bootstrap of 30 skewed units falls a bit short
    assert 0.90 <= covered["percentile"] / trials <= 0.97
    assert 0.90 <= covered["bca"] / trials <= 0.97
    assert covered["bca"] >= covered["percentile"]


def test_resamples_draw_every_unit_alike_and_are_seeded():
    weights = resamples(5, replicates=4000, seed=3)
    assert (weights.sum(1) == 5).all()
    torch.testing.assert_close(weights.mean(0), torch.ones(5, dtype=torch.float64), atol=0.06, rtol=0)
    assert weights.var(0).mean().item() == pytest.approx(5 * 0.2 * 0.8, rel=0.1)
    assert torch.equal(weights, resamples(5, replicates=4000, seed=3))
    assert not torch.equal(weights, resamples(5, replicates=4000, seed=4))


def test_units_without_a_count_and_constants_are_no_trouble():
    constant = bootstrap(*units([0.3] * 9))
    assert [constant.low.item(), constant.high.item(), constant.value.item()] == pytest.approx([0.3] * 3, rel=1e-14)
    sparse = bootstrap(*units([2.0, 4.0, 0.0, 0.0], [1.0, 1.0, 0.0, 0.0]))
    assert sparse.value.item() == 3.0
    assert 2.0 <= sparse.low.item() <= sparse.high.item() <= 4.0
    alone = bootstrap(*units([1.0]))
    assert alone.value.item() == 1.0
    assert alone.low.isnan()
    assert alone.standard_error.isnan()


def test_a_paired_difference_has_the_smaller_error():
    """Two policies on the same sequences: what the sequences share cancels."""
    shared = RNG.normal(size=60)
    first, second = shared + 0.1 * RNG.normal(size=60), shared + 0.1 * RNG.normal(size=60) + 0.05
    sums = torch.tensor(np.stack([first, second], 1))
    counts = torch.ones_like(sums)
    paired = bootstrap(sums, counts, lambda s, c: (s / c)[..., 1:] - (s / c)[..., :1])
    apart = bootstrap(sums, counts).standard_error.square().sum().sqrt()
    assert paired.standard_error.item() < 0.2 * apart
    linear = paired_difference((sums[:, 0], counts[:, 0]), (sums[:, 1], counts[:, 1]))
    assert paired.value.item() == pytest.approx(linear[0])
    assert paired.standard_error.item() == pytest.approx(linear[1], rel=0.1)


@pytest.mark.parametrize(
    ("changes", "words"),
    [({"method": "bcs"}, "bcs"), ({"level": 1.0}, "level=1.0"), ({"replicates": 1}, "replicates=1")],
)
def test_bootstrap_refuses(changes, words):
    with pytest.raises(UsageError, match=words):
        bootstrap(*units([1.0, 2.0]), ratio, **changes)
    with pytest.raises(UsageError, match=r"\[2, 1\]"):
        bootstrap(torch.ones(2, 1), torch.ones(2))


# ---- whole answers


@pytest.mark.parametrize("samples", [1, 2, 5, 7])
def test_pass_at_k_is_the_mean_over_all_subsets(samples):
    for outcome in itertools.product([0, 1], repeat=samples):
        for k in range(1, samples + 1):
            subsets = [max(subset) for subset in itertools.combinations(outcome, k)]
            found = pass_at_k(torch.tensor(outcome, dtype=torch.bool), k=k).item()
            assert found == pytest.approx(sum(subsets) / len(subsets), abs=1e-12)
            assert best_of_k(torch.tensor(outcome).float(), k=k).item() == pytest.approx(found, abs=1e-12)


def test_best_of_k_is_the_mean_over_all_subsets():
    values = torch.tensor(RNG.normal(size=(3, 6)))
    for k in range(1, 7):
        exact = [np.mean([max(s) for s in itertools.combinations(row, k)]) for row in values.tolist()]
        assert best_of_k(values, k=k).tolist() == pytest.approx(exact, abs=1e-12)


def test_k_out_of_range_and_shares_are_refused():
    with pytest.raises(UsageError, match="k=3: expected 1 to 2"):
        pass_at_k(torch.tensor([True, False]), k=3)
    with pytest.raises(UsageError, match="0 and 1"):
        pass_at_k(torch.tensor([0.5, 1.0]), k=1)


@pytest.mark.parametrize(
    ("source", "right"),
    [
        ("def f(x):\n    return x\n", True), ("x = '\\d'", True), ("", True), ("def f(x):\n", False),
        ("return 3", False), ("x = (", False), ("x = '\0'", False), ("(" * 5000, False), ("print 'a'", False),
    ],
)  # fmt: skip
def test_compiles(source, right):
    assert compiles(source) is right


def test_compiling_runs_nothing(tmp_path):
    assert compiles(f"open({str(tmp_path / 'left')!r}, 'w')")
    assert not (tmp_path / "left").exists()


def test_corpus_bleu_from_sums_is_sacrebleu_s():
    texts = ["the cat sat on the mat", "a dog ran", "no match here at all", "der Hund"]
    references = ["the cat sat on a mat", "a dog ran away quickly", "something else entirely", "der Hund bellt laut"]
    statistics = bleu_statistics(texts, references)
    for kept in ([0], [0, 1], [0, 1, 2, 3], [2], [3, 3, 1]):
        exact = BLEU().corpus_score([texts[i] for i in kept], [[references[i] for i in kept]]).score / 100
        assert corpus_bleu(statistics[kept].sum(0)).item() == pytest.approx(exact, abs=1e-12)
