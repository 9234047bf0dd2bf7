"""Optimisers by name, learning rates over a run, averaged weights."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from ebft.assemble import build_optimizer, resolve_run, settle
from ebft.components.optimizers import LR_SCHEDULES, OPTIMIZERS
from ebft.loops.average import Average
from ebft.loops.evaluate import concatenate, evaluate, mean
from ebft.policy import CausalPolicy
from tests.runs import go, metrics, parts


def built(options, **changes):
    options = options | changes
    weights = [torch.nn.Parameter(torch.ones(2, 2))]
    return build_optimizer(weights, settle(options), resolve_run(options))


def test_the_default_is_adamw_as_in_the_paper(options):
    optimizer, _ = built(options)
    assert type(optimizer) is torch.optim.AdamW
    group = optimizer.param_groups[0]
    assert (group["betas"], group["weight_decay"]) == ((0.9, 0.95), 0.0)


def test_an_optimizer_gets_its_options(options):
    optimizer, _ = built(options, optimizer="sgd", momentum=0.7, nesterov=True, weight_decay=0.1)
    group = optimizer.param_groups[0]
    assert (group["momentum"], group["nesterov"], group["weight_decay"]) == (0.7, True, 0.1)
    optimizer, _ = built(options, betas="0.5,0.6", eps=1e-3)
    assert (optimizer.param_groups[0]["betas"], optimizer.param_groups[0]["eps"]) == ((0.5, 0.6), 1e-3)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_of_torch_makes_a_step(options, name):
    optimizer, scheduler = built(options, optimizer=name)
    (weight,) = optimizer.param_groups[0]["params"]
    (weight * torch.tensor([[1.0, 2.0], [-1.0, 3.0]])).sum().backward()
    optimizer.step()
    scheduler.step()
    assert not torch.equal(weight, torch.ones(2, 2))


def rates(options, steps, **changes):
    optimizer, scheduler = built(options, steps=steps, lr=1.0, optimizer="sgd", **changes)
    found = []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


def test_learning_rates_by_hand(options):
    assert rates(options, 4, lr_schedule="constant", warm_up=0.5) == pytest.approx([0.5, 1, 1, 1])
    assert rates(options, 4, lr_schedule="constant", warm_up=0.0) == [1, 1, 1, 1]
    linear = rates(options, 7, lr_schedule="linear", warm_up=0.25, lr_end=0.2)
    assert linear == pytest.approx([0.5, 1, 1, 0.8, 0.6, 0.4, 0.2])
    cosine = rates(options, 7, lr_schedule="cosine", warm_up=0.25, lr_end=0.1)
    half = 0.45 * 0.5**0.5
    assert cosine == pytest.approx([0.5, 1, 1, 0.55 + half, 0.55, 0.55 - half, 0.1])


@pytest.mark.parametrize("name", LR_SCHEDULES)
@pytest.mark.parametrize("steps", [1, 2, 3, 50])
def test_learning_rates_stay_in_range(options, name, steps):
    found = rates(options, steps, lr_schedule=name)
    assert all(0 < rate <= 1 for rate in found)
    assert max(found) == 1


# The average of the weights


def test_the_average_by_hand(options):
    policy, _, _ = parts(options)
    average = Average(policy, 0.9)
    name, weight = next(iter(policy.trainable().items()))
    start = weight.detach().clone()
    expected = start.clone()
    for step in range(3):
        with torch.no_grad():
            weight.add_(1.0 + step)
        average.update()
        expected = 0.9 * expected + 0.1 * weight.detach()
    torch.testing.assert_close(average.state_dict()[name], expected)
    trained = weight.detach().clone()
    with average.applied():
        torch.testing.assert_close(weight.detach(), expected)
    assert torch.equal(weight, trained)


def test_the_average_of_bfloat16_weights_does_not_stand_still(options):
    policy, _, _ = parts(options)
    policy.model.bfloat16()
    average = Average(policy, 0.999)
    name, weight = next(iter(policy.trainable().items()))
    start = weight.detach().float()
    with torch.no_grad():
        weight.mul_(1.5)
    average.update()
    assert not torch.equal(average.state_dict()[name], start)


def test_the_average_is_saved_measured_and_resumed(options, tmp_path):
    chosen = options | {"ema": 0.8, "held_out": 3}
    said = go(chosen, tmp_path / "run")
    assert "its averaged weights (--ema)" in said
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "policy")
    checkpoint = tmp_path / "run" / "checkpoints" / "step-000006"
    last, state = load_file(checkpoint / "weights.safetensors"), torch.load(checkpoint / "optimizer.pt")
    differ = 0
    for name, weight in saved.named_parameters():
        assert torch.equal(weight, state["average"][name])
        differ += not torch.equal(weight, last[name])
    assert differ > 0

    measured = json.loads((tmp_path / "run" / "evaluation.json").read_text())["metrics"]["cross_entropy"]["after"]
    assert measured == pytest.approx(held_out_cross_entropy(chosen, tmp_path / "run" / "policy"), abs=1e-6)

    shutil.copytree(tmp_path / "run", tmp_path / "resumed")
    shutil.rmtree(tmp_path / "resumed" / "checkpoints" / "step-000006")
    shutil.rmtree(tmp_path / "resumed" / "policy")
    go(options, tmp_path / "resumed", resume=True)
    assert metrics(tmp_path / "resumed") == metrics(tmp_path / "run")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "resumed" / "policy")
    for ours, theirs in zip(again.parameters(), saved.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def held_out_cross_entropy(options, folder):
    """Measured anew: the run's held-out rows under the model in `folder`."""
    found = {}

    def keep(*args, **kwargs):
        found.update(kwargs)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("ebft.assemble.run.run", keep)
        go(options, folder.parent.parent / "rows")
    policy = CausalPolicy.from_pretrained(str(folder), device="cpu", dtype="float32")
    _, pipeline, _ = parts(options, policy=str(folder))
    sums = concatenate([s for s, _ in evaluate(policy, pipeline, found["held_out"], batch_size=8, seed=0)])
    return mean(sums["cross_entropy"])


def test_the_last_weights_go_on_training(options, tmp_path):
    """The average is applied for the measurement and taken off again: the checkpoint has the trained weights."""
    go(options | {"held_out": 2}, tmp_path / "plain")
    go(options | {"held_out": 2, "ema": 0.8}, tmp_path / "averaged")
    ours, theirs = (
        load_file(tmp_path / n / "checkpoints/step-000006/weights.safetensors") for n in ("plain", "averaged")
    )
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
