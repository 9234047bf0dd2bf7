"""Feature matching, sampled as in a run, on texts from a source whose distribution is known."""

from __future__ import annotations

import pytest
import torch

from ebft.objectives.baselines import advantage
from ebft.objectives.moments import moment_values
from ebft.objectives.policy_gradient import reinforce
from tests.enumeration import TablePolicy

STEPS, ANCHORS, ROLLOUTS = 250, 400, 4


def fit(diversity: float, phi: torch.Tensor) -> tuple[TablePolicy, TablePolicy]:
    """Source and the policy trained on its texts, with features [Y,D] of all outcomes."""
    source, policy = TablePolicy(seed=3), TablePolicy(seed=4)
    random = torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam([policy.parameters], lr=0.1)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, STEPS)
    for _ in range(STEPS):
        texts = torch.multinomial(source.prob().detach(), ANCHORS, replacement=True, generator=random)
        drawn = torch.multinomial(policy.prob().detach(), ANCHORS * ROLLOUTS, replacement=True, generator=random)
        drawn = drawn.view(ANCHORS, ROLLOUTS)
        gain = advantage(*moment_values(phi[drawn], phi[texts]), diversity=diversity)
        log_prob = policy.log_prob()[drawn]
        loss = reinforce(log_prob, gain, torch.ones_like(log_prob, dtype=torch.bool)).sum(-1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return source, policy


def divergence(source: TablePolicy, policy: TablePolicy) -> float:
    """KL(source ‖ policy) over all outcomes, in nats."""
    log_p, log_q = (table.log_prob().sum(-1).detach() for table in (source, policy))
    return float((log_p.exp() * (log_p - log_q)).sum())


def entropy(policy: TablePolicy) -> float:
    log_p = policy.log_prob().sum(-1).detach()
    return float(-(log_p.exp() * log_p).sum())


@pytest.fixture(scope="module")
def one_hot() -> torch.Tensor:
    return torch.eye(9, dtype=torch.float64)


def test_rich_features_recover_the_source(one_hot: torch.Tensor) -> None:
    source, policy = fit(1.0, one_hot)
    start = divergence(source, TablePolicy(seed=4))
    # 8 free parameters estimated from the texts of the last steps, an effective few thousand: 8 / 2n nats and noise
    assert divergence(source, policy) < 0.01 < 0.3 < start


def test_without_diversity_the_policy_collapses_onto_modes(one_hot: torch.Tensor) -> None:
    source, policy = fit(0.2, one_hot)
    assert divergence(source, policy) > 0.3
    assert entropy(policy) < entropy(source) / 2
    mode = int(source.prob().argmax())
    assert policy.prob()[mode] > 1.5 * source.prob()[mode]


def test_features_that_see_less_match_what_they_see() -> None:
    """The first token only: its marginal is matched, the rest of the distribution is free."""
    first = torch.eye(3, dtype=torch.float64).repeat_interleave(3, 0)
    source, policy = fit(1.0, first)
    ours, theirs = (table.prob().detach() @ first for table in (policy, source))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0.03)
    assert divergence(source, policy) > 0.05
