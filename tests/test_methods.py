"""Methods in whole runs on a tiny model: what each is made of, and that its update is the one written by hand."""

import json
import math
from functools import partial

import pytest
import torch
from transformers import AutoModelForCausalLM

from ebft import schema
from ebft.assemble import build_loss, resolve_run, settle
from ebft.data import batches
from ebft.errors import UsageError
from ebft.loops.scoring import score, token_log_prob
from ebft.loops.stages import at_step
from ebft.loops.train import train
from ebft.objectives.losses import EBFTLoss
from ebft.objectives.policy_gradient import cispo, clipped, reinforce, sequence_clipped
from ebft.policy import CausalPolicy
from tests.runs import go, metrics, parts


@pytest.fixture
def sft(options):
    return options | {"method": "sft", "kl": None}


def loss_of(options):
    return build_loss(settle(options), resolve_run(options)["pg"])


def assert_same_weights(ours, theirs, **tolerance):
    for left, right in zip(ours.model.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(left, right, **tolerance)


# SFT


def test_sft_trains_without_rollouts_and_is_measured_with_them(sft, tmp_path):
    go(sft, tmp_path / "run")
    rows = metrics(tmp_path / "run")
    assert len(rows) == 6
    for row in rows:
        assert float(row["loss"]) == float(row["loss_cross_entropy"]) == float(row["cross_entropy"])
        assert all(row[name] == "" for name in ("reward", "feature_matching_loss", "distinct_rollouts", "loss_kl"))
    with open(tmp_path / "run" / "metrics.csv") as file:
        assert "time_sample" in file.readline()  # the column is there for other methods
    result = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert set(result["stages"]) == {"score", "update", "step"}
    measured = result["metrics"]
    assert measured["cross_entropy"]["difference"] < -2 * measured["cross_entropy"]["standard_error"]
    assert measured["feature_matching_loss"]["before"] > 0
    assert measured["kl"]["after"] > 0
    components = json.loads((tmp_path / "run" / "config.json").read_text())["components"]
    drawn = {name: sft[name] for name in ("horizon", "rollouts", "features", "lr")}
    assert components["method"] == {"name": "sft", "sampler": "strided", **drawn, "ce": 1.0, "ce_schedule": None}
    assert "pg" not in components


def one_document_rows(rows, answers):
    """Two rows of one document each with an answer in the middle, one of them padded."""
    rows = rows[:2].clone()
    rows[schema.DOCUMENT_IDS] = torch.zeros_like(rows[schema.DOCUMENT_IDS])
    rows[schema.MASK][1, 25:] = False
    if answers:
        place = torch.arange(32)
        rows[schema.ANSWER_MASK] = ((place >= 10) & (place < 20)).repeat(2, 1) & rows[schema.MASK]
    return rows


@pytest.mark.parametrize("answers", [False, True])
def test_sft_is_the_loss_of_transformers(sft, answers):
    """Value, and the weights after one update, with labels -100 on what is not to be learnt."""
    policy, _, rows = parts(sft)
    rows = one_document_rows(rows, answers)
    model = AutoModelForCausalLM.from_pretrained(sft["policy"]).eval()
    learnt = rows[schema.ANSWER_MASK] if answers else rows[schema.MASK]
    labels = torch.where(learnt, rows[schema.TOKENS], -100)
    theirs = model(input_ids=rows[schema.TOKENS], attention_mask=rows[schema.MASK].long(), labels=labels).loss
    by_hand = torch.optim.SGD(model.parameters(), lr=0.5)
    theirs.backward()
    by_hand.step()

    optimizer = torch.optim.SGD(policy.trainable().values(), lr=0.5)
    (record,) = train(
        policy, {}, loss_of(sft), rows, optimizer=optimizer, steps=1, batch_size=2, micro_batch=1, seed=0,
        max_grad_norm=0,
    )  # fmt: skip
    assert record["loss"] == pytest.approx(theirs.item(), abs=1e-5)
    assert record["gradient_norm"] > 0.1
    assert_same_weights(policy, model, atol=2e-6, rtol=1e-5)


def test_learning_answers_only_changes_what_is_learnt(sft):
    policy, _, rows = parts(sft)
    rows = one_document_rows(rows, answers=True)

    def loss(tokens):
        td = rows.clone()
        score(policy, td)
        return loss_of(sft | {"ce_tokens": tokens})(td)["cross_entropy"].item()

    assert loss("auto") == loss("answers") != loss("all")


@pytest.mark.parametrize("kernel", ["dense", "chunked", "rows"])
def test_log_probs_without_rollouts_are_those_beside_rollouts(options, kernel):
    policy, pipeline, rows = parts(options)
    policy.kernel = kernel
    td = at_step(rows[:3].clone(), seed=0, step=0)
    alone = token_log_prob(policy, td)
    td = pipeline["sample"](td)
    score(policy, td)
    torch.testing.assert_close(alone, td[schema.POLICY_TOKEN_LOG_PROB], atol=1e-5, rtol=1e-5)


# Options


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ({"method": "stf"}, "unknown method 'stf' (did you mean 'sft'?)"),
        ({"method": "sft", "kl": 0.1}, "--kl 0.1 does not apply to method sft; it belongs to method ebft"),
        ({"method": "sft", "kl": None, "pg": "clipped"}, "--pg clipped does not apply to method sft"),
        ({"method": "sft", "kl": None, "estimator": "rloo"}, "--estimator rloo does not apply to method sft"),
        ({"method": "sft", "kl": None, "clip": "0.2"}, "--clip 0.2 does not apply"),
        ({"method": "sft", "kl": None, "pooling": "none"}, "--pooling none keeps features per token"),
        ({"minibatches": 3}, "--minibatches 3: reinforce is right for the first update only"),
        ({"pg": "clipped", "minibatches": 2}, "--minibatches 2: --batch 3 does not split"),
        ({"pg": "clipped", "minibatches": 3, "truncate_weights": 2.0}, "--truncate-weights 2.0: its weights are those"),
        ({"optimizer": "adamv"}, "unknown optimizer 'adamv' (did you mean 'adam"),
        ({"optimizer": "lbfgs"}, "unknown optimizer 'lbfgs'"),
        ({"optimizer": "adamw", "momentum": 0.9}, "--momentum 0.9 does not apply"),
        ({"optimizer": "sgd", "betas": "0.9,0.95"}, "--betas 0.9,0.95 does not apply"),
        ({"betas": "0.9"}, "betas '0.9': expected two numbers"),
        ({"optimizer": "sgd", "nesterov": True}, "torch's optimizer refuses"),
        ({"lr_schedule": "cosin"}, "did you mean 'cosine'"),
        ({"lr_schedule": "constant", "lr_end": 0.1}, "--lr-end 0.1 does not apply"),
        ({"warm_up": 1.5}, "--warm-up 1.5: expected a share"),
        ({"ema": 1.0}, "ema 1.0: expected a decay in [0, 1)"),
    ],
)  # fmt: skip
def test_what_does_not_apply_is_refused_before_anything_is_written(options, tmp_path, chosen, message):
    with pytest.raises(UsageError) as caught:
        go(options | chosen, tmp_path / "run")
    assert message in str(caught.value)
    assert not (tmp_path / "run").exists()


# Accumulation and minibatches

GRADIENTS = {
    "reinforce": reinforce,
    "clipped": partial(clipped, clip=0.2),
    "sequence_clipped": partial(sequence_clipped, clip=0.01),
    "cispo": partial(cispo, clip=(1.0, 0.28)),
}
TERMS = {"cross_entropy_coefficient": 0.5, "kl_coefficient": 0.3, "entropy_coefficient": 0.1}


EXACT = [("reinforce", "exact"), ("clipped", "exact_forward")]


@pytest.mark.parametrize("normalization", ["sequence", "token"])
@pytest.mark.parametrize(("gradient", "divergence"), [*((name, None) for name in GRADIENTS), *EXACT])
def test_one_batch_of_eight_is_two_of_four_is_eight_of_one(options, gradient, normalization, divergence):
    """The gradient that reaches the optimiser, in float64 so that only the arithmetic of the parts is compared."""
    policy, pipeline, rows = parts(options)
    policy.model.double()
    frozen = CausalPolicy(AutoModelForCausalLM.from_pretrained(options["policy"]).double())
    with torch.no_grad():  # away from the start, so that ratios and divergence have gradients
        for parameter in frozen.model.parameters():
            parameter.add_(0.01)
    td = at_step(rows[:8].clone(), seed=0, step=0)
    for stage in pipeline.values():
        td = stage(td)
    td[schema.ADVANTAGE] = td[schema.ADVANTAGE].double()
    td[schema.ROLLOUT_LOG_PROB] = td[schema.ROLLOUT_LOG_PROB].double() - 0.1
    td[schema.ROLLOUT_MASK][0, :, :, 1:] = False  # uneven lengths
    found = {}
    for micro_batch in (8, 4, 1):
        loss = EBFTLoss(
            policy_gradient=GRADIENTS[gradient], normalization=normalization, kl_estimator=divergence, **TERMS
        )
        optimizer = torch.optim.SGD(policy.trainable().values(), lr=0.0)
        (record,) = train(
            policy, {"given": lambda batch: td.clone()}, loss, rows[:8], optimizer=optimizer, steps=1, batch_size=8,
            micro_batch=micro_batch, seed=0, reference=frozen, max_grad_norm=0,
        )  # fmt: skip
        assert all(record[f"loss_{term}"] != 0 for term in ("policy_gradient", "cross_entropy", "kl", "entropy"))
        found[micro_batch] = [weight.grad.clone() for weight in policy.trainable().values()]
    assert max(gradient.abs().max() for gradient in found[8]) > 1e-3
    for micro_batch in (4, 1):
        for ours, whole in zip(found[micro_batch], found[8], strict=True):
            torch.testing.assert_close(ours, whole, atol=1e-6, rtol=0)


def test_minibatches_are_updates_by_hand(options):
    """Two passes over three minibatches: six updates, each from its own rows and its own counts."""
    policy, pipeline, rows = parts(options)
    twin, untouched, _ = parts(options)
    make = partial(EBFTLoss, policy_gradient=partial(clipped, clip=0.2), cross_entropy_coefficient=0.5)
    optimizer = torch.optim.SGD(policy.trainable().values(), lr=0.02)
    (record,) = train(
        policy, pipeline, make(), rows, optimizer=optimizer, steps=1, batch_size=3, seed=4, updates=2, minibatches=3,
        max_grad_norm=0,
    )  # fmt: skip

    by_hand = torch.optim.SGD(twin.trainable().values(), lr=0.02)
    td = at_step(next(batches(rows, batch_size=3, seed=4)), seed=4, step=0)
    for stage in untouched.values():
        td = stage(td)
    values = []
    for row in [0, 1, 2, 0, 1, 2]:
        part = td[row : row + 1]
        score(twin, part)
        loss = sum(value for name, value in make()(part).items() if name.startswith("loss_"))
        values.append(loss.item())
        by_hand.zero_grad()
        loss.backward()
        by_hand.step()
    assert record["loss"] == pytest.approx(sum(values[:3]) / 3, abs=1e-4)
    assert_same_weights(policy, twin.model, atol=2e-5, rtol=1e-5)


def test_every_policy_gradient_with_ratios_trains_in_minibatches(options, tmp_path):
    chosen = {"pg": "cispo", "updates": 2, "minibatches": 3, "steps": 2, "held_out": 2}
    go(options | chosen, tmp_path / "run")
    rows = metrics(tmp_path / "run")
    assert all(math.isfinite(float(row["loss"])) and float(row["kl"]) >= 0 for row in rows)
