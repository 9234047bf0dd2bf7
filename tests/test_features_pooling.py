"""Pooling: hand-computed positions, masks, rollouts cut short, nothing read behind the mask."""

import pytest
import torch

from ebft.errors import UsageError
from ebft.features import pooling


def prefix_mask(*lengths, horizon=8):
    return torch.arange(horizon) < torch.tensor(lengths)[:, None]


def numbered(rows=1, horizon=8):
    """Token g of row r has the features [10 r + g, -(10 r + g)]."""
    x = 10.0 * torch.arange(rows)[:, None] + torch.arange(horizon)
    return torch.stack([x, -x], -1)


def test_last_takes_the_last_own_token_and_zeros_for_an_empty_rollout():
    pooled = pooling.last(numbered(3), prefix_mask(8, 3, 0))
    assert pooled.tolist() == [[7, -7], [12, -12], [0, 0]]


def test_mean_is_over_own_tokens_only():
    pooled = pooling.mean(numbered(3), prefix_mask(8, 3, 0))
    assert pooled.tolist() == [[3.5, -3.5], [11, -11], [0, 0]]


def test_mean_with_context_weighs_all_tokens_alike():
    """Context of 3 tokens that sum to [6, 0] before rollouts of 8, 3 and no tokens."""
    context = torch.tensor([6.0, 0]).expand(3, 2), torch.tensor([3, 3, 3])
    pooled = pooling.mean_with_context(numbered(3), prefix_mask(8, 3, 0), *context)
    torch.testing.assert_close(pooled, torch.tensor([[34 / 11, -28 / 11], [39 / 6, -33 / 6], [0, 0]]))


@pytest.mark.parametrize(
    ("length", "positions"), [(8, (1, 3, 5)), (4, (0, 1, 2)), (5, (1, 2, 3)), (2, (0, 0, 1)), (1, (0, 0, 0))]
)
def test_quantiles_are_those_of_the_own_tokens(length, positions):
    pooled = pooling.concat_quantiles(numbered(), prefix_mask(length))
    assert pooled.tolist() == [[s * p for p in positions for s in (1, -1)]]


def test_quantiles_of_an_empty_rollout_are_zeros():
    assert pooling.concat_quantiles(numbered() + 1, prefix_mask(0)).tolist() == [[0.0] * 6]


def test_concat_all_pads_with_zeros_and_none_keeps_tokens_apart():
    pooled = pooling.concat_all(numbered(horizon=4) + 1, prefix_mask(2, horizon=4))
    assert pooled.tolist() == [[1, 1, 2, 0, 0, 0, 0, 0]]
    assert pooling.none(numbered(horizon=4) + 1, prefix_mask(2, horizon=4)).shape == (1, 4, 2)


@pytest.mark.parametrize("name", pooling.POOLINGS)
def test_masked_tokens_are_never_read(name):
    """Garbage and NaN behind the mask change nothing, and a rollout of holes equals the compact one where it should."""
    mask = prefix_mask(5, 0, 8)
    hidden = torch.randn(3, 8, 4, generator=torch.Generator().manual_seed(0))
    garbage = torch.where(mask[..., None], hidden, torch.tensor(float("nan")))
    pooled = pooling.pool(garbage, mask, how=name)
    assert pooled.isfinite().all()
    assert torch.equal(pooled, pooling.pool(hidden, mask, how=name))
    assert not pooled[1].any()


@pytest.mark.parametrize("name", ["last", "mean", "concat_quantiles"])
def test_holes_in_the_mask_are_skipped(name):
    mask = torch.tensor([[False, True, False, True, True, False]])
    hidden = torch.randn(1, 6, 3, generator=torch.Generator().manual_seed(1))
    compact = pooling.pool(hidden[:, mask[0]], mask[:, mask[0]], how=name)
    assert torch.equal(pooling.pool(hidden, mask, how=name), compact)


@pytest.mark.parametrize("name", pooling.POOLINGS)
def test_leading_axes_are_a_batch(name):
    hidden = torch.randn(2, 3, 4, 5, 6, generator=torch.Generator().manual_seed(2))
    mask = prefix_mask(*([5, 2, 0, 1] * 6), horizon=5).view(2, 3, 4, 5)
    pooled = pooling.pool(hidden, mask, how=name)
    assert torch.equal(pooled[1, 2], pooling.pool(hidden[1, 2], mask[1, 2], how=name))


def test_unknown_pooling_names_the_allowed_ones():
    with pytest.raises(UsageError, match=r"'median'.*last, mean, concat_quantiles, concat_all, none"):
        pooling.pool(numbered(), prefix_mask(1), how="median")


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(UsageError, match=r"\[1, 8, 2\].*\[1, 7\]"):
        pooling.pool(numbered(), prefix_mask(1, horizon=7))
