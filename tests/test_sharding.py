"""Processes that share the weights make the update of one that has them all; any go on from their checkpoints."""

import math
import sys

import pytest
import torch
from safetensors.torch import load_file

from ebft.assemble import resolve_run
from ebft.commands.derived import run_defaults
from ebft.errors import UsageError
from ebft.loops.numbers import own_parts, part_shares
from tests.processes import HALVES, LOST, check_halves, close, left_by
from tests.runs import go, metrics
from tests.sharded import COUNTS_OF

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the harness forks")
SHARDED = [(kind, count) for kind, counts in COUNTS_OF.items() for count in counts]

folder, results = left_by("tests.sharded")


@linux
@pytest.mark.parametrize(("kind", "count"), SHARDED)
def test_a_sharded_run_is_the_run_of_one_process(results, folder, kind, count):
    """Rollouts, every metric (the norm of the gradient, the terms of the loss), the trained weights and the files."""
    (alone,), several = results[kind, 1], results[kind, count]
    for own in several:
        assert len(own["rollouts"]) == len(alone["rollouts"]) == 2
        assert all(map(torch.equal, own["rollouts"], alone["rollouts"]))
        for ours, theirs in zip(own["records"], alone["records"], strict=True):
            for name in theirs:
                if not name.startswith(("time_", "tokens_per_second", "gradient_signal_to_noise")):
                    assert close(ours[name], theirs[name]), (name, ours[name], theirs[name])
        for name, weight in own["weights"].items():
            torch.testing.assert_close(weight, alone["weights"][name], atol=2e-6, rtol=0)
            assert torch.equal(weight, several[0]["weights"][name])
    first, other = (folder / f"{kind} {number}" for number in (1, count))
    assert {path.name for path in first.iterdir()} == {path.name for path in other.iterdir()}
    ours, theirs = (load_file(out / "policy" / "model.safetensors") for out in (other, first))
    start = load_file(folder / "model" / "model.safetensors")
    assert ours.keys() == theirs.keys()
    assert max((theirs[name] - weight).abs().max() for name, weight in start.items()) > 1e-3
    for name, weight in theirs.items():
        torch.testing.assert_close(ours[name], weight, atol=3e-6, rtol=0)


@linux
@pytest.mark.parametrize("kind", HALVES)
def test_bfloat16_of_sharded_processes(results, folder, kind):
    check_halves(folder, results, kind)


@linux
@pytest.mark.parametrize(("kind", "count"), SHARDED)
def test_each_process_holds_its_share_alone(results, kind, count):
    """The shares add up to the whole, and none is more than a row of each matrix above an equal one."""
    (alone,), several = results[kind, 1], results[kind, count]
    for what in ("weights", "states"):
        held = [own["held"][what] for own in several]
        assert sum(held) == alone["held"][what]
        if kind == "full weights":
            assert alone["held"][what] > 1000
            assert max(held) < 1.15 * alone["held"][what] / count, (what, held)


@linux
def test_signal_to_noise_between_the_parts_of_all_processes(results):
    """2 processes score 2 + 2 and then 1 + 0 rows, 4 score their rows at once."""
    for own in results["full weights", 2]:
        assert all(math.isfinite(record["gradient_signal_to_noise"]) for record in own["records"])
    assert not any("gradient_signal_to_noise" in record for record in results["full weights", 4][0]["records"])


@linux
def test_any_number_of_processes_goes_on_from_a_checkpoint_in_shares(results, folder):
    """Of 4 processes one fails in the 3rd step; 2 and 1 go on, and 2 that each hold all weights."""
    said = results["broken"]
    assert said[1] == "UsageError: process 1 has had enough (told: False)"
    for other in (said[0], *said[2:]):
        assert other.startswith(f"{LOST}: another process of this run ended ("), other
        assert f"`run --resume --out {folder / 'broken'}` goes on from the last checkpoint" in other
    kept = sorted((folder / "broken" / "checkpoints").iterdir())
    assert [path.name for path in kept] == ["step-000001", "step-000002"]
    assert len(list(kept[1].glob("shard-*.safetensors"))) == 4
    assert not (kept[1] / "weights.safetensors").exists()
    whole = metrics(folder / "never broken")
    assert len(whole) == 4
    for count in (2, 1, "unshared"):
        for ours, theirs in zip(metrics(folder / f"mended {count}"), whole, strict=True):
            for key in ("step", "loss", "reward", "cross_entropy", "gradient_norm", "learning_rate", "kl"):
                assert close(float(ours[key]), float(theirs[key])), (count, key)
        weights, wanted = (
            load_file(out / "policy" / "model.safetensors")
            for out in (folder / f"mended {count}", folder / "never broken")
        )
        for key, weight in wanted.items():
            torch.testing.assert_close(weights[key], weight, atol=3e-6, rtol=0)
    assert "one process has nothing to share" in results["mended", 1][0]["said"]
    shared, unshared = (results["mended", kind][0]["held"]["weights"] for kind in (2, "unshared"))
    assert unshared > 1.7 * shared


@linux
@pytest.mark.parametrize(("writers", "readers"), [(4, 3), (1, 2)])
def test_a_checkpoint_holds_everything_to_the_last_bit(results, writers, readers):
    """Weights, both moments and the steps of AdamW, an average: by 4 that share for 2 and for 1; by 1 for 2."""
    saved, read = results["written", writers][0], results["read", writers]
    assert len(read) == readers
    assert {name.split()[-1] for name in saved} >= {"exp_avg", "exp_avg_sq", "step"}
    for own in read:
        assert own.keys() == saved.keys()
        assert all(torch.equal(own[name], value) for name, value in saved.items())


@linux
def test_every_optimizer_that_takes_shares(results):
    assert {"adam", "adamw", "sgd", "rmsprop", "nadam"} <= results["optimizers"][0].keys()
    for own in results["optimizers"]:
        for name, (plain, sharded) in own.items():
            for key, weight in plain.items():
                torch.testing.assert_close(sharded[key], weight, atol=1e-6, rtol=0, msg=f"{name}: {key}")


def test_parts_of_processes_that_go_together(monkeypatch):
    """Of 5 rows for 4 processes, one at a time: the first has 2, the others one and one more that does not count."""
    rows = torch.arange(5)
    for process in range(4):
        monkeypatch.setattr("ebft.distributed.size", lambda: 4)
        monkeypatch.setattr("ebft.distributed.rank", lambda process=process: process)
        found = [(part.tolist(), counts) for part, counts in own_parts(rows, 1, alike=True)]
        assert found == ([([0], True), ([1], True)] if not process else [([process + 1], True), ([0], False)])
        assert len(own_parts(rows, 1)) == (1 if process else 2)
    monkeypatch.setattr("ebft.loops.numbers.size", lambda: 4)
    assert part_shares(5, 1, alike=True) == [[0.8, 1.0]]
    assert part_shares(5, 2, alike=True) == []
    assert part_shares(5, 1) == [[0.2, 0.4], [0.2], [0.2], [0.2]]


def test_what_cannot_be_shared_is_refused():
    with pytest.raises(UsageError, match="--optimizer muon with --shard"):
        resolve_run({**run_defaults(), "shard": True, "optimizer": "muon"})
    with pytest.raises(UsageError, match="--offload-reference with --shard"):
        resolve_run({**run_defaults(), "shard": True, "offload_reference": True})


def test_one_process_has_nothing_to_share(tiny_folder, tiny_text, options, tmp_path):
    said = go({**options, "shard": True, "steps": 1, "features": "ngram"}, tmp_path / "run")
    assert "--shard: one process has nothing to share; it trains as without" in said
