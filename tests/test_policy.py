"""Sampling and scoring over combs equal one plain forward per prefix and rollout, values and gradients."""

import copy

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from ebft.errors import UsageError
from ebft.policy import CausalPolicy
from tests.models import NAMES, VOCABULARY, independent_score, plain_logits, tiny

# Families whose norms, rotations and softmax keep the weights' precision; the others compute in float32 inside.
FLOAT64_THROUGHOUT = ("gpt2", "opt")


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


@pytest.mark.parametrize("name", FLOAT64_THROUGHOUT)
def test_score_equals_independent_forwards_in_float64(name):
    model = tiny(name, dtype=torch.float64)
    model.set_attn_implementation("sdpa")  # the eager form rounds its softmax to float32
    policy = CausalPolicy(copy.deepcopy(model))
    tokens, mask, anchors, anchor_mask, rollout, rollout_mask = comb()
    log_prob, _ = policy.score(tokens, mask, anchors, anchor_mask, rollout, rollout_mask)
    expected = independent_score(model, tokens, anchors, anchor_mask, rollout, rollout_mask)
    torch.testing.assert_close(log_prob, expected, atol=1e-10, rtol=0)
    for ours, theirs in zip(gradients(policy.model, log_prob.sum()), gradients(model, expected.sum()), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-10, rtol=0)


def test_a_frozen_head_has_the_gradient_of_a_trained_one():
    """The analytic gradient of `ebft.head` against autograd through the logits, at a temperature and N draws a row."""
    results = []
    for frozen in (False, True):
        model = tiny("gpt2", dtype=torch.float64, tie_word_embeddings=False)
        model.get_output_embeddings().weight.requires_grad_(not frozen)
        policy = CausalPolicy(model, head_rows=5)
        tokens, mask, anchors, anchor_mask, rollout, rollout_mask = comb()
        score, trunk = policy.score(tokens, mask, anchors, anchor_mask, rollout, rollout_mask, temperature=0.7)
        weights = torch.randn(score.shape, generator=torch.Generator().manual_seed(1))
        embeddings = model.get_input_embeddings().weight
        results.append((score, trunk, *torch.autograd.grad((score * weights).sum() + trunk.sum(), embeddings)))
    for trained, frozen in zip(*results, strict=True):
        torch.testing.assert_close(frozen, trained, atol=1e-10, rtol=0)


def test_layers_that_cannot_share_a_prefix_are_refused_by_name():
    config = {"layer_types": ["linear_attention", "full_attention", "linear_attention", "full_attention"]}
    small = {"vocab_size": 29, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    hybrid = AutoConfig.for_model(
        "qwen3_5_text", **small, num_hidden_layers=4, num_key_value_heads=2, head_dim=8, **config
    )
    with pytest.raises(UsageError, match=r"Qwen3_5ForCausalLM.*linear_attention"):
        CausalPolicy(AutoModelForCausalLM.from_config(hybrid))
    bloom = AutoConfig.for_model("bloom", vocab_size=29, hidden_size=32, n_layer=2, n_head=4)
    with pytest.raises(UsageError, match=r"BloomForCausalLM.*not pluggable"):
        CausalPolicy(AutoModelForCausalLM.from_config(bloom))


def test_a_plain_forward_of_a_driven_model_is_an_error_and_plain_gives_it_back():
    model = tiny("llama")
    context = torch.tensor([[3, 4, 5]])
    before = model(input_ids=context).logits
    policy = CausalPolicy(model)
    with pytest.raises(RuntimeError, match=r"policy\.plain"):
        model(input_ids=context)
    with policy.plain() as plain:
        torch.testing.assert_close(plain(input_ids=context).logits, before, atol=0, rtol=0)
