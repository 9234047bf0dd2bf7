"""Checkpoints: bit for bit, atomic, and honest about damage."""

import errno
import json

import pytest
import torch
from safetensors import SafetensorError

from ebft.errors import UsageError
from ebft.loops import checkpoint
from ebft.policy import CausalPolicy
from tests.models import tiny

FULL_DISK = {
    "file": OSError(errno.ENOSPC, "No space left on device"),
    "quota": OSError(errno.EDQUOT, "Disk quota exceeded"),
    "safetensors": SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
}


class Training:
    """A tiny policy with an optimizer and a schedule, and a step that changes all of them."""

    def __init__(self, name="llama", seed=0):
        self.policy = CausalPolicy(tiny(name, seed=seed))
        self.optimizer = torch.optim.AdamW(self.policy.trainable().values(), lr=1e-2)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: 1 / (1 + step))

    def step(self, seed):
        generator = torch.Generator().manual_seed(seed)
        for parameter in self.policy.trainable().values():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        self.optimizer.step()
        self.scheduler.step()

    def saved(self):
        return {"policy": self.policy, "optimizer": self.optimizer}

    def parts(self):
        return {**self.saved(), "scheduler": self.scheduler}

    def weights(self):
        return torch.cat([p.detach().flatten() for p in self.policy.trainable().values()])


def test_restored_training_goes_on_bit_for_bit(tmp_path):
    original, restored = Training(), Training(seed=1)
    for seed in range(3):
        original.step(seed)
    checkpoint.save(tmp_path, 3, **original.saved())
    assert not torch.equal(original.weights(), restored.weights())
    assert checkpoint.restore(tmp_path, **restored.parts()) == 3
    assert torch.equal(original.weights(), restored.weights())
    for seed in range(3, 5):  # with the optimizer's moments and the schedule's step, which the weights do not show
        original.step(seed)
        restored.step(seed)
        assert torch.equal(original.weights(), restored.weights())
    assert original.scheduler.get_last_lr() == restored.scheduler.get_last_lr()


def test_nothing_to_restore(tmp_path):
    training = Training()
    before = training.weights()
    assert checkpoint.restore(tmp_path / "absent", **training.parts()) == 0
    assert torch.equal(training.weights(), before)


def test_the_newest_two_are_kept(tmp_path):
    training = Training()
    for step in (1, 2, 10, 11):
        checkpoint.save(tmp_path, step, **training.saved())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000010", "step-000011"]
    assert checkpoint.restore(tmp_path, **training.parts()) == 11


@pytest.mark.parametrize("damage", ["flipped byte", "cut short", "missing file", "no manifest", "broken manifest"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(tmp_path, damage):
    training = Training()
    checkpoint.save(tmp_path, 1, **training.saved())
    good = training.weights()
    training.step(0)
    newest = checkpoint.save(tmp_path, 2, **training.saved())
    weights, manifest = newest / "weights.safetensors", newest / "manifest.json"
    content = bytearray(weights.read_bytes())
    if damage == "flipped byte":
        content[-1] ^= 1
        weights.write_bytes(content)
    elif damage == "cut short":
        weights.write_bytes(content[:-4])
    elif damage == "missing file":
        (newest / "optimizer.pt").unlink()
    elif damage == "no manifest":
        manifest.unlink()
    else:
        manifest.write_text(json.dumps({"step": 2}))

    warnings = []
    assert checkpoint.restore(tmp_path, **training.parts(), warn=warnings.append) == 1
    assert torch.equal(training.weights(), good)
    (warning,) = warnings
    assert str(newest) in warning
    assert "damaged" in warning


@pytest.mark.parametrize("reason", FULL_DISK)
def test_a_full_disk_is_told_and_leaves_what_was_there(tmp_path, monkeypatch, reason):
    training = Training()
    kept = checkpoint.save(tmp_path, 1, **training.saved())
    content = {path.name: path.read_bytes() for path in kept.iterdir()}

    def full(weights, path):
        path.write_bytes(b"half of it")
        raise FULL_DISK[reason]

    monkeypatch.setattr(checkpoint, "save_file", full)
    for step in (1, 2):
        with pytest.raises(UsageError, match=f"step-00000{step} could not be written: .*(space|quota)"):
            checkpoint.save(tmp_path, step, **training.saved())
    assert list(tmp_path.iterdir()) == [kept]
    assert {path.name: path.read_bytes() for path in kept.iterdir()} == content


def test_a_full_disk_while_the_optimizer_is_written(tmp_path, monkeypatch):
    """torch reports it as a RuntimeError, raised while it handles the OSError of the file."""

    def full(state, file):
        try:
            raise FULL_DISK["file"]
        except OSError:
            raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 704 vs 598")  # noqa: B904

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(UsageError, match="no space is left"):
        checkpoint.save(tmp_path, 1, **Training().saved())
    assert list(tmp_path.iterdir()) == []


def test_other_errors_while_writing_are_not_disguised(tmp_path, monkeypatch):
    training = Training()
    kept = checkpoint.save(tmp_path, 1, **training.saved())

    def fail(*args):
        raise RuntimeError("something else")

    monkeypatch.setattr(checkpoint, "save_file", fail)
    with pytest.raises(RuntimeError, match="something else"):
        checkpoint.save(tmp_path, 2, **training.saved())
    assert list(tmp_path.iterdir()) == [kept]
    assert checkpoint.restore(tmp_path, **training.parts()) == 1


def test_a_checkpoint_whose_last_rename_fails_is_put_back(tmp_path, monkeypatch):
    training = Training()
    kept = checkpoint.save(tmp_path, 1, **training.saved())
    rename = type(kept).rename

    def fail(self, target):
        if self.name.endswith(".tmp"):
            raise FULL_DISK["file"]
        return rename(self, target)

    monkeypatch.setattr(type(kept), "rename", fail)
    with pytest.raises(UsageError, match="no space is left"):
        checkpoint.save(tmp_path, 1, **training.saved())
    assert list(tmp_path.iterdir()) == [kept]
    assert checkpoint.restore(tmp_path, **training.parts()) == 1


def test_a_process_killed_while_writing_leaves_nothing_that_counts(tmp_path):
    training = Training()
    checkpoint.save(tmp_path, 1, **training.saved())
    (tmp_path / ".step-000002.tmp").mkdir()
    (tmp_path / ".step-000002.tmp" / "weights.safetensors").write_bytes(b"half of it")
    assert checkpoint.restore(tmp_path, **training.parts()) == 1
    checkpoint.save(tmp_path, 2, **training.saved())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000001", "step-000002"]


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    path = checkpoint.save(tmp_path, 1, **Training("llama").saved())
    with pytest.raises(UsageError, match=f"{path} is of another model: .* weights differ"):
        checkpoint.restore(tmp_path, **Training("gpt2").parts())


def test_any_flipped_byte_of_the_manifest_is_noticed_or_means_nothing(tmp_path):
    training = Training()
    path = checkpoint.save(tmp_path, 7, **training.saved()) / "manifest.json"
    content = path.read_bytes()
    noticed = 0
    for position in range(len(content)):
        path.write_bytes(content[:position] + bytes([content[position] ^ 4]) + content[position + 1 :])
        found = checkpoint.newest(tmp_path, warn=lambda message: None)
        noticed += found is None
        if found:
            assert json.loads(path.read_bytes()) == json.loads(content)
    assert noticed > 0.9 * len(content)
    path.write_bytes(content)
    assert checkpoint.newest(tmp_path) == path.parent


def test_more_than_a_million_steps_are_in_order(tmp_path):
    training = Training()
    for step in (999_999, 1_000_000):
        checkpoint.save(tmp_path, step, **training.saved())
    newest = checkpoint.newest(tmp_path)
    assert newest is not None
    assert newest.name == "step-1000000"
    (tmp_path / "step-of-mine").mkdir()
    checkpoint.save(tmp_path, 1_000_001, keep=1, **training.saved())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-1000001", "step-of-mine"]


def test_hyperparameters_are_those_of_the_new_optimizer_and_schedule(tmp_path):
    original, restored = Training(), Training(seed=1)
    original.step(0)
    checkpoint.save(tmp_path, 1, **original.saved())
    restored.optimizer = torch.optim.AdamW(restored.policy.trainable().values(), lr=0.5, weight_decay=0.25)
    restored.scheduler = torch.optim.lr_scheduler.LambdaLR(restored.optimizer, lambda step: 10 + step)
    checkpoint.restore(tmp_path, **restored.parts())
    (group,) = restored.optimizer.param_groups
    assert (group["lr"], group["weight_decay"]) == (0.5 * 11, 0.25)
    first = next(iter(restored.policy.trainable().values()))
    moment = original.optimizer.state[next(iter(original.policy.trainable().values()))]["exp_avg"]
    assert torch.equal(restored.optimizer.state[first]["exp_avg"], moment)


@pytest.mark.parametrize("name", ["CosineAnnealingLR", "ExponentialLR", "OneCycleLR", "SequentialLR"])
def test_schedules_of_torch_are_restored_bit_for_bit(tmp_path, name):
    def make(training):
        schedules, optimizer = torch.optim.lr_scheduler, training.optimizer
        if name == "SequentialLR":
            parts = [schedules.LinearLR(optimizer), schedules.ExponentialLR(optimizer, 0.9)]
            training.scheduler = schedules.SequentialLR(optimizer, parts, milestones=[2])
        else:
            options = {"CosineAnnealingLR": {"T_max": 9}, "ExponentialLR": {"gamma": 0.9}, "OneCycleLR": {"max_lr": 1}}
            options["OneCycleLR"]["total_steps"] = 9
            training.scheduler = getattr(schedules, name)(optimizer, **options[name])
        return training

    original, restored = make(Training()), make(Training(seed=1))
    for seed in range(4):
        original.step(seed)
    checkpoint.save(tmp_path, 4, **original.saved())
    checkpoint.restore(tmp_path, **restored.parts())
    for seed in range(4, 7):
        assert original.optimizer.param_groups[0]["lr"] == restored.optimizer.param_groups[0]["lr"]
        original.step(seed)
        restored.step(seed)
        assert torch.equal(original.weights(), restored.weights())


def test_another_kind_of_optimizer_starts_anew_and_is_named(tmp_path):
    original, restored = Training(), Training(seed=1)
    original.step(0)
    checkpoint.save(tmp_path, 1, **original.saved())
    restored.optimizer = torch.optim.SGD(restored.policy.trainable().values(), lr=0.1)
    restored.scheduler = torch.optim.lr_scheduler.LambdaLR(restored.optimizer, lambda step: 1.0)
    warnings = []
    assert checkpoint.restore(tmp_path, **restored.parts(), warn=warnings.append) == 1
    assert len(restored.optimizer.state) == 0
    assert "AdamW: SGD starts anew" in warnings[0]


def test_a_scheduler_beyond_the_checkpoint_is_refused(tmp_path):
    training = Training()
    training.step(0)
    checkpoint.save(tmp_path, 1, **training.saved())
    training.step(0)
    with pytest.raises(UsageError, match="scheduler is at step 2, the checkpoint at 1"):
        checkpoint.restore(tmp_path, **training.parts())
