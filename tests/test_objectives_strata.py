"""Rollouts with chosen first tokens: weights, and the exact gradient of the score by enumeration."""

from __future__ import annotations

import itertools
from functools import cache

import pytest
import torch
from tensordict import TensorDict

from ebft import schema
from ebft.errors import UsageError
from ebft.objectives.horizons import horizon_weights
from ebft.objectives.kernels import kernel_values
from ebft.objectives.scores import hold_last
from ebft.objectives.strata import leave_out_ratios, stratified_coefficients, stratum_weights
from ebft.objectives.stratified import stratified_objective
from ebft.policy import CausalPolicy
from ebft.samplers.first_tokens import branches, distinct, first_tokens
from tests.enumeration import TablePolicy, score_parts
from tests.models import tiny

VOCABULARY, HORIZON = 4, 2
EXACT = {"rtol": 0, "atol": 1e-9}


def sets(prob: torch.Tensor, size: int) -> dict[tuple[int, ...], float]:
    """All ordered draws without replacement with their probabilities."""
    found = {}
    for order in itertools.permutations(range(len(prob)), size):
        p, left = 1.0, 1.0
        for token in order:
            p, left = p * prob[token].item() / left, left - prob[token].item()
        found[order] = p
    return found


def of_set(prob: torch.Tensor, chosen) -> float:
    """P(C): the unordered set, from a distribution that is normalised over what `prob` holds."""
    size = len(chosen)
    return sum(p for order, p in sets(prob / prob.sum(), size).items() if set(order) == set(chosen)) if size else 1.0


@pytest.mark.parametrize("prob", [[0.5, 0.3, 0.15, 0.05], [0.9999, 5e-5, 4e-5, 1e-5], [0.25] * 4])
@pytest.mark.parametrize("size", [2, 3, 4])
def test_leave_out_ratios(prob, size) -> None:
    prob = torch.tensor(prob, dtype=torch.float64)
    chosen = list(range(len(prob)))[-size:]
    one, two = leave_out_ratios(prob[chosen])
    whole = of_set(prob, chosen)

    def without(*gone):
        kept = [token for token in range(len(prob)) if token not in gone]
        rest = [kept.index(token) for token in chosen if token not in gone]
        return of_set(prob[kept], rest) / whole

    expected = torch.tensor([without(c) for c in chosen], dtype=torch.float64)
    torch.testing.assert_close(one, expected, rtol=1e-9, atol=0)
    for a, c in enumerate(chosen):
        for b, d in enumerate(chosen):
            if a != b:
                torch.testing.assert_close(two[a, b].item(), without(c, d), rtol=1e-9, atol=0)


class Drawn:
    """All draws of N rollouts of one anchor in strata, with their probabilities."""

    def __init__(self, kind: str, strata: int, each: int) -> None:
        self.kind, self.strata, self.each = kind, strata, each
        self.policy = TablePolicy(seed=3, vocabulary=VOCABULARY, horizon=HORIZON)
        prob = self.policy.log_prob().exp().detach()  # [Y,G]
        first = prob[:, 0].view(VOCABULARY, VOCABULARY)[:, 0]
        later = prob[:, 1].view(VOCABULARY, VOCABULARY)
        count = strata * each
        draws, chances = [], []
        for tokens, chance in self._first(first):
            for rest in itertools.product(range(VOCABULARY), repeat=count):
                draws.append([a * VOCABULARY + b for a, b in zip(tokens, rest, strict=True)])
                chances.append(chance * later[list(tokens), list(rest)].prod().item())
        self.index, self.chance = torch.tensor(draws), torch.tensor(chances, dtype=torch.float64)
        self.log_first = first.log()[self.policy.outcomes[self.index][..., 0]]

    def _first(self, prob):
        """First tokens of all rollouts, with the chance of each choice."""
        if self.kind == "distinct":
            for order, chance in sets(prob, self.strata).items():
                yield [token for token in order for _ in range(self.each)], chance
            return
        top = prob.argsort(descending=True)[: self.strata - 1].tolist()
        rest = [a for a in range(VOCABULARY) if a not in top]
        for drawn in itertools.product(rest, repeat=self.each):
            chance = (prob[list(drawn)] / prob[rest].sum()).prod().item()
            yield [token for token in top for _ in range(self.each)] + list(drawn), chance

    def update(self, phi, target, alpha):
        """Expected gradient of the mean over rollouts of -A log p."""
        weights, pairs = stratum_weights(self.log_first, kind=self.kind, strata=self.strata)
        k_target, k_rollouts = kernel_values(phi[self.index], target.expand(len(self.index), -1))
        first, later = stratified_coefficients(k_target, k_rollouts, weights, pairs, kind=self.kind, diversity=alpha)
        log_prob = self.policy.log_prob()[self.index]  # [M,N,G]
        terms = -(first * log_prob[..., 0] + later * log_prob[..., 1]).mean(-1)
        return self.policy.gradient((self.chance * terms).sum())


drawn_once = cache(Drawn)

CASES = [
    ("branches", 2, 1, 0.0), ("branches", 3, 1, 0.0), ("distinct", 2, 1, 0.0), ("distinct", 3, 1, 0.0),
    ("branches", 2, 2, 1.0), ("distinct", 2, 2, 0.7), ("branches", 4, 1, 0.0), ("distinct", 4, 1, 0.0),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "strata", "each", "alpha"), CASES)
def test_unbiased(kind, strata, each, alpha) -> None:
    drawn = Drawn(kind, strata, each)
    assert drawn.chance.sum().item() == pytest.approx(1, abs=1e-12)
    generator = torch.Generator().manual_seed(0)
    phi = torch.randn(VOCABULARY**HORIZON, 3, generator=generator, dtype=torch.float64)
    target = torch.randn(3, generator=generator, dtype=torch.float64)
    alignment, spread = score_parts(drawn.policy, *kernel_values(phi, target))
    exact = drawn.policy.gradient(alignment + alpha * spread)
    torch.testing.assert_close(drawn.update(phi, target, alpha), exact, **EXACT)


@pytest.mark.parametrize("ends", [False, True])
@pytest.mark.parametrize("horizons", [None, "uniform", "last", "geometric:0.5"])
@pytest.mark.parametrize(("kind", "strata", "each", "alpha"), [("branches", 2, 2, 0.7), ("distinct", 2, 2, 0.7)])
def test_the_module_is_unbiased_with_features_per_token(kind, strata, each, alpha, horizons, ends) -> None:
    """Of the weighted sum of the losses at all horizons, also where rollouts end with their first token."""
    drawn = drawn_once(kind, strata, each)
    outcomes, count = drawn.policy.outcomes, len(drawn.index)
    real = torch.ones_like(outcomes, dtype=torch.bool)
    if ends:
        real[:, 1] = outcomes[:, 0] != 1
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(HORIZON, len(outcomes), 3, generator=generator, dtype=torch.float64)
    phi = torch.stack([table[0][outcomes[:, 0]], table[1]], 1)  # [Y,G,D], of the first g tokens
    target = torch.randn(HORIZON, 3, generator=generator, dtype=torch.float64)
    held, weights = hold_last(phi, real), horizon_weights(horizons or "last", HORIZON).tolist()
    exact = sum(
        weight * drawn.policy.gradient(a + alpha * b)
        for g, weight in enumerate(weights)
        for a, b in [score_parts(drawn.policy, *kernel_values(held[:, g], target[g]))]
    )
    log_prob = torch.where(real, drawn.policy.log_prob(), 0.0)[drawn.index]  # [M,N,G]
    found, goal = (phi[drawn.index], target) if horizons else (held[:, -1][drawn.index], target[-1])
    td = TensorDict(
        {
            schema.ROLLOUT_FEATURES: found[:, None],
            schema.TARGET_FEATURES: goal.expand(count, 1, *goal.shape),
            schema.ANCHOR_MASK: torch.ones(count, 1, dtype=torch.bool),
            schema.ROLLOUT_LOG_PROB: log_prob.detach()[:, None],
            schema.ROLLOUT_MASK: real[drawn.index][:, None],
            schema.TARGET_MASK: torch.ones(count, 1, HORIZON, dtype=torch.bool),
        },
        [count],
    )
    options = {"kind": kind, "strata": strata, "diversity": alpha, "horizons": horizons}
    advantage = stratified_objective(kernel_values, **options)(td)[schema.ADVANTAGE][:, 0]
    assert advantage[~real[drawn.index]].abs().sum() == 0
    terms = -(advantage * log_prob).sum(-1).mean(-1)
    torch.testing.assert_close(drawn.policy.gradient((drawn.chance * terms).sum()), exact, **EXACT)


def test_a_baseline_that_differs_between_strata_is_biased() -> None:
    """Why the first token has a baseline of its own: with that of the later tokens the gradient is another."""
    drawn = Drawn("branches", 2, 2)
    phi = torch.randn(VOCABULARY**HORIZON, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    target = torch.ones(3, dtype=torch.float64)
    weights, pairs = stratum_weights(drawn.log_first, kind="branches", strata=2)
    k = kernel_values(phi[drawn.index], target.expand(len(drawn.index), -1))
    _, later = stratified_coefficients(*k, weights, pairs, kind="branches", diversity=0.0)
    log_prob = drawn.policy.log_prob()[drawn.index].sum(-1)
    found = drawn.policy.gradient((drawn.chance * -(later * log_prob).mean(-1)).sum())
    exact = drawn.policy.gradient(score_parts(drawn.policy, *kernel_values(phi, target))[0])
    assert (found - exact).abs().max() > 1e-2


@pytest.mark.parametrize("kind", ["branches", "distinct"])
def test_choosers_draw_what_the_weights_are_for(kind) -> None:
    prob = torch.tensor([0.1, 0.5, 0.15, 0.25])
    uniform = torch.rand(20_000, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    tokens = first_tokens(kind, strata=2)(prob.log().expand(len(uniform), -1), uniform)
    assert tokens.shape == (20_000, 4)
    if kind == "branches":
        assert (tokens[:, :2] == 1).all()
        shares = torch.bincount(tokens[:, 2:].flatten(), minlength=4) / 40_000
        torch.testing.assert_close(shares, torch.tensor([0.2, 0, 0.3, 0.5]), atol=0.01, rtol=0)
        return
    assert (tokens[:, 0] == tokens[:, 1]).all()
    assert (tokens[:, 2] == tokens[:, 3]).all()
    for order, chance in sets(prob, 2).items():
        share = ((tokens[:, 0] == order[0]) & (tokens[:, 2] == order[1])).float().mean().item()
        assert share == pytest.approx(chance, abs=0.012)


def test_a_policy_draws_first_tokens_so() -> None:
    """The likeliest tokens first, log-probs that scoring agrees with, later tokens drawn as ever."""
    policy = CausalPolicy(tiny("llama"), kernel="dense")
    tokens = torch.randint(29, (2, 8), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(tokens, dtype=torch.bool)
    anchors, valid = torch.tensor([[3, 5], [2, 8]]), torch.ones(2, 2, dtype=torch.bool)
    options = {"rollouts": 4, "horizon": 3, "seed": 1}
    drawn, log_prob, real = policy.sample(
        tokens, mask, anchors, valid, **options, first=first_tokens("branches", strata=4)
    )
    scored, _ = policy.score(tokens, mask, anchors, valid, drawn, real)
    torch.testing.assert_close(log_prob, scored.detach(), atol=1e-5, rtol=1e-4)
    assert (log_prob[..., :2, 0] >= log_prob[..., 1:3, 0]).all()
    assert all(len(set(group)) == 4 for group in drawn[..., 0].flatten(0, 1).tolist())
    again, _, _ = policy.sample(tokens[1:], mask[1:], anchors[1:], valid[1:], **options,
                                sequence_ids=torch.tensor([1]), first=first_tokens("branches", strata=4))  # fmt: skip
    assert torch.equal(again[0], drawn[1])


def test_bad_input_is_refused() -> None:
    with pytest.raises(UsageError, match=r"'top'.*branches, distinct"):
        first_tokens("top", strata=2)
    with pytest.raises(UsageError, match="strata=1"):
        first_tokens("branches", strata=1)
    for chooser in (branches, distinct):
        with pytest.raises(UsageError, match="3 rollouts do not fill 2 strata"):
            chooser(torch.zeros(1, 5), torch.zeros(1, 3), strata=2)
    with pytest.raises(UsageError, match="'top'"):
        stratum_weights(torch.zeros(4), kind="top", strata=2)
    with pytest.raises(UsageError, match="3 rollouts do not fill 2"):
        stratum_weights(torch.zeros(3), kind="branches", strata=2)
    k = (torch.zeros(2), torch.zeros(2, 2))
    with pytest.raises(UsageError, match=r"diversity=1\.0 with 2 rollouts in 2 strata.*give 4"):
        stratified_coefficients(*k, torch.ones(2), torch.ones(2, 2), kind="branches", diversity=1.0)
