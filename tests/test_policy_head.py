"""The head of a policy that scores combs: its chunks, its gradient, and entropies."""

import copy

import pytest
import torch

from ebft import head_blocks
from ebft.draw import sampling_log_probs
from ebft.errors import UsageError
from ebft.policy import CausalPolicy
from ebft.tuning import PerDevice
from tests.combs import LargestOverTheVocabulary, comb, gradients
from tests.models import VOCABULARY, plain_logits, tiny


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_no_tensor_over_the_vocabulary_beyond_a_chunk(name, monkeypatch):
    size = 61
    monkeypatch.setattr(head_blocks, "STATES_PER_BLOCK", PerDevice(cpu=18, cuda=1))
    policy = CausalPolicy(tiny(name, vocab_size=size, hidden_size=16), head_rows=18)
    tokens, mask, anchors, anchor_mask, *_ = comb()
    with LargestOverTheVocabulary(size) as largest:
        drawn, _, alive = policy.sample(tokens, mask, anchors, anchor_mask, rollouts=5, horizon=4, seed=0)
        log_prob, own = policy.score(tokens, mask, anchors, anchor_mask, drawn, alive)
        (log_prob.sum() + own.sum()).backward()
    assert largest.rows == 18
    assert alive.sum() > 5 * 18


def test_a_frozen_head_has_the_gradient_of_a_trained_one(monkeypatch):
    """The analytic gradient of `ebft.head_blocks` for a frozen weight against that for a trained one."""
    monkeypatch.setattr(head_blocks, "STATES_PER_BLOCK", PerDevice(cpu=5, cuda=1))
    results = []
    for frozen in (False, True):
        model = tiny("gpt2", dtype=torch.float64, tie_word_embeddings=False)
        model.get_output_embeddings().weight.requires_grad_(not frozen)
        policy = CausalPolicy(model)
        tokens, mask, anchors, anchor_mask, rollout, rollout_mask = comb()
        score, trunk = policy.score(tokens, mask, anchors, anchor_mask, rollout, rollout_mask, temperature=0.7)
        weights = torch.randn(score.shape, generator=torch.Generator().manual_seed(1))
        embeddings = model.get_input_embeddings().weight
        results.append((score, trunk, *torch.autograd.grad((score * weights).sum() + trunk.sum(), embeddings)))
    for trained, frozen in zip(*results, strict=True):
        torch.testing.assert_close(frozen, trained, atol=1e-10, rtol=0)


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2"])
@pytest.mark.parametrize("options", [{}, {"temperature": 0.7}, {"top_k": 5}])
def test_entropy_is_that_of_the_distribution_drawn_from(name, options, monkeypatch):
    """The analytic head (llama, gpt2), the one through autograd (gemma2's is capped), and truncation."""
    monkeypatch.setattr(head_blocks, "STATES_PER_BLOCK", PerDevice(cpu=5, cuda=1))
    model = tiny(name)
    policy = CausalPolicy(copy.deepcopy(model), head_rows=5)
    tokens, mask, anchors, anchor_mask, rollout, rollout_mask = comb()
    *_, entropy = policy.score(tokens, mask, anchors, anchor_mask, rollout, rollout_mask, entropy=True, **options)
    expected = torch.zeros(rollout.shape)
    for b, k, n, g in rollout_mask.nonzero().tolist():
        context = torch.cat([tokens[b, : anchors[b, k]], rollout[b, k, n, :g]])
        log_probs = sampling_log_probs(plain_logits(model, context)[-1], **options)
        log_probs = log_probs[log_probs > -torch.inf]
        expected[b, k, n, g] = -(log_probs.exp() * log_probs).sum()
    torch.testing.assert_close(entropy, expected, atol=3e-5, rtol=0)
    ours, theirs = gradients(policy.model, entropy.sum()), gradients(model, expected.sum())
    for left, right in zip(ours, theirs, strict=True):
        torch.testing.assert_close(left, right, atol=2e-5 * float(right.abs().max() + 1), rtol=0)


def test_a_head_that_does_something_unknown_is_refused():
    model = tiny("llama")
    head = model.get_output_embeddings()
    model.lm_head = torch.nn.Sequential(head, torch.nn.Tanh())
    model.get_output_embeddings = lambda: head
    with pytest.raises(UsageError, match=r"LlamaForCausalLM: its logits differ from those of its head"):
        CausalPolicy(model)
    model = tiny("llama")
    model.lm_head = torch.nn.Sequential(torch.nn.Linear(32, 16), torch.nn.Linear(16, VOCABULARY))
    model.get_output_embeddings = lambda: model.lm_head[1]
    with pytest.raises(UsageError, match=r"LlamaForCausalLM: its head does not go on its last hidden states .*shapes"):
        CausalPolicy(model)
