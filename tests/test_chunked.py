"""The chunked kernel in the precisions and shapes that whole models do not reach."""

import pytest
import torch

from ebft.attention import Score
from ebft.attention.masks import partly_hidden
from ebft.attention.registered import rounded
from ebft.attention.rule import ScoreRule
from ebft.layout import NestedPrefixLayout

PLAIN = {"softcap": None, "sinks": None}


@pytest.fixture
def layout():
    """Two rows of two documents, 11 anchors (more than one chunk), one masked, 3 rollouts of 2 tokens."""
    anchors = torch.tensor([[1, 2, 5, 6, 9, 20, 60, 100, 140, 200, 259], [3, 4, 7, 8, 9, 33, 70, 130, 131, 220, 1]])
    anchor_mask = torch.ones_like(anchors, dtype=torch.bool)
    anchor_mask[1, -1] = False
    document_ids = (torch.arange(260) >= 65).long().expand(2, -1)
    return NestedPrefixLayout(anchors, anchor_mask, length=260, rollouts=3, horizon=2, document_ids=document_ids)


def attention(layout, kernel, inputs, rule, autocast=None):
    """Output and gradients of one pass with a fixed pull on the output."""
    inputs = [x.clone().requires_grad_() for x in inputs]
    sinks = None if rule["sinks"] is None else rule["sinks"].clone().requires_grad_()
    with torch.autocast("cpu", dtype=autocast, enabled=autocast is not None):
        out = Score(layout, kernel)(
            0,
            *rounded(*inputs),
            ScoreRule(scaling=0.3, window=rule.get("window"), softcap=rule["softcap"], sinks=sinks),
        )
    pull = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(out.dtype)
    wanted = [*inputs, *([] if sinks is None else [sinks])]
    return out.detach(), *torch.autograd.grad((out * pull).sum(), wanted)


def tensors(layout, dtype):
    """query [B,4,S,8], key and value [B,2,S,8]."""
    random = torch.Generator().manual_seed(0)
    return [
        torch.randn(2, heads, layout.size, 8, generator=random, dtype=torch.float64).to(dtype) for heads in (4, 2, 2)
    ]


@pytest.mark.parametrize(
    "rule",
    [
        PLAIN,
        {**PLAIN, "window": 7},
        {**PLAIN, "softcap": 1.5},
        {**PLAIN, "sinks": torch.tensor([0.5, -1.0, 2.0, 0.0]).double()},
    ],
    ids=["plain", "window", "softcap", "sinks"],
)
def test_values_and_gradients_equal_the_dense_kernel(layout, rule):
    inputs = tensors(layout, torch.float64)
    expected = attention(layout, "dense", inputs, rule)
    for found, wanted in zip(attention(layout, "chunked", inputs, rule), expected, strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-12, rtol=1e-12)


def test_in_bfloat16_it_errs_as_the_dense_kernel_does(layout):
    coarse = [x.bfloat16().double() for x in tensors(layout, torch.float64)]
    inputs = [x.float() for x in coarse]
    exact = attention(layout, "dense", coarse, PLAIN)
    for name in ("dense", "chunked"):
        found = attention(layout, name, inputs, PLAIN, autocast=torch.bfloat16)
        assert found[0].dtype == torch.bfloat16
        for one, wanted in zip(found, exact, strict=True):
            # bfloat16 has 8 bits; a few roundings of the weights, of the products and of the result
            assert (one.double() - wanted).abs().max() < 3 * 2**-8 * wanted.abs().max(), name


def test_the_leading_keys_that_all_see_need_no_mask():
    visible = torch.tensor([[[0, 1, 1, 0, 1], [0, 1, 1, 1, 1]], [[0, 1, 0, 1, 1], [0, 1, 1, 1, 0]]]).bool()
    every = torch.ones(1, 2, 3, dtype=torch.bool)
    found = partly_hidden([visible, every, visible, visible[:1], ~every, every], [5, 3, 2, 5, 3, 0])
    # keys before the first are seen by none, those before the second by all
    assert [bounds for *bounds, _ in found] == [[1, 2], [0, 3], [1, 2], [1, 3], [3, 3], [0, 0]]
    assert torch.equal(found[0][-1][:, 0, 0], ~visible[..., 2:])
    assert partly_hidden([], []) == []
