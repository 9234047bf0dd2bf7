"""Replays of saved rollouts: what is kept, what the numbers mean, and what is refused."""

import csv
import json
import math
import re
import time

import pytest
import torch
from typer.testing import CliRunner

from ebft import cli, schema
from ebft.assemble import build_pipeline, build_reward, build_values, replay, resolve_run, settle
from ebft.assemble.run import observe_moments
from ebft.commands.derived import run_defaults
from ebft.components import choose
from ebft.errors import UsageError
from ebft.features.module import as_module
from ebft.loops.ablation.replay import correlations, measure, rollout_weights, sequence_gradients, token_agreement
from ebft.loops.ablation.rollouts import load_rollouts
from ebft.loops.ablation.sketch import SKETCH, Projection, score_sketches
from ebft.loops.scoring import score
from ebft.objectives.losses import EBFTLoss
from ebft.policy import CausalPolicy
from tests.runs import go, metrics
from tests.test_ablate import EXAMPLE, invoke, rows


def tiny(folder, text):
    return {
        "policy": str(folder), "data": str(text), "device": "cpu", "dtype": "float32", "lora": 2, "length": 32,
        "stride": 9, "first": 5, "horizon": 4, "rollouts": 3, "batch": 3, "seed": 4,
    }  # fmt: skip


def flags(options):
    return [str(x) for name, value in options.items() for x in (f"--{name.replace('_', '-')}", value)]


@pytest.fixture(scope="module")
def saved(tiny_folder, tiny_text, tmp_path_factory):
    """A folder of 3 batches of rollouts with features of two maps and sketches."""
    out = tmp_path_factory.mktemp("saved") / "rollouts"
    command = ["rollouts", *flags(tiny(tiny_folder, tiny_text)), "--out", str(out), "--batches", "3", "--sketch", "64"]
    result = CliRunner().invoke(cli.app, [*command, "--keep", "features=hidden", "--keep", "layers=last;default"])
    assert result.exit_code == 0, (result.output, result.exception)
    return out


def value(results, cell, metric):
    (row,) = (row for row in results.rows if row["cell"] == cell and row["metric"] == metric)
    return row["value"]


def test_a_replay_is_what_a_run_sees_at_its_first_step(saved, tiny_folder, tiny_text, tmp_path):
    """The first batch is that of step 1: reward and feature-matching loss are those in metrics.csv."""
    td, config = load_rollouts(saved)
    for features in ("hidden", "ngram"):
        go(
            {**run_defaults(), **tiny(tiny_folder, tiny_text), "features": features, "steps": 1, "held_out": 2},
            tmp_path / features,
        )
        (first,) = metrics(tmp_path / features)
        policy = CausalPolicy.from_pretrained(str(tiny_folder), device="cpu", dtype="float32", lora=2, seed=4)
        options = {**run_defaults(), **tiny(tiny_folder, tiny_text), "features": features}
        pipeline = build_pipeline(policy, policy.reference(), settle(options), resolve_run(options))
        part = pipeline["reward"](pipeline["embed"](td[:3].clone()))
        outcome = measure([part], EBFTLoss())
        assert outcome.metrics["feature_matching_loss"].value == pytest.approx(
            float(first["feature_matching_loss"]), rel=1e-5
        )
        assert outcome.metrics["reward_spread"].value == pytest.approx(float(first["reward_spread"]), rel=1e-4)
        found = replay(saved, {"features": ["hidden", "ngram"]})
        every = [pipeline["reward"](pipeline["embed"](part.clone())) for part in td.split(3)]
        expected = measure(every, EBFTLoss()).metrics
        for name in ("feature_matching_loss", "reward_spread", "token_agreement", "advantage_variance"):
            assert value(found, f"features={features}", name) == pytest.approx(expected[name].value, rel=1e-4), name
    assert config["batches"] == 3


def test_what_needs_no_gradient_may_use_flex_on_a_cpu(saved, tiny_folder, tiny_text, tmp_path):
    command = ["rollouts", *flags(tiny(tiny_folder, tiny_text)), "--attention", "flex", "--batches", "1"]
    out = tmp_path / "drawn"
    result = CliRunner().invoke(cli.app, [*command, "--out", str(out)])
    assert result.exit_code == 0, (result.output, result.exception)
    ours, theirs = load_rollouts(out)[0], load_rollouts(saved)[0][:3]
    torch.testing.assert_close(ours[schema.POLICY_LOG_PROB], theirs[schema.POLICY_LOG_PROB], atol=2e-5, rtol=0)
    assert replay(out, {"estimator": ["rloo", "none"]}, features="ngram").rows
    sketched = CliRunner().invoke(cli.app, [*command, "--out", str(tmp_path / "sketched"), "--sketch", "8"])
    assert "--attention flex: the device is cpu" in str(sketched.exception)


def test_the_saved_log_probs_are_those_of_scoring(saved, tiny_folder):
    td, _ = load_rollouts(saved)
    policy = CausalPolicy.from_pretrained(str(tiny_folder), device="cpu", dtype="float32", lora=2, seed=4)
    again = td.clone()
    with torch.no_grad():
        score(policy, again)
    torch.testing.assert_close(td[schema.POLICY_LOG_PROB], again[schema.POLICY_LOG_PROB], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(td[schema.ROLLOUT_LOG_PROB], again[schema.POLICY_LOG_PROB], rtol=1e-4, atol=1e-4)


def test_sketches_give_the_gradient_of_the_loss(saved, tiny_folder):
    """Σ weight · sketch is the projection of the gradient that backward finds, with 1e-4 of its size for rounding."""
    td, config = load_rollouts(saved)
    policy = CausalPolicy.from_pretrained(str(tiny_folder), device="cpu", dtype="float32", lora=2, seed=4)
    leaves = list(policy.trainable().values())
    projection = Projection(config["sketch"]["parameters"], dimension=64, seed=4)
    part = td[:3].clone()
    part[schema.ADVANTAGE] = torch.randn(
        part[schema.ROLLOUT_TOKENS].shape[:3], generator=torch.Generator().manual_seed(0)
    )
    for normalization in ("sequence", "token"):
        loss = EBFTLoss(normalization=normalization)
        found = sequence_gradients(part, loss).mean(0)
        scored = part.clone()
        score(policy, scored)
        gradients = torch.autograd.grad(loss(scored)["loss_policy_gradient"], leaves, allow_unused=True)
        flat = torch.cat(
            [torch.zeros(p.numel()) if g is None else g.flatten() for g, p in zip(gradients, leaves, strict=True)]
        )
        wanted = projection(flat).double()
        assert wanted.norm() > 0
        assert (found - wanted).norm() < 1e-4 * wanted.norm()


def test_sketches_are_zero_where_there_is_no_rollout(saved):
    td, _ = load_rollouts(saved)
    nothing = ~td[schema.ANCHOR_MASK]
    assert td[SKETCH][nothing].abs().sum() == 0
    assert (td[SKETCH][td[schema.ANCHOR_MASK]].norm(dim=-1) > 0).all()


def test_a_projection_keeps_inner_products_on_average():
    x, y = (torch.randn(200, generator=torch.Generator().manual_seed(n)) for n in (0, 1))
    y = y + x
    products = torch.tensor([torch.dot((p := Projection(200, dimension=32, seed=s))(x), p(y)) for s in range(2000)])
    exact = torch.dot(x, y)
    variance = (x.square().sum() * y.square().sum() + exact**2 - 2 * (x * y).square().sum()) / 32
    assert abs(products.mean() - exact) < 4 * (variance / 2000).sqrt()
    assert products.var() == pytest.approx(variance.item(), rel=0.15)  # 2,000 draws know it to about 4 %
    with pytest.raises(UsageError, match="sketch dimension 0"):
        Projection(3, dimension=0, seed=0)


def batch(advantage, tokens, target, anchors=None):
    """A batch of rollouts [B,K,N,G] with unit features, equal to what the pipeline would have written."""
    from tensordict import TensorDict

    b, k, n, g = tokens.shape
    real = torch.ones(b, k, dtype=torch.bool) if anchors is None else anchors
    td = TensorDict({schema.ANCHOR_MASK: real}, batch_size=[b])
    td[schema.ROLLOUT_TOKENS], td[schema.TARGET_TOKENS] = tokens, target
    td[schema.ROLLOUT_MASK] = torch.ones(b, k, n, g, dtype=torch.bool)
    td[schema.TARGET_MASK] = torch.ones(b, k, g, dtype=torch.bool)
    td[schema.MASK] = torch.ones(b, 9, dtype=torch.bool)
    td[schema.POLICY_LOG_PROB] = torch.zeros(b, k, n, g)
    td[schema.ADVANTAGE] = advantage
    td[schema.ROLLOUT_FEATURES], td[schema.TARGET_FEATURES] = torch.ones(b, k, n, 1), torch.zeros(b, k, 1)
    td[schema.metric("reward_spread")] = advantage.std(-1)
    td[schema.metric("zero_spread_groups")] = (advantage.std(-1) == 0).float()
    return td


def test_the_metrics_by_hand():
    target = torch.tensor([[[1, 2]], [[1, 2]]])
    tokens = torch.tensor([[[[1, 2], [1, 9], [9, 9]]], [[[9, 2], [9, 9], [9, 9]]]])
    advantage = torch.tensor([[[3.0, 1.0, -1.0]], [[2.0, 2.0, 2.0]]])
    td = batch(advantage, tokens, target)
    assert token_agreement(td).tolist() == [[[1.0, 0.5, 0.0]], [[0.5, 0.0, 0.0]]]
    found = {name: v.value for name, v in measure([td], EBFTLoss()).metrics.items()}
    assert found["reward_spread"] == pytest.approx(1.0)  # (2 + 0) / 2
    assert found["zero_spread_share"] == 0.5
    # centred in the first anchor: (2, 0, -2) against (.5, 0, -.5); nothing in the second but its agreement, 1/6 in all
    assert found["token_agreement"] == pytest.approx(2 / math.sqrt(8 * (0.5 + 1 / 6)))
    assert found["advantage_variance"] == pytest.approx((9 + 1 + 1 + 12) / 6 - 1.5**2)
    assert found["feature_matching_loss"] == pytest.approx(1.0)
    masked = batch(
        torch.tensor([[[3.0, 1.0, -1.0], [1e9, 0.0, 7.0]]]),
        tokens[:1].repeat(1, 2, 1, 1),
        target[:1].repeat(1, 2, 1),
        torch.tensor([[True, False]]),
    )
    one = measure([masked], EBFTLoss())
    assert one.metrics["advantage_variance"].value == pytest.approx(11 / 3 - 1)
    assert one.advantages.tolist() == [3.0, 1.0, -1.0]
    td[schema.ADVANTAGE] = advantage[..., None].expand(-1, -1, -1, 2)
    assert rollout_weights(td, EBFTLoss()) is None
    torch.testing.assert_close(measure([td], EBFTLoss()).advantages, 2 * advantage.flatten())


def test_correlations_by_hand():
    td = [
        measure([batch(torch.tensor([[a]]), torch.zeros(1, 1, 3, 2).long(), torch.zeros(1, 1, 2).long())], EBFTLoss())
        for a in ([1.0, 2.0, 3.0], [5.0, 3.0, 1.0], [2.0, 2.0, 2.0])
    ]
    found = correlations(td)
    assert found[0, 1].item() == pytest.approx(-1.0)
    assert found[1, 1].item() == pytest.approx(1.0)
    assert found[2].isnan().all()


def test_replay_by_the_command_line(saved, tmp_path):
    axes = ("features=hidden,ngram", "whitening=none,group,population", "estimator=rloo,none")
    over = [word for axis in axes for word in ("--over", axis)] + ["--dimension", "64"]
    begin = time.perf_counter()
    result = invoke(["ablate", "--replay", str(saved), "--out", str(tmp_path / "replay")], *over)
    assert result.exit_code == 0, (result.output, result.exception)
    assert time.perf_counter() - begin < 20
    found = rows(tmp_path / "replay")
    assert len(found) == 12 * 6
    assert {row["metric"] for row in found} >= {"signal_to_noise", "token_agreement"}
    assert all(math.isfinite(float(row["value"])) for row in found)
    for name in ("results.md", "correlations.png", "axis-features.png", "axis-whitening.png", "axis-estimator.png"):
        assert (tmp_path / "replay" / name).stat().st_size > 100
    with open(tmp_path / "replay" / "correlations.csv", newline="") as file:
        assert len(list(csv.DictReader(file))) == 144
    text = (tmp_path / "replay" / "results.md").read_text()
    assert "| – |" in text
    assert "nan" not in text


def test_kept_features_are_used(saved):
    found = replay(saved, {"layers": [None, "last"]}, features="hidden")
    one, other = (value(found, f"layers={layers}", "feature_matching_loss") for layers in ("default", "last"))
    assert one != other
    assert found.rows[0]["difference"] == 0


def test_losses_of_one_update_agree(saved):
    """At the first update every policy gradient is the same; how it is normalised matters where rollouts end early."""
    found = replay(saved, {"pg": ["reinforce", "clipped", "cispo"]}, features="ngram")
    values = [value(found, f"pg={pg}", "signal_to_noise") for pg in ("reinforce", "clipped", "cispo")]
    assert values == pytest.approx([values[0]] * 3, rel=1e-3)


def test_the_first_cell_has_no_difference_to_itself(saved):
    found = replay(saved, {"estimator": ["rloo", "none"]}, features="ngram")
    first = [row for row in found.rows if row["cell"] == "estimator=rloo"]
    assert {(row["difference"], row["difference_error"]) for row in first} == {(0.0, 0.0)}
    spread = [row for row in found.rows if row["metric"] == "reward_spread"]
    assert spread[1]["difference"] == 0  # a baseline does not touch rewards
    (variance,) = (r for r in found.rows if r["cell"] == "estimator=none" and r["metric"] == "advantage_variance")
    assert variance["difference"] != 0


@pytest.mark.parametrize(
    ("over", "given", "message"),
    [
        ({"lr": [0.1, 0.2]}, {}, "--lr with --replay: saved rollouts leave only rewards"),
        ({"decay": [0.1, 0.2]}, {}, "takes its moment from the other half"),
        ({"pooling": ["mean", "last"]}, {"features": "hidden"}, "features=hidden backbone=start layers=0.25,0.5,0.75"),
        ({"features": ["hidden"]}, {"backbone": "random"}, "needs the language model"),
        ({"features": ["join:hidden+ngram"]}, {}, "needs the language model"),
        ({"estimator": ["rloo", "rlo"]}, {}, "did you mean 'rloo'"),
        ({"estimator": ["rloo"]}, {"steps": 3}, "steps=3: saved rollouts leave only rewards"),
    ],
    ids=str,
)
def test_mistakes_in_a_replay(saved, tmp_path, over, given, message):
    with pytest.raises(UsageError) as caught:
        replay(saved, over, **given)
    assert message in str(caught.value)


def test_folders_that_hold_no_rollouts(saved, tmp_path):
    with pytest.raises(UsageError, match="holds no rollouts"):
        replay(tmp_path, {"estimator": ["rloo"]})
    (tmp_path / "config.json").write_text(json.dumps({"options": {}}))
    with pytest.raises(UsageError, match="is no folder of rollouts"):
        replay(tmp_path, {"estimator": ["rloo"]})
    result = invoke(
        ["ablate", "--replay", str(saved), "--out", str(tmp_path / "o"), "--over", "pg=reinforce"], "--seeds", "2"
    )
    assert "--seeds 2 with --replay" in str(result.exception)
    result = invoke(
        ["ablate", "--replay", str(saved), "--out", str(tmp_path / "o"), "--over", "pg=reinforce"], "--lr", "2"
    )
    assert "--lr with --replay" in str(result.exception)
    assert not (tmp_path / "o").exists()


def test_one_batch_cannot_whiten_itself(saved, tmp_path, tiny_folder, tiny_text):
    options = tiny(tiny_folder, tiny_text)
    result = CliRunner().invoke(
        cli.app, ["rollouts", *flags(options), "--out", str(tmp_path / "one"), "--batches", "1"]
    )
    assert result.exit_code == 0, result.exception
    with pytest.raises(UsageError, match="there is one batch only"):
        replay(tmp_path / "one", {"whitening": ["population"]}, features="ngram")
    assert {row["metric"] for row in replay(tmp_path / "one", {"whitening": ["group"]}, features="ngram").rows} == {
        "reward_spread", "zero_spread_share", "token_agreement", "feature_matching_loss", "advantage_variance",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--keep", "estimator=rloo"], "no such option to vary"),
        (["--batches", "0"], "--batches 0"),
        (["--sketch", "-1"], "--sketch -1"),
        (["--keep", "features=ngram", "--keep", "layers=last"], "--layers last does not apply"),
    ],
)
def test_mistakes_in_saving(tmp_path, tiny_folder, tiny_text, more, message):
    result = CliRunner().invoke(
        cli.app, ["rollouts", *flags(tiny(tiny_folder, tiny_text)), "--out", str(tmp_path / "o"), *more]
    )
    assert message in str(result.exception), result.output
    assert not (tmp_path / "o").exists()


def test_sketching_needs_only_the_anchor(saved, tiny_folder):
    """The sketch of one anchor alone is that of the whole batch."""
    td, config = load_rollouts(saved)
    policy = CausalPolicy.from_pretrained(str(tiny_folder), device="cpu", dtype="float32", lora=2, seed=4)
    projection = Projection(config["sketch"]["parameters"], dimension=64, seed=4)
    again = score_sketches(policy, td[1:2].clone(), projection)
    torch.testing.assert_close(again, td[SKETCH][1:2].clone(), rtol=1e-4, atol=1e-5)


def test_masked_target_tokens_agree_with_nothing():
    td = batch(torch.zeros(1, 1, 2), torch.zeros(1, 1, 2, 2).long(), torch.zeros(1, 1, 2).long())
    td[schema.TARGET_MASK] = torch.tensor([[[True, False]]])
    assert token_agreement(td).tolist() == [[[1.0, 1.0]]]
    td[schema.TARGET_TOKENS] = torch.tensor([[[5, 0]]])
    assert token_agreement(td).tolist() == [[[0.0, 0.0]]]


def test_a_moment_never_whitens_the_rollouts_it_is_of(saved):
    """Batches 0 and 2 are whitened by the moment of batch 1, and batch 1 by theirs."""
    td, _ = load_rollouts(saved)
    options = {**run_defaults(), "features": "ngram", "dimension": 64, "whitening": "population", "rollouts": 3}
    resolved = resolve_run(options)
    embed = as_module(choose("features", "ngram").build(None, None, **resolved["features"]).embed, documents=True)
    parts = [embed(part.clone()) for part in td.split(3)]
    rewarded = {}
    for whitened, others in (((0, 2), (1,)), ((1,), (0, 2))):
        values = build_values(settle(options), resolved)
        for other in others:
            observe_moments(values["feature_matching"], parts[other])
        stage = build_reward(settle(options), resolved, decode=str, values=values)
        rewarded.update({number: stage(parts[number].clone()) for number in whitened})
    expected = measure([rewarded[number] for number in range(3)], EBFTLoss()).metrics["reward_spread"].value
    found = replay(saved, {"whitening": ["population"]}, features="ngram", dimension=64)
    assert value(found, "whitening=population", "reward_spread") == pytest.approx(expected, rel=1e-6)


def test_a_replay_from_python(saved, monkeypatch, tmp_path, capsys):
    """The lines of the example, on these rollouts."""
    (code,) = re.findall(r"```python\n(from ebft.assemble import replay\n.*?)```", EXAMPLE.read_text(), re.DOTALL)
    assert len([line for line in code.splitlines() if line]) <= 5
    monkeypatch.setattr("ebft.assemble.replay", lambda rollouts, over, **given: replay(saved, over, **given))
    monkeypatch.chdir(tmp_path)
    exec(code, {})
    assert "signal_to_noise" in capsys.readouterr().out
