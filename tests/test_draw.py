"""Drawing tokens: the truncations, exactness of the inverse CDF, and the keyed uniform numbers."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from ebft.draw import check_sampling, inverse_cdf, keyed_uniform, sampling_log_probs, until_eos
from ebft.errors import UsageError

LARGEST = 1 - 2.0**-53  # the largest number that keyed_uniform returns


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def chi_square_is_plausible(observed, expected):
    """Whether Pearson's statistic lies within 5 standard deviations of its mean, in both directions."""
    freedom = len(expected) - 1
    statistic = float(((observed - expected) ** 2 / expected).sum())
    return abs(statistic - freedom) < 5 * math.sqrt(2 * freedom)


# From logits to the distribution sampled from


def test_plain_and_tempered_log_probs():
    logits = torch.randn(3, 17, generator=generator(), dtype=torch.float64)
    torch.testing.assert_close(sampling_log_probs(logits), logits - logits.exp().sum(-1, keepdim=True).log())
    tempered = logits / 0.7
    expected = tempered - tempered.exp().sum(-1, keepdim=True).log()
    torch.testing.assert_close(sampling_log_probs(logits, temperature=0.7), expected)


def test_result_is_float32_for_low_precision_and_float64_for_float64():
    logits = torch.randn(5)
    assert sampling_log_probs(logits.bfloat16()).dtype == torch.float32
    assert sampling_log_probs(logits.double()).dtype == torch.float64


def test_truncations_written_out():
    probabilities = torch.tensor([0.05, 0.4, 0.15, 0.3, 0.1], dtype=torch.float64)
    logits = probabilities.log()

    def kept(**options):
        return sampling_log_probs(logits, **options).exp()

    def expected(*tokens):
        chosen = torch.zeros(5, dtype=torch.float64)
        chosen[list(tokens)] = probabilities[list(tokens)]
        return chosen / chosen.sum()

    torch.testing.assert_close(kept(top_k=2), expected(1, 3))
    torch.testing.assert_close(kept(top_p=0.69), expected(1, 3))  # 0.4 + 0.3 reach it
    torch.testing.assert_close(kept(top_p=0.71), expected(1, 3, 2))
    torch.testing.assert_close(kept(top_p=0.01), expected(1))  # never nothing
    torch.testing.assert_close(kept(min_p=0.3), expected(1, 3, 2))  # 0.3 · 0.4 = 0.12
    torch.testing.assert_close(kept(top_k=3, top_p=0.8), expected(1, 3))  # 0.7 / 0.85 = 0.82 of what top-k left
    torch.testing.assert_close(kept(top_p=0.8, min_p=0.5), expected(1, 3))


@pytest.mark.parametrize(
    "options",
    [
        {"top_k": 5},
        {"top_k": 1000},
        {"top_p": 0.6},
        {"top_p": 0.999},
        {"min_p": 0.1},
        {"temperature": 1.7, "top_k": 9, "top_p": 0.8, "min_p": 0.05},
        {"temperature": 0.4, "top_p": 0.9},
    ],
)
def test_same_distribution_as_the_logits_warpers_of_transformers(options):
    logits = torch.randn(40, 50, generator=generator(1), dtype=torch.float64) * 3
    scores = TemperatureLogitsWarper(options.get("temperature", 1.0))(None, logits)
    if "top_k" in options:
        scores = TopKLogitsWarper(options["top_k"])(None, scores)
    if "top_p" in options:
        scores = TopPLogitsWarper(options["top_p"])(None, scores)
    if "min_p" in options:
        scores = MinPLogitsWarper(options["min_p"])(None, scores)
    ours = sampling_log_probs(logits, **options)
    assert torch.equal(ours > -torch.inf, scores > -torch.inf)
    torch.testing.assert_close(ours, scores.log_softmax(-1))


def test_gradient_of_a_kept_token_stays_among_the_kept():
    logits = torch.randn(6, generator=generator(2), dtype=torch.float64, requires_grad=True)
    best = int(logits.argmax())
    sampling_log_probs(logits, top_k=3)[best].backward()
    left_out = logits.detach().argsort()[:3]
    assert torch.equal(logits.grad[left_out], torch.zeros(3, dtype=torch.float64))
    share = logits.detach()[logits.detach().topk(3).indices].softmax(-1)[0]
    torch.testing.assert_close(logits.grad[best], 1 - share)


def test_greedy_takes_the_first_of_equal_tokens():
    logits = torch.tensor([[1.0, 3.0, 3.0], [5.0, 0.0, -1.0]])
    log_probs = sampling_log_probs(logits, temperature=0)
    assert log_probs.tolist() == [[-torch.inf, 0.0, -torch.inf], [0.0, -torch.inf, -torch.inf]]
    assert inverse_cdf(log_probs.exp(), torch.tensor([[0.0, LARGEST]] * 2).double()).tolist() == [[1, 1], [0, 0]]


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("temperature", -0.1),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_p", math.nan),
        ("top_k", 0),
        ("min_p", -0.1),
        ("min_p", 1.5),
    ],
)
def test_settings_out_of_range_are_refused(setting, value):
    with pytest.raises(UsageError, match=f"^{setting}={value}: expected"):
        check_sampling(**{setting: value})


def test_settings_at_the_border_are_accepted():
    check_sampling(temperature=0, top_p=1, top_k=1, min_p=0)
    check_sampling(temperature=5.0, top_p=1e-9, top_k=10**9, min_p=1)


# The inverse CDF


@pytest.mark.parametrize("size", [1, 5, 128, 129, 700])
def test_inverse_cdf_is_that_of_the_running_sum(size):
    log_probs = (torch.randn(4, size, generator=generator(3), dtype=torch.float64) * 2).log_softmax(-1)
    uniform = torch.rand(4, 500, generator=generator(4), dtype=torch.float64)
    running = log_probs.exp().cumsum(-1)
    expected = torch.searchsorted(running / running[:, -1:], uniform, right=True)
    assert torch.equal(inverse_cdf(log_probs.exp(), uniform), expected)


@pytest.mark.parametrize("size", [7, 700])
def test_draws_have_the_distribution(size):
    log_probs = torch.randn(size, generator=generator(5)).log_softmax(-1)
    draws = 40_000
    tokens = inverse_cdf(log_probs.exp(), torch.rand(draws, generator=generator(6), dtype=torch.float64))
    expected = log_probs.double().exp() * draws
    assert expected.min() > 1
    assert chi_square_is_plausible(torch.bincount(tokens, minlength=size), expected)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 300), st.integers(0, 2**31), st.floats(0, LARGEST))
def test_a_token_of_probability_zero_is_never_drawn(size, seed, uniform):
    logits = torch.randn(size, generator=generator(seed)) * 10
    logits[torch.rand(size, generator=generator(seed + 1)) < 0.7] = -torch.inf
    logits[int(torch.randint(size, (), generator=generator(seed + 2)))] = 0.0
    log_probs = logits.log_softmax(-1)
    numbers = torch.tensor([0.0, 2.0**-53, uniform, 0.5, LARGEST], dtype=torch.float64)
    assert (log_probs[inverse_cdf(log_probs.exp(), numbers)] > -torch.inf).all()


def test_rounding_between_blocks_never_draws_a_token_of_probability_zero():
    # The first block's mass lies between half a unit and one unit in the last place of the second's.
    probabilities = torch.zeros(256, dtype=torch.float64)
    probabilities[0], probabilities[130] = 0.6 * 2.0**-53, 0.9
    log_probs = probabilities.log()
    assert inverse_cdf(log_probs.exp(), torch.tensor([2.0**-53], dtype=torch.float64)).tolist() in ([0], [130])


# The uniform numbers


def numbers(batch=40, count=25, rollouts=10, step=0, seed=0):
    ids = torch.arange(batch)
    anchors = (torch.arange(count) * 3 + 1).expand(batch, -1)
    return keyed_uniform(seed, ids, anchors, rollouts=rollouts, step=step)


def test_keyed_numbers_are_uniform():
    for seed in (0, 1, 2**62 + 12345):
        values = torch.cat([numbers(seed=seed, step=step).flatten() for step in range(4)])  # 40,000
        assert values.min() >= 0
        assert values.max() < 1
        ordered = values.sort().values
        grid = torch.arange(1, len(values) + 1, dtype=torch.float64) / len(values)
        distance = float((ordered - grid).abs().max())
        assert distance * math.sqrt(len(values)) < 1.95  # Kolmogorov-Smirnov, exceeded once in 1,000
        counts = torch.bincount((values * 64).long(), minlength=64)
        assert chi_square_is_plausible(counts, torch.full((64,), len(values) / 64.0))


def test_keyed_numbers_are_multiples_of_two_to_the_minus_53():
    values = numbers() * 2.0**53
    assert torch.equal(values, values.round())
    assert values.remainder(2).mean() == pytest.approx(0.5, abs=0.02)  # the last bit is used


def correlation(left, right):
    return float(torch.corrcoef(torch.stack([left.flatten(), right.flatten()]))[0, 1])


def test_numbers_of_neighbouring_keys_are_uncorrelated():
    values = numbers()  # 10,000: the correlation of independent ones has a standard deviation of 0.01
    assert abs(correlation(values[1:], values[:-1])) < 0.05
    assert abs(correlation(values[:, 1:], values[:, :-1])) < 0.05
    assert abs(correlation(values[:, :, 1:], values[:, :, :-1])) < 0.05
    assert abs(correlation(values, numbers(step=1))) < 0.05
    assert abs(correlation(values, numbers(seed=1))) < 0.05


def test_the_parts_of_a_key_do_not_stand_in_for_each_other():
    ids, anchors = torch.arange(6), torch.arange(1, 7).expand(6, -1)
    values = torch.stack([keyed_uniform(3, ids, anchors, rollouts=6, step=step) for step in range(6)])
    assert values.unique().numel() == values.numel()


def test_a_number_depends_on_its_key_alone():
    ids, anchors = torch.tensor([7, 900, 2**60]), torch.tensor([[1, 4, 9], [2, 4, 30], [5, 6, 7]])
    whole = keyed_uniform(11, ids, anchors, rollouts=4, step=2)
    assert torch.equal(keyed_uniform(11, ids[1:2], anchors[1:2], rollouts=4, step=2), whole[1:2])
    assert torch.equal(keyed_uniform(11, ids.flip(0), anchors.flip(0), rollouts=4, step=2), whole.flip(0))
    assert torch.equal(keyed_uniform(11, ids, anchors[:, [2, 0]], rollouts=4, step=2), whole[:, [2, 0]])
    assert torch.equal(keyed_uniform(11, ids, anchors, rollouts=9, step=2)[:, :, :4], whole)
    per_row = torch.tensor([11, 12, 11])
    assert torch.equal(keyed_uniform(per_row, ids, anchors, rollouts=4, step=2)[[0, 2]], whole[[0, 2]])


# The end of a rollout


def test_until_eos_counts_the_first_eos():
    tokens = torch.tensor([[5, 2, 3, 2], [2, 2, 2, 2], [1, 3, 5, 7]])
    expected = [[True, True, False, False], [True, False, False, False], [True] * 4]
    assert until_eos(tokens, 2).tolist() == expected
    assert until_eos(tokens, None).all()
