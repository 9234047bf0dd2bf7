"""The options of the loss in whole runs on a tiny model: what they do to an update, to a checkpoint, to a mistake."""

import math
import shutil
from functools import partial

import pytest
import torch

from ebft import schema
from ebft.assemble import build_loss, resolve_run, settle
from ebft.data import batches
from ebft.errors import UsageError
from ebft.loops.scoring import correct_mismatch, mismatch, score
from ebft.loops.stages import at_step
from ebft.loops.train import train
from ebft.objectives.counts import totals
from ebft.objectives.losses import EBFTLoss
from ebft.objectives.policy_gradient import clipped
from tests.runs import go, metrics, parts


def test_an_adaptive_weight_is_checkpointed(options, tmp_path):
    chosen = options | {"kl_target": 1e-4, "kl": 0.5}
    go(chosen, tmp_path / "whole")
    rows = metrics(tmp_path / "whole")
    weights = [float(row["kl_coefficient"]) for row in rows]
    assert weights[0] == 0.5
    for now, later, row in zip(weights, weights[1:], rows, strict=False):
        error = min(max(float(row["kl"]) / 1e-4 - 1, -0.2), 0.2)
        assert later == pytest.approx(now * (1 + 0.1 * error))
    assert len(set(weights)) > 2
    shutil.copytree(tmp_path / "whole", tmp_path / "resumed")
    shutil.rmtree(tmp_path / "resumed" / "checkpoints" / "step-000006")
    go(options, tmp_path / "resumed", resume=True)
    assert metrics(tmp_path / "resumed") == rows


def test_training_ends_above_the_limit_and_stays_ended(options, tmp_path):
    said = go(options | {"kl_stop": 1e-9}, tmp_path / "run")
    assert "--kl-stop" in said
    rows = metrics(tmp_path / "run")
    assert 1 < len(rows) < options["steps"]  # the first step starts at the reference, where the divergence is 0
    assert float(rows[-1]["kl"]) > 1e-9 >= float(rows[-2]["kl"])
    go(options, tmp_path / "run", resume=True)
    assert metrics(tmp_path / "run") == rows


def test_schedules_set_the_weights_of_every_step(options, tmp_path):
    chosen = {"ce": 2.0, "ce_schedule": "linear_decay:0.5", "kl_schedule": "warm_up:0.5", "steps": 6}
    go(options | chosen, tmp_path / "run")
    rows = metrics(tmp_path / "run")
    found = [float(row["loss_cross_entropy"]) / float(row["cross_entropy"]) for row in rows]
    assert found == pytest.approx([2 * (1 - 0.5 * step / 6) for step in range(6)])
    assert [float(row["kl_coefficient"]) for row in rows] == pytest.approx(
        [0.1 * min(1, (s + 1) / 3) for s in range(6)]
    )


def test_two_updates_are_two_updates_by_hand(options):
    policy, pipeline, rows = parts(options)
    twin, untouched, _ = parts(options)
    make = partial(EBFTLoss, policy_gradient=partial(clipped, clip=0.2), cross_entropy_coefficient=0.5)
    settings = {"steps": 1, "batch_size": 3, "seed": 4, "max_grad_norm": 0}
    optimizer = torch.optim.SGD(policy.trainable().values(), lr=0.01)
    list(train(policy, pipeline, make(), rows, optimizer=optimizer, micro_batch=2, updates=2, **settings))

    by_hand = torch.optim.SGD(twin.trainable().values(), lr=0.01)
    td = at_step(next(batches(rows, batch_size=3, seed=4)), seed=4, step=0)
    for stage in untouched.values():
        td = stage(td)
    values = []
    for _ in range(2):
        score(twin, td)
        loss = sum(value for name, value in make()(td).items() if name.startswith("loss_"))
        values.append(loss.item())
        by_hand.zero_grad()
        loss.backward()
        by_hand.step()
    assert values[1] < values[0]
    for ours, theirs in zip(policy.model.parameters(), twin.model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-5)


def test_mismatch_and_its_correction(options):
    policy, pipeline, rows = parts(options)
    td = at_step(rows[:2].clone(), seed=0, step=0)
    for stage in pipeline.values():
        td = stage(td)
    td.update(totals(td))
    score(policy, td)
    assert mismatch(td) < 1e-5
    td[schema.ROLLOUT_LOG_PROB] -= math.log(1.5)
    before = td[schema.ADVANTAGE].clone()
    assert mismatch(td).item() == pytest.approx(math.log(1.5), abs=1e-5)
    assert sum(mismatch(part).item() for part in td.split(1)) == pytest.approx(math.log(1.5), abs=1e-5)
    correct_mismatch(td, cap=1.2)
    real = td[schema.ROLLOUT_MASK]
    wanted = before[..., None] * torch.where(real, 1.2, 1.0)
    torch.testing.assert_close(td[schema.ADVANTAGE], wanted)
    torch.testing.assert_close(td[schema.ROLLOUT_LOG_PROB], td[schema.POLICY_LOG_PROB].detach())


@pytest.mark.parametrize(
    "chosen",
    [
        {"pg": "clipped", "updates": 2, "clip": "0.1,0.3", "kl_in": "reward"},
        {"pg": "sequence_clipped", "truncate_weights": 2.0, "entropy": 0.01},
        {"pg": "cispo", "updates": 2, "normalization": "token", "kl_mode": "k3", "kl_scope": "rollout"},
        {"objective": "kernel_score", "kernel": "rbf", "bandwidth": 2.0, "estimator": "rloo_tuned"},
        {"drop_zero_spread": True, "normalize_advantage": True, "clip_advantage": 1.0},
    ],
)
def test_every_choice_trains(options, tmp_path, chosen):
    go(options | {"steps": 2, "held_out": 2} | chosen, tmp_path / "run")
    rows = metrics(tmp_path / "run")
    assert len(rows) == 2
    assert all(math.isfinite(float(row["loss"])) and float(row["gradient_norm"]) > 0 for row in rows)
    assert ("entropy" in rows[0]) == ("entropy" in chosen)


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ({"kl": 0.0, "kl_target": 0.1}, "--kl-target 0.1: there is no divergence term"),
        ({"kl": 0.0, "kl_in": "reward"}, "--kl-in reward: there is no divergence term"),
        ({"kl_target": 0.1, "kl_schedule": "constant"}, "--kl-schedule constant: the weight follows --kl-target"),
        ({"ce": 0.0, "ce_schedule": "warm_up"}, "--ce-schedule warm_up: its weight is 0"),
        ({"updates": 2}, "--updates 2: reinforce is right for the first update only"),
        ({"clip": "0.2"}, "--clip 0.2 does not apply"),
        ({"pg": "clipped", "clip": "much"}, "clip 'much'"),
        ({"pg": "cliped"}, "did you mean 'clipped'"),
        ({"pg": "clipped", "clip": "0"}, "clip=0.0"),
        ({"truncate_weights": 0.5}, "cap=0.5"),
        ({"clip_advantage": -1.0}, "clip_advantage=-1.0"),
        ({"kl_mode": "k4"}, "kl_estimator='k4'"),
        ({"normalization": "mean"}, "normalization='mean'"),
        ({"objective": "kernel_score", "kernel": "rbf", "power": 1.0}, "power=1.0 does not apply to kernel='rbf'"),
        ({"bandwidth": 1.0}, "--bandwidth 1.0 does not apply"),
        ({"ce_schedule": "sometimes"}, "schedule 'sometimes'"),
    ],
)
def test_mistakes_are_told_before_anything_is_written(options, tmp_path, chosen, message):
    with pytest.raises(UsageError) as caught:
        go(options | chosen, tmp_path / "run")
    assert message in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_the_defaults_are_the_papers_estimator(options):
    loss = build_loss(settle(options), resolve_run(options)["pg"])
    assert (loss.normalization, loss.kl_estimator, loss.kl_in) == ("sequence", "k2", "loss")
    assert not loss.needs_old_log_prob
