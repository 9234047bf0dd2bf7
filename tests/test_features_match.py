"""Features that count equal tokens: their products by hand, and what their score can tell apart."""

from __future__ import annotations

import itertools

import pytest
import torch

from ebft.errors import UsageError
from ebft.features.match import match


def embed(feature_map, rollouts, targets=None, lengths=None):
    """Features of rollouts [N,G] at one anchor, and of a target [G]."""
    rollouts = torch.tensor(rollouts)[None, None]
    horizon = rollouts.shape[-1]
    target = torch.zeros(1, 1, horizon, dtype=torch.int64) if targets is None else torch.tensor(targets)[None, None]
    mask = torch.ones_like(rollouts, dtype=torch.bool)
    if lengths is not None:
        mask = torch.arange(horizon) < torch.tensor(lengths)[None, None, :, None]
    one = torch.ones(1, 1, dtype=torch.bool)
    return feature_map(torch.zeros(1, 4).long(), torch.ones(1, 4).bool(), one.long(), one, rollouts, mask, target,
                       torch.ones_like(target, dtype=torch.bool))  # fmt: skip


def test_products_are_the_shares() -> None:
    rollouts, target = [[5, 6, 7, 8], [5, 6, 9, 8], [4, 6, 7, 8], [5, 6, 7, 8]], [5, 6, 7, 8]
    phi, psi = embed(match("prefix"), rollouts, target)
    torch.testing.assert_close((phi @ psi[..., None])[0, 0, :, 0], torch.tensor([1.0, 0.5, 0.0, 1.0]))
    phi, psi = embed(match("position"), rollouts, target)
    torch.testing.assert_close((phi @ psi[..., None])[0, 0, :, 0], torch.tensor([1.0, 0.75, 0.75, 1.0]))
    torch.testing.assert_close((phi[0, 0, 1] @ phi[0, 0, 2]), torch.tensor(0.5))


def test_early_ends() -> None:
    phi, psi = embed(match("prefix"), [[5, 1, 0, 0]], [5, 1, 7, 8], lengths=[2])
    torch.testing.assert_close((phi[0, 0, 0] @ psi[0, 0]).item(), 2 / 8**0.5)
    per_token, _ = embed(match("prefix", pooling="none"), [[5, 1, 0, 0]], [5, 1, 7, 8], lengths=[2])
    assert per_token[0, 0, 0].sum(-1).tolist() == [1, 1, 0, 0]


@pytest.mark.parametrize("kind", ["prefix", "position"])
def test_tokens_sum_to_the_whole(kind: str) -> None:
    rollouts = [[5, 6, 7], [5, 2, 7]]
    whole, target = embed(match(kind), rollouts, [5, 6, 7])
    tokens, targets = embed(match(kind, pooling="none"), rollouts, [5, 6, 7])
    torch.testing.assert_close(tokens.sum(-2) / 3**0.5, whole)
    torch.testing.assert_close(targets.sum(-2) / 3**0.5, target)


def test_prefix_is_strictly_proper_and_position_is_blind_to_dependence() -> None:
    outcomes = list(itertools.product(range(3), repeat=3))
    phi, _ = embed(match("prefix", dimension=1 << 14), [list(y) for y in outcomes])
    gram = (phi @ phi.mT)[0, 0].double()
    assert torch.linalg.eigvalsh(gram).min() > 0.1  # every signed measure other than 0 has a positive norm
    phi, _ = embed(match("position", dimension=1 << 14), [[0, 0], [1, 1], [0, 1], [1, 0]])
    together, apart = torch.tensor([0.5, 0.5, 0, 0]), torch.tensor([0.25] * 4)
    torch.testing.assert_close(together @ phi[0, 0], apart @ phi[0, 0])


def test_bad_options_are_refused() -> None:
    with pytest.raises(UsageError, match=r"match='suffix'.*prefix, position"):
        match("suffix")
    with pytest.raises(UsageError, match=r"pooling='last'.*sum or none"):
        match(pooling="last")
    with pytest.raises(UsageError, match="dimension=0"):
        match(dimension=0)
