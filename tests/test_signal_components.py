"""Sources of noise from gradients of known sources, and the optimum against a search."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from ebft.loops.signal.components import (
    Components,
    Cost,
    allocation,
    best_density,
    components,
    halves,
    price,
    spent,
    variance,
    variances,
)
from ebft.loops.signal.plan import Configuration
from ebft.loops.signal.statistics import moments

DIMENSION, ROLLOUTS = 6, 8
# standard deviations in each direction: of the batch's sequences, of a half of the anchors, of the rollouts
SEQUENCES, ANCHORS, ALL, HALF = 0.4, 0.6, 1.1, 1.9


def gram(batches: int, replicates: int = 2, seed: int = 0) -> torch.Tensor:
    """Gradients of even and odd anchors with all rollouts and half of them: [4,M,R,4,M,R] products."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, DIMENSION, generator=generator, dtype=torch.float64)

    sequences = SEQUENCES * normal(1, batches, 1)
    anchors = ANCHORS * normal(2, batches, 1)
    all_of_them = 0.3 + sequences + anchors + ALL * normal(2, batches, replicates)
    half = 0.3 + sequences + anchors + HALF * normal(2, batches, replicates)
    flat = torch.cat([all_of_them, half]).flatten(0, 2)
    shape = (4, batches, replicates)
    return (flat @ flat.T).view(*shape, *shape)


def test_sources_are_told_apart() -> None:
    found = torch.stack([variances(moments(gram(12, seed=seed))) for seed in range(400)])
    exact = DIMENSION * torch.tensor([SEQUENCES**2, ANCHORS**2 / 2, ALL**2 / 2, HALF**2 / 2]).double()
    error = found.std(0) / 20
    assert ((found.mean(0) - exact).abs() < 3 * error).all()
    assert (error < 0.05 * exact.sum()).all()


def test_the_law_of_the_rollouts() -> None:
    parts = components([1.0, 2.0, 3.0 / 7 + 5.0 / 49, 3.0 / 3 + 5.0 / 9], rollouts=8)
    assert parts == pytest.approx(Components(1.0, 2.0, 3.0, 5.0))
    assert variance(parts, density=2.0, rollouts=4) == pytest.approx(1 + (2 + 3 / 3 + 5 / 9) / 2)
    assert components([-1.0, -2.0, 1 / 7, 1 / 4], rollouts=8)[:2] == (0, 0)
    assert components([0, 0, 1 / 7, 1 / 4], rollouts=8).second == 0  # falls more slowly than 1/(N-1)
    assert components([0, 0, 1 / 70, 1.0], rollouts=8).first == 0  # faster than its square


def test_the_cost_is_split() -> None:
    """Sequences cost 100, a rollout from every even anchor 6 and from every odd one 4."""
    found = price([100 + 8 * 6, 100 + 8 * 4, 100 + 4 * 6, 100 + 4 * 4], rollouts=8)
    assert found == Cost(100, 10)
    assert spent(found, density=0.5, rollouts=4) == 120


def test_the_optimum_is_that_of_a_search() -> None:
    parts, cost = Components(0.3, 0.2, 2.0, 1.0), Cost(100.0, 7.0)
    for rollouts in (2, 4, 16):
        found = best_density(parts, cost, rollouts=rollouts, most=100)
        search = min(
            (variance(parts, density=k, rollouts=rollouts) * spent(cost, density=k, rollouts=rollouts), k)
            for k in (0.001 * i for i in range(1, 12000))
        )[1]
        assert found == pytest.approx(search, abs=0.002)
    assert best_density(parts, cost, rollouts=4, most=0.5) == 0.5
    assert best_density(parts._replace(sequences=0.0), cost, rollouts=4, most=3.0) == 3.0


def test_allocation_holds_together() -> None:
    result = allocation(gram(40), [148.0, 132.0, 124.0, 116.0], rollouts=ROLLOUTS, stride=8)
    assert sum(result["shares"].values()) == pytest.approx(1)
    parts, cost = Components(**result["components"]), Cost(**result["cost"])
    assert result["best"]["gain"] == max(row["gain"] for row in result["table"])

    def worth(stride, rollouts):
        density = 8 / stride
        return 1 / variance(parts, density=density, rollouts=rollouts) / spent(cost, density=density, rollouts=rollouts)

    for row in result["table"]:
        assert row["gain"] == pytest.approx(worth(row["stride"], row["rollouts"]) / worth(8, ROLLOUTS))
    search = max(
        worth(stride, rollouts) / worth(8, ROLLOUTS)
        for stride, rollouts in itertools.product(range(1, 200), (2, 3, 4, 6, 8, 12, 16, 32))
    )
    assert result["best"]["gain"] >= 0.97 * search  # strides are whole numbers, the nearest to the best
    assert math.isfinite(result["variances"]["sequences"]["low"])


def test_halves_are_named_and_restricted() -> None:
    found = halves(Configuration("x", "s", "e", lambda td: td), rollouts=8)
    assert [(c.parity, c.rollouts) for c in found] == [(0, 8), (1, 8), (0, 4), (1, 4)]
    assert found[3].name == "x, odd anchors, 4 rollouts"
