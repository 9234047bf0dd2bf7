"""Fused attention as a part of a longer row of keys."""

import pytest
import torch

from ebft.attention import Score, chunks, fused
from ebft.attention.rule import ScoreRule
from ebft.layout import NestedPrefixLayout
from ebft.tuning import PerDevice

SCALING = 0.4


@pytest.fixture
def parts():
    """rows [2,3,5,8], keys and values [2,7,8]."""
    random = torch.Generator().manual_seed(0)
    shapes = (2, 3, 5, 8), (2, 7, 8), (2, 7, 8)
    return [torch.randn(shape, generator=random, dtype=torch.float64).requires_grad_() for shape in shapes]


def plainly(rows, keys, values):
    """Output, log Z."""
    scores = SCALING * rows @ keys[:, None].mT
    return scores.softmax(-1) @ values[:, None], scores.logsumexp(-1)


def test_output_and_normalizer(parts):
    for found, wanted in zip(fused.forward(*parts, SCALING), plainly(*parts), strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-14, rtol=1e-13)


def test_the_gradients_of_two_parts_of_the_keys_add_up(parts):
    rows, keys, values = parts
    out, normalizer = plainly(*parts)
    slope = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=out.dtype)
    wanted = torch.autograd.grad(out, parts, slope)
    split = [slice(3), slice(3, None)]
    found = [
        fused.backward(slope, rows, keys[:, own], values[:, own], out.detach(), normalizer.detach(), SCALING)
        for own in split
    ]
    torch.testing.assert_close(found[0][0] + found[1][0], wanted[0], atol=1e-13, rtol=1e-12)
    for i in (1, 2):
        torch.testing.assert_close(torch.cat([part[i] for part in found], 1), wanted[i], atol=1e-13, rtol=1e-12)


def test_what_it_serves():
    query = torch.zeros(1, 1, 2, 8)
    plain = ScoreRule(scaling=1.0)
    assert fused.serves(query, query, plain)
    assert fused.serves(query, query, ScoreRule(scaling=1.0, window=3, sinks=torch.zeros(1)))
    assert not fused.serves(query, query, ScoreRule(scaling=1.0, softcap=1.0))
    assert not fused.serves(query, query[..., :4], plain)
    assert not fused.serves(query, query.bfloat16(), plain)
    assert not fused.serves(query.bfloat16(), query.bfloat16(), plain)
    assert not fused.serves(query.to("meta"), query.to("meta"), plain)


@pytest.mark.parametrize("window", [None, 16])
def test_it_gets_no_key_that_no_query_of_a_call_sees(monkeypatch, window):
    """Of rows of their own documents, each from where its own begins, and from the window's beginning."""
    documents = torch.zeros(2, 300, dtype=torch.int64)
    documents[1, 40:] = 1
    anchors = torch.tensor([[50, 60, 280], [50, 60, 50]])
    layout = NestedPrefixLayout(
        anchors, torch.ones_like(anchors) > 0, length=300, rollouts=2, horizon=4, document_ids=documents
    )
    given, forward = [], fused.forward

    def counted(query, key, *rest, **options):
        given.append((query.shape[2], key.shape[1]))
        return forward(query, key, *rest, **options)

    monkeypatch.setattr(fused, "forward", counted)
    monkeypatch.setattr(chunks, "TOKENS_PER_CALL", PerDevice(cpu=256, cuda=1))
    query, key, value = (torch.randn(2, heads, layout.size, 8) for heads in (4, 2, 2))
    Score(layout, "chunked")(0, query, key, value, ScoreRule(scaling=1.0, window=window))
    # queries and keys of 256 tokens, of the other 44, and of the teeth of all three anchors
    last = (44, 300), (44, 260)
    if window:
        last = (44, 59), (44, 59)
    teeth = (24, 280 if window is None else 245), (24, 20)
    assert given == [(256, 256), last[0], teeth[0], (256, 256), last[1], teeth[1]]


def test_a_query_that_sees_none_of_the_trunk_sees_its_own_tooth():
    """The first tokens of a document: fused attention has nothing to say of them."""
    documents = (torch.arange(20) >= 9)[None].long()
    layout = NestedPrefixLayout(
        torch.tensor([[4, 9]]), torch.ones(1, 2) > 0, length=20, rollouts=2, horizon=3, document_ids=documents
    )
    random = torch.Generator().manual_seed(0)
    tensors = [torch.randn(1, h, layout.size, 8, generator=random, dtype=torch.float64) for h in (4, 2, 2)]
    found = {}
    for kernel in ("dense", "chunked"):
        inputs = [x.clone().requires_grad_() for x in tensors]
        out = Score(layout, kernel)(0, *inputs, ScoreRule(scaling=0.5))
        found[kernel] = out, *torch.autograd.grad(out.square().sum(), inputs)
    for ours, theirs in zip(found["chunked"], found["dense"], strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-13, rtol=1e-12)
