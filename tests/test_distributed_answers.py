"""Two processes that train on whole answers, alone and beside feature matching, make the updates of one."""

import json
import sys

import pytest
import torch
from safetensors.torch import load_file

from tests.processes import close, left_by
from tests.processes_answers import KINDS, VARIANTS

# What a batch is divided into, and time, differ.
OF_THE_DIVISION = ("time_", "tokens_per_second", "gradient_signal_to_noise")

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the harness forks")

folder, results = left_by("tests.processes_answers")


@pytest.mark.parametrize("how", [2, *VARIANTS])
@pytest.mark.parametrize("kind", KINDS)
def test_metrics_and_weights_are_those_of_one_process(results, folder, kind, how):
    (alone,), several = results[kind, 1], results[kind, how]
    start = load_file(folder / "model" / "model.safetensors")
    moved = max((w - start.get(name, torch.zeros_like(w))).abs().max() for name, w in alone["weights"].items())
    assert moved > 1e-3
    assert len(several) == 2
    for own in several:
        assert len(own["rollouts"]) == len(alone["rollouts"]) == 2
        assert all(map(torch.equal, own["rollouts"], alone["rollouts"]))
        for ours, theirs in zip(own["records"], alone["records"], strict=True):
            assert {name for name in theirs if not name.startswith(OF_THE_DIVISION)} - set(ours) == set()
            for name in theirs.keys() & ours.keys():
                if not name.startswith(OF_THE_DIVISION):
                    assert close(ours[name], theirs[name]), (name, ours[name], theirs[name])
        for name, weight in own["weights"].items():
            torch.testing.assert_close(weight, alone["weights"][name], atol=2e-6, rtol=0)
            assert torch.equal(weight, several[0]["weights"][name])  # to the last bit among the processes


@pytest.mark.parametrize(
    ("kind", "wanted"),
    [
        ("rlvr", {"answer_tokens", "loss_policy_gradient", "reward", "kl"}),
        ("mixed", {"answers_tokens", "loss_answers_policy_gradient", "answers_reward", "feature_matching_loss"}),
    ],
)
def test_the_metrics_are_those_of_the_method(results, kind, wanted):
    (alone,) = results[kind, 1]
    assert wanted <= set(alone["records"][0])
    name = "answers_reward" if kind == "mixed" else "reward"
    assert len({record[name] for record in alone["records"]}) == 2


@pytest.mark.parametrize("how", [2, *VARIANTS])
@pytest.mark.parametrize("kind", KINDS)
def test_held_out_measurements_are_those_of_one_process(folder, kind, how):
    first, other = (json.loads((folder / f"{kind} {count}" / "evaluation.json").read_text()) for count in (1, how))
    assert first["metrics"].keys() == other["metrics"].keys() >= {"reward", *["answers_reward"] * (kind == "mixed")}
    for name, row in first["metrics"].items():
        for key, value in row.items():
            assert close(other["metrics"][name][key], value), (name, key)
