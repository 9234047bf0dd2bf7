"""Sampling and scoring over combs equal one plain forward per prefix and rollout, values and gradients."""

import copy
from functools import partial

import pytest
import torch

from ebft import head_blocks
from ebft.architectures import lost_windows
from ebft.errors import UsageError
from ebft.loading import add_adapters
from ebft.policy import CausalPolicy
from ebft.samplers import independent, snapshot
from ebft.tuning import PerDevice
from tests.combs import comb, gradients
from tests.models import NAMES, UNSHARED, independent_score, plain_logits, tiny

# Families whose norms, rotations and softmax keep the weights' precision; the others compute in float32 inside.
FLOAT64_THROUGHOUT = ("gpt2", "opt", "gpt_neox", "phi", "falcon")

# The gated delta rule works in float32 whatever it is given, and inverts a triangular matrix in every chunk: its
# gradients lose more digits than the rest, and how many depends on the processor (1.3e-5 of the largest was seen).
GRADIENT_ROUNDING = {"qwen3_5_text": 4e-5}

DOCUMENTS = torch.tensor([[0] * 5 + [1] * 8, [3] * 6 + [4] * 7])
STARTS = torch.tensor([[0] * 5 + [5] * 8, [0] * 6 + [6] * 7])


@pytest.mark.parametrize(
    ("name", "kernel", "documents"),
    [(name, kernel, False) for name in NAMES for kernel in ("dense", "chunked")]
    + [("llama", "rows", False), ("mistral-window", "rows", False), *((name, None, False) for name in UNSHARED)]
    + [(name, "chunked", True) for name in NAMES]
    + [("gemma2", "dense", True), ("llama", "rows", True), ("qwen3_5_text", None, True), ("bloom", None, True)],
)
def test_score_equals_independent_forwards(name, kernel, documents, monkeypatch):
    monkeypatch.setattr(head_blocks, "STATES_PER_BLOCK", PerDevice(cpu=5, cuda=1))
    model = tiny(name)
    policy = CausalPolicy(copy.deepcopy(model), kernel=kernel, head_rows=5)
    tokens, mask, anchors, anchor_mask, rollout, rollout_mask = comb()
    weights = torch.randn(rollout.shape, generator=torch.Generator().manual_seed(1))
    ids, starts = (DOCUMENTS, STARTS) if documents else (None, torch.zeros_like(STARTS))
    of_anchors = starts.gather(1, anchors - 1)
    assert documents == bool((of_anchors > 0).any())

    log_prob, token_log_prob = policy.score(tokens, mask, anchors, anchor_mask, rollout, rollout_mask, document_ids=ids)
    expected = independent_score(model, tokens, anchors, anchor_mask, rollout, rollout_mask, of_anchors)
    texts = [
        row.split(begins.unique_consecutive(return_counts=True)[1].tolist())
        for row, begins in zip(tokens, starts, strict=True)
    ]
    expected_trunk = torch.stack(
        [torch.cat([plain_logits(model, text) for text in row])[:-1] for row in texts]
    ).log_softmax(-1)
    expected_trunk = expected_trunk.gather(-1, tokens[:, 1:, None])[..., 0].masked_fill(~mask[:, 1:], 0)

    torch.testing.assert_close(log_prob, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(token_log_prob, expected_trunk, atol=1e-5, rtol=0)
    got = gradients(policy.model, (log_prob * weights).sum() + token_log_prob.sum())
    wanted = gradients(model, (expected * weights).sum() + expected_trunk.sum())
    for ours, theirs in zip(got, wanted, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            atol = GRADIENT_ROUNDING.get(name, 1e-5) * float(theirs.abs().max() + 1)
            torch.testing.assert_close(ours, theirs, atol=atol, rtol=0)


@pytest.mark.parametrize("name", NAMES)
def test_strided_sampling_records_the_independent_log_probs(name):
    model = tiny(name)
    policy = CausalPolicy(copy.deepcopy(model))
    tokens, mask, anchors, anchor_mask, *_ = comb()
    rollout, log_prob, rollout_mask = policy.sample(
        tokens, mask, anchors, anchor_mask, rollouts=3, horizon=4, seed=5, eos=2
    )
    expected = independent_score(model, tokens, anchors, anchor_mask, rollout, rollout_mask)
    torch.testing.assert_close(log_prob, expected, atol=1e-5, rtol=0)
    scored, _ = policy.score(tokens, mask, anchors, anchor_mask, rollout, rollout_mask)
    torch.testing.assert_close(log_prob, scored, atol=1e-5, rtol=0)


SHAPES = [{}, {"count": 1}, {"rollouts": 1}, {"horizon": 1}, {"count": 1, "rollouts": 1, "horizon": 1}]


@pytest.mark.parametrize(
    ("name", "shape"),
    [("gpt2", shape) for shape in SHAPES] + [(name, {}) for name in ("opt", "gpt_neox", "phi")],
)
def test_strided_sampling_records_the_independent_log_probs_in_float64(name, shape):
    model = tiny(name, dtype=torch.float64)
    model.set_attn_implementation("sdpa")  # the eager form rounds its softmax to float32
    policy = CausalPolicy(copy.deepcopy(model))
    sizes = {"rollouts": 2, "horizon": 5, **{key: value for key, value in shape.items() if key != "count"}}
    tokens, mask, anchors, anchor_mask, *_ = comb(count=shape.get("count", 3))
    drawn, log_prob, real = policy.sample(tokens, mask, anchors, anchor_mask, seed=5, eos=2, **sizes)
    expected = independent_score(model, tokens, anchors, anchor_mask, drawn, real)
    assert log_prob.dtype == torch.float64
    torch.testing.assert_close(log_prob, expected.detach(), atol=1e-10, rtol=0)


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


@pytest.mark.parametrize("kernel", ["dense", "chunked", "rows"])
def test_padding_changes_nothing(kernel):
    """What stands behind the mask, in rows and in rollouts, is never read."""
    policy = CausalPolicy(tiny("qwen3"), kernel=kernel)
    tokens, mask, anchors, anchor_mask, rollout, rollout_mask = comb()
    tokens[1, 10:], mask[1, 10:] = 3, False
    anchors = anchors.clamp(max=10)
    other, drawn = torch.where(mask, tokens, 17), torch.where(rollout_mask, rollout, 17)
    elsewhere = torch.where(anchor_mask, anchors, 999)
    before = policy.score(tokens, mask, anchors, anchor_mask, rollout, rollout_mask)
    after = policy.score(other, mask, elsewhere, anchor_mask, drawn, rollout_mask)
    assert (other != tokens).any()
    assert (drawn != rollout).any()
    for left, right in zip(before, after, strict=True):
        torch.testing.assert_close(left, right, atol=1e-6, rtol=0)


def test_the_reference_is_the_start_and_with_adapters_no_second_copy():
    tokens, mask, anchors, anchor_mask, rollout, rollout_mask = comb()
    inputs = tokens, mask, anchors, anchor_mask, rollout, rollout_mask
    for lora in (False, True):
        model = tiny("llama")
        policy = CausalPolicy(add_adapters(model, rank=2, seed=0, autocast=False) if lora else model)
        before, _ = policy.score(*inputs)
        reference = policy.reference()
        owned, frozen = ({p.data_ptr() for p in x.model.parameters()} for x in (policy, reference))
        assert (owned == frozen) == lora
        assert lora or not owned & frozen
        with torch.no_grad():
            for parameter in policy.trainable().values():
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)))
        moved, _ = policy.score(*inputs)
        assert float((moved - before).detach().abs().max()) > 0.1
        torch.testing.assert_close(reference.score(*inputs)[0], before, atol=1e-6, rtol=0)
        torch.testing.assert_close(policy.score(*inputs)[0], moved, atol=0, rtol=0)


@pytest.mark.parametrize("name", NAMES)
def test_flex_scores_like_dense(name):
    tokens, mask, anchors, anchor_mask, rollout, rollout_mask = comb()
    with torch.no_grad():
        scores = [
            CausalPolicy(tiny(name), kernel=kernel).score(tokens, mask, anchors, anchor_mask, rollout, rollout_mask)
            for kernel in ("flex", "dense")
        ]
    for flex, dense in zip(*scores, strict=True):
        torch.testing.assert_close(flex, dense, atol=1e-5, rtol=0)


def test_flex_has_no_gradient_without_a_gpu():
    with pytest.raises(UsageError, match=r"'flex' has no gradient on cpu: use 'chunked'"):
        CausalPolicy(tiny("llama"), kernel="flex").score(*comb())


@pytest.mark.parametrize("shape", [{"count": 1}, {"rollouts": 1}, {"horizon": 1}, {"count": 1, "rollouts": 1}])
@pytest.mark.parametrize("kernel", ["dense", "chunked", "rows"])
def test_smallest_shapes(kernel, shape):
    model = tiny("qwen2")
    policy = CausalPolicy(copy.deepcopy(model), kernel=kernel)
    tokens, mask, anchors, anchor_mask, rollout, rollout_mask = comb(**shape)
    log_prob, _ = policy.score(tokens, mask, anchors, anchor_mask, rollout, rollout_mask)
    expected = independent_score(model, tokens, anchors, anchor_mask, rollout, rollout_mask)
    torch.testing.assert_close(log_prob, expected, atol=1e-5, rtol=0)
    ours, theirs = gradients(policy.model, log_prob.sum()), gradients(model, expected.sum())
    for left, right in zip(ours, theirs, strict=True):
        torch.testing.assert_close(left, right, atol=1e-5 * float(right.abs().max() + 1), rtol=0)


@pytest.mark.parametrize("options", [{"top_p": 0.7}, {"top_k": 4}, {"min_p": 0.2}, {"temperature": 0.6, "top_k": 9}])
def test_score_recomputes_what_the_sampler_recorded(options):
    policy = CausalPolicy(tiny("gemma2"))
    tokens, mask, anchors, anchor_mask, *_ = comb()
    drawn, recorded, real = policy.sample(
        tokens, mask, anchors, anchor_mask, rollouts=3, horizon=4, seed=5, eos=2, **options
    )
    scored, _ = policy.score(tokens, mask, anchors, anchor_mask, drawn, real, **options)
    torch.testing.assert_close(scored, recorded, atol=1e-5, rtol=0)
    plain, _ = policy.score(tokens, mask, anchors, anchor_mask, drawn, real)
    assert float((plain - recorded).detach().abs().max()) > 0.01


@pytest.mark.parametrize("name", ["llama", "gemma2", "qwen3_moe"])
def test_checkpointing_changes_nothing_but_the_work(name):
    results, forwards = [], []
    for checkpointing in (False, True):
        policy = CausalPolicy(tiny(name), checkpointing=checkpointing)
        calls = []
        policy._layers()[0].mlp.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        log_prob, trunk = policy.score(*comb())
        results.append((log_prob, trunk, *gradients(policy.model, log_prob.sum() + trunk.sum())))
        forwards.append(len(calls))
        with torch.no_grad():
            policy.score(*comb())
        assert len(calls) == forwards[-1] + 1
    assert forwards == [1, 2]
    for kept, recomputed in zip(*results, strict=True):
        assert (kept is None) == (recomputed is None)
        if kept is not None:
            torch.testing.assert_close(kept, recomputed, atol=1e-6, rtol=1e-5)


def test_a_model_that_cannot_share_prefixes_says_so_and_names_the_sampler_that_can():
    hybrid, bloom = CausalPolicy(tiny("qwen3_5_text")), CausalPolicy(tiny("bloom"))
    assert hybrid.kernel == bloom.kernel == "rows"
    with pytest.raises(UsageError, match=r"Qwen3_5ForCausalLM.*linear_attention.*'snapshot' sampler"):
        hybrid.sample(*comb()[:4], rollouts=1, horizon=2, seed=0)
    with pytest.raises(UsageError, match=r"BloomForCausalLM.*not pluggable.*'snapshot' sampler"):
        bloom.sample(*comb()[:4], rollouts=1, horizon=2, seed=0)
    with pytest.raises(UsageError, match=r"kernel 'chunked': BloomForCausalLM cannot share.*'rows'"):
        CausalPolicy(tiny("bloom"), kernel="chunked")
    with pytest.raises(UsageError, match=r"kernel 'fast': expected one of dense, chunked, flex, rows"):
        CausalPolicy(tiny("llama"), kernel="fast")


def test_a_window_that_attention_is_not_told_of_is_not_lost():
    """Windows are longer than what a model is tried on, so that its logits cannot tell."""
    by_mask = CausalPolicy(tiny("qwen2_moe"))
    assert by_mask.not_shared == "its sliding windows are those of layers [0, 2], its attention is told of those of []"
    assert CausalPolicy(tiny("qwen2_moe", use_sliding_window=False, layer_types=None)).not_shared is None
    for name in ("mistral-window", "gemma3_text"):
        assert CausalPolicy(tiny(name, sliding_window=64)).not_shared is None
    config = tiny("mistral-window", sliding_window=64).config
    assert lost_windows(config, {0: 64, 1: 64}) is None
    assert lost_windows(config, {0: None, 1: None}) == "its attention is not told of its sliding window of 64 tokens"


def test_whatever_a_family_raises_when_it_is_tried_is_a_reason_not_to_share():
    model = tiny("llama")
    attend = model.model.layers[1].self_attn
    forward = attend.forward

    def strange(*inputs, comb=None, **options):
        if comb is not None:
            raise KeyError("block_tables")
        return forward(*inputs, **options)

    attend.forward = strange
    policy = CausalPolicy(model)
    assert policy.not_shared == "its forward pass failed: KeyError: 'block_tables'"
    assert policy.kernel == "rows"
    policy.score(*comb())


@pytest.mark.parametrize("name", ["gpt2", "opt"])
def test_a_text_longer_than_the_table_of_positions_is_refused(name):
    small = {"n_positions": 15} if name == "gpt2" else {"max_position_embeddings": 15}
    policy = CausalPolicy(tiny(name, **small))
    tokens, mask, _, yes, *_ = comb(count=1)
    far, shape = torch.full((2, 1), 12), {"rollouts": 1, "seed": 0}
    assert policy.sample(tokens, mask, far, yes, horizon=3, **shape)[2].all()
    with pytest.raises(UsageError, match=r"knows 15 positions, the text with its rollouts has 16"):
        policy.sample(tokens, mask, far, yes, horizon=4, **shape)
    with pytest.raises(UsageError, match=r"knows 15 positions"):
        policy.score(tokens, mask, far, yes, torch.ones(2, 1, 1, 5).long(), torch.ones(2, 1, 1, 5).bool())
    for engine in (partial(independent.sample, policy), partial(snapshot.sample, snapshot.cache_reader(policy))):
        assert engine(tokens, mask, far, yes, horizon=3, **shape)[2].all()
        with pytest.raises(UsageError, match=r"knows 15 positions, the text with its rollouts has 16"):
            engine(tokens, mask, far, yes, horizon=4, **shape)


LONGROPE = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [3.0] * 4}
ROTARY = {
    "longrope": {"rope_parameters": {**LONGROPE, "rope_theta": 100.0, "original_max_position_embeddings": 13}},
    "dynamic": {
        "rope_parameters": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 100.0},
        "max_position_embeddings": 13,
    },
}


@pytest.mark.parametrize("kind", ROTARY)
def test_frequencies_of_a_long_text_are_not_given_to_the_short_ones_of_its_pass(kind):
    """They depend on the longest text of a pass: up to the first length a comb is exact, beyond it is refused."""
    model = tiny("llama", **ROTARY[kind])
    policy = CausalPolicy(copy.deepcopy(model))
    tokens, mask, anchors, yes, rollout, real = comb(length=13, horizon=3)
    assert int(anchors.max()) < 10
    torch.testing.assert_close(
        policy.score(*comb(length=13, horizon=3))[0],
        independent_score(model, tokens, anchors, yes, rollout, real),
        atol=1e-5,
        rtol=0,
    )
    far, match = anchors.clone(), rf"changes its rotary frequencies \({kind}\).* beyond 13 positions, .* has 1[45]:"
    far[0, 0], options = 12, {"rollouts": 1, "horizon": 3, "seed": 0}
    with pytest.raises(UsageError, match=match):
        policy.score(tokens, mask, far, yes, rollout, real)
    alone = partial(independent.sample, policy)
    for engine in (policy.sample, alone, partial(snapshot.sample, snapshot.cache_reader(policy))):
        with pytest.raises(UsageError, match=match):
            engine(tokens, mask, far, yes, **options)


def test_a_plain_forward_of_a_driven_model_is_an_error_and_plain_gives_it_back():
    model = tiny("llama")
    context = torch.tensor([[3, 4, 5]])
    before = model(input_ids=context).logits
    policy = CausalPolicy(model)
    with pytest.raises(RuntimeError, match=r"policy\.plain"):
        model(input_ids=context)
    with policy.plain() as plain:
        torch.testing.assert_close(plain(input_ids=context).logits, before, atol=0, rtol=0)
