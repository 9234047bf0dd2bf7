"""EBFTLoss: exact gradient of the whole objective, normalisation, splitting of batches, masks and errors."""

from __future__ import annotations

import subprocess
import sys
from functools import partial

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor

from ebft import schema
from ebft.errors import UsageError
from ebft.objectives import EBFTLoss, totals
from ebft.objectives.baselines import advantage
from ebft.objectives.kl import exact_kl, kl_estimate
from ebft.objectives.moments import moment_values
from ebft.objectives.policy_gradient import cispo, clipped, reinforce, sequence_clipped
from tests.enumeration import TablePolicy, features, groups

B, T, K, N, G = 8, 9, 3, 4, 5
EXACT = {"rtol": 1e-12, "atol": 1e-12}
ALL = {"policy_gradient_coefficient": 0.7, "cross_entropy_coefficient": 0.3, "kl_coefficient": 0.2}


def batch(seed: int = 0) -> TensorDict:
    """Uneven in everything: anchors per row, rollout lengths, row lengths, answers, documents."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def upto(high: int, *shape: int) -> Tensor:
        return torch.randint(0, high, shape, generator=generator)

    td = TensorDict({}, batch_size=[B])
    td[schema.POLICY_LOG_PROB] = (draw(B, K, N, G) - 2).requires_grad_()
    td[schema.ROLLOUT_LOG_PROB] = td[schema.POLICY_LOG_PROB].detach() + 0.2 * draw(B, K, N, G)
    td[schema.REFERENCE_LOG_PROB] = td[schema.POLICY_LOG_PROB].detach() + 0.5 * draw(B, K, N, G)
    td[schema.ADVANTAGE] = draw(B, K, N)
    td[schema.ROLLOUT_MASK] = torch.arange(G) <= upto(G, B, K, N, 1)
    td[schema.ANCHOR_MASK] = torch.arange(K) <= upto(K, B, 1)
    td[schema.POLICY_TOKEN_LOG_PROB] = (draw(B, T - 1) - 2).requires_grad_()
    td[schema.MASK] = torch.arange(T) < 2 + upto(T - 1, B, 1)
    td[schema.ANSWER_MASK] = upto(4, B, T) > 0
    td[schema.DOCUMENT_IDS] = (upto(4, B, T) == 0).long().cumsum(-1)
    return td


def gradients(td: TensorDict, value: Tensor) -> list[Tensor]:
    leaves = [td[schema.POLICY_LOG_PROB], td[schema.POLICY_TOKEN_LOG_PROB]]
    return [torch.zeros_like(leaf) if g is None else g for leaf, g in zip(leaves, _grad(value, leaves), strict=True)]


def _grad(value: Tensor, leaves: list[Tensor]):
    return torch.autograd.grad(value, leaves, retain_graph=True, allow_unused=True)


def total(out: TensorDict) -> Tensor:
    return sum(value for key, value in out.items() if key.startswith("loss_"))


def test_expected_gradient_is_that_of_the_whole_objective() -> None:
    """L_CFM + γ L_CE + β KL(policy rollouts ‖ reference rollouts), over all groups of three rollouts."""
    policy, reference = TablePolicy(seed=0, vocabulary=2), TablePolicy(seed=1, vocabulary=2)
    phi, target = features(seed=2, outcomes=4), features(seed=3, outcomes=1)[0]
    data = 2  # the outcome that the data holds
    gamma, beta = 0.4, 0.3
    loss = EBFTLoss(cross_entropy_coefficient=gamma, kl_coefficient=beta, kl_scope="rollout")
    index, weight = groups(policy, 3)
    log_prob = policy.log_prob()
    expected_loss = 0.0
    for group, probability in zip(index, weight, strict=True):
        td = TensorDict({}, batch_size=[1])
        td[schema.ADVANTAGE] = advantage(*moment_values(phi[group], target))[None, None]
        td[schema.POLICY_LOG_PROB] = log_prob[group][None, None]
        td[schema.REFERENCE_LOG_PROB] = reference.log_prob()[group][None, None].detach()
        td[schema.ROLLOUT_MASK] = torch.ones(1, 1, 3, 2, dtype=torch.bool)
        td[schema.ANCHOR_MASK] = torch.ones(1, 1, dtype=torch.bool)
        td[schema.POLICY_TOKEN_LOG_PROB] = log_prob[data][None]
        td[schema.MASK] = torch.ones(1, 3, dtype=torch.bool)  # one token of context, two of data
        expected_loss = expected_loss + probability * total(loss(td))

    prob = policy.prob()
    matching = (prob @ phi - target).square().sum()
    cross_entropy = -policy.log_prob()[data].mean()
    divergence = (prob * (policy.log_prob() - reference.log_prob()).sum(-1)).sum()
    exact = policy.gradient(matching + gamma * cross_entropy + beta * divergence)
    torch.testing.assert_close(policy.gradient(expected_loss), exact, rtol=0, atol=1e-12)


def test_divergence_per_token_by_enumeration() -> None:
    """With kl_scope="token" the gradient is of the next-token divergences in the contexts visited."""
    policy, reference = TablePolicy(seed=0), TablePolicy(seed=1)
    loss = EBFTLoss(policy_gradient_coefficient=0.0, kl_coefficient=1.0)
    expected, logged = 0.0, 0.0
    for outcome, probability in enumerate(policy.prob().detach()):
        td = TensorDict({}, batch_size=[1])
        td[schema.POLICY_LOG_PROB] = policy.log_prob()[outcome].view(1, 1, 1, 2)
        td[schema.REFERENCE_LOG_PROB] = reference.log_prob()[outcome].view(1, 1, 1, 2).detach()
        td[schema.ROLLOUT_MASK] = torch.ones(1, 1, 1, 2, dtype=torch.bool)
        td[schema.ANCHOR_MASK] = torch.ones(1, 1, dtype=torch.bool)
        out = loss(td)
        expected, logged = expected + probability * out["loss_kl"], logged + probability * out["kl"]
    exact = (policy.prob().detach()[:, None] * exact_kl(policy.logits(), reference.logits())).sum()
    torch.testing.assert_close(policy.gradient(expected), policy.gradient(exact), rtol=0, atol=1e-12)
    torch.testing.assert_close(logged, exact.detach(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("scope", ["token", "rollout"])
def test_divergence_in_the_reward_by_enumeration(scope: str) -> None:
    """k1 in the reward descends KL(policy rollouts ‖ reference rollouts), over all groups of three rollouts."""
    policy, reference = TablePolicy(seed=0, vocabulary=2), TablePolicy(seed=1, vocabulary=2)
    phi, target = features(seed=2, outcomes=4), features(seed=3, outcomes=1)[0]
    loss = EBFTLoss(kl_coefficient=0.3, kl_in="reward", kl_scope=scope)
    index, weight = groups(policy, 3)
    log_prob = policy.log_prob()
    expected = 0.0
    for group, probability in zip(index, weight, strict=True):
        td = TensorDict({}, batch_size=[1])
        td[schema.ADVANTAGE] = advantage(*moment_values(phi[group], target))[None, None]
        td[schema.POLICY_LOG_PROB] = log_prob[group][None, None]
        td[schema.REFERENCE_LOG_PROB] = reference.log_prob()[group][None, None].detach()
        td[schema.ROLLOUT_MASK] = torch.ones(1, 1, 3, 2, dtype=torch.bool)
        td[schema.ANCHOR_MASK] = torch.ones(1, 1, dtype=torch.bool)
        out = loss(td)
        assert "loss_kl" not in set(out.keys())
        expected = expected + probability * total(out)
    prob = policy.prob()
    divergence = (prob * (policy.log_prob() - reference.log_prob()).sum(-1)).sum()
    exact = policy.gradient((prob @ phi - target).square().sum() + 0.3 * divergence)
    torch.testing.assert_close(policy.gradient(expected), exact, rtol=0, atol=1e-12)


@pytest.mark.parametrize("normalization", ["sequence", "token"])
def test_entropy_bonus_is_the_loop(normalization: str) -> None:
    td = batch()
    entropy = torch.rand(B, K, N, G, generator=torch.Generator().manual_seed(5), dtype=torch.float64).requires_grad_()
    td[schema.POLICY_ENTROPY] = entropy
    out = EBFTLoss(policy_gradient_coefficient=0.0, entropy_coefficient=0.3, normalization=normalization)(td)
    real = td[schema.ROLLOUT_MASK] & td[schema.ANCHOR_MASK][..., None, None]
    count = real.sum() if normalization == "token" else td[schema.ANCHOR_MASK].sum() * N
    torch.testing.assert_close(out["entropy"], entropy[real].sum().detach() / count, **EXACT)
    (gradient,) = torch.autograd.grad(out["loss_entropy"], entropy)
    torch.testing.assert_close(gradient, -0.3 * real.double() / count, **EXACT)


@pytest.mark.parametrize("normalization", ["sequence", "token"])
@pytest.mark.parametrize("kl_scope", ["token", "rollout"])
def test_value_is_the_loop(normalization: str, kl_scope: str) -> None:
    td = batch()
    out = EBFTLoss(**ALL, normalization=normalization, kl_scope=kl_scope)(td)
    gradient, divergence, measured, tokens, rollouts = 0.0, 0.0, 0.0, 0, 0
    for b, k in td[schema.ANCHOR_MASK].nonzero().tolist():
        for n in range(N):
            real = td[schema.ROLLOUT_MASK][b, k, n]
            log_prob = td[schema.POLICY_LOG_PROB][b, k, n][real]
            ratio = log_prob - td[schema.REFERENCE_LOG_PROB][b, k, n][real]
            gradient = gradient - td[schema.ADVANTAGE][b, k, n] * log_prob.sum()
            divergence = divergence + (ratio.sum() ** 2 if kl_scope == "rollout" else (ratio**2).sum()) / 2
            measured = measured + ((-ratio).exp() - 1 + ratio).sum()
            tokens += int(real.sum())
            rollouts += 1
    count = rollouts if normalization == "sequence" else tokens
    assert rollouts < B * K * N
    assert tokens < rollouts * G
    torch.testing.assert_close(out["loss_policy_gradient"], 0.7 * gradient / count, **EXACT)
    torch.testing.assert_close(out["loss_kl"], 0.2 * divergence / count, **EXACT)
    torch.testing.assert_close(out["kl"], (measured / count).detach(), **EXACT)
    learnt, terms = 0, 0.0
    for b in range(B):
        for t in range(1, T):
            same = td[schema.DOCUMENT_IDS][b, t] == td[schema.DOCUMENT_IDS][b, t - 1]
            if td[schema.MASK][b, t] and td[schema.ANSWER_MASK][b, t] and same:
                learnt, terms = learnt + 1, terms - td[schema.POLICY_TOKEN_LOG_PROB][b, t - 1]
    torch.testing.assert_close(out["loss_cross_entropy"], 0.3 * terms / learnt, **EXACT)
    torch.testing.assert_close(out["cross_entropy"], (terms / learnt).detach(), **EXACT)


@pytest.mark.parametrize("normalization", ["sequence", "token"])
@pytest.mark.parametrize("kl_scope", ["token", "rollout"])
@pytest.mark.parametrize("rows", [1, 4, 8])
def test_parts_of_a_batch_sum_to_the_batch(normalization: str, kl_scope: str, rows: int) -> None:
    loss = EBFTLoss(**ALL, normalization=normalization, kl_scope=kl_scope)
    td = batch()
    whole = loss(td)
    counted = td.copy().update(totals(td))
    parts = [loss(part) for part in counted.split(rows)]
    assert len(parts) == B // rows
    for key in loss.out_keys:
        torch.testing.assert_close(sum(part[key] for part in parts), whole[key], **EXACT)
    summed = gradients(td, sum(total(part) for part in parts))
    for found, expected in zip(summed, gradients(td, total(whole)), strict=True):
        torch.testing.assert_close(found, expected, **EXACT)
    if rows < B:  # averages of averages are something else
        naive = sum(total(loss(part)) for part in td.split(rows)) / len(parts)
        assert (naive - total(whole)).abs() > 1e-3


def test_totals_are_counts_in_every_row() -> None:
    td = batch()
    counted = totals(td)
    assert counted.batch_size == torch.Size([B])
    schema.check(counted, schema.TOTAL_ROLLOUTS, schema.TOTAL_TOKENS, schema.TOTAL_TRUNK_TOKENS)
    assert counted[schema.TOTAL_ROLLOUTS].tolist() == [float(td[schema.ANCHOR_MASK].sum() * N)] * B
    tokens = sum(int(td[schema.ROLLOUT_MASK][b, k].sum()) for b, k in td[schema.ANCHOR_MASK].nonzero().tolist())
    assert counted[schema.TOTAL_TOKENS].tolist() == [float(tokens)] * B
    learnt = td[schema.MASK] & td[schema.ANSWER_MASK]
    learnt[:, 1:] &= td[schema.DOCUMENT_IDS].diff() == 0
    assert counted[schema.TOTAL_TRUNK_TOKENS].tolist() == [float(learnt[:, 1:].sum())] * B


@pytest.mark.parametrize("normalization", ["sequence", "token"])
def test_masked_anchors_and_tokens_may_hold_anything(normalization: str) -> None:
    loss = EBFTLoss(**ALL, normalization=normalization)
    td = batch()
    dirty = td.clone()
    anchor, real = td[schema.ANCHOR_MASK], td[schema.ROLLOUT_MASK] & td[schema.ANCHOR_MASK][..., None, None]
    for key in (schema.POLICY_LOG_PROB, schema.REFERENCE_LOG_PROB):
        dirty[key] = torch.where(real, td[key].detach(), float("nan")).requires_grad_()
    dirty[schema.ADVANTAGE] = torch.where(anchor[..., None], td[schema.ADVANTAGE], float("inf"))
    dirty[schema.ROLLOUT_MASK] = td[schema.ROLLOUT_MASK] | ~anchor[..., None, None]
    dirty[schema.POLICY_TOKEN_LOG_PROB] = (
        torch.where(td[schema.MASK][:, 1:], td[schema.POLICY_TOKEN_LOG_PROB], float("nan")).detach().requires_grad_()
    )
    clean, found = loss(td), loss(dirty)
    for key in loss.out_keys:
        torch.testing.assert_close(found[key], clean[key], **EXACT)
    for ours, expected in zip(gradients(dirty, total(found)), gradients(td, total(clean)), strict=True):
        torch.testing.assert_close(ours, expected, **EXACT)
    assert torch.equal(totals(dirty)[schema.TOTAL_TOKENS], totals(td)[schema.TOTAL_TOKENS])


@pytest.mark.parametrize("normalization", ["sequence", "token"])
def test_nothing_to_learn_is_zero_with_a_graph(normalization: str) -> None:
    """An empty mask does not fall back to the mean of everything."""
    td = batch()
    td[schema.ANCHOR_MASK] = torch.zeros(B, K, dtype=torch.bool)
    td[schema.ANSWER_MASK] = torch.zeros(B, T, dtype=torch.bool)
    out = EBFTLoss(**ALL, normalization=normalization)(td)
    assert all(value == 0 for value in out.values())
    for gradient in gradients(td, total(out)):
        assert (gradient == 0).all()


def test_divergence_is_averaged_over_unmasked_tokens_only() -> None:
    """Adding masked tokens does not dilute it."""
    td = batch()
    out = EBFTLoss(kl_coefficient=1.0, normalization="token")(td)
    real = td[schema.ROLLOUT_MASK] & td[schema.ANCHOR_MASK][..., None, None]
    terms = kl_estimate(td[schema.POLICY_LOG_PROB], td[schema.REFERENCE_LOG_PROB])
    torch.testing.assert_close(out["loss_kl"], terms[real].mean(), **EXACT)
    assert abs(out["loss_kl"] / torch.where(real, terms, 0.0).mean() - 1) > 0.5


def test_only_losses_have_a_gradient_and_only_terms_in_use_are_there() -> None:
    td = batch()
    loss = EBFTLoss(**ALL)
    out = loss(td)
    assert set(out.keys()) == set(loss.out_keys)
    assert out.batch_size == torch.Size([])
    for key, value in out.items():
        assert value.requires_grad == key.startswith("loss_")
        assert value.shape == ()
    only = EBFTLoss(policy_gradient_coefficient=0.0, cross_entropy_coefficient=1.0)
    assert only.in_keys == [schema.MASK, schema.POLICY_TOKEN_LOG_PROB]
    assert set(only(td.select(*only.in_keys)).keys()) == {"loss_cross_entropy", "cross_entropy"}


@pytest.mark.parametrize("function", [clipped, sequence_clipped, cispo])
def test_policy_gradient_with_old_log_probs(function) -> None:
    td = batch()
    function = partial(function, clip=0.2)
    loss = EBFTLoss(policy_gradient=function)
    assert schema.ROLLOUT_LOG_PROB in loss.in_keys
    real = td[schema.ROLLOUT_MASK] & td[schema.ANCHOR_MASK][..., None, None]
    terms = function(td[schema.POLICY_LOG_PROB], td[schema.ROLLOUT_LOG_PROB], td[schema.ADVANTAGE], real)
    count = td[schema.ANCHOR_MASK].sum() * N
    torch.testing.assert_close(loss(td)["loss_policy_gradient"], terms.sum() / count, **EXACT)


def test_a_policy_gradient_that_ignores_the_mask_is_masked() -> None:
    td = batch()
    loss = EBFTLoss(policy_gradient=lambda log_prob, advantage, mask: -advantage[..., None] * log_prob)
    assert torch.equal(loss(td)["loss_policy_gradient"], EBFTLoss()(td)["loss_policy_gradient"])


def test_advantage_per_token() -> None:
    td = batch()
    loss = EBFTLoss()
    expected = loss(td)["loss_policy_gradient"]
    td[schema.ADVANTAGE] = td[schema.ADVANTAGE][..., None].expand(B, K, N, G)
    torch.testing.assert_close(loss(td)["loss_policy_gradient"], expected, **EXACT)


def test_coefficient_can_follow_a_controller() -> None:
    td, loss = batch(), EBFTLoss(kl_coefficient=0.2)
    first = loss(td)["loss_kl"]
    loss.kl_coefficient = 0.6
    torch.testing.assert_close(loss(td)["loss_kl"], 3 * first, **EXACT)


def test_keys_can_be_renamed() -> None:
    td, loss = batch(), EBFTLoss(**ALL)
    expected = loss(td)
    loss.set_keys(advantage="mine", policy_log_prob=("actor", "log_prob"))
    td["mine"] = td.pop(schema.ADVANTAGE)
    td["actor", "log_prob"] = td[schema.POLICY_LOG_PROB]
    del td[schema.POLICY_LOG_PROB]
    assert "mine" in loss.in_keys
    for key, value in loss(td).items():
        assert torch.equal(value, expected[key])


def test_importing_the_functions_does_not_import_torchrl() -> None:
    code = (
        "import sys, ebft, ebft.objectives.moments, ebft.objectives.policy_gradient;assert 'torchrl' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def _wants_more(log_prob: Tensor, advantage: Tensor, mask: Tensor, *, critic: Tensor) -> Tensor:
    return critic


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"normalization": "mean"}, "normalization='mean'.*'sequence', 'token'"),
        ({"kl_estimator": "k4"}, "kl_estimator='k4'"),
        ({"kl_scope": "batch"}, "kl_scope='batch'"),
        ({"kl_coefficient": -0.1}, "kl_coefficient=-0.1"),
        ({"cross_entropy_coefficient": float("nan")}, "cross_entropy_coefficient=nan"),
        ({"policy_gradient_coefficient": 0.0}, "all weights of the loss are 0"),
        ({"policy_gradient": clipped}, r"unbound: \['clip'\]"),
        ({"policy_gradient": _wants_more}, r"unbound: \['critic'\]"),
        ({"policy_gradient": lambda log_prob, mask: log_prob}, "expected log_prob, advantage, mask"),
    ],
)
def test_bad_options_are_refused(arguments: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        EBFTLoss(**arguments)


def test_bad_input_is_refused() -> None:
    loss = EBFTLoss(**ALL)
    for key in loss.in_keys:
        td = batch()
        del td[key]
        with pytest.raises(UsageError, match="missing"):
            loss(td)
    td = batch()
    td[schema.ADVANTAGE] = torch.zeros(B, K, N + 1)
    with pytest.raises(UsageError, match="N="):
        loss(td)
    td[schema.ADVANTAGE] = torch.zeros(B, K, N, G + 1)
    with pytest.raises(UsageError, match="advantage has shape"):
        loss(td)
    td = batch().update(totals(batch()))
    del td[schema.TOTAL_TRUNK_TOKENS]
    with pytest.raises(UsageError, match="trunk_tokens"):
        loss(td)
    with pytest.raises(UsageError, match="missing"):
        totals(batch().exclude(schema.MASK))
    with pytest.raises(ValueError, match="not an accepted tensordict key"):
        loss.set_keys(rewards="mine")


def test_default_policy_gradient_is_reinforce() -> None:
    td = batch()
    assert torch.equal(
        EBFTLoss()(td)["loss_policy_gradient"], EBFTLoss(policy_gradient=reinforce)(td)["loss_policy_gradient"]
    )
