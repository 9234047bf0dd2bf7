"""What bfloat16 compute over float32 weights costs: sampling rounds queries, keys and values as scoring does."""

import pytest
import torch
from torch._dynamo.utils import counters
from torch.nn.attention.flex_attention import flex_attention

from ebft import attention, static_decode
from ebft.attention import flex, registered
from ebft.layout import NestedPrefixLayout
from ebft.policy import CausalPolicy
from tests.models import tiny


def comb(seed=0, *, length=40):
    """Tokens, mask, anchors, anchor mask of two rows."""
    tokens = torch.randint(3, 29, (2, length), generator=torch.Generator().manual_seed(seed))
    anchors = torch.tensor([[4, 9, 20, 31]] * 2)
    return tokens, tokens > 0, anchors, anchors > 0


def policy_of(decode, **options):
    """In bfloat16."""
    policy = CausalPolicy(tiny(**options), autocast=torch.bfloat16, kernel="chunked")
    policy.static = static_decode.StaticDecoder(policy, "graph") if decode == "graph" else None
    return policy


@pytest.mark.parametrize("head_dim", [8, 24])
@pytest.mark.parametrize("decode", ["eager", "graph"])
def test_sampling_and_scoring_round_alike(decode, head_dim, captured, monkeypatch):
    """Where queries and keys stay float32, as rotary positions make them, the gap of eager steps is a third wider."""
    gaps = {False: [], True: []}
    for seed in range(3):
        for alike, found in gaps.items():
            policy = policy_of(decode if alike else "eager", seed=seed, head_dim=head_dim)
            with monkeypatch.context() as patch:
                if not alike:
                    patch.setattr(registered, "rounded", lambda *tensors: tensors)
                drawn, recorded, real = policy.sample(*comb(seed), rollouts=4, horizon=8, seed=seed)
            with torch.no_grad():
                scored, _ = policy.score(*comb(seed), drawn, real)
            found.append((scored - recorded).abs().mean())
    before, now = (float(torch.stack(found).mean()) for found in gaps.values())
    assert 1e-3 < now < 0.85 * before, (now, before)


def test_kept_keys_take_the_space_of_values():
    policy = CausalPolicy(tiny("qwen3"), autocast=torch.bfloat16)
    tokens, _, anchors, real = comb()
    layout = NestedPrefixLayout(anchors, real, length=40, rollouts=2, horizon=3)
    prefill = attention.Prefill(layout)
    with policy.computing(), torch.no_grad():
        policy.backbone(tokens, layout.positions()[:, :40], prefill)
    assert len(prefill.kept) == 3
    assert {x.dtype for pair in prefill.kept.values() for x in pair} == {torch.bfloat16}


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_flex_takes_what_autocast_computes(name, monkeypatch):
    """Compiled, as on a GPU; without a gradient, which it has nowhere else."""
    torch._dynamo.reset()
    counters.clear()
    monkeypatch.setattr(
        flex, "flex_attention", torch.compile(flex_attention, dynamic=False, fullgraph=True, backend="eager")
    )
    drawn = torch.arange(2 * 4 * 3 * 5).view(2, 4, 3, 5) % 19 + 3
    scores = {}
    for kernel, autocast in (("flex", torch.bfloat16), ("dense", torch.bfloat16), ("dense", None)):
        with torch.no_grad():
            scores[kernel, autocast] = CausalPolicy(tiny(name), kernel=kernel, autocast=autocast).score(
                *comb(), drawn, drawn > 0
            )
    assert counters["stats"]["unique_graphs"] == (1 if name == "llama" else 2)
    for ours, theirs, exact in zip(*scores.values(), strict=True):
        assert 1e-3 < (ours - exact).abs().mean() < 1.2 * (theirs - exact).abs().mean()
    torch._dynamo.reset()


def test_weights_that_are_not_trained_are_kept_as_they_are_computed_with(tiny_folder, monkeypatch):
    monkeypatch.setattr("ebft.loading._has_bfloat16_units", lambda device: True)
    frozen = CausalPolicy.from_pretrained(str(tiny_folder), device="cpu", frozen=True)
    trained = CausalPolicy.from_pretrained(str(tiny_folder), device="cpu")
    assert {p.dtype for p in frozen.model.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in trained.model.parameters()} == {torch.float32}
    assert not frozen.trainable()
    assert trained.trainable()
    asked = CausalPolicy.from_pretrained(str(tiny_folder), device="cpu", dtype="float32", frozen=True)
    assert {p.dtype for p in asked.model.parameters()} == {torch.float32}
    assert asked.autocast is None
