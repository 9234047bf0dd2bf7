"""The divergence over the whole vocabulary: scored in chunks as from dense logits, in the loss and in a run."""

import copy
import math

import pytest
import torch

from ebft import head_blocks, schema
from ebft.errors import UsageError
from ebft.loading import add_adapters
from ebft.loops.scoring import score
from ebft.loops.stages import at_step
from ebft.objectives import exact_kl
from ebft.objectives.kl import EXACT
from ebft.objectives.losses import EBFTLoss
from ebft.policy import CausalPolicy
from ebft.tuning import PerDevice
from tests.combs import LargestOverTheVocabulary, comb, gradients
from tests.models import plain_logits, tiny
from tests.runs import go, metrics, parts
from tests.test_objectives_kl import TablePolicy

TEMPERATURE = 0.7


def dense(model, reference, batch, function):
    """One plain forward of both models per rollout, all logits at once: [B,K,N,G]."""
    tokens, _, anchors, _, rollout, rollout_mask = batch
    found = torch.zeros(rollout.shape, dtype=model.dtype)
    for b, k, n in rollout_mask[..., 0].nonzero().tolist():
        a = int(anchors[b, k])
        row = torch.cat([tokens[b, :a], rollout[b, k, n]])
        ours, theirs = (plain_logits(m, row)[a - 1 : -1] / TEMPERATURE for m in (model, reference))
        found[b, k, n] = torch.where(rollout_mask[b, k, n], function(ours, theirs), 0.0)
    return found


@pytest.mark.parametrize("direction", EXACT)
@pytest.mark.parametrize(
    ("name", "dtype", "atol"),
    [
        ("gpt2", torch.float64, 1e-11),
        ("llama", torch.float32, 1e-5),
        ("llama-mqa-untied", torch.float32, 1e-5),
        ("gemma2", torch.float32, 1e-5),  # soft-capped logits
        ("bloom", torch.float32, 1e-5),  # rows of its own
    ],
)
def test_it_is_that_of_dense_logits(name, dtype, atol, direction):
    model, reference = tiny(name, dtype=dtype), tiny(name, dtype=dtype, seed=1).requires_grad_(False)
    policy, start = CausalPolicy(copy.deepcopy(model), head_rows=5), CausalPolicy(copy.deepcopy(reference), head_rows=5)
    batch = comb()
    wanted = dense(model, reference, batch, EXACT[direction])
    log_prob, _, entropy, found = policy.score(
        *batch, temperature=TEMPERATURE, entropy=True, reference=start, divergence=EXACT[direction]
    )
    alone, _, spread = policy.score(*batch, temperature=TEMPERATURE, entropy=True)
    assert torch.equal(log_prob, alone)
    assert torch.equal(entropy, spread)
    assert wanted.max() > 0.1
    torch.testing.assert_close(found, wanted, atol=atol * wanted.max().item(), rtol=0)
    weights = torch.randn(found.shape, generator=torch.Generator().manual_seed(1), dtype=dtype)
    got, expected = gradients(policy.model, (found * weights).sum()), gradients(model, (wanted * weights).sum())
    for ours, theirs in zip(got, expected, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            torch.testing.assert_close(ours, theirs, atol=atol * float(theirs.abs().max() + 1), rtol=0)
    assert all(p.grad is None for p in start.model.parameters())


def test_from_the_start_of_adapters_only_they_have_a_gradient():
    policy = CausalPolicy(add_adapters(tiny(), rank=2, seed=0), head_rows=5)
    start = policy.reference()
    *_, at_start = policy.score(*comb(), reference=start, divergence=exact_kl)
    assert at_start.abs().max() < 1e-6
    with torch.no_grad():
        for name, parameter in policy.model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1, generator=torch.Generator().manual_seed(0))
    *_, moved = policy.score(*comb(), temperature=TEMPERATURE, reference=start, divergence=exact_kl)
    merged = copy.deepcopy(policy.model).merge_and_unload()
    merged.set_attn_implementation("eager")
    wanted = dense(merged, tiny(), comb(), exact_kl)
    torch.testing.assert_close(moved, wanted, atol=1e-5, rtol=0)
    assert wanted.max() > 0.01
    moved.sum().backward()
    touched = {n.split(".lora_")[-1][0] for n, p in policy.model.named_parameters() if p.grad is not None}
    assert touched == {"A", "B"}
    assert all("lora_" in n for n, p in policy.model.named_parameters() if p.grad is not None)


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_no_more_than_a_chunk_of_logits_exists_at_a_time(name, monkeypatch):
    monkeypatch.setattr(head_blocks, "STATES_PER_BLOCK", PerDevice(cpu=18, cuda=1))
    policy, start = (CausalPolicy(tiny(name, vocab_size=61, hidden_size=16, seed=s), head_rows=18) for s in (0, 1))
    batch = comb(rollouts=5, horizon=4)
    assert int(batch[-1].sum()) > 3 * 18
    with LargestOverTheVocabulary(61) as largest:
        *_, found = policy.score(*batch, reference=start, divergence=exact_kl)
        found.sum().backward()
    assert largest.rows <= 18


def test_per_token_it_is_what_the_estimators_have_on_average():
    """At one position: the mean over the token of k1's value, of k2's gradient, of k3's gradient for the forward."""
    policy, reference = TablePolicy(seed=0), TablePolicy(seed=5)
    logits = policy.logits()[0, 0].detach().requires_grad_()
    other = reference.logits()[0, 0].detach()
    log_prob, theirs = logits.log_softmax(-1), other.log_softmax(-1)
    ratio, probability = log_prob - theirs, log_prob.exp().detach()
    torch.testing.assert_close((probability * ratio).sum(), exact_kl(logits, other))
    for terms, name in ((ratio.square() / 2, "exact"), (torch.expm1(-ratio) + ratio, "exact_forward")):
        sampled = torch.autograd.grad((probability * terms).sum(), logits, retain_graph=True)[0]
        exact = torch.autograd.grad(EXACT[name](logits, other), logits, retain_graph=True)[0]
        torch.testing.assert_close(sampled, exact, atol=1e-12, rtol=0)


@pytest.mark.parametrize("normalization", ["sequence", "token"])
def test_in_the_loss_masked_positions_dilute_nothing(options, normalization):
    policy, pipeline, rows = parts(options)
    start, _, _ = parts(options)
    with torch.no_grad():
        for parameter in start.model.parameters():
            parameter.add_(0.02)
    td = at_step(rows[:2].clone(), seed=0, step=0)
    for stage in pipeline.values():
        td = stage(td)
    td[schema.ROLLOUT_MASK][:, :, 0, 2:] = False
    loss = EBFTLoss(kl_coefficient=0.5, kl_estimator="exact", normalization=normalization)
    score(policy, td, reference=start, divergence=loss.divergence)
    real = td[schema.ROLLOUT_MASK] & td[schema.ANCHOR_MASK][..., None, None]
    assert not real.all()
    td[schema.POLICY_DIVERGENCE] = torch.where(real, td[schema.POLICY_DIVERGENCE], math.nan)
    out = loss(td)
    count = real.sum() if normalization == "token" else td[schema.ANCHOR_MASK].sum() * real.shape[2]
    wanted = torch.where(real, td[schema.POLICY_DIVERGENCE], 0.0).sum() / count
    assert wanted > 1e-3
    torch.testing.assert_close(out["loss_kl"], 0.5 * wanted)
    torch.testing.assert_close(out["kl"], wanted.detach())
    assert td.get(schema.REFERENCE_LOG_PROB, None) is None
    assert schema.REFERENCE_LOG_PROB not in loss.in_keys
    assert schema.POLICY_DIVERGENCE in loss.in_keys


@pytest.mark.parametrize("mode", EXACT)
def test_a_run_is_pulled_back_to_its_start(options, tmp_path, mode):
    """Twice the same run, with and without the divergence; also as what a controller follows, with several updates."""
    rows = {}
    for kl in (1e-6, 5.0):
        chosen = {"kl": kl, "kl_mode": mode, "pg": "clipped", "updates": 2, "lora": 4, "entropy": 0.001, "lr": 0.05}
        go(options | chosen, tmp_path / str(kl))
        rows[kl] = metrics(tmp_path / str(kl))
    first, last = (float(rows[5.0][i]["kl"]) for i in (0, -1))
    assert abs(first) < 1e-6
    assert 0 < last < float(rows[1e-6][-1]["kl"]) / 2
    assert float(rows[5.0][-1]["loss_kl"]) == pytest.approx(5.0 * last, rel=1e-5)
    go(options | {"kl_mode": mode, "kl_target": 1e-4, "kl_stop": 1e3}, tmp_path / "adaptive")
    assert len({row["kl_coefficient"] for row in metrics(tmp_path / "adaptive")}) > 1


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ({"kl_in": "reward"}, "has no gradient at the token's own position"),
        ({"kl_scope": "rollout"}, "use kl_scope='token'"),
        ({"top_p": 0.9}, "--top-p 0.9 drops tokens"),
        ({"kl": 0.0}, "--kl-mode exact"),
    ],
    ids=str,
)
def test_where_it_makes_no_sense_is_said(options, tmp_path, chosen, message):
    with pytest.raises(UsageError) as caught:
        go(options | {"kl_mode": "exact"} | chosen, tmp_path / "run")
    assert message in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_scoring_refuses_what_it_cannot_compare():
    policy = CausalPolicy(tiny())
    with pytest.raises(UsageError, match="give one"):
        policy.score(*comb(), divergence=exact_kl)
    with pytest.raises(UsageError, match="truncated"):
        policy.score(*comb(), reference=policy, divergence=exact_kl, top_k=3)
