"""The feature-matching loss over the horizon, as a run measures, writes and shows it."""

import json
import math

import pytest
import torch

from ebft import schema
from ebft.loops.evaluate import concatenate, evaluate, mean
from ebft.loops.held_out import Held, profile_of
from ebft.loops.report_profile import check_profile
from ebft.loops.stages import at_step
from ebft.loops.summary import horizon_profile
from tests.runs import go, parts


def measured(options, **changes):
    policy, pipeline, rows = parts(options, **changes)
    found = [sums for sums, _ in evaluate(policy, pipeline, rows, batch_size=3, seed=0, profile=True)]
    batch = at_step(rows.clone(), seed=0, step=-1)
    for stage in pipeline.values():
        batch = stage(batch)
    return {int(g): mean(pair) for g, pair in concatenate([part["profile"] for part in found]).items()}, batch, pipeline


def by_hand(td):
    """(5) of every real anchor: the mean over pairs of rollouts of (φ_j - φ(y))·(φ_k - φ(y))."""
    off = (td[schema.ROLLOUT_FEATURES] - td[schema.TARGET_FEATURES][:, :, None])[td[schema.ANCHOR_MASK]].double()
    products = off @ off.mT
    count = off.shape[1]
    pairs = products.sum((-2, -1)) - products.diagonal(dim1=-2, dim2=-1).sum(-1)
    return (pairs / (count * (count - 1))).mean().item()


@pytest.mark.parametrize("features", [{"features": "ngram", "ngram": 1, "rollouts": 8}, {"features": "hidden"}])
def test_every_horizon_is_that_of_the_first_tokens(options, features):
    """Tokens are cut by hand, and what is left embedded as a sampler of that horizon would have it."""
    found, td, pipeline = measured(options, **features, horizon=6)
    assert list(found) == [1, 2, 4, 6]
    for g, value in found.items():
        cut = td.exclude(schema.ROLLOUT_FEATURES, schema.TARGET_FEATURES)
        for part in ("tokens", "mask"):
            cut["rollout", part] = td["rollout", part][:, :, :, :g]
            cut["target", part] = td["target", part][:, :, :g]
        assert value == pytest.approx(by_hand(pipeline["embed"](cut)), rel=1e-4, abs=1e-6)
    assert len({round(value, 6) for value in found.values()}) == 4


def test_features_of_tokens_give_the_same_profile_without_embedding_again(options):
    chosen = {"features": "hidden", "pooling": "none", "credit": "reward_to_go", "horizon": 4}
    found, td, _ = measured(options, **chosen)
    known = {int(name.rpartition("_")[2]): float(value) for name, value in horizon_profile(td).items()}
    assert found == pytest.approx(known, rel=1e-4)


def test_a_run_writes_and_shows_it(options, tmp_path):
    said = go(options | {"steps": 2}, tmp_path / "run")
    profile = check_profile(json.loads((tmp_path / "run" / "profile.json").read_text()))
    result = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert profile["horizons"] == [1, 2, 4]
    assert result["profile"] == profile
    whole = result["metrics"]["feature_matching_loss"]
    assert (profile["before"][-1], profile["after"][-1]) == (whole["before"], whole["after"])
    assert all(error > 0 for when in ("before", "after") for error in profile[f"{when}_standard_error"])
    assert f"1: {profile['before'][0]:.4f} → {profile['after'][0]:.4f}, 2: " in " ".join(said.split())
    assert "Loss over the horizon" in (tmp_path / "run" / "report.html").read_text()


def test_the_error_is_that_of_a_ratio_over_sequences():
    total, count = torch.tensor([2.0, 9.0, 1.0]).double(), torch.tensor([1.0, 3.0, 2.0]).double()
    held = Held({}, [], {"1": (total, count)})
    later = Held({}, [], {"1": (total * 2, count), "2": (total, count)})
    found = profile_of(held, later)
    assert (found["horizons"], found["before"], found["after"]) == ([1], [2.0], [4.0])
    residual = total - 2 * count
    error = math.sqrt(float(residual.square().sum()) * 3 / 2) / 6
    assert found["before_standard_error"] == pytest.approx([error])
    assert found["after_standard_error"] == pytest.approx([2 * error])
    assert profile_of(held, Held({}, [])) == {}
