"""Objectives of several kinds in one run, on a tiny model: feature matching at anchors and rewards of whole answers."""

import json
from functools import partial

import pytest
import torch

from ebft import schema
from ebft.assemble import build_loss, build_pipeline, resolve_run, settle
from ebft.assemble.answers import ANSWERS, build_answers
from ebft.assemble.rows import pack_data, read_data
from ebft.commands.derived import run_defaults
from ebft.data import batches
from ebft.errors import UsageError
from ebft.loops.objective import called
from ebft.loops.scoring import score
from ebft.loops.stages import at_step
from ebft.loops.train import train
from ebft.policy import CausalPolicy
from tests.runs import go, metrics


class Silent:
    def print(self, *args, **kwargs):
        pass


@pytest.fixture(scope="module")
def mixed(tiny_folder, tmp_path_factory):
    """The options of a tiny run on prompts with answers."""
    folder = tmp_path_factory.mktemp("prompts")
    lines = [{"prompt": f"def f{i}(x):\n    return", "answer": f" x + {i}\n    # end\n"} for i in range(24)]
    (folder / "prompts.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (folder / "own.py").write_text(
        "def overlap(texts, answers):\n    return [len(set(t) & set(a)) for t, a in zip(texts, answers)]\n"
    )
    return run_defaults() | {
        "method": "mixed", "policy": str(tiny_folder), "data": str(folder / "prompts.jsonl"), "device": "cpu",
        "dtype": "float32", "lora": 0, "length": 48, "stride": 3, "first": 2, "horizon": 3, "rollouts": 3,
        "features": "hidden", "max_new_tokens": 7, "verifier": f"{folder / 'own.py'}:overlap", "steps": 4, "batch": 2,
        "micro_batch": 1, "kl": 0.1, "lr": 0.01, "held_out": 3, "save_every": 2,
    }  # fmt: skip


def parts(options):
    """Policy, the stages, loss and rows of feature matching, and the objective of answers."""
    policy = CausalPolicy.from_pretrained(options["policy"], device="cpu", dtype="float32")
    settled, resolved, data = settle(options), resolve_run(options), read_data(options)
    settled["steps"] = settled["steps"] or 1
    pipeline = build_pipeline(policy, policy.reference(), settled, resolved, answers=True)
    rows, _ = pack_data(data, policy.tokenizer, settled, resolved, console=Silent())
    further = build_answers(policy, policy.reference(), settled, resolved, data, console=Silent())
    return policy, pipeline, build_loss(settled, resolved["pg"]), rows, further


def test_an_update_descends_the_weighted_sum(mixed):
    options = mixed | {"answer_weight": 0.25}
    policy, pipeline, loss, rows, further = parts(options)
    twin, stages, own, _, answers = parts(options)
    reference = CausalPolicy.from_pretrained(options["policy"], device="cpu", dtype="float32")
    with torch.no_grad():  # away from the start, so that the divergence has a gradient
        for weight in reference.model.parameters():
            weight.add_(0.02)
    optimizer = torch.optim.SGD(policy.trainable().values(), lr=0.1)
    run = partial(train, optimizer=optimizer, steps=1, batch_size=2, micro_batch=1, seed=5, max_grad_norm=0)
    (record,) = run(policy, pipeline, loss, rows, reference=reference, further=further)

    by_hand, total = torch.optim.SGD(twin.trainable().values(), lr=0.1), torch.zeros(())
    values = {}
    for place, (label, each, objective, data) in enumerate(
        [("", stages, own, rows), (ANSWERS, answers[ANSWERS].pipeline, answers[ANSWERS].loss, answers[ANSWERS].data)]
    ):
        seed = hash((5, place)) if place else 5
        td = at_step(next(batches(data, batch_size=2, seed=seed)), seed=seed, step=0)
        for stage in each.values():
            td = stage(td)
        score(twin, td, reference=reference)
        out = objective(td)
        values |= {called(name, label): value.item() for name, value in out.items()}
        total = total + sum(value for name, value in out.items() if name.startswith("loss_"))
        if label:
            reward = td[schema.REWARD]
            assert list(td[schema.ROLLOUT_TOKENS].shape) == [2, 1, 3, 7]
            gain = torch.where(td[schema.ROLLOUT_MASK], td[schema.ADVANTAGE][..., None] * td["policy", "log_prob"], 0.0)
            assert values["loss_answers_policy_gradient"] == pytest.approx(-0.25 * gain.sum().item() / 6, abs=1e-5)
            assert record["answers_reward"] == pytest.approx(float(reward.mean()), abs=1e-6)
            assert reward.std() > 0
    total.backward()
    by_hand.step()
    assert set(values) == {
        "loss_policy_gradient", "loss_cross_entropy", "loss_kl", "cross_entropy", "kl",
        "loss_answers_policy_gradient", "loss_answers_kl", "answers_kl",
    }  # fmt: skip
    for name, value in values.items():
        assert record[name] == pytest.approx(value, abs=2e-5), name
    assert record["loss"] == pytest.approx(total.item(), abs=1e-5)
    for ours, theirs in zip(policy.model.parameters(), twin.model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-6, rtol=1e-4)


def test_the_gradient_does_not_depend_on_parts(mixed):
    found = []
    for micro_batch in (1, 2, None):
        policy, pipeline, loss, rows, further = parts(mixed)
        optimizer = torch.optim.SGD(policy.trainable().values(), lr=0.0)
        list(train(policy, pipeline, loss, rows, optimizer=optimizer, steps=1, batch_size=2, micro_batch=micro_batch,
                   seed=0, max_grad_norm=0, reference=policy.reference(), further=further))  # fmt: skip
        found.append([weight.grad.clone() for weight in policy.trainable().values()])
    for other in found[1:]:
        for ours, theirs in zip(found[0], other, strict=True):
            torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-4)


def test_a_mixed_run_and_its_resume(mixed, tmp_path):
    """Schedules of every weight; metrics, measurements and samples of both objectives."""
    options = mixed | {"answer_schedule": "warm_up:1", "ce_schedule": "linear_decay", "pg_schedule": "linear_decay",
                       "whitening": "population", "decay": 0.9, "lr_schedule": "constant", "eval_every": 2,
                       "stop": ["q"]}  # fmt: skip
    go(options, tmp_path / "whole")
    rows = metrics(tmp_path / "whole")
    assert {"answers_reward", "answers_tokens", "answers_at_limit", "loss_answers_policy_gradient"} <= set(rows[0])
    measured = json.loads((tmp_path / "whole" / "evaluation.json").read_text())["metrics"]
    assert set(measured) == {
        "feature_matching_loss", "cross_entropy", "kl", "distinct_rollouts", "reward", "answers_reward",
    }  # fmt: skip
    assert len(json.loads((tmp_path / "whole" / "samples.json").read_text())) == 3 + 3
    components = json.loads((tmp_path / "whole" / "config.json").read_text())["components"]
    assert components[ANSWERS]["verifier"] == options["verifier"]
    assert "verifier" not in components["objective"]
    flat = options | {"answer_schedule": None, "ce_schedule": None, "pg_schedule": None}
    for name in ("one", "two"):
        go(flat | {"steps": 4 if name == "one" else 2}, tmp_path / name)
    config = json.loads((tmp_path / "two" / "config.json").read_text())
    config["options"]["steps"] = 4
    (tmp_path / "two" / "config.json").write_text(json.dumps(config))
    go(run_defaults(), tmp_path / "two", resume=True)
    assert metrics(tmp_path / "two") == metrics(tmp_path / "one")
    one, two = ((tmp_path / name / "policy" / "model.safetensors").read_bytes() for name in ("one", "two"))
    assert one == two


def test_a_weight_of_an_objective_follows_its_schedule(mixed):
    _, _, _, _, further = parts(mixed | {"answer_weight": 2.0, "answer_schedule": "warm_up:1"})
    schedules = further[ANSWERS].schedules
    assert [schedules["policy_gradient_coefficient"](step) for step in range(4)] == [0.5, 1.0, 1.5, 2.0]
    assert set(schedules) == {"policy_gradient_coefficient"}


def test_a_step_takes_the_weight_of_its_schedule(mixed):
    found = {}
    for schedule in (None, "warm_up:1"):
        policy, pipeline, loss, rows, further = parts(mixed | {"answer_schedule": schedule})
        optimizer = torch.optim.SGD(policy.trainable().values(), lr=0.0)
        run = train(policy, pipeline, loss, rows, optimizer=optimizer, steps=2, batch_size=2, seed=0, further=further,
                    reference=policy.reference())  # fmt: skip
        found[schedule] = [record["loss_answers_policy_gradient"] for record in run]
    assert all(value != 0 for value in found[None])
    assert found["warm_up:1"] == pytest.approx([found[None][0] / 4, found[None][1] / 2], rel=1e-4)


def test_whole_answers_alone_end_at_stop_sequences(mixed):
    policy, pipeline, _, rows, _ = parts(mixed)
    drawn = pipeline["sample"](at_step(rows[:2].clone(), seed=0, step=0))
    token = drawn[schema.ROLLOUT_TOKENS][0, 0, 0, :1]
    _, stages, _, _, further = parts(mixed | {"stop": [policy.tokenizer.decode(token.tolist())]})
    again = stages["sample"](at_step(rows[:2].clone(), seed=0, step=0))
    assert torch.equal(again[schema.ROLLOUT_MASK], drawn[schema.ROLLOUT_MASK])
    answers = further[ANSWERS]
    answered = answers.pipeline["sample"](at_step(answers.data[:8].clone(), seed=0, step=0))
    tokens, mask = answered[schema.ROLLOUT_TOKENS], answered[schema.ROLLOUT_MASK]
    ends = ((tokens == token) & mask).nonzero()
    assert len(ends)
    for b, k, n, g in ends.tolist():
        assert int(mask[b, k, n].sum()) == g + 1


def test_cross_entropy_and_answers_without_matching_draw_no_short_rollouts(mixed, tmp_path):
    go(mixed | {"pg_weight": 0.0, "kl": 0.0, "steps": 2}, tmp_path / "run")
    for row in metrics(tmp_path / "run"):
        assert row["feature_matching_loss"] == ""
        assert row["answers_reward"] != ""
        total = float(row["loss_cross_entropy"]) + float(row["loss_answers_policy_gradient"])
        assert float(row["loss"]) == pytest.approx(total, abs=1e-6)


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ({"data": "stdlib"}, "--data stdlib is plain text, and whole answers want prompts"),
        ({"answer_weight": 0.0}, "--answer-weight 0 leaves whole answers out: use --method ebft"),
        ({"answer_weight": -1.0}, "--answer-weight -1.0: expected a number >= 0"),
        ({"answer_schedule": "sometimes"}, "schedule 'sometimes' is not known"),
        ({"verifier": "chrff"}, "did you mean 'chrf'"),
        ({"verifier": "unit_tests"}, "has no training examples with tests"),
        ({"alignment": "dott"}, "alignment 'dott'"),
        ({"method": "ebft", "max_new_tokens": None}, "--verifier"),
        ({"method": "ebft", "max_new_tokens": None, "verifier": None, "answer_weight": 1.0}, "--answer-weight 1.0"),
        ({"method": "rlvr", "horizon": None, "features": None, "stride": None, "first": None, "answer_weight": 1.0},
         "--answer-weight 1.0 does not apply to method rlvr; it belongs to method mixed"),
    ],
)  # fmt: skip
def test_what_does_not_apply_is_refused_before_anything_is_written(mixed, tmp_path, chosen, message):
    with pytest.raises(UsageError) as caught:
        go(mixed | chosen, tmp_path / "run")
    assert message in str(caught.value)
    assert not (tmp_path / "run").exists()
