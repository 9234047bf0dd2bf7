"""Policy-gradient terms against hand-written loops and torchrl's losses."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModuleBase
from torch import Tensor
from torchrl.modules.llm.policies.common import LogProbDistribution
from torchrl.objectives.llm import CISPOLoss, GRPOLoss

from ebft.errors import UsageError
from ebft.objectives.policy_gradient import cispo, clipped, reinforce, sequence_clipped

SHAPE = (2, 3, 4, 5)  # B, K, N, G
RATIOS = {"clipped": clipped, "sequence_clipped": sequence_clipped, "cispo": cispo}


def setting(seed: int = 0, distance: float = 0.3) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log-probs with gradient, old log-probs, advantages per rollout, and a ragged mask."""
    generator = torch.Generator().manual_seed(seed)
    log_prob = -torch.rand(SHAPE, generator=generator, dtype=torch.float64) - 1
    old = log_prob + distance * torch.randn(SHAPE, generator=generator, dtype=torch.float64)
    advantage = torch.randn(SHAPE[:-1], generator=generator, dtype=torch.float64)
    lengths = torch.randint(1, SHAPE[-1] + 1, SHAPE[:-1], generator=generator)
    return log_prob.requires_grad_(), old, advantage, torch.arange(SHAPE[-1]) < lengths[..., None]


def gradient(terms: Tensor, log_prob: Tensor) -> Tensor:
    return torch.autograd.grad(terms.sum(), log_prob, retain_graph=True)[0]


def every_function() -> list:
    bound = [pytest.param(partial(f, clip=0.2), id=name) for name, f in RATIOS.items()]
    return [pytest.param(lambda lp, old, a, m: reinforce(lp, a, m), id="reinforce"), *bound]


def test_reinforce_gradient_is_minus_the_advantage() -> None:
    log_prob, _, advantage, mask = setting()
    terms = reinforce(log_prob, advantage, mask)
    assert torch.equal(terms, torch.where(mask, -advantage[..., None] * log_prob, 0.0))
    assert torch.equal(gradient(terms, log_prob), torch.where(mask, -advantage[..., None], 0.0))


@pytest.mark.parametrize("function", every_function())
def test_on_policy_all_have_the_gradient_of_reinforce(function) -> None:
    log_prob, _, advantage, mask = setting()
    terms = function(log_prob, log_prob.detach(), advantage, mask)
    expected = gradient(reinforce(log_prob, advantage, mask), log_prob)
    torch.testing.assert_close(gradient(terms, log_prob), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("function", every_function())
def test_masked_entries_are_zero_whatever_they_hold(function) -> None:
    log_prob, old, advantage, mask = setting()
    mask[0, 0] = False  # a whole anchor
    clean = function(log_prob, old, advantage, mask)
    for garbage in (float("nan"), float("inf"), -float("inf")):
        dirty = torch.where(mask, log_prob.detach(), garbage).requires_grad_()
        dirty_advantage = advantage.clone()
        dirty_advantage[0, 0] = garbage
        terms = function(dirty, torch.where(mask, old, garbage), dirty_advantage, mask)
        assert torch.equal(terms, clean)
        assert (terms[~mask] == 0).all()
        assert torch.equal(gradient(terms, dirty), gradient(function(log_prob, old, advantage, mask), log_prob))


@pytest.mark.parametrize("function", every_function())
def test_an_advantage_per_token_repeats_to_one_per_rollout(function) -> None:
    log_prob, old, advantage, mask = setting()
    per_rollout = function(log_prob, old, advantage, mask)
    per_token = function(log_prob, old, advantage[..., None].expand(SHAPE), mask)
    assert torch.equal(per_rollout, per_token)


@pytest.mark.parametrize("function", every_function())
def test_advantages_and_old_log_probs_get_no_gradient(function) -> None:
    log_prob, old, advantage, mask = setting()
    old.requires_grad_(), advantage.requires_grad_()
    function(log_prob, old, advantage, mask).sum().backward()
    assert log_prob.grad is not None
    assert old.grad is None
    assert advantage.grad is None


@pytest.mark.parametrize("clip", [0.2, (0.1, 0.3)])
def test_clipped_is_the_loop(clip) -> None:
    log_prob, old, advantage, mask = setting(distance=0.5)
    low, high = clip if isinstance(clip, tuple) else (clip, clip)
    terms = clipped(log_prob, old, advantage, mask, clip=clip)
    slope = gradient(terms, log_prob)
    stopped = 0
    for index in mask.nonzero().tolist():
        position = tuple(index)
        ratio, a = math.exp((log_prob.detach() - old)[position]), float(advantage[position[:-1]])
        bounded = min(max(ratio, 1 - low), 1 + high)
        assert float(terms.detach()[position]) == pytest.approx(-min(ratio * a, bounded * a), rel=1e-12)
        outside = ratio * a > bounded * a
        stopped += outside
        assert float(slope[position]) == pytest.approx(0.0 if outside else -ratio * a, rel=1e-12)
    assert stopped > 5


def test_sequence_clipped_is_one_ratio_per_rollout() -> None:
    log_prob, old, advantage, mask = setting()
    terms = sequence_clipped(log_prob, old, advantage, mask, clip=(0.1, 0.2))
    slope = gradient(terms, log_prob)
    for b, k, n in torch.cartesian_prod(*map(torch.arange, SHAPE[:-1])).tolist():
        real, a = mask[b, k, n], float(advantage[b, k, n])
        ratio = math.exp((log_prob.detach() - old)[b, k, n][real].mean())
        bounded = min(max(ratio, 0.9), 1.2)
        value = -min(ratio * a, bounded * a)
        flow = 0.0 if ratio * a > bounded * a else -ratio * a
        for g in range(SHAPE[-1]):
            assert float(terms.detach()[b, k, n, g]) == pytest.approx(value if real[g] else 0.0, rel=1e-12)
            assert float(slope[b, k, n, g]) == pytest.approx(flow if real[g] else 0.0, rel=1e-12)


def test_sequence_clipped_is_the_gspo_objective_times_the_length() -> None:
    log_prob, old, advantage, mask = setting(distance=0.05)
    length = mask.sum(-1)
    ratio = (torch.where(mask, log_prob - old, 0.0).sum(-1) / length).exp()
    objective = -length * torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
    terms = sequence_clipped(log_prob, old, advantage, mask, clip=0.2)
    torch.testing.assert_close(terms.sum(-1), objective)
    torch.testing.assert_close(gradient(terms, log_prob), gradient(objective, log_prob), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("function", every_function())
def test_every_anchor_keeps_its_own_advantage(function) -> None:
    """Credit is not averaged over the anchors of a sequence."""
    log_prob = torch.full((1, 5, 1, 4), -1.0, dtype=torch.float64, requires_grad=True)
    advantage = torch.arange(5.0, dtype=torch.float64).view(1, 5, 1)
    mask = torch.ones(1, 5, 1, 4, dtype=torch.bool)
    slope = gradient(function(log_prob, log_prob.detach(), advantage, mask), log_prob)
    torch.testing.assert_close(slope, -advantage[..., None].expand_as(slope), rtol=1e-12, atol=0)


def test_cispo_keeps_the_gradient_of_clipped_tokens() -> None:
    log_prob, old, advantage, mask = setting(distance=0.5)
    terms = cispo(log_prob, old, advantage, mask, clip=(1.0, 0.2))
    weight = (log_prob - old).detach().exp().clamp(max=1.2)
    expected = torch.where(mask, -weight * advantage[..., None], 0.0)
    torch.testing.assert_close(terms, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(gradient(terms, log_prob), expected, rtol=1e-12, atol=0)
    assert ((weight == 1.2) & mask).any()


class Actor(TensorDictModuleBase):
    """Serves given log-probs to torchrl's losses."""

    in_keys = ("tokens",)
    out_keys = ("log_probs",)

    def __init__(self, log_prob: Tensor, mask: Tensor) -> None:
        super().__init__()
        self.log_prob, self.mask = log_prob, mask

    def get_dist(self, tensordict: TensorDict, **_) -> LogProbDistribution:
        return LogProbDistribution(self.log_prob, mask=self.mask)


def torchrl_loss(kind, log_prob: Tensor, old: Tensor, advantage: Tensor, mask: Tensor, **options) -> TensorDict:
    loss = kind(Actor(log_prob, mask), entropy_bonus=False, **options)
    loss.double()
    loss.set_keys(action="tokens", sample_log_prob="old", advantage="advantage", ref_log_probs="reference")
    td = TensorDict(
        {
            "tokens": torch.zeros(SHAPE, dtype=torch.long),
            "old": old,
            "advantage": advantage[..., None, None].expand(*SHAPE, 1),
            "reference": old,
        },
        batch_size=SHAPE,
    )
    return loss(td)


@pytest.mark.parametrize("clip", [0.2, (0.2, 0.28)])
@pytest.mark.parametrize("distance", [0.0, 0.05, 0.5])
def test_clipped_is_torchrls_grpo(clip, distance: float) -> None:
    log_prob, old, advantage, mask = setting(distance=distance)
    theirs = torchrl_loss(GRPOLoss, log_prob, old, advantage, mask, clip_epsilon=clip).loss_objective
    ours = clipped(log_prob, old, advantage, mask, clip=clip).sum() / mask.sum()
    # torchrl holds its clip bounds in float32
    torch.testing.assert_close(ours, theirs.squeeze(), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(gradient(ours, log_prob), gradient(theirs, log_prob), rtol=1e-6, atol=1e-9)


def test_cispo_is_torchrls_where_nothing_is_clipped() -> None:
    """Values agree everywhere; where a weight is clipped torchrl stops the gradient, which the method keeps."""
    log_prob, old, advantage, mask = setting(distance=0.3)
    theirs = torchrl_loss(CISPOLoss, log_prob, old, advantage, mask, clip_epsilon=0.2).loss_objective
    ours = cispo(log_prob, old, advantage, mask, clip=0.2).sum() / mask.sum()
    torch.testing.assert_close(ours, theirs.squeeze(), rtol=1e-6, atol=1e-7)
    ratio = (log_prob - old).detach().exp()
    inside = mask & (ratio > 0.8) & (ratio < 1.2)
    assert 0 < inside.sum() < mask.sum()
    torch.testing.assert_close(gradient(ours, log_prob)[inside], gradient(theirs, log_prob)[inside])
    assert (gradient(ours, log_prob)[mask & ~inside] != 0).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"advantage": torch.zeros(2, 3)}, r"advantage has shape \[2, 3\].*\[2, 3, 4\].*\[2, 3, 4, 5\]"),
        ({"mask": torch.ones(2, 3, 4, dtype=torch.bool)}, r"mask has shape \[2, 3, 4\]"),
        ({"old_log_prob": torch.zeros(2, 3, 4)}, r"old_log_prob has shape \[2, 3, 4\]"),
        ({"clip": 0.0}, "clip=0.0"),
        ({"clip": (1.2, 0.2)}, r"clip=\(1.2, 0.2\)"),
    ],
)
@pytest.mark.parametrize("name", RATIOS)
def test_bad_input_is_refused(name: str, change: dict, message: str) -> None:
    log_prob, old, advantage, mask = setting()
    given = {"old_log_prob": old, "advantage": advantage, "mask": mask, "clip": 0.2}
    with pytest.raises(UsageError, match=message):
        RATIOS[name](log_prob, **(given | change))
