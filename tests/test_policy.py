"""Sampling and scoring over combs equal one plain forward per prefix and rollout, values and gradients."""

import copy

import pytest
import torch

from ebft.policy import CausalPolicy
from tests.models import NAMES, VOCABULARY, independent_score, plain_logits, tiny

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}
# Families whose code computes softmax or norms in float32 whatever the weights: float64 gains them nothing.
FLOAT32_INSIDE = {
    "llama", "llama-mqa-untied", "qwen2", "qwen3", "mistral-window", "gemma2", "gemma3_text", "olmo2", "granite",
    "cohere", "qwen3_moe", "gpt_oss", "gpt2", "gpt_neox", "phi", "opt",
}  # fmt: skip


def comb(seed=0, batch=2, length=13, count=3, rollouts=2, horizon=3):
    """Random tokens, per-row anchors (one masked), padding in the last row, and rollouts (one cut short)."""
    random = torch.Generator().manual_seed(seed)
    tokens = torch.randint(2, VOCABULARY, (batch, length), generator=random)
    mask = torch.ones(batch, length, dtype=torch.bool)
    mask[-1, -2:] = False
    anchors = torch.stack([torch.randperm(length - horizon - 2, generator=random)[:count] + 1 for _ in range(batch)])
    anchor_mask = torch.ones(batch, count, dtype=torch.bool)
    if count > 1:
        anchor_mask[0, -1] = False
    rollout = torch.randint(2, VOCABULARY, (batch, count, rollouts, horizon), generator=random)
    rollout_mask = anchor_mask[:, :, None, None].expand(rollout.shape).clone()
    if horizon > 1:
        rollout_mask[-1, 0, 0, 1:] = False
    return tokens, mask, anchors, anchor_mask, rollout, rollout_mask


def gradients(model, loss):
    parameters = [p for p in model.parameters() if p.requires_grad]
    return torch.autograd.grad(loss, parameters, allow_unused=True)


@pytest.mark.parametrize("kernel", ["dense", "chunked"])
@pytest.mark.parametrize("name", NAMES)
def test_score_equals_independent_forwards(name, kernel):
    model = tiny(name)
    policy = CausalPolicy(copy.deepcopy(model), kernel=kernel, head_rows=5)
    tokens, mask, anchors, anchor_mask, rollout, rollout_mask = comb()
    weights = torch.randn(rollout.shape, generator=torch.Generator().manual_seed(1))

    log_prob, token_log_prob = policy.score(tokens, mask, anchors, anchor_mask, rollout, rollout_mask)
    expected = independent_score(model, tokens, anchors, anchor_mask, rollout, rollout_mask)
    expected_trunk = torch.stack([plain_logits(model, row).log_softmax(-1)[:-1] for row in tokens])
    expected_trunk = expected_trunk.gather(-1, tokens[:, 1:, None])[..., 0].masked_fill(~mask[:, 1:], 0)

    torch.testing.assert_close(log_prob, expected, atol=2e-5, rtol=0)
    torch.testing.assert_close(token_log_prob, expected_trunk, atol=2e-5, rtol=0)
    got = gradients(policy.model, (log_prob * weights).sum() + token_log_prob.sum())
    wanted = gradients(model, (expected * weights).sum() + expected_trunk.sum())
    for ours, theirs in zip(got, wanted, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            torch.testing.assert_close(ours, theirs, atol=1e-5 * float(theirs.abs().max() + 1), rtol=0)


@pytest.mark.parametrize("name", NAMES)
def test_strided_sampling_records_the_independent_log_probs(name):
    model = tiny(name)
    policy = CausalPolicy(copy.deepcopy(model))
    tokens, mask, anchors, anchor_mask, *_ = comb()
    rollout, log_prob, rollout_mask = policy.sample(
        tokens, mask, anchors, anchor_mask, rollouts=3, horizon=4, seed=5, eos=2
    )
    expected = independent_score(model, tokens, anchors, anchor_mask, rollout, rollout_mask)
    torch.testing.assert_close(log_prob, expected, atol=2e-5, rtol=0)
    scored, _ = policy.score(tokens, mask, anchors, anchor_mask, rollout, rollout_mask)
    torch.testing.assert_close(log_prob, scored, atol=2e-5, rtol=0)
