"""Several processes make the update of one: the same rollouts, metrics and weights, whatever there are of rows."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from ebft import distributed
from ebft.components.features import frozen_network
from ebft.distributed import by_items, by_rows, check_same, share, started
from ebft.errors import UsageError
from ebft.loading import choose_device
from ebft.loops.interrupt import stop_requests
from ebft.policy import CausalPolicy
from tests.processes import COUNTS, COUNTS_OF, HALVES, LOST, ROOT, check_halves, close, free_port, left_by
from tests.runs import go, metrics

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the harness forks, and reads /proc")
SEVERAL = [count for count in COUNTS if count > 1]

folder, results = left_by("tests.processes")


@linux
@pytest.mark.parametrize(("kind", "count"), [(kind, count) for kind, counts in COUNTS_OF.items() for count in counts])
def test_a_run_of_several_processes_is_the_run_of_one(results, folder, kind, count):
    (alone,), several = results[kind, 1], results[kind, count]
    start = load_file(folder / "model" / "model.safetensors")
    moved = max((w - start.get(name, torch.zeros_like(w))).abs().max() for name, w in alone["weights"].items())
    assert moved > 1e-3
    for own in several:
        assert all(map(torch.equal, own["rollouts"], alone["rollouts"]))
        assert len(own["rollouts"]) == len(alone["rollouts"]) == 2
        for ours, theirs in zip(own["records"], alone["records"], strict=True):
            assert {name for name in theirs if not name.startswith("time_")} - set(ours) == set()
            for name in theirs.keys() & ours.keys():
                if not name.startswith(("time_", "tokens_per_second", "gradient_signal_to_noise")):
                    assert close(ours[name], theirs[name]), (name, ours[name], theirs[name])
        for name, weight in own["weights"].items():
            torch.testing.assert_close(weight, alone["weights"][name], atol=2e-6, rtol=0)
            assert torch.equal(weight, several[0]["weights"][name])  # to the last bit among the processes


@linux
@pytest.mark.parametrize("kind", HALVES)
def test_bfloat16_of_several_processes(results, folder, kind):
    check_halves(folder, results, kind)


@linux
@pytest.mark.parametrize("kind", ["full weights", "adapters"])
def test_one_process_writes_and_speaks(results, folder, kind):
    alone, several = folder / f"{kind} 1", folder / f"{kind} 2"
    assert {path.name for path in several.iterdir()} == {path.name for path in alone.iterdir()}
    assert len(metrics(several)) == 2
    assert "training 2/2" in results[kind, 2][0]["said"]  # `go` gives every process a console
    first, other = (json.loads((out / "evaluation.json").read_text()) for out in (alone, several))
    for name, row in first["metrics"].items():
        for key, value in row.items():
            assert close(other["metrics"][name][key], value), (name, key)
    saved = AutoModelForCausalLM.from_pretrained(several / "policy")
    twin = AutoModelForCausalLM.from_pretrained(alone / "policy")
    for ours, theirs in zip(saved.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, atol=3e-6, rtol=0)
    assert json.loads((several / "config.json").read_text())["machine"]["processes"] == 2


@linux
def test_the_metric_that_parts_give_is_there_wherever_there_are_parts(results):
    """Its value depends on how the batch was divided; `test_signal_and_noise_from_any_parts` is about its mean."""
    for count in COUNTS:
        for own in results["full weights", count]:
            assert [r["gradient_signal_to_noise"] for r in own["records"]] == pytest.approx(
                [r["gradient_signal_to_noise"] for r in results["full weights", count][0]["records"]]
            )
    assert "gradient_signal_to_noise" not in results["rows without anchors", 1][0]["record"]
    assert "gradient_signal_to_noise" in results["rows without anchors", 2][0]["record"]


@linux
@pytest.mark.parametrize("count", SEVERAL)
def test_a_process_whose_rows_have_no_anchor_is_no_error(results, count):
    (alone,) = results["rows without anchors", 1]
    assert alone["record"]["gradient_norm"] > 1
    for own in results["rows without anchors", count]:
        for name in ("loss", "reward", "cross_entropy", "kl", "gradient_norm", "feature_matching_loss"):
            assert close(own["record"][name], alone["record"][name]), name
        for name, weight in own["weights"].items():
            torch.testing.assert_close(weight, alone["weights"][name], atol=1e-6, rtol=0)


@linux
def test_the_pieces(results):
    pieces = results["pieces"]
    assert len(pieces) == 4
    wanted_shares = {1: "0 1 1 1 1", 3: "0 1 2 3 3", 8: "0 2 4 6 8", 9: "0 3 5 7 9"}
    for count, text in wanted_shares.items():
        ends = list(map(int, text.split()))
        assert [own["share", count] for own in pieces] == list(pairwise(ends))
        x = torch.arange(count, dtype=torch.float64)
        for own, (start, stop) in zip(pieces, pairwise(ends), strict=True):
            doubled, large, wide, seen = own["rows", count]
            assert torch.equal(doubled, 2 * x)
            assert torch.equal(large, x > 4)
            assert torch.equal(wide, x.to(torch.bfloat16)[:, None].expand(-1, 2))
            assert seen == ([stop - start] if stop > start else [])  # each works on its own rows alone
            assert torch.equal(own["one tensor", count], x + 1)
            assert own["items", count].tolist() == [2 * i for i in range(count)]
    for own in pieces:
        first, nothing, third = own["gradients"]
        assert torch.equal(first, torch.full((3,), 1.0 + 2 + 3 + 4))
        assert nothing is None  # an optimizer skips it, as it does for one process
        assert torch.equal(third, torch.full((4,), 3.0, dtype=torch.bfloat16))
        assert own["any"] == [True, True, False]
        assert own["different"].startswith("the weights are not the same in process 2 as in process 0")


@linux
def test_a_process_that_raises_ends_the_run_which_any_number_of_processes_resumes(results, folder):
    first, second = results["broken"]
    assert second == "UsageError: process 1 has had enough (told: False)"
    assert first.startswith(f"{LOST}: another process of this run ended (")
    assert f"`run --resume --out {folder / 'broken'}` goes on from the last checkpoint (told: False)" in first
    assert [path.name for path in sorted((folder / "broken" / "checkpoints").iterdir())] == [
        "step-000001",
        "step-000002",
    ]
    whole = metrics(folder / "never broken")
    assert len(whole) == 4
    for count in (1, 2):
        rows = metrics(folder / f"mended {count}")
        for ours, theirs in zip(rows, whole, strict=True):
            for name in ("step", "loss", "reward", "cross_entropy", "gradient_norm", "learning_rate", "kl"):
                assert close(float(ours[name]), float(theirs[name])), name
        ours, theirs = (
            load_file(out / "policy" / "model.safetensors")
            for out in (folder / f"mended {count}", folder / "never broken")
        )
        for name, weight in theirs.items():
            torch.testing.assert_close(ours[name], weight, atol=3e-6, rtol=0)


@pytest.mark.parametrize("processes", [1, 2])
def test_of_several_processes_one_that_ends_with_an_error_outlives_what_torchrun_sends(processes, monkeypatch):
    monkeypatch.setattr("ebft.loops.interrupt.size", lambda: processes)
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    heard = []
    try:
        for number in before:
            signal.signal(number, lambda *_: heard.append(1))
        with pytest.raises(UsageError), stop_requests():
            raise UsageError("it cannot go on")
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        assert len(heard) == (2 if processes == 1 else 0)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_a_second_signal_does_nothing_where_one_of_several_processes_works_by_itself(monkeypatch):
    processes = [2]
    monkeypatch.setattr("ebft.loops.interrupt.size", lambda: processes[0])
    monkeypatch.setattr("ebft.loops.interrupt.any_process", bool)
    with stop_requests() as stop:
        processes[0] = 1  # as inside `alone`
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
        assert stop()
    with stop_requests():
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


@linux
def test_torchrun_and_a_process_that_is_killed(tiny_folder, tiny_text, options, tmp_path):
    """The command that people type; the second of two processes gets SIGKILL, and one process ends the run.

    They share the weights, so that one may miss the other in any of FSDP's steps as well as in ours.
    """
    out = tmp_path / "run"
    command = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "0", "--rdzv-backend", "c10d"]
    command += ["--rdzv-endpoint", "localhost:0", str(ROOT / "cli.py"), "run", "--out", str(out), "--held-out", "2"]
    command += ["--shard"]
    command += ["--policy", str(tiny_folder), "--data", str(tiny_text), "--features", "ngram", "--device", "cpu"]
    command += [
        "--length",
        "32",
        "--horizon",
        "4",
        "--first",
        "5",
        "--steps",
        "60",
        "--save-every",
        "1",
        "--batch",
        "3",
    ]
    process = subprocess.Popen(
        [sys.executable, *command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env=os.environ | {"GLOO_SOCKET_IFNAME": "lo", "COLUMNS": "200"},
    )  # fmt: skip
    try:
        until = time.monotonic() + 120
        while not (out / "checkpoints" / "step-000002").exists() and process.poll() is None:
            assert time.monotonic() < until
            time.sleep(0.02)
        assert process.poll() is None, process.communicate()[0]
        os.kill(_process_of_rank(process.pid, 1), signal.SIGKILL)
        said, _ = process.communicate(timeout=100)
    finally:
        process.kill()
    assert process.returncode != 0
    assert "Signal 9 (SIGKILL) received" in said
    assert "another process of this run ended" in said, said
    assert said.count("method ebft, policy") == 1  # one of the two speaks
    assert not (out / "policy").exists()
    reached = len(metrics(out))
    assert 2 <= reached < 60
    config = json.loads((out / "config.json").read_text())
    config["options"]["steps"] = reached + 1
    (out / "config.json").write_text(json.dumps(config))
    go(config["options"], out, resume=True)
    assert len(metrics(out)) == reached + 1
    assert (out / "policy" / "model.safetensors").is_file()


@linux
def test_two_machines_are_one_run(tiny_folder, tiny_text, tmp_path):
    """As far as one machine shows it: an agent of torchrun for each, that meet at a port, and a folder for both."""
    port = free_port()
    options = {
        "policy": tiny_folder, "data": tiny_text, "features": "ngram", "device": "cpu", "dtype": "float32", "lora": 0,
        "length": 32, "horizon": 4, "first": 5, "steps": 2, "batch": 3, "held-out": 2, "optimizer": "sgd", "lr": 0.1,
    }  # fmt: skip
    given = [str(part) for name, value in options.items() for part in (f"--{name}", value)]
    cli = [str(ROOT / "cli.py"), "run", *given, "--out"]
    agent = ["-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1", "--rdzv-backend", "c10d"]
    agent += ["--rdzv-endpoint", f"localhost:{port}", "--rdzv-id", "two"]
    where = os.environ | {"GLOO_SOCKET_IFNAME": "lo", "COLUMNS": "200"}
    agents = [
        subprocess.Popen(
            [sys.executable, *agent, *cli, str(tmp_path / "two")],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=where,
        )
        for _ in range(2)
    ]  # fmt: skip
    try:
        said = [process.communicate(timeout=240)[0] for process in agents]
    finally:
        for process in agents:
            process.kill()
    assert [process.returncode for process in agents] == [0, 0], said
    assert sum(text.count("method ebft, policy") for text in said) == 1
    subprocess.run([sys.executable, *cli, str(tmp_path / "one")], check=True, capture_output=True)
    one, two = (metrics(tmp_path / name) for name in ("one", "two"))
    assert len(one) == len(two) == 2
    for ours, theirs in zip(two, one, strict=True):
        for name in ("loss", "reward", "gradient_norm", "feature_matching_loss", "cross_entropy"):
            assert close(float(ours[name]), float(theirs[name])), name


def _process_of_rank(parent: int, rank: int) -> int:
    for child in Path(f"/proc/{parent}/task/{parent}/children").read_text().split():
        if f"RANK={rank}".encode() in Path(f"/proc/{child}/environ").read_bytes().split(b"\0"):
            return int(child)
    raise AssertionError(f"no process of rank {rank}")


# What one process alone sees of all this


def test_alone_everything_is_a_plain_call():
    x = torch.arange(3.0)
    assert started() == 1
    assert share(5) == slice(0, 5)
    assert by_rows(lambda x, scale: x * scale, x, scale=2).tolist() == [0, 2, 4]
    assert by_items(lambda words: [1, 2], ["a", "b"]).tolist() == [1, 2]
    check_same([x], 3, what="nothing")


def test_only_run_shares_its_work(monkeypatch, capsys):
    from ebft.cli import main

    monkeypatch.setattr(sys, "argv", ["ebft", "evaluate", "somewhere"])
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, said in (("0", "torchrun started 2 processes of `evaluate`, and only `run` shares its work"), ("1", "")):
        monkeypatch.setenv("RANK", rank)
        with pytest.raises(SystemExit):
            main()
        found = " ".join(capsys.readouterr().err.split())
        assert said in found
        assert bool(said) == bool(found)


def test_each_process_of_a_machine_has_its_own_gpu(monkeypatch):
    chosen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    assert choose_device("auto") == torch.device("cuda")
    monkeypatch.setattr("ebft.loading.size", lambda: 4)
    monkeypatch.setattr("ebft.loading.local_number", lambda: 1)
    assert choose_device("auto") == choose_device("cuda") == torch.device("cuda:1")
    assert chosen == [torch.device("cuda:1")] * 2
    with pytest.raises(UsageError, match="device 'cuda:0': 4 processes cannot share one"):
        choose_device("cuda:0")
    monkeypatch.setattr("ebft.loading.local_number", lambda: 3)
    with pytest.raises(UsageError, match="only 2 CUDA devices, and this asks for number 3"):
        choose_device("auto")


@pytest.mark.parametrize(("processes", "wanted"), [(1, "cuda:1"), (4, "cuda")])
def test_a_backbone_goes_where_the_policy_of_its_process_is(monkeypatch, processes, wanted):
    asked = []
    monkeypatch.setattr("ebft.components.features.size", lambda: processes)
    monkeypatch.setattr(CausalPolicy, "from_pretrained", lambda name, **options: asked.append(options["device"]))
    policy = SimpleNamespace(autocast=torch.bfloat16, device=torch.device("cuda:1"), offload_frozen=False)
    with suppress(AttributeError):  # there is no network
        frozen_network(policy, policy, "another")
    assert asked == [wanted]


def test_every_process_must_see_the_folder(monkeypatch, tmp_path):
    monkeypatch.setattr(distributed, "size", lambda: 3)
    monkeypatch.setattr(distributed, "from_first", lambda value: value)
    monkeypatch.setattr(distributed, "from_all", lambda value: [value, value, seen])
    seen = True
    distributed.check_seen(tmp_path)
    seen = False
    with pytest.raises(UsageError, match=rf"--out {tmp_path}: 1 of 3 processes do not see .* number 2\)"):
        distributed.check_seen(tmp_path)
    assert not list(tmp_path.iterdir())
