"""The benchmark of sampling and scoring: its reference is right, and what it counts and reports is what it says."""

import json
import math
import os
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import comparison, contestants, measure, reference_algorithm, sampling, sampling_report
from benchmarks.contestants import Choice, Contestant, Setting
from ebft.errors import UsageError
from ebft.policy import CausalPolicy
from tests.models import VOCABULARY, tiny

MIB = 2**20
CPU = torch.device("cpu")
CONFIG = {
    "model_type": "llama",
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
CHOICE = Choice("config:" + json.dumps(CONFIG), dtype="float32")
SETTING = Setting(26, horizon=4, rollouts=6)  # more rollouts than the reference scores at once
K = 5  # anchors 4, 8, ... 20: with 4 target tokens each they fit 26 tokens


def tiny_policy(name="llama", attention="sdpa"):
    model = tiny(name)
    model.set_attn_implementation(attention)
    return CausalPolicy(model, head_rows=7)


def gradients(policy):
    return {name: p.grad.clone() for name, p in policy.trainable().items()}


# ---- the reference


@pytest.mark.parametrize(("rollouts", "horizon"), [(3, 4), (1, 1)])
def test_reference_equals_the_policy(rollouts, horizon):
    """Per-row anchors; the same tokens, log-probs and gradients."""
    policy = tiny_policy()
    random = torch.Generator().manual_seed(0)
    tokens = torch.randint(VOCABULARY, (2, 20), generator=random)
    anchors = torch.tensor([[1, 5, 9, 17], [3, 4, 8, 16]])
    real = torch.ones_like(tokens, dtype=torch.bool), anchors, torch.ones_like(anchors, dtype=torch.bool)

    drawn, log_prob, mask = policy.sample(tokens, *real, rollouts=rollouts, horizon=horizon, seed=3)
    with policy.plain() as model:
        got, got_log_prob = reference_algorithm.sample(
            model, tokens, anchors, rollouts=rollouts, horizon=horizon, seed=3
        )
    assert torch.equal(got, drawn)
    torch.testing.assert_close(got_log_prob, log_prob, atol=2e-5, rtol=0)

    weights = torch.randn(drawn.shape, generator=random)
    results = []
    for score in (
        lambda: policy.score(tokens, *real, drawn, mask),
        lambda: reference_algorithm.score(policy.model, tokens, anchors, drawn),
    ):
        policy.model.zero_grad()
        with policy.plain() if results else policy.computing():
            scored, own = score()
        ((scored * weights).sum() + own.square().sum()).backward()
        results.append((scored, own, gradients(policy)))
    (ours, ours_own, expected), (theirs, theirs_own, found) = results
    torch.testing.assert_close(theirs, ours, atol=2e-5, rtol=0)
    torch.testing.assert_close(theirs_own, ours_own, atol=2e-5, rtol=0)
    for name in expected:
        bound = 1e-5 * float(expected[name].abs().max() + 1)
        torch.testing.assert_close(found[name], expected[name], atol=bound, rtol=0)


@pytest.mark.parametrize(
    ("name", "attention", "reason"),
    [("llama", "eager", "eager"), ("mistral-window", "sdpa", "window 5"), ("gemma3_text", "sdpa", "sliding_attention")],
)
def test_reference_refuses_what_its_mask_would_get_wrong(name, attention, reason):
    tokens, anchors = torch.ones(1, 9, dtype=torch.long), torch.tensor([[4]])
    with tiny_policy(name, attention).plain() as model, pytest.raises(UsageError, match=reason):
        reference_algorithm.sample(model, tokens, anchors, rollouts=1, horizon=2, seed=0)


def test_contestants_leave_the_same_gradient():
    """Also where the reference scores in several passes, and with the sequence's own tokens counted once."""
    policy = CHOICE.load()
    rollouts = contestants.ours(policy, SETTING).sample()
    assert rollouts.shape == (1, K, SETTING.rollouts, SETTING.horizon)
    assert SETTING.rollouts > contestants.COPIES
    found = {}
    for name, make in contestants.CONTESTANTS.items():
        log_prob = make(policy, SETTING).score(rollouts)
        found[name] = log_prob, gradients(policy)
    torch.testing.assert_close(found["reference"][0], found["ours"][0], atol=2e-5, rtol=0)
    for name, expected in found["ours"][1].items():
        bound = 1e-5 * float(expected.abs().max())
        torch.testing.assert_close(found["reference"][1][name], expected, atol=bound, rtol=0)


# ---- what is counted


def matrix_operations(call) -> int:
    """Operations of plain matrix products, which attention does not use here: it has batched ones."""
    with FlopCounterMode(display=False) as counter:
        call()
    counts = counter.get_flop_counts()["Global"]
    return sum(n for op, n in counts.items() if str(op) in ("aten.mm", "aten.addmm"))


def test_token_forwards():
    policy = CHOICE.load()
    length, horizon, count = SETTING.length, SETTING.horizon, SETTING.rollouts
    runs = {}
    for name, make in contestants.CONTESTANTS.items():
        contestant = make(policy, SETTING)
        done = comparison.run(policy, contestant, ("sampling", "scoring"), contestant.sample())
        runs[name] = {part: one.token_forwards for part, one in done.items()}
    assert runs["reference"] == {
        "sampling": count * sum(length + K * g for g in range(horizon)),
        "scoring": count * length + K * count * horizon,
    }
    assert runs["ours"] == {
        "sampling": K * horizon + K * count * (horizon - 1),  # the last anchor is at K·G
        "scoring": length + K * count * (horizon - 1),
    }


def test_the_plain_pass_has_as_many_tokens_and_products():
    policy = CHOICE.load()
    ours = contestants.ours(policy, SETTING)
    rollouts = ours.sample()
    counts = []
    for call in (lambda: ours.score(rollouts), lambda: contestants.plain_pass(policy, SETTING)):
        with measure.token_forwards(policy.causal_lm.get_input_embeddings()) as tokens:
            counts.append((matrix_operations(call), sum(tokens)))
    assert counts[0] == counts[1]


@pytest.mark.parametrize("lora", [0, 2])
def test_floor_has_the_products_of_the_comb(lora):
    policy = Choice(CHOICE.policy, CHOICE.dtype, lora=lora).load()
    policy.head_rows = 7
    ours, floor = (make(policy, SETTING) for make in (contestants.ours, contestants.floor))
    sampled = matrix_operations(ours.sample)
    assert sampled > 0
    assert matrix_operations(floor.sample) == sampled

    rollouts = ours.sample()
    width, teeth = CONFIG["hidden_size"], K * SETTING.rollouts * (SETTING.horizon - 1)
    head = 2 * CONFIG["vocab_size"] * width * (K + teeth + SETTING.length - 1)
    scored, least = (matrix_operations(lambda c=c: c.score(rollouts)) for c in (ours, floor))
    if lora:  # nothing trained stands before the first layer's projections, their input has no gradient
        row = SETTING.length + teeth
        first = 2 * row * width * (width + 2 * width // 2) + 3 * 2 * row * width * lora
        assert least - scored == first
    else:  # the head's logits are computed again in the backward pass, which the floor leaves out
        assert scored - least == head


def test_slow_contestants_run_once_and_the_others_take_turns(monkeypatch):
    order = []

    def contestant(name, pause):
        def sample():
            order.append(name)
            clock[0] += pause
            return torch.zeros(1)

        return Contestant(sample, lambda rollouts: rollouts)

    clock = [0.0]
    monkeypatch.setattr(measure.time, "perf_counter", lambda: clock[0])
    named = {"slow": contestant("slow", 200.0), "quick": contestant("quick", 1.0)}
    runs = comparison.take_turns(CHOICE.load(), named, ("sampling",), rollouts=torch.zeros(1), repeats=3)
    assert order == ["slow", "quick", "quick", "quick"]
    assert [run["sampling"].seconds for run in runs["quick"]] == [1.0, 1.0, 1.0]
    assert runs["slow"][0]["sampling"].seconds == 200.0


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="elsewhere the high-water mark only rises")
def test_peak_is_what_was_held_at_most():
    """Whatever was held before and given back since, to the system or only to the C library."""

    def hold(count: int, size: int) -> list[torch.Tensor]:
        return [torch.ones(size // 4) for _ in range(count)]

    last = None
    for count, size in ((1, 256 * MIB), (1, 64 * MIB), (1024, MIB // 16)):
        held = hold(count, size)
        last = held[-1]  # stays, so that the heap below it cannot shrink by itself
        del held
        grown = measure.peak_increase(lambda count=count, size=size: hold(count, size), CPU)
        assert (count * size - MIB) < grown < count * size + 16 * MIB  # the kernel counts resident pages in batches
    assert last is not None


def test_fresh_processes():
    assert measure.in_fresh_process(os.getpid) != os.getpid()
    assert measure.in_fresh_process(os.abort) is None
    with pytest.raises(ValueError, match="math domain error"):
        measure.in_fresh_process(math.sqrt, -1.0)


def test_contestants_that_disagree_are_an_error():
    same = {"scoring": comparison.Run(1.0, 1, torch.zeros(4))}
    other = {"scoring": comparison.Run(1.0, 1, torch.full((4,), 0.2))}
    assert comparison.agree(same, same) == {"log_prob_difference": 0.0}
    with pytest.raises(RuntimeError, match=r"differ by 0\.2 nats"):
        comparison.agree(same, other)


def test_growth_is_the_exponent():
    points = [{"scoring_token_forwards": n, "scoring_s": 0.01 * n**1.5} for n in (10, 40, 90)]
    assert sampling.growth(points, "scoring") == pytest.approx(1.5)


# ---- the whole


def test_benchmark_measures_every_column(monkeypatch):
    monkeypatch.setattr(sampling, "in_fresh_process", lambda function, *args: function(*args))
    saved = []
    results = sampling.benchmark(
        CHOICE,
        settings=[Setting(24, 4, 2)],
        curve=[Setting(16, 4, 2), Setting(32, 4, 2)],
        memory=[Setting(24, 4, 2)],
        stages=["scoring", "both", "peaks", "curve", "memory"],
        repeats=1,
        earlier={},
        save=lambda so_far: saved.append(json.loads(json.dumps(so_far))),
        say=lambda what: None,
    )
    scoring, both = results["rows"]
    assert (scoring["stage"], both["stage"]) == ("scoring", "both")
    for name in ("reference", "ours", "floor"):
        assert 0 < scoring[f"{name}_s"] < both[f"{name}_s"]
    assert both["same_tokens"] == 1.0
    assert both["log_prob_difference"] < 2e-5
    assert set(results["growth"]) == {"sampling", "scoring"}
    assert len(saved) == 1 + 4 + 2 + 1  # the times, each peak, each length of the curve, the plain pass
    assert "reference_peak" not in saved[0]["rows"][0]
    assert saved[-1] == json.loads(json.dumps(results))
    lines = [line for line in sampling_report.markdown(results).splitlines() if line.startswith("| T=")]
    assert len(lines) == 2 + 2 + 1

    quiet = {"repeats": 1, "save": lambda so_far: None, "say": lambda what: None, "curve": [], "memory": []}
    settings = [Setting(12, 4, 2), Setting(24, 4, 2)]
    later = sampling.benchmark(CHOICE, settings=settings, stages=["scoring"], earlier=results, **quiet)
    assert [(row["setting"], row["stage"]) for row in later["rows"]] == [
        (str(settings[1]), "scoring"),
        (str(settings[1]), "both"),
        (str(settings[0]), "scoring"),
    ]
    assert later["rows"][1] == both
    assert later["rows"][0]["ours_peak"] == scoring["ours_peak"]  # measured before, and not again
    assert "ours_peak" not in later["rows"][2]
    assert later["curve"] == results["curve"]
    peaks = sampling.benchmark(CHOICE, settings=settings[:1], stages=["peaks"], earlier=later, **quiet)
    assert peaks["rows"][2]["ours_peak"] >= 0  # the time is that of before
    assert {**later["rows"][2], "ours_peak": None} == {**peaks["rows"][2], "ours_peak": None}
    with pytest.raises(UsageError, match="peaks: nothing of T=20 G=4 N=2 was timed"):
        sampling.benchmark(CHOICE, settings=[Setting(20, 4, 2)], stages=["peaks"], earlier=later, **quiet)
    elsewhere = results | {"machine": {"device": "another"}}
    fresh = sampling.benchmark(CHOICE, settings=settings[:1], stages=["scoring"], earlier=elsewhere, **quiet)
    assert len(fresh["rows"]) == 1
    assert not fresh["curve"]


def test_report_says_what_is_missing(tmp_path):
    row = {
        "setting": "T=9 G=2 N=2",
        "stage": "scoring",
        **{"reference_s": 6.0, "ours_s": 2.0, "floor_s": 1.6, "reference_repeats": 1, "ours_repeats": 2},
        **{"reference_token_forwards": 90, "ours_token_forwards": 30, "reference_peak": None},
    }
    results = {
        "machine": measure.machine(CPU),
        "choice": {"policy": "p", "lora": 0},
        "compute_dtype": "float32",
        "reference_copies": 2,
        **{"rows": [row], "curve": [], "growth": {}, "memory": []},
    }
    sampling_report.write(tmp_path / "new", results)
    text = (tmp_path / "new" / "sampling.md").read_text()
    assert "| T=9 G=2 N=2 | scoring | 6 | 2 | 3.0× | 1.6 | 1.25 | 90 | 30 | killed | – | – | 1, 2 |" in text
    assert json.loads((tmp_path / "new" / "sampling.json").read_text()) == results


def test_settings():
    assert Setting.parse("256,1024:32:8") == [Setting(256, 8, 4), Setting(1024, 32, 8)]
    for wrong in ("", "256,", "8:0:1", "1:2:3:4", "x"):
        with pytest.raises(UsageError, match=f"settings '{wrong}'"):
            Setting.parse(wrong)
    with pytest.raises(UsageError, match="no room for an anchor"):
        Setting(15).inputs(CHOICE.load())


@pytest.mark.parametrize(
    ("options", "message"),
    [({"stage": "sampling,scorin"}, "--stage scorin"), ({"repeats": 0}, "--repeats 0"), ({"lora": -1}, "--lora -1")],
)
def test_wrong_options(options, message, tmp_path):
    with pytest.raises(UsageError, match=message):
        sampling.main(policy=CHOICE.policy, out=tmp_path, **options)


@pytest.mark.parametrize("text", ["config:{", 'config:{"model_type": "nothing"}', "config:{}", "config:[1]"])
def test_wrong_configurations(text):
    with pytest.raises(UsageError, match="config: and a JSON object"):
        Choice(text).load()
