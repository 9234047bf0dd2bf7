"""What a step makes a GPU wait for, and in which precision it computes: seen on a CPU."""

import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ebft import comb_scoring, schema, static_decode
from ebft.assemble import build_pipeline, resolve_run, settle
from ebft.assemble.reward import decoder
from ebft.attention import chunks
from ebft.loading import add_adapters, load_causal_lm, load_tokenizer
from ebft.loops.clock import Clock
from ebft.loops.history import History, order_statistics
from ebft.loops.scoring import score
from ebft.loops.stages import at_step
from ebft.loops.summary import measures
from ebft.loops.train import train
from ebft.objectives import EBFTLoss
from ebft.policy import CausalPolicy
from ebft.tuning import PerDevice
from tests.models import tiny
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


# Of what a GPU waits for: values that the host reads, and sizes that depend on values.
READ = {"aten::_local_scalar_dense", "aten::nonzero", "aten::unique_consecutive", "aten::masked_select", "aten::equal"}


class Waits(TorchDispatchMode):
    """Counts them, by name; an index that is a mask is a `nonzero`."""

    def __init__(self):
        super().__init__()
        self.found = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name
        masks = name.startswith("aten::index") and any(
            isinstance(leaf, torch.Tensor) and leaf.dtype == torch.bool for leaf in tree_leaves(args[1:2])
        )
        if name in READ or masks:
            self.found[name.removeprefix("aten::")] += 1
        return func(*args, **(kwargs or {}))


def waits(run):
    tolist, read_together = torch.Tensor.tolist, comb_scoring.read_together
    with pytest.MonkeyPatch.context() as patch, Waits() as counted:
        patch.setattr(torch.Tensor, "tolist", lambda self: counted.found.update(["tolist"]) or tolist(self))
        patch.setattr(comb_scoring, "read_together", lambda *x: counted.found.update(["read"]) or read_together(*x))
        run()
    return counted.found.total()


def given(policy, *, width=40):
    tokens = torch.arange(2 * width).view(2, width) % 23 + 2
    anchors = torch.tensor([[4, 9, 20, 31]] * 2)
    return tokens, tokens > 0, anchors, anchors > 0


def test_waits_by_hand():
    x = torch.arange(4.0)
    assert waits(lambda: (x[x > 1], x.nonzero(), x.sum().item(), bool(x.any()), x.tolist())) == 5
    assert waits(lambda: (x[torch.tensor([0, 2])], torch.where(x > 1, x, 0).sum())) == 0


@pytest.mark.parametrize("name", ["llama", "mistral-window"])
def test_scoring_asks_for_as_much_whatever_its_size(name, monkeypatch):
    monkeypatch.setattr(chunks, "ANCHORS_PER_CALL", PerDevice(1, 1))
    policy = CausalPolicy(tiny(name))
    drawn = torch.ones(2, 4, 3, 5, dtype=torch.int64)

    def score(width=40, **options):
        log_prob, own, *rest = policy.score(*given(policy, width=width), drawn, drawn > 0, **options)
        (log_prob.sum() + own.sum() + sum(x.sum() for x in rest)).backward()

    least = 1 + 1  # anchors and masks at once, and for each window how far all see
    assert waits(score) == waits(lambda: score(100)) == least
    start = policy.reference()
    compare = {"reference": start, "divergence": lambda ours, theirs: (ours - theirs).square().sum(-1), "entropy": True}
    assert waits(lambda: score(**compare)) <= 2 * least


def test_what_is_read_together_is_what_was_there():
    """As from a device that is not the CPU."""
    given = torch.tensor([[3, -1]]), torch.tensor([[True, False]]), torch.zeros(2, 0, 3, dtype=torch.bool)

    class Elsewhere(torch.Tensor):
        device = torch.device("cuda")

    found = comb_scoring.read_together(given[0].as_subclass(Elsewhere), *given[1:])
    for ours, theirs in zip(found, given, strict=True):
        assert np.array_equal(ours, theirs.numpy())
        assert ours.dtype == theirs.numpy().dtype


def test_static_steps_of_sampling_wait_for_nothing(monkeypatch):
    monkeypatch.setattr(static_decode, "capture", lambda step, changed: step)
    policy, eager = CausalPolicy(tiny("mistral-window")), CausalPolicy(tiny("mistral-window"))
    policy.static = static_decode.StaticDecoder(policy, "graph")

    def sample(which, horizon, **options):
        return lambda: which.sample(*given(which), rollouts=3, horizon=horizon, seed=0, eos=1, **options)

    few = waits(sample(policy, 2))
    assert waits(sample(policy, 9)) == few <= 5
    assert waits(sample(policy, 9, top_p=0.9)) == few
    assert waits(sample(eager, 9)) > waits(sample(eager, 2)) > few


def test_texts_are_read_at_once(options):
    decode = decoder(load_tokenizer(options["policy"]))
    tokens = torch.arange(40).view(8, 5) + 3
    mask = torch.arange(5) < torch.arange(8)[:, None] % 6
    assert waits(lambda: decode(tokens, mask)) == 2
    assert decode(tokens, mask)[3] == decode(tokens[3:4, :3], mask[3:4, :3])[0] != ""


def test_what_is_watched_of_a_batch_is_read_at_once(options):
    _, pipeline, rows = parts(options)
    td = at_step(rows[:3].clone(), seed=0, step=0)
    for stage in pipeline.values():
        td = stage(td)
    found, history = {}, History(None)
    assert waits(lambda: found.update(measures(td))) == 0
    assert waits(lambda: history.observe(td)) == 0
    history.append({"step": 1})
    assert history.state_dict()["rewards"] == [[1, *order_statistics(td[schema.REWARD], td[schema.ANCHOR_MASK])]]
    history.append({"step": 2})
    assert len(history.state_dict()["rewards"]) == 1
    valid = td[schema.ANCHOR_MASK]
    torch.testing.assert_close(found["reward"], td[schema.REWARD][valid].mean())
    td[schema.ANCHOR_MASK][0, 0] = False
    torch.testing.assert_close(measures(td)["reward"], td[schema.REWARD][td[schema.ANCHOR_MASK]].mean())
