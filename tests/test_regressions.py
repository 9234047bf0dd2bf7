"""Errors found in public implementations of EBFT, each written so that the wrong formula fails.

Row order of combs and predecessors have further tests in `test_layout.py` and `test_mutations.py`.
"""

from __future__ import annotations

import pytest
import torch

from ebft import schema
from ebft.errors import UsageError
from ebft.features.whitening import whiten
from ebft.objectives.baselines import advantage
from ebft.objectives.moments import conditional_feature_matching_loss, feature_matching_reward, moment_values
from ebft.objectives.policy_gradient import sequence_clipped
from ebft.objectives.scores import token_scores
from ebft.policy import CausalPolicy
from tests.enumeration import TablePolicy, expected_update, features
from tests.models import tiny


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture(scope="module")
def comb():
    """Two anchors with three rollouts of three tokens, in float64."""
    policy = CausalPolicy(tiny("gpt2", dtype=torch.float64))
    tokens = torch.randint(2, 20, (1, 9), generator=torch.Generator().manual_seed(0))
    anchors, valid = torch.tensor([[3, 6]]), torch.ones(1, 2, dtype=torch.bool)
    rollouts = torch.randint(2, 20, (1, 2, 3, 3), generator=torch.Generator().manual_seed(1))
    inputs = tokens, torch.ones_like(tokens, dtype=torch.bool), anchors, valid
    return policy, inputs, rollouts, torch.ones_like(rollouts, dtype=torch.bool)


def logits_after(policy: CausalPolicy, text: torch.Tensor) -> torch.Tensor:
    with policy.plain() as model, torch.no_grad():
        return model(text[None]).logits[0, -1]


def test_a_token_is_scored_from_the_one_before_it_in_its_own_rollout(comb) -> None:
    """The wrong predecessor takes the neighbour in the packed row: the last token of the trunk or another rollout's."""
    policy, inputs, rollouts, mask = comb
    found = policy.score(*inputs, rollouts, mask)[0]
    wrong = 0
    for k, anchor in enumerate(inputs[2][0].tolist()):
        for n in range(3):
            for g in range(3):
                prefix = torch.cat([inputs[0][0, :anchor], rollouts[0, k, n, :g]])
                wanted = logits_after(policy, prefix).log_softmax(-1)[rollouts[0, k, n, g]]
                torch.testing.assert_close(found[0, k, n, g], wanted, rtol=0, atol=1e-10)
                whole = torch.cat([inputs[0][0], rollouts[0, k, n, :g]])  # as if it hung at the end of the trunk
                other = logits_after(policy, whole).log_softmax(-1)[rollouts[0, k, n, g]]
                wrong += int((other - wanted).abs() > 1e-3)
    assert wrong > 9


def test_every_token_has_the_advantage_of_its_own_anchor_and_rollout() -> None:
    """Interleaved, anchors' advantages land on the tokens of other anchors."""
    phi, target = draw(1, 2, 3, 4, 5), draw(1, 2, 4, 5, seed=1)
    valid = torch.ones(1, 2, dtype=torch.bool)

    def values(rollout, goal, *, mask):
        return moment_values(rollout, goal)

    got = token_scores(values, phi, target, valid, credit="own").advantage
    for k in range(2):
        for g in range(4):
            wanted = advantage(*moment_values(phi[0, k, :, g], target[0, k, g]))
            torch.testing.assert_close(got[0, k, :, g], wanted)


@pytest.mark.parametrize(("rollouts", "share"), [(2, 0.0), (3, 1 / 2), (4, 2 / 3)])
def test_a_baseline_of_finished_rewards_loses_diversity(rollouts: int, share: float) -> None:
    """Expected updates by enumeration: the naive baseline keeps (n-2)/(n-1) of the diversity part, ours all of it."""
    policy = TablePolicy(seed=0, vocabulary=2)
    phi, target = features(seed=1, outcomes=4), features(seed=2, outcomes=1)[0]

    def update(estimator: str, diversity: float) -> torch.Tensor:
        return expected_update(
            policy,
            rollouts,
            lambda index: advantage(
                *moment_values(phi[index], target.expand(len(index), -1)), estimator=estimator, diversity=diversity
            ),
        )

    prob = policy.prob()
    alignment, diversity = policy.gradient(-2 * prob @ phi @ target), policy.gradient((prob @ phi).square().sum())
    torch.testing.assert_close(update("mean", 1.0), alignment + share * diversity, rtol=0, atol=1e-12)
    if rollouts > 2:
        torch.testing.assert_close(update("rloo", 1.0), alignment + diversity, rtol=0, atol=1e-12)
    assert diversity.norm() > 0.1


def test_joined_unit_layers_keep_alignment_and_diversity_on_one_scale() -> None:
    """Three unit vectors side by side have norm √3: with a cosine on one side only, equal rollouts got -4, not 0."""
    joined = torch.nn.functional.normalize(draw(3, 6), dim=-1).flatten()
    group = joined.expand(4, -1)
    torch.testing.assert_close(feature_matching_reward(group, joined), torch.zeros(4, dtype=torch.float64))
    mixed = feature_matching_reward(group, joined, alignment="cosine")
    torch.testing.assert_close(mixed, torch.full((4,), -4.0, dtype=torch.float64))  # what "cosine" says it needs


def test_scoring_has_the_temperature_of_sampling(comb) -> None:
    policy, inputs, *_ = comb
    settings = {"temperature": 0.6, "top_p": 0.8}
    tokens, sampled, mask = policy.sample(*inputs, rollouts=3, horizon=3, seed=0, **settings)
    same = policy.score(*inputs, tokens, mask, **settings)[0]
    plain = policy.score(*inputs, tokens, mask)[0]
    torch.testing.assert_close(same.float(), sampled.float(), rtol=0, atol=1e-5)
    assert (plain - same).abs().max() > 0.05


@pytest.mark.parametrize("temperature", [0.6, 0.3])
def test_log_probs_of_another_temperature_are_the_gradient_of_nothing(temperature: float) -> None:
    """Sampled at one temperature, scored at 1: a constant advantage moves the policy, and directions are off."""
    policy, phi, target = TablePolicy(seed=0), features(seed=1), features(seed=2, outcomes=1)[0]
    tempered = (policy.logits() / temperature).log_softmax(-1).gather(-1, policy.outcomes[..., None])[..., 0].sum(-1)
    plain, probability = policy.log_prob().sum(-1), tempered.detach().exp()
    reward = 2 * phi @ target - 2 * phi @ (probability @ phi)
    exact = policy.gradient((tempered.exp() @ phi - target).square().sum())
    right, wrong = (policy.gradient(-(probability * reward * scored).sum()) for scored in (tempered, plain))
    torch.testing.assert_close(right, exact, rtol=0, atol=1e-10)
    assert torch.cosine_similarity(wrong, exact, dim=0) < 0.999
    drift, none = (policy.gradient(-(probability * scored).sum()) for scored in (plain, tempered))
    assert none.norm() < 1e-12
    assert drift.norm() > 0.05


def test_the_reported_loss_is_not_the_plug_in() -> None:
    """‖mean φ - φ(y)‖² is too large by the variance over n."""
    phi, target = draw(2000, 4, 6), draw(2000, 6, seed=1)
    truth = 6 * (0.0 + 1.0)  # E φ = 0 and E‖φ(y)‖² = 6
    pairs = conditional_feature_matching_loss(phi, target)
    plug_in = (phi.mean(1) - target).square().sum(-1)
    error = 4 * float(pairs.std()) / 2000**0.5
    assert abs(pairs.mean() - truth) < error
    assert abs(plug_in.mean() - (truth + 6 / 4)) < error
    assert plug_in.mean() - truth > error


def test_whitening_in_the_group_sees_exact_duplicates_only() -> None:
    """Why the paper's form says little about diversity; and ours does not flip the sign of an alignment."""
    phi, target = draw(1, 1, 4, 32), draw(1, 1, 32, seed=1)
    white, goal = whiten(phi, target, mode="group")
    gram = (white @ white.mT)[0, 0] / 4
    torch.testing.assert_close(gram, torch.eye(4, dtype=gram.dtype), rtol=0, atol=1e-4)
    raw, done = (phi @ target[..., None])[0, 0, :, 0], (white @ goal[..., None])[0, 0, :, 0]
    assert done.shape == raw.shape
    copies = whiten(phi[:, :, [0, 0, 1, 2]], target, mode="group")[0]
    assert (copies @ copies.mT)[0, 0, 0, 1] > 1  # the pair of copies


def test_group_norm_is_over_rollouts_and_finite_for_one_anchor() -> None:
    reward = torch.tensor([[0.0, 1.0, 2.0, 3.0], [10.0, 10.0, 10.0, 10.0]])
    found = advantage(reward / 2, torch.zeros(2, 4, 4), estimator="group_norm", diversity=0.0)
    wanted = torch.tensor([-1.1619, -0.3873, 0.3873, 1.1619])
    torch.testing.assert_close(found[0], wanted, rtol=0, atol=1e-4)
    assert found[1].tolist() == [0.0, 0.0, 0.0, 0.0]
    alone = advantage(reward[:1] / 2, torch.zeros(1, 4, 4), estimator="group_norm", diversity=0.0)
    torch.testing.assert_close(alone, found[:1])


def test_a_rollout_ratio_never_crosses_anchors() -> None:
    log_prob = draw(1, 5, 1, 4).requires_grad_()
    gain = torch.arange(5.0, dtype=torch.float64).view(1, 5, 1)
    mask = torch.ones(1, 5, 1, 4, dtype=torch.bool)
    terms = sequence_clipped(log_prob, log_prob.detach(), gain, mask, clip=0.2)
    (gradient,) = torch.autograd.grad(terms.sum(), log_prob)
    torch.testing.assert_close(gradient, -gain[..., None].expand_as(gradient))


def test_a_row_without_answers_trains_nothing() -> None:
    from ebft.objectives import EBFTLoss
    from tests.test_objectives_losses import batch, gradients

    td = batch()
    td[schema.ANSWER_MASK] = torch.zeros_like(td[schema.ANSWER_MASK])
    out = EBFTLoss(policy_gradient_coefficient=0.0, cross_entropy_coefficient=1.0, cross_entropy_tokens="answers")(td)
    assert out["loss_cross_entropy"] == 0
    assert not gradients(td, out["loss_cross_entropy"])[1].any()


def test_the_entropy_is_of_the_distributions_that_rollouts_were_drawn_from(comb) -> None:
    """At raw positions one misses the anchor's distribution and counts the one after the last token."""
    policy, inputs, rollouts, mask = comb
    entropy = policy.score(*inputs, rollouts, mask, entropy=True)[2]
    for k, anchor in enumerate(inputs[2][0].tolist()):
        for g in range(3):
            prefix = torch.cat([inputs[0][0, :anchor], rollouts[0, k, 1, :g]])
            wanted = torch.distributions.Categorical(logits=logits_after(policy, prefix)).entropy()
            torch.testing.assert_close(entropy[0, k, 1, g], wanted, rtol=0, atol=1e-10)


def test_the_loss_averages_over_rollouts_of_an_anchor() -> None:
    """Averaged over a groups' axis of size 1, one logs the mean distance of single rollouts instead."""
    phi, target = draw(1, 1, 500, 6), draw(1, 1, 6, seed=1)
    found = conditional_feature_matching_loss(phi, target)
    single = (phi - target[:, :, None]).square().sum(-1).mean()
    assert found.shape == (1, 1)
    assert single - found[0, 0] > 5  # the variance of the features, 6


def test_an_unknown_option_is_never_accepted() -> None:
    with pytest.raises(UsageError, match="clip"):
        sequence_clipped(*(torch.zeros(1, 1, 1, 1) for _ in range(3)), torch.ones(1, 1, 1, 1, dtype=torch.bool), clip=0)
