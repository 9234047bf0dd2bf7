"""RLVR in whole runs on a tiny model: whole answers to prompts, a verifiable reward, GRPO's update."""

import csv
import json

import pytest
import torch
from typer.testing import CliRunner

from ebft import schema
from ebft.assemble import build_loss, build_pipeline, resolve_run, settle
from ebft.assemble.rows import read_data, whole_rows
from ebft.cli import app
from ebft.commands.derived import run_defaults
from ebft.data import batches
from ebft.errors import UsageError
from ebft.loops.stages import at_step
from ebft.loops.train import train
from ebft.policy import CausalPolicy
from ebft.samplers.stop import cut_mask, cut_text, stopping
from tests.models import plain_logits
from tests.runs import go, metrics

OVERLAP = """
def overlap(texts, answers):
    return [len(text) / 10 + len(set(text) & set(right)) for text, right in zip(texts, answers)]
"""
PROMPTS = [f"def f{i}(x):\n    return" for i in range(24)]


@pytest.fixture(scope="module")
def rlvr(tiny_folder, tmp_path_factory):
    """The options of a tiny run of RLVR on prompts with answers and tests."""
    data = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    lines = [
        {"prompt": prompt, "answer": f" x + {i}\n", "checks": [f"assert f{i}(1) == {1 + i}"]}
        for i, prompt in enumerate(PROMPTS)
    ]
    data.write_text("\n".join(map(json.dumps, lines)))
    own = data.with_name("own.py")
    own.write_text(OVERLAP)
    return run_defaults() | {
        "method": "rlvr", "policy": str(tiny_folder), "data": str(data), "device": "cpu", "dtype": "float32", "lora": 0,
        "length": 48, "max_new_tokens": 6, "rollouts": 4, "verifier": f"{own}:overlap", "steps": 4, "batch": 3,
        "micro_batch": 2, "lr": 0.01, "held_out": 4, "save_every": 2,
    }  # fmt: skip


def overlap(texts, answer):
    """The reward of texts that answer one prompt."""
    names = {}
    exec(OVERLAP, names)
    return torch.tensor(names["overlap"](texts, [answer] * len(texts)))


def parts(options):
    """Policy, pipeline, rows and data of a run with these options."""
    policy = CausalPolicy.from_pretrained(options["policy"], device="cpu", dtype="float32")
    settled, resolved, data = settle(options), resolve_run(options), read_data(options)
    pipeline = build_pipeline(policy, policy.reference(), settled, resolved, answers=True, examples=data.example)
    return policy, pipeline, whole_rows(data, policy.tokenizer, settled)[0], data


def sampled(options, count=3):
    policy, pipeline, rows, data = parts(options)
    td = at_step(rows[:count].clone(), seed=0, step=0)
    for stage in pipeline.values():
        td = stage(td)
    return policy, td, data


# What a batch holds


def test_rollouts_start_where_the_prompt_ends_and_are_scored_against_the_answer(rlvr):
    policy, td, data = sampled(rlvr)
    assert list(td[schema.ROLLOUT_TOKENS].shape) == [3, 1, 4, 6]
    for b, row in enumerate(td):
        example = data.example(int(row[schema.EXAMPLE]))
        place = int(row[schema.ANCHORS][0])
        assert policy.tokenizer.decode(row[schema.TOKENS][:place].tolist()) == example.prompt
        own = row[schema.TARGET_TOKENS][0][row[schema.TARGET_MASK][0]].tolist()
        said = policy.tokenizer(example.answer)["input_ids"] + [policy.tokenizer.eos_token_id]
        assert own == said[:6]
        texts = [
            policy.tokenizer.decode(tokens[mask].tolist(), skip_special_tokens=True)
            for tokens, mask in zip(row[schema.ROLLOUT_TOKENS][0], row[schema.ROLLOUT_MASK][0], strict=True)
        ]
        reward = overlap(texts, example.answer)
        torch.testing.assert_close(td[schema.REWARD][b, 0], reward)
        torch.testing.assert_close(td[schema.ADVANTAGE][b, 0], (reward - reward.mean()) / reward.std())
    lengths = td[schema.ROLLOUT_MASK].sum(-1).float()
    torch.testing.assert_close(td["metrics", "answer_tokens"], lengths.mean(-1))
    torch.testing.assert_close(td["metrics", "answers_at_limit"], (lengths == 6).float().mean(-1))


def test_held_out_prompts_have_their_own_answers(rlvr):
    data = read_data(rlvr)
    policy = CausalPolicy.from_pretrained(rlvr["policy"], device="cpu", dtype="float32")
    _, held_out = whole_rows(data, policy.tokenizer, settle(rlvr))
    found = [data.example(number) for number in held_out[schema.EXAMPLE].tolist()]
    assert found == list(data.held_out)


# Stop sequences


def test_an_answer_ends_with_the_token_that_completes_a_stop_sequence():
    texts = ["a", "b\n", "\nc", "d", "", "e"]
    read = lambda ids: "".join(texts[i] for i in ids)  # noqa: E731
    tokens = torch.tensor([[0, 1, 2, 3], [3, 3, 0, 0], [2, 2, 2, 2], [0, 0, 0, 1]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 1], [1, 1, 1, 1]]).bool()
    cut = cut_mask(tokens, mask, read=read, stop=["\n\n", "cc", "\n\nc"])
    assert cut.int().tolist() == [[1, 1, 1, 0], [1, 1, 0, 0], [1, 1, 1, 1], [1, 1, 1, 1]]
    assert cut_mask(tokens, mask, read=read, stop=["c"]).sum(-1).tolist() == [3, 2, 1, 4]
    assert torch.equal(mask.sum(-1), torch.tensor([4, 2, 4, 4]))  # the input is as it was

    def engine(*args, **options):
        return tokens + 7, torch.ones(tokens.shape), mask

    drawn, log_prob, kept = stopping(engine, read=lambda ids: read([i - 7 for i in ids]), stop=["c"])()
    assert torch.equal(drawn[0], torch.tensor([7, 8, 9, 0]))
    assert log_prob[0].tolist() == [1, 1, 1, 0]
    assert torch.equal(kept, cut_mask(tokens, mask, read=read, stop=["c"]))


def test_a_text_is_cut_where_the_first_sequence_begins():
    assert cut_text("one\ntwo\n\nthree", ["\n\n", "two"]) == "one\n"
    assert cut_text("one", ["\n"]) == "one"
    assert cut_text("one", []) == "one"


def test_what_follows_a_stop_sequence_is_neither_rewarded_nor_learnt(rlvr):
    """A stop at the first token of a rollout: one token is left of it, and no text."""
    policy, td, _ = sampled(rlvr)
    first = policy.tokenizer.decode(td[schema.ROLLOUT_TOKENS][0, 0, 0, :1].tolist())
    assert td[schema.ROLLOUT_MASK][0, 0, 0].sum() > 1
    _, cut, _ = sampled(rlvr | {"stop": [first]})
    assert cut[schema.ROLLOUT_MASK][0, 0, 0].sum() == 1
    assert (cut[schema.ROLLOUT_LOG_PROB][0, 0, 0, 1:] == 0).all()
    assert cut[schema.REWARD][0, 0, 0] == 0
    kept = cut[schema.ROLLOUT_MASK]
    assert torch.equal(cut[schema.ROLLOUT_TOKENS][kept], td[schema.ROLLOUT_TOKENS][kept])
    assert (kept <= td[schema.ROLLOUT_MASK]).all()


# The update


@pytest.mark.parametrize("estimator", ["group_norm", "rloo"])
def test_the_update_is_grpo_by_hand(rlvr, estimator):
    """Two passes over one batch with a divergence from another start, every rollout forwarded by itself."""
    options = rlvr | {"estimator": estimator, "updates": 2}
    policy, pipeline, rows, data = parts(options)
    twin = CausalPolicy.from_pretrained(options["policy"], device="cpu", dtype="float32")
    start = CausalPolicy.from_pretrained(options["policy"], device="cpu", dtype="float32")
    with torch.no_grad():
        for weight in start.model.parameters():
            weight.add_(0.02)
    optimizer = torch.optim.SGD(policy.trainable().values(), lr=0.5)
    (record,) = train(
        policy, pipeline, build_loss(settle(options), resolve_run(options)["pg"]), rows, optimizer=optimizer, steps=1,
        batch_size=3, micro_batch=2, seed=0, reference=start, updates=2, max_grad_norm=0,
    )  # fmt: skip

    td = at_step(next(batches(rows, batch_size=3, seed=0)), seed=0, step=0)
    td = parts(options)[1]["sample"](td)  # drawn from the start of the run
    answers = []
    for row in td:
        prompt = row[schema.TOKENS][: int(row[schema.ANCHORS][0])]
        said = [t[m] for t, m in zip(row[schema.ROLLOUT_TOKENS][0], row[schema.ROLLOUT_MASK][0], strict=True)]
        texts = [policy.tokenizer.decode(ids.tolist(), skip_special_tokens=True) for ids in said]
        reward = overlap(texts, data.example(int(row[schema.EXAMPLE])).answer)
        gain = reward - reward.mean()
        gain = gain / reward.std() if estimator == "group_norm" else gain * 4 / 3
        answers += [
            (prompt, ids, gain[n], row[schema.ROLLOUT_LOG_PROB][0, n, : len(ids)]) for n, ids in enumerate(said)
        ]
    count = sum(len(ids) for _, ids, _, _ in answers)
    by_hand = torch.optim.SGD(twin.model.parameters(), lr=0.5)

    def log_probs(model, prompt, ids):
        with model.plain():
            logits = plain_logits(model.model, torch.cat([prompt, ids]))[len(prompt) - 1 : -1]
        return logits.log_softmax(-1).gather(-1, ids[:, None])[:, 0]

    losses = []
    for _ in range(2):
        by_hand.zero_grad()
        loss = torch.zeros(())
        for prompt, ids, gain, old in answers:
            new, frozen = log_probs(twin, prompt, ids), log_probs(start, prompt, ids).detach()
            ratio = (new - old).exp()
            surrogate = torch.minimum(ratio * gain, ratio.clamp(0.8, 1.2) * gain)
            divergence = (frozen - new).exp() - (frozen - new) - 1
            loss = loss - (surrogate - 0.04 * divergence).sum() / count
        loss.backward()
        by_hand.step()
        losses.append(loss.item())
    assert record["loss"] == pytest.approx(losses[0], abs=1e-5)
    moved = 0.0
    untouched = parts(options)[0]
    weights = (model.model.parameters() for model in (policy, twin, untouched))
    for ours, theirs, old in zip(*weights, strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-6, rtol=1e-4)
        moved = max(moved, (ours - old).abs().max().item())
    assert moved > 1e-3


def test_a_two_armed_bandit_finds_the_rewarded_arm(rlvr, tmp_path):
    """Answers of one token; the reward is for one of the two likeliest."""
    policy = CausalPolicy.from_pretrained(rlvr["policy"], device="cpu", dtype="float32")
    prompt = "def f1(x):\n    return"

    def chances(policy):
        with policy.plain(), torch.no_grad():
            return plain_logits(policy.model, torch.tensor(policy.tokenizer(prompt)["input_ids"]))[-1].softmax(-1)

    before = chances(policy)
    other, right = before.topk(2).indices.tolist()
    arm = tmp_path / "arm.py"
    arm.write_text(
        f"def arm(texts, answers):\n    return [float(t == {policy.tokenizer.decode(right)!r}) for t in texts]\n"
    )
    bandit = rlvr | {"verifier": f"{arm}:arm", "max_new_tokens": 1, "rollouts": 16, "steps": 25, "batch": 6, "lr": 0.01,
                     "micro_batch": None}  # fmt: skip
    go(bandit, tmp_path / "run")
    after = chances(CausalPolicy.from_pretrained(str(tmp_path / "run" / "policy"), device="cpu", dtype="float32"))
    assert before[other] > before[right]
    assert after[right] > 0.9
    found = json.loads((tmp_path / "run" / "evaluation.json").read_text())["metrics"]["reward"]
    assert found["after"] > 0.8 > found["before"]


# Whole runs


def test_a_run_from_the_command_line(rlvr, tmp_path):
    """Programs with tests: --tests-field, --stop, metrics, held-out measurement, samples and report."""
    out = tmp_path / "run"
    flags = ["--method", "rlvr", "--policy", rlvr["policy"], "--data", rlvr["data"], "--tests-field", "checks",
             "--verifier", "unit_tests", "--stop", "\n", "--stop", "def", "--max-new-tokens", "5", "--rollouts", "3",
             "--estimator", "rloo", "--steps", "2", "--batch", "2", "--held-out", "2", "--length", "48", "--lora", "0",
             "--eval-every", "1", "--device", "cpu", "--dtype", "float32", "--out", str(out)]  # fmt: skip
    result = CliRunner().invoke(app, ["run", *flags])
    assert result.exit_code == 0, result.output
    assert "prompts with answers" in result.output
    rows = metrics(out)
    assert len(rows) == 2
    for row in rows:
        assert 0 <= float(row["reward"]) <= 1
        assert 1 <= float(row["answer_tokens"]) <= 5
        assert float(row["kl"]) >= 0
        assert row["loss_policy_gradient"] != ""
        assert "feature_matching_loss" not in row or row["feature_matching_loss"] == ""
    found = json.loads((out / "evaluation.json").read_text())
    assert set(found["metrics"]) == {"cross_entropy", "kl", "distinct_rollouts", "reward"}
    assert found["n_anchors"] == 2
    assert set(found["stages"]) == {"sample", "verify", "reward", "score", "update", "step"}
    with open(out / "held_out.csv") as file:
        assert [row["step"] for row in csv.DictReader(file)] == ["0", "1", "2"]
    samples = json.loads((out / "samples.json").read_text())
    assert samples[0]["prefix"].endswith("return")
    assert samples[0]["target"].startswith(" x + ")
    assert len(samples[0]["before"]) == len(samples[0]["after"]) == 3
    assert "reward" in (out / "report.html").read_text()
    config = json.loads((out / "config.json").read_text())
    assert config["components"]["sampler"] == {"name": "full"}
    assert config["components"]["objective"]["verifier"] == "unit_tests"
    assert "features" not in config["components"]
    assert config["options"]["stop"] == ["\n", "def"]


def test_a_right_program_is_rewarded(rlvr, tmp_path):
    """The reward of a whole run is that of tests in the sandbox: a policy that was taught the answers passes some."""
    taught = rlvr | {"method": "sft", "rollouts": 2, "steps": 60, "batch": 4, "micro_batch": None, "lr": 0.01,
                     "max_new_tokens": None, "verifier": None, "features": "ngram", "stride": 1, "first": 1,
                     "horizon": 2, "held_out": 2}  # fmt: skip
    go(taught, tmp_path / "taught")
    options = rlvr | {"policy": str(tmp_path / "taught"), "tests_field": "checks", "verifier": "unit_tests",
                      "steps": 2, "rollouts": 8, "batch": 8, "temperature": 0.7, "micro_batch": None}  # fmt: skip
    go(options, tmp_path / "run")
    rewards = [float(row["reward"]) for row in metrics(tmp_path / "run")]
    assert all(0 < reward <= 1 for reward in rewards), rewards


def test_a_resumed_run_is_the_run_that_was_not_stopped(rlvr, tmp_path):
    options = rlvr | {"stop": ["\n"], "updates": 2}
    go(options, tmp_path / "whole")
    go(options | {"steps": 2, "lr_schedule": "constant"}, tmp_path / "parts")
    config = json.loads((tmp_path / "parts" / "config.json").read_text())
    config["options"] |= {"steps": 4, "lr_schedule": options["lr_schedule"]}
    go(options | {"lr_schedule": "constant"}, tmp_path / "constant")
    config["options"]["lr_schedule"] = "constant"
    (tmp_path / "parts" / "config.json").write_text(json.dumps(config))
    go(run_defaults(), tmp_path / "parts", resume=True)
    assert metrics(tmp_path / "parts") == metrics(tmp_path / "constant")
    assert metrics(tmp_path / "constant") != metrics(tmp_path / "whole")
    for name in ("model.safetensors",):
        one, other = ((tmp_path / run / "policy" / name).read_bytes() for run in ("parts", "constant"))
        assert one == other


def test_an_evaluation_ends_answers_where_training_did(rlvr, tmp_path):
    go(rlvr | {"stop": ["\n"], "steps": 1}, tmp_path / "run")
    base = ["evaluate", "--policy", str(tmp_path / "run"), "--quick", "--features", "ngram", "--dtype", "float32",
            "--device", "cpu", "--length", "48", "--stride", "1", "--first", "1", "--horizons", "1", "--prompts", "2",
            "--bootstrap", "10", "--max-new-tokens", "12", "--answer-temperature", "1"]  # fmt: skip
    for more, name in (([], "inherited"), (["--stop", "x"], "given")):
        result = CliRunner().invoke(app, [*base, *more, "--out", str(tmp_path / name)])
        assert result.exit_code == 0, result.output
        stop = "x" if more else "\n"
        assert json.loads((tmp_path / name / "evaluation.json").read_text())["options"]["stop"] == [stop]
        lines = (tmp_path / name / "answers.jsonl").read_text().splitlines()
        assert all(stop not in text for line in lines for text in json.loads(line)["answers"])


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ({"horizon": 8}, "--horizon 8 does not apply to method rlvr; it belongs to method ebft, method sft"),
        ({"features": "hidden"}, "--features hidden does not apply to method rlvr"),
        ({"pooling": "last"}, "--pooling last does not apply to"),
        ({"sampler": "strided"}, "--sampler strided does not apply to method rlvr"),
        ({"stride": 8}, "--stride 8 does not apply to sampler full"),
        ({"objective": "energy"}, "--objective energy does not apply to method rlvr"),
        ({"whitening": "group"}, "--whitening group does not apply to method rlvr"),
        ({"stop": [""]}, "--stop '': expected characters"),
        ({"max_new_tokens": 0}, "--max-new-tokens 0: expected a number >= 1"),
        ({"rollouts": 1}, "--rollouts 1: the estimator group_norm compares a rollout with the others"),
        ({"verifier": "unit_tests"}, "has no training examples with tests; --tests-field names"),
        ({"data": "stdlib"}, "--data stdlib is plain text, and whole answers want prompts"),
        ({"method": "ebft", "max_new_tokens": 4, "verifier": None}, "--max-new-tokens 4 does not apply to method ebft"),
        ({"method": "ebft", "max_new_tokens": None, "verifier": None, "stop": ["x"]}, "--stop ['x'] does not apply"),
    ],
)  # fmt: skip
def test_what_does_not_apply_is_refused_before_anything_is_written(rlvr, tmp_path, chosen, message):
    with pytest.raises(UsageError) as caught:
        go(rlvr | chosen, tmp_path / "run")
    assert message in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_defaults_are_those_of_grpo_and_a_run_without_divergence_has_none(rlvr):
    plain = settle(run_defaults() | {"method": "rlvr"})
    wanted = {"estimator": "group_norm", "pg": "clipped", "normalization": "token", "kl": 0.04, "kl_mode": "k3",
              "ce": 0.0, "updates": 1, "sampler": "full", "rollouts": 8, "horizon": 128}  # fmt: skip
    assert {name: plain[name] for name in wanted} == wanted
    assert resolve_run(run_defaults() | {"method": "rlvr"})["pg"] == {"clip": "0.2"}
    assert settle(rlvr | {"kl": 0.0})["kl_mode"] is None
    resolve_run(rlvr | {"kl": 0.0})
    with pytest.raises(UsageError, match="--kl-mode k2: there is no divergence term"):
        resolve_run(rlvr | {"kl": 0.0, "kl_mode": "k2"})


def test_feature_matching_of_whole_answers(rlvr, tmp_path):
    """The sampler is open to other methods: one row a prompt, targets that are the answers' first tokens."""
    matching = rlvr | {"method": "ebft", "sampler": "full", "features": "ngram", "max_new_tokens": None, "horizon": 4,
                       "verifier": None, "steps": 2}  # fmt: skip
    go(matching, tmp_path / "run")
    assert all(float(row["feature_matching_loss"]) > -1 for row in metrics(tmp_path / "run"))
