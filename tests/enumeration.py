"""Exact expectations over all groups of rollouts of a policy on a tiny vocabulary: the oracle of the estimators."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import Tensor

VOCABULARY = 3
HORIZON = 2
DIMENSION = 4


class TablePolicy:
    """A softmax table: logits of the first token, and of every next token given the one before.

    ``parameters`` is one flat vector, so a gradient is one flat vector too. ``outcomes`` [Y,G] are all rollouts.
    """

    def __init__(self, *, seed: int, vocabulary: int = VOCABULARY, horizon: int = HORIZON) -> None:
        generator = torch.Generator().manual_seed(seed)
        size = vocabulary + (horizon - 1) * vocabulary**2
        self.vocabulary, self.horizon = vocabulary, horizon
        self.parameters = torch.randn(size, generator=generator, dtype=torch.float64).requires_grad_()
        self.outcomes = torch.tensor(list(itertools.product(range(vocabulary), repeat=horizon)))

    def logits(self) -> Tensor:
        """[Y,G,V]: logits that every token of every outcome was drawn from."""
        v = self.vocabulary
        first = self.parameters[:v].expand(len(self.outcomes), v)
        later = self.parameters[v:].view(self.horizon - 1, v, v)
        rest = [later[step - 1][self.outcomes[:, step - 1]] for step in range(1, self.horizon)]
        return torch.stack([first, *rest], dim=1)

    def log_prob(self) -> Tensor:
        """[Y,G]: log-prob of every token of every outcome."""
        return self.logits().log_softmax(-1).gather(-1, self.outcomes[..., None]).squeeze(-1)

    def prob(self) -> Tensor:
        """[Y]: probability of every outcome."""
        return self.log_prob().sum(-1).exp()

    def gradient(self, value: Tensor) -> Tensor:
        """Gradient of a scalar in the parameters."""
        return torch.autograd.grad(value, self.parameters, retain_graph=True)[0]


def features(*, seed: int, outcomes: int = VOCABULARY**HORIZON, dimension: int = DIMENSION) -> Tensor:
    """[Y,D]: a random feature vector per outcome."""
    return torch.randn(outcomes, dimension, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def groups(policy: TablePolicy, rollouts: int) -> tuple[Tensor, Tensor]:
    """All groups of independent rollouts: outcome indices [M,N] and probabilities [M], without gradient."""
    index = torch.tensor(list(itertools.product(range(len(policy.outcomes)), repeat=rollouts)))
    return index, policy.prob().detach()[index].prod(-1)


def expected_value(policy: TablePolicy, rollouts: int, statistic: Callable[[Tensor], Tensor]) -> Tensor:
    """Expectation of a statistic of a group, a function from outcome indices [M,N] to values [M,...]."""
    index, weight = groups(policy, rollouts)
    return torch.einsum("m,m...->...", weight, statistic(index))


def expected_update(policy: TablePolicy, rollouts: int, advantage: Callable[[Tensor], Tensor]) -> Tensor:
    """Expected gradient of mean_j(-A_j log p(rollout j)), A a function from indices [M,N] to advantages [M,N]."""
    index, weight = groups(policy, rollouts)
    log_prob = policy.log_prob().sum(-1)[index]
    surrogate = (-advantage(index).detach() * log_prob).mean(-1)
    return policy.gradient((weight * surrogate).sum())


def score_parts(policy: TablePolicy, k_target: Tensor, k_rollouts: Tensor) -> tuple[Tensor, Tensor]:
    """Exact -2 E k(ŷ,y) and E k(ŷ,ỹ), with gradient, from values of all outcomes [Y] and all pairs [Y,Y]."""
    prob = policy.prob()
    return -2 * (prob @ k_target), prob @ k_rollouts @ prob
