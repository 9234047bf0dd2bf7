"""Whole runs on a tiny model: what they leave, that they repeat, resume and stop, and what an update does."""

import json
import math
import os
import shutil
import signal

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from ebft import schema
from ebft.data import batches
from ebft.errors import UsageError
from ebft.loops import run as run_module
from ebft.loops.evaluate import METRICS, concatenate, evaluate, mean, paired_difference
from ebft.loops.interrupt import Interrupted
from ebft.loops.samples import SAMPLED_PREFIXES
from ebft.loops.stages import at_step
from ebft.loops.train import NonFiniteLoss, train
from ebft.objectives.losses import EBFTLoss
from ebft.policy import CausalPolicy
from tests.models import independent_score, plain_logits
from tests.runs import go, metrics, parts

RECORDS = {"config.json", "metrics.csv", "rewards.csv", "evaluation.json"}
FILES = {*RECORDS, "samples.md", "samples.json", "report.html", "report.png"}


def measured(out):
    return json.loads((out / "evaluation.json").read_text())["metrics"]


def weights(out):
    return load_file(out / "policy" / "model.safetensors")


def same(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@pytest.fixture(scope="module")
def finished(options, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "finished"
    printed = go(options, out)
    return out, printed


# What a run leaves


def test_the_run_folder_is_complete(finished, options):
    out, printed = finished
    assert {path.name for path in out.iterdir()} == FILES | {"policy", "checkpoints", "before.json", "profile.json"}
    assert all((out / name).stat().st_size > 0 for name in FILES)
    config = json.loads((out / "config.json").read_text())
    assert config["options"] == options
    assert config["components"]["features"] == {
        "name": "hidden",
        "layers": "0.25,0.5,0.75",
        "pooling": "last",
        "backbone": "start",
        "unit_norm": "layer",
    }
    rows = metrics(out)
    assert [row["step"] for row in rows] == ["1", "2", "3", "4", "5", "6"]
    for row in rows:
        assert all(math.isfinite(float(value)) for value in row.values())
        assert float(row["loss_policy_gradient"]) != 0
        assert float(row["loss"]) == pytest.approx(
            sum(float(row[f"loss_{term}"]) for term in ("policy_gradient", "cross_entropy", "kl"))
        )
    assert set(measured(out)) == set(METRICS)
    assert "samples.md" in printed


def test_the_measurement_says_what_training_did(finished):
    result = measured(finished[0])
    for row in result.values():
        assert row["difference"] == pytest.approx(row["after"] - row["before"], abs=1e-9)
    assert result["kl"]["before"] == 0
    assert result["kl"]["after"] > 0
    assert result["cross_entropy"]["difference"] < -2 * result["cross_entropy"]["standard_error"]


def test_samples_hold_text_before_and_after(finished):
    samples = json.loads((finished[0] / "samples.json").read_text())
    assert len(samples) == SAMPLED_PREFIXES
    for sample in samples:
        assert sample["prefix"]
        assert sample["target"]
        assert len(sample["before"]) == len(sample["after"]) == 3
    assert any(s["before"] != s["after"] for s in samples)


def test_the_saved_policy_is_the_trained_one(finished, tiny_folder):
    out, _ = finished
    saved = AutoModelForCausalLM.from_pretrained(out / "policy").eval()
    trained = AutoModelForCausalLM.from_pretrained(tiny_folder).eval()
    context = torch.arange(5, 25)
    before = plain_logits(trained, context)
    last = load_file(out / "checkpoints" / "step-000006" / "weights.safetensors")
    assert trained.load_state_dict(last, strict=False).unexpected_keys == []
    assert set(last) == {name for name, _ in trained.named_parameters()}
    assert torch.equal(plain_logits(saved, context), plain_logits(trained, context))
    assert not torch.allclose(plain_logits(saved, context), before, atol=0.01)
    text = "def add(left):"
    tokenizers = [AutoTokenizer.from_pretrained(folder) for folder in (out / "policy", tiny_folder)]
    assert tokenizers[0](text)["input_ids"] == tokenizers[1](text)["input_ids"]
    assert tokenizers[0].eos_token_id is not None


# Repeating, stopping, resuming


def test_a_run_stopped_by_a_signal_and_resumed_equals_the_run_that_was_not(finished, options, tmp_path, monkeypatch):
    def interrupting(*args, **kwargs):
        for record in train(*args, **kwargs):
            if record["step"] == 3:
                os.kill(os.getpid(), signal.SIGINT)
            yield record

    out = tmp_path / "stopped"
    with monkeypatch.context() as patched:
        patched.setattr(run_module, "train", interrupting)
        with pytest.raises(Interrupted, match=r"step 3 of 6.*--resume"):
            go(options, out)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert metrics(out) == metrics(finished[0])[:3]  # also: the same seed gives the same run
    assert (out / "report.html").is_file()
    assert not (out / "policy").exists()

    go(options, out, resume=True)
    assert metrics(out) == metrics(finished[0])
    assert same(weights(out), weights(finished[0]))
    assert measured(out) == measured(finished[0])
    for name in ("samples.json", "samples.md"):
        assert (out / name).read_bytes() == (finished[0] / name).read_bytes()


def test_steps_after_the_last_checkpoint_are_computed_again(finished, options, tmp_path):
    out = tmp_path / "killed"
    shutil.copytree(finished[0], out, ignore=shutil.ignore_patterns("step-000006", "policy", "evaluation.json"))
    go(options, out, resume=True)  # metrics.csv holds 6 steps, the newest checkpoint is of step 4
    assert metrics(out) == metrics(finished[0])
    assert same(weights(out), weights(finished[0]))
    assert measured(out) == measured(finished[0])


def test_resuming_with_another_option_is_refused(finished, options):
    out, _ = finished
    changed = {**options, "lr": 0.5, "rollouts": 9}
    with pytest.raises(UsageError, match=r"--lr 0\.5 \(was 0\.01\)"):
        go(changed, out, resume=True, explicit={"lr"})


def test_resuming_what_is_no_run_is_refused(options, tmp_path):
    with pytest.raises(UsageError, match=f"{tmp_path} holds no run"):
        go(options, tmp_path, resume=True)
    with pytest.raises(UsageError, match="--resume needs --out"):
        go(options, None, resume=True)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UsageError, match=r"config\.json does not hold the options of a run"):
        go(options, tmp_path, resume=True)


@pytest.mark.parametrize("top_p", [1.0, 0.9])
def test_a_loss_that_is_not_finite_names_step_and_term_and_keeps_the_checkpoint(options, tmp_path, monkeypatch, top_p):
    cross_entropy_of = EBFTLoss.forward
    calls = []

    def broken(self, td):
        calls.append(td)
        out = cross_entropy_of(self, td)
        if len(calls) > 2:  # two micro-batches a step
            out["loss_cross_entropy"] = out["loss_cross_entropy"] * math.nan
        return out

    monkeypatch.setattr(EBFTLoss, "forward", broken)
    out = tmp_path / "run"
    with pytest.raises(NonFiniteLoss, match="step 2: loss_cross_entropy is nan") as raised:
        go({**options, "save_every": 1, "top_p": top_p}, out)
    assert ("Or --top-p 1" in str(raised.value)) is (top_p < 1)
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["step-000001"]
    assert len(metrics(out)) == 1
    assert not (out / "policy").exists()


def test_weights_that_blow_up_are_told_as_a_loss_that_is_not_finite(options, tmp_path):
    with pytest.raises(UsageError, match=r"step [23]: .*(nan|inf)"):
        go({**options, "lr": 1e30, "held_out": 2}, tmp_path / "run")


# Other parts


def test_a_lora_run_on_ngrams_leaves_merged_weights(options, tiny_folder, tmp_path):
    out = tmp_path / "lora"
    chosen = {"lora": 2, "features": "ngram", "objective": "kernel_score", "estimator": "mean", "sampler": "random"}
    go({**options, **chosen, "steps": 2, "save_every": 1, "held_out": 2, "lr": 0.05}, out)
    saved = AutoModelForCausalLM.from_pretrained(out / "policy").eval()
    start = AutoModelForCausalLM.from_pretrained(tiny_folder).eval()
    assert saved.state_dict().keys() == start.state_dict().keys()

    adapted = CausalPolicy.from_pretrained(str(tiny_folder), device="cpu", dtype="float32", lora=2)
    trained = load_file(out / "checkpoints" / "step-000002" / "weights.safetensors")
    assert all("lora_" in name for name in trained)
    adapted.model.load_state_dict(trained, strict=False)
    context = torch.arange(5, 25)
    with adapted.plain() as model:
        expected = plain_logits(model, context)
    torch.testing.assert_close(plain_logits(saved, context), expected, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(plain_logits(start, context), expected, atol=1e-3)


def test_merging_copies_no_weight_where_the_policy_is(tiny_folder, tmp_path, monkeypatch):
    policy = CausalPolicy.from_pretrained(str(tiny_folder), device="cpu", dtype="float32", lora=2)
    before = {name: weight.detach().clone() for name, weight in policy.model.named_parameters()}

    def refuse(self, memo):
        raise AssertionError("a copy on the policy's device")

    monkeypatch.setattr(torch.nn.Parameter, "__deepcopy__", refuse)
    with torch.no_grad():
        for name, weight in policy.trainable().items():
            weight += 0.1
            before[name] = weight.detach().clone()
    policy.save_pretrained(tmp_path / "policy")
    for name, weight in policy.model.named_parameters():
        assert torch.equal(weight, before[name]), name
    assert not any("lora" in name for name in load_file(tmp_path / "policy" / "model.safetensors"))


def test_adapters_on_weights_of_pure_bfloat16(options, tmp_path):
    """No autocast: frozen weights compute in the dtype they have, adapters are float32."""
    out, chosen = tmp_path / "half", {"dtype": "bfloat16", "lora": 2, "features": "hidden", "kl": 0.1, "lr": 0.05}
    go({**options, **chosen, "steps": 2, "save_every": 1, "held_out": 2}, out)
    records = metrics(out)
    assert len(records) == 2
    for name in ("loss", "reward", "gradient_norm", "sampler_mismatch"):
        assert all(math.isfinite(float(record[name])) for record in records), name
    assert all(1e-7 < float(record["sampler_mismatch"]) < 0.1 for record in records)
    trained = load_file(out / "checkpoints" / "step-000002" / "weights.safetensors")
    assert {w.dtype for w in trained.values()} == {torch.float32}
    assert all(w.any() for name, w in trained.items() if "lora_B" in name)  # which start at zero
    saved = load_file(out / "policy" / "model.safetensors")
    assert {w.dtype for w in saved.values()} == {torch.float32}  # merged in it


@pytest.mark.parametrize("sampler", ["strided", "random"])
def test_a_measurement_does_not_depend_on_the_batch_size(options, sampler):
    policy, pipeline, rows = parts(options, sampler=sampler)

    def measure(batch_size):
        return concatenate([s for s, _ in evaluate(policy, pipeline, rows, batch_size=batch_size, seed=3)])

    whole = measure(8)
    for batch_size in (1, 3):
        split = measure(batch_size)
        for name in METRICS:
            for ours, theirs in zip(split[name], whole[name], strict=True):
                torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-5)
    assert whole["feature_matching_loss"][1].sum() > 8  # anchors


def test_the_independent_sampler_trains_like_the_strided_one(options):
    losses = []
    for sampler in ("strided", "independent"):
        policy, pipeline, rows = parts(options, sampler=sampler, horizon=2, rollouts=2, estimator="none")
        optimizer = torch.optim.SGD(policy.trainable().values(), lr=0.1)
        records = train(policy, pipeline, EBFTLoss(), rows, optimizer=optimizer, steps=2, batch_size=2, seed=0)
        losses.append([record["loss"] for record in records])
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)
    assert losses[0][0] != losses[0][1]


def test_one_update_equals_the_update_written_out(options):
    """Sample, embed, reward, leave-one-out, cross-entropy, divergence: by independent forwards and loops."""
    policy, pipeline, rows = parts(options, estimator="rloo")
    model = AutoModelForCausalLM.from_pretrained(options["policy"]).eval()
    start = AutoModelForCausalLM.from_pretrained(options["policy"]).eval()
    with torch.no_grad():  # away from the start, so that the divergence has a gradient
        for ours, theirs in zip(policy.model.parameters(), model.parameters(), strict=True):
            theirs.add_(0.02 * torch.randn(theirs.shape, generator=torch.Generator().manual_seed(1)))
            ours.copy_(theirs)
    td = at_step(next(batches(rows, batch_size=3, seed=4)), seed=4, step=0)
    td = pipeline["embed"](pipeline["sample"](td))

    ids = td[schema.DOCUMENT_IDS]
    anchors, real = td[schema.ANCHORS], td[schema.ANCHOR_MASK]
    starts = torch.tensor([[(ids[b] == ids[b, a - 1]).nonzero()[0, 0] for a in row] for b, row in enumerate(anchors)])
    inputs = td[schema.TOKENS], anchors, real, td[schema.ROLLOUT_TOKENS], td[schema.ROLLOUT_MASK]
    log_prob = independent_score(model, *inputs, starts=starts)  # [B,K,N,G]
    with torch.no_grad():
        start_log_prob = independent_score(start, *inputs, starts=starts)
    assert td[schema.ROLLOUT_FEATURES].std(2).mean() > 0.01
    loss, rollouts = 0.0, 3
    for b, k in real.nonzero().tolist():
        phi, target = td[schema.ROLLOUT_FEATURES][b, k], td[schema.TARGET_FEATURES][b, k]

        def reward(j, among, phi=phi, target=target):
            others = [i for i in among if i != j]
            return 2 * phi[j] @ target - 2 * sum(phi[j] @ phi[i] for i in others) / len(others)

        for j in range(rollouts):
            rest = [i for i in range(rollouts) if i != j]
            gain = reward(j, range(rollouts)) - sum(reward(i, rest) for i in rest) / len(rest)
            ratio = log_prob[b, k, j] - start_log_prob[b, k, j]
            loss = loss - gain * log_prob[b, k, j].sum() + 0.3 * (ratio.square() / 2).sum()
    loss = loss / (real.sum() * rollouts)
    entropy, count = 0.0, 0
    for b in range(3):
        for document in ids[b][td[schema.MASK][b]].unique():
            text = td[schema.TOKENS][b][ids[b] == document]
            terms = plain_logits(model, text).log_softmax(-1)[:-1].gather(-1, text[1:, None])
            entropy, count = entropy - terms.sum(), count + len(terms)
    (loss + 0.7 * entropy / count).backward()
    torch.optim.SGD(model.parameters(), lr=0.5).step()

    frozen = CausalPolicy(start).reference()
    optimizer = torch.optim.SGD(policy.trainable().values(), lr=0.5)
    weighted = EBFTLoss(cross_entropy_coefficient=0.7, kl_coefficient=0.3)
    (record,) = train(
        policy, pipeline, weighted, rows, optimizer=optimizer, steps=1, batch_size=3, micro_batch=2, seed=4,
        reference=frozen, max_grad_norm=0,
    )  # fmt: skip
    assert record["gradient_norm"] > 0.01
    for ours, theirs in zip(policy.model.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-5)


# The paired difference


def test_paired_difference_by_hand():
    before = torch.tensor([4.0, 6.0, 2.0]).double(), torch.tensor([2.0, 3.0, 1.0]).double()
    after = torch.tensor([5.0, 9.0, 3.0]).double(), before[1]
    difference, error = paired_difference(before, after)
    assert difference == pytest.approx(5 / 6)  # changes 1, 3, 1 over 2 + 3 + 1 anchors
    residuals = [1 - 5 / 6 * 2, 3 - 5 / 6 * 3, 1 - 5 / 6]
    assert error == pytest.approx(math.sqrt(1.5 * sum(r * r for r in residuals)) / 6)
    assert difference == pytest.approx(mean(after) - mean(before))


def test_paired_difference_with_equal_counts_is_the_standard_error_of_the_mean():
    changes = torch.randn(20, generator=torch.Generator().manual_seed(0)).double()
    count = torch.full_like(changes, 4.0)
    difference, error = paired_difference((torch.zeros_like(changes), count), (changes * 4, count))
    assert difference == pytest.approx(float(changes.mean()))
    assert error == pytest.approx(float(changes.std() / math.sqrt(20)))


def test_paired_difference_against_the_bootstrap_over_sequences():
    random = torch.Generator().manual_seed(0)
    count = torch.randint(1, 6, (200,), generator=random).double()
    change = (torch.randn(200, generator=random).double() + 0.3) * count
    difference, error = paired_difference((torch.zeros_like(count), count), (change, count))
    draws = torch.randint(0, 200, (4000, 200), generator=random)
    ratios = change[draws].sum(1) / count[draws].sum(1)
    assert difference == pytest.approx(float(ratios.mean()), abs=0.01)
    assert error == pytest.approx(float(ratios.std()), rel=0.06)  # the bootstrap's own error is about 1 %


def test_paired_difference_ignores_sequences_without_an_anchor_and_needs_two():
    one, two = torch.tensor([1.0, 0.0]).double(), torch.tensor([3.0, 0.0]).double()
    difference, error = paired_difference((one, one), (two, one))
    assert difference == 2
    assert math.isnan(error)
