"""Going on with a run: under other options, with other text, after damage; and that no hidden generator matters."""

import csv
import json
import random
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from ebft.errors import UsageError
from ebft.loops import run as run_module
from ebft.loops.train import train
from tests.runs import go, metrics


@pytest.fixture(scope="module")
def short(options):
    """Options of a short run that a checkpoint is taken of after every step."""
    return {**options, "steps": 4, "save_every": 1, "held_out": 4, "keep": 10}


@pytest.fixture(scope="module")
def finished(short, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "finished"
    go(short, out)
    return out


@pytest.fixture
def half(finished, tmp_path):
    """A copy of that run as a kill after step 2 would leave it."""
    out = tmp_path / "half"
    late = ("step-000003", "step-000004", "policy", "evaluation.json", "samples.*", "report.*")
    shutil.copytree(finished, out, ignore=shutil.ignore_patterns(*late))
    return out


def final_weights(out):
    return load_file(out / "policy" / "model.safetensors")


def same_weights(left, right):
    left, right = final_weights(left), final_weights(right)
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


KINDS = {
    "full weights": {},
    "adapters, anchors at random": {"lora": 2, "sampler": "random"},
    "running whitening, adaptive divergence": {"whitening": "population", "decay": 0.9, "kl_target": 0.001},
    "several clipped updates": {"pg": "clipped", "updates": 2, "features": "ngram"},
}


@pytest.mark.parametrize("kind", KINDS)
def test_no_number_of_a_run_comes_from_a_global_generator(short, tmp_path, monkeypatch, kind):
    """Their states are stirred differently before and between all steps: the numbers stay, bit for bit."""

    def stir(seed):
        torch.manual_seed(seed)
        np.random.seed(seed)  # noqa: NPY002
        random.seed(seed)

    drawn = []

    def stirring(*args, **kwargs):
        for record in train(*args, **kwargs):
            yield record
            drawn.append(torch.rand(1).item())
            stir(1000 * seed + int(record["step"]))

    monkeypatch.setattr(run_module, "train", stirring)
    folders = []
    for seed in (1, 2):
        stir(seed)
        folders.append(tmp_path / f"seed {seed}")
        go({**short, "steps": 3, "save_every": 3, **KINDS[kind]}, folders[-1])
    assert len(set(drawn)) == 6  # the generators did differ
    assert metrics(folders[0]) == metrics(folders[1])
    assert same_weights(*folders)


@pytest.mark.parametrize("kind", list(KINDS)[1:])
def test_every_kind_of_run_resumes_bit_for_bit(short, tmp_path, kind):
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    go({**short, **KINDS[kind]}, whole)
    shutil.copytree(whole, resumed, ignore=shutil.ignore_patterns("step-000003", "step-000004", "policy"))
    go(short, resumed, resume=True)
    assert metrics(resumed) == metrics(whole)
    assert same_weights(resumed, whole)
    assert (resumed / "rewards.csv").read_bytes() == (whole / "rewards.csv").read_bytes()


def test_the_files_of_metrics_are_those_of_the_checkpoint(half, finished, short):
    """Whatever happened to them: torn, of later steps, lost."""
    for name, content in (("metrics.csv", b"step,loss\n1,2.0\n2,3."), ("rewards.csv", None)):
        path = half / name
        path.unlink() if content is None else path.write_bytes(content)
    go(short, half, resume=True)
    assert metrics(half) == metrics(finished)
    assert (half / "rewards.csv").read_bytes() == (finished / "rewards.csv").read_bytes()


def test_rewards_are_kept_as_order_statistics_of_each_step(finished):
    with open(finished / "rewards.csv", newline="") as file:
        header, *rows = list(csv.reader(file))
    assert header[0] == "step"
    assert len(rows) == 4
    for row, step in zip(rows, metrics(finished), strict=True):
        values = [float(cell) for cell in row[1:]]
        assert values == sorted(values)
        assert row[0] == step["step"]
        assert np.mean(values) == pytest.approx(float(step["reward"]), abs=0.5 * np.ptp(values) / len(values) + 1e-6)


def test_forced_options_are_gone_on_with_and_recorded(half, finished, short):
    changed = {**short, "lr": 0.5, "steps": 5}
    with pytest.raises(
        UsageError, match=r"--lr 0\.5 \(was 0\.01\), --steps 5 \(was 4\): leave them out, or .* --force"
    ):
        go(changed, half, resume=True, explicit={"lr", "steps"})
    assert json.loads((half / "config.json").read_text())["options"] == short

    go(changed, half, resume=True, force=True, explicit={"lr", "steps"})
    config = json.loads((half / "config.json").read_text())
    assert config["options"] == changed
    (change,) = config["changes"]
    assert change == {"from_step": 2, "options": {"lr": {"was": 0.01, "now": 0.5}, "steps": {"was": 4, "now": 5}}}
    rates = [float(row["learning_rate"]) for row in metrics(half)]
    assert rates[:2] == [float(row["learning_rate"]) for row in metrics(finished)[:2]]
    fresh = half.parent / "fresh"
    go(changed, fresh)
    assert rates[2:] == [float(row["learning_rate"]) for row in metrics(fresh)[2:]]
    assert (half / "before.json").read_bytes() == (finished / "before.json").read_bytes()

    go(short, half, resume=True)  # and from now on the new options are those of the run
    assert len(json.loads((half / "config.json").read_text())["changes"]) == 1


def test_a_forced_option_that_changes_the_measurement_has_the_start_measured_again(half, finished, short, tmp_path):
    changed = {**short, "features": "ngram", "held_out": 3}
    go(changed, half, resume=True, force=True, explicit={"features", "held_out"})
    fresh = tmp_path / "fresh"
    go({**changed, "steps": 1}, fresh)
    assert json.loads((half / "before.json").read_text()) == json.loads((fresh / "before.json").read_text())
    assert metrics(half)[:2] == metrics(finished)[:2]


def test_forced_parts_without_a_state_start_anew_and_are_named(half, short):
    changed = {**short, "kl_target": 0.001, "whitening": "population"}
    printed = go(changed, half, resume=True, force=True, explicit={"kl_target", "whitening"})
    for name in ("controller", "whitening"):
        assert f"holds no state for this {name}" in " ".join(printed.split())
    assert len(metrics(half)) == 4


def test_other_text_is_refused_and_may_be_forced(finished, short, tiny_text, tmp_path):
    text, out = tmp_path / "text", tmp_path / "run"
    shutil.copytree(tiny_text, text)
    chosen = {**short, "data": str(text), "steps": 1}
    go(chosen, out)
    for path in text.glob("*.py"):
        path.write_text(path.read_text().replace("return", "yield"))
    with pytest.raises(UsageError, match=r"--data is not the text that .* began with"):
        go(chosen, out, resume=True)
    go({**chosen, "steps": 2}, out, resume=True, force=True, explicit={"steps"})
    (change,) = json.loads((out / "config.json").read_text())["changes"]
    assert change["sequences"]["was"] != change["sequences"]["now"]
    go(chosen, out, resume=True)


def test_an_option_that_came_after_the_run_began_has_its_default(half, finished, short):
    config = json.loads((half / "config.json").read_text())
    del config["options"]["checkpointing"]
    (half / "config.json").write_text(json.dumps(config))
    with pytest.raises(UsageError, match=r"--checkpointing True \(was False\)"):
        go({**short, "checkpointing": True}, half, resume=True, explicit={"checkpointing"})
    go(short, half, resume=True, explicit={"checkpointing"})
    assert metrics(half) == metrics(finished)


def test_force_without_resume_is_refused(short, tmp_path):
    with pytest.raises(UsageError, match="--force goes with --resume"):
        go(short, tmp_path / "run", force=True)
    assert list(tmp_path.iterdir()) == []


def test_other_versions_are_told(half, short):
    config = json.loads((half / "config.json").read_text())
    config["versions"]["torch"] = "1.0"
    (half / "config.json").write_text(json.dumps(config))
    printed = " ".join(go(short, half, resume=True).split())
    assert f"torch {torch.__version__} (was 1.0)" in printed


def test_damaged_checkpoints_are_passed_over_and_give_way_to_the_new_ones(half, finished, short):
    """Two damaged ones of later steps must not count among the newest that are kept."""
    for step in (1, 2):
        source = half / "checkpoints" / f"step-00000{step}"
        target = half / "checkpoints" / f"step-00001{step}"
        shutil.copytree(source, target)
        (target / "optimizer.pt").write_bytes(b"")
    printed = " ".join(go({**short, "keep": 2}, half, resume=True, force=True, explicit={"keep"}).split())
    assert printed.count("is damaged") >= 2
    assert metrics(half) == metrics(finished)
    assert same_weights(half, finished)
    kept = sorted(path.name for path in (half / "checkpoints").iterdir())
    assert kept == ["step-000003", "step-000004"]
