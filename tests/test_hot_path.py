"""What a step makes a GPU wait for, and in which precision it computes: seen on a CPU."""

import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import torch

from ebft import schema
from ebft.assemble import build_pipeline, resolve_run, settle
from ebft.loading import add_adapters, load_causal_lm
from ebft.loops.clock import Clock
from ebft.loops.scoring import score
from ebft.loops.stages import at_step
from ebft.loops.train import train
from ebft.objectives import EBFTLoss
from ebft.policy import CausalPolicy
from tests.runs import parts

READS = ("item", "tolist", "__float__", "__int__", "__bool__", "__index__")


@pytest.fixture
def reads(monkeypatch):
    """Which modules of the loop and of the loss read a tensor's value, and how often."""
    found = Counter()

    def counting(name, original):
        def read(self, *args):
            path = Path(sys._getframe(1).f_code.co_filename)
            if path.parent.name in ("loops", "objectives") and path.name != "scoring.py":
                found[path.name, name] += 1
            return original(self, *args)

        return read

    for name in READS:
        monkeypatch.setattr(torch.Tensor, name, counting(name, getattr(torch.Tensor, name)))
    return found


@pytest.mark.parametrize("micro_batch", [1, 4])
def test_a_step_reads_its_numbers_in_one_place_once_an_update(options, reads, micro_batch):
    policy, pipeline, rows = parts(options, features="ngram")
    loss = EBFTLoss(cross_entropy_coefficient=0.5, kl_coefficient=0.1, entropy_coefficient=0.01)
    settings = {"steps": 3, "batch_size": 4, "seed": 0, "micro_batch": micro_batch, "reference": policy.reference()}
    optimizer = torch.optim.AdamW(policy.trainable().values(), lr=1e-3)
    records = list(train(policy, pipeline, loss, rows, optimizer=optimizer, **settings))
    assert len(records) == 3
    assert dict(reads) == {("numbers.py", "tolist"): 3 * 2}  # of the update, and of the summary


def test_the_clock_waits_for_the_gpu_once_at_the_end(monkeypatch):
    """Events of a device that runs behind the host: a stage lasts as long as the device says."""
    waits, now = [], iter([0.0, 250.0, 250.0, 1000.0, 1000.0, 1500.0])

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = next(now)

        def elapsed_time(self, end):
            return end.at - self.at

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: waits.append(time.perf_counter()))
    clock = Clock()
    for name in ("sample", "score", "sample"):
        with clock(name):
            pass
    assert waits == []
    times = clock.times()
    assert len(waits) == 1
    assert times.pop("time_step") >= 0
    assert times == {"time_sample": 0.25 + 0.5, "time_score": 0.75}
    assert clock.times()["time_sample"] == 0.75  # asked again, nothing is booked twice


def test_the_clock_of_a_cpu():
    clock = Clock()
    for _ in range(2):
        with clock("sample"):
            time.sleep(0.01)
    times = clock.times()
    assert 0.02 <= times["time_sample"] <= times["time_step"]


@pytest.mark.parametrize("lora", [0, 2])
def test_in_bfloat16_what_must_be_float32_is(options, lora):
    """Master weights and gradients, log-probs, rewards, features; and the gap of sampling and scoring is measured."""
    _, _, rows = parts(options)
    frozen = torch.bfloat16 if lora else torch.float32
    model, tokenizer = load_causal_lm(options["policy"], weights=frozen, device=torch.device("cpu"))
    if lora:
        model = add_adapters(model, rank=lora, seed=0, autocast=True)
    policy = CausalPolicy(model, tokenizer, autocast=torch.bfloat16)
    chosen = {**options, "whitening": "group", "estimator": "group_norm"}
    pipeline = build_pipeline(policy, policy.reference(), settle(chosen), resolve_run(chosen))
    td = at_step(rows[:3].clone(), seed=0, step=0)
    for stage in pipeline.values():
        td = stage(td)
    score(policy, td)
    float32 = (schema.ROLLOUT_LOG_PROB, schema.ROLLOUT_FEATURES, schema.TARGET_FEATURES, schema.REWARD)
    for key in (*float32, schema.ADVANTAGE, schema.POLICY_LOG_PROB, schema.POLICY_TOKEN_LOG_PROB):
        assert td[key].dtype == torch.float32, key
        assert td[key].isfinite().all(), key
    optimizer = torch.optim.AdamW(policy.trainable().values(), lr=1e-3)
    (record,) = train(
        policy,
        pipeline,
        EBFTLoss(cross_entropy_coefficient=1.0),
        rows,
        optimizer=optimizer,
        steps=1,
        batch_size=3,
        seed=0,
    )
    assert 1e-7 < record["sampler_mismatch"] < 0.1  # rounding differs between a step of decoding and a whole row
    for name, weight in policy.model.named_parameters():
        if weight.requires_grad:
            assert weight.dtype == weight.grad.dtype == torch.float32, name
        else:
            assert weight.dtype == frozen, name
    states = [value for state in optimizer.state.values() for value in state.values() if value.ndim]
    assert {value.dtype for value in states} == {torch.float32}
