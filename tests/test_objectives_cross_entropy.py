"""Which tokens are under cross-entropy, and that the terms are torch's."""

from __future__ import annotations

import pytest
import torch

from ebft.errors import UsageError
from ebft.objectives.cross_entropy import cross_entropy, prediction_mask


def test_terms_are_torchs() -> None:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 7, (2, 6), generator=generator)
    logits = torch.randn(2, 6, 7, generator=generator, dtype=torch.float64)
    mask = torch.tensor([[True] * 6, [True] * 4 + [False] * 2])
    answer = torch.tensor([[False, False, True, True, True, False], [True] * 6])
    documents = torch.tensor([[0, 0, 0, 0, 1, 1], [3, 3, 5, 5, 5, 5]])
    log_prob = logits[:, :-1].log_softmax(-1).gather(-1, tokens[:, 1:, None]).squeeze(-1)
    labels = tokens.clone()
    labels[~(mask & answer)] = -100
    labels[0, 4] = labels[1, 2] = -100  # the first tokens of the second documents
    expected = torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="none"
    ).view(2, 5)
    terms, counted = cross_entropy(log_prob, mask, answer, documents)
    torch.testing.assert_close(terms, expected)
    assert torch.equal(counted, labels[:, 1:] != -100)


def test_each_mask_drops_its_own_tokens() -> None:
    mask = torch.tensor([[True, True, True, True, False]])
    assert prediction_mask(mask).tolist() == [[True, True, True, False]]
    answer = torch.tensor([[True, False, True, True, True]])
    assert prediction_mask(mask, answer).tolist() == [[False, True, True, False]]
    documents = torch.tensor([[4, 4, 2, 2, 2]])
    assert prediction_mask(mask, None, documents).tolist() == [[True, False, True, False]]
    assert prediction_mask(mask, answer, documents).tolist() == [[False, False, True, False]]


def test_tokens_that_do_not_count_may_hold_anything() -> None:
    log_prob = torch.tensor([[-1.0, float("nan"), -float("inf")]], requires_grad=True)
    terms, _ = cross_entropy(log_prob, torch.tensor([[True, True, False, False]]))
    assert terms.tolist() == [[1.0, 0.0, 0.0]]
    terms.sum().backward()
    assert log_prob.grad.tolist() == [[-1.0, 0.0, 0.0]]


def test_bad_shapes_are_refused() -> None:
    mask = torch.ones(2, 5, dtype=torch.bool)
    with pytest.raises(UsageError, match=r"token_log_prob has shape \[2, 5\], expected \[2, 4\]"):
        cross_entropy(torch.zeros(2, 5), mask)
    with pytest.raises(UsageError, match=r"answer_mask has shape \[2, 4\].*\[2, 5\]"):
        prediction_mask(mask, mask[:, 1:])
    with pytest.raises(UsageError, match=r"document_ids has shape \[1, 5\]"):
        prediction_mask(mask, None, torch.zeros(1, 5))
