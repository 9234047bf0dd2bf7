"""The benchmark of a GPU, on a CPU with a tiny model: every piece, a restart, and what its numbers are."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import gpu, gpu_report
from ebft import static_decode
from ebft.errors import UsageError

ROOT = Path(__file__).parents[1]
SMALL = {"device": "cpu", "batch": 2, "micro_batch": 1, "length": 40, "horizon": 4, "rollouts": 3, "steps": 3}


def run(out, **changes):
    options = {"model": "tiny", "piece": ",".join(gpu.PIECES), "minutes": 8.0, **SMALL, **changes}
    gpu.main(**options, out=out)
    return json.loads((out / "gpu.json").read_text())


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """All pieces, in this process: one of its own is tested below."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu, "in_fresh_process", lambda function, *args: function(*args))
        patch.setattr(static_decode, "BACKEND", "eager")  # a compiler of C++ takes long
        out = tmp_path_factory.mktemp("gpu")
        return out, run(out)


def test_every_piece_is_measured(results):
    out, found = results
    pieces = found["models"]["tiny"]
    assert set(pieces) == set(gpu.PIECES)
    assert pieces["ceilings"]["tflops"].keys() == {"bfloat16", "float32"}
    assert pieces["ceilings"]["gigabytes_per_second"] > 0.1
    assert set(pieces["step"]["seconds"]) == set(gpu.STAGES)
    assert set(pieces["sft"]["seconds"]) == {"score", "update", "step"}
    assert pieces["adapters"]["trained"] < pieces["step"]["trained"] == pieces["step"]["weights"]
    assert pieces["kernels"]["chunked"]["backward"]
    assert not pieces["kernels"]["flex"]["backward"]
    eager, compiled, graph = (pieces["decode"][mode] for mode in ("eager", "compile", "graph"))
    assert eager["same_tokens"] == compiled["same_tokens"] == 1
    assert (eager["graphs"], compiled["graphs"]) == (0, 2)
    assert "CUDA graphs are of GPUs" in graph["refused"]
    assert set(pieces["reference"]["seconds_of_a_sequence"]) == {"sample", "embed", "score and update"}
    text = (out / "gpu.md").read_text()
    for words in ("| tiny | step |", "| tiny | compile |", "| tiny | sft |", "flex (forward alone)", "(aim 8×)"):
        assert words in text


def test_operations_are_those_of_the_products(results):
    """By hand: H=64, I=128, 2 layers, 4 heads of 16 of which 2 for keys, V=512; T=40, G=4, N=3, so K=9."""
    body = 2 * (64 * 64 * 2 + 2 * 64 * 32 + 3 * 64 * 128)
    head, teeth, columns = 64 * 512, 9 * 3 * 3, 9 * 3
    found = results[1]["models"]["tiny"]["step"]["operations"]
    assert found["score"] == 2 * 3 * 2 * (body * (40 + teeth) + head * (9 + teeth + 39))
    assert found["sample"] == 2 * 2 * (body * (40 + 3 * columns) + head * (9 + 3 * columns))
    assert found["embed"] == 2 * int(0.75 * 2 * body * (40 + 9 * 3 * 4))


def test_what_follows_from_the_pieces():
    step = {"seconds": {"sample": 2.0, "score": 1.0, "update": 3.0, "step": 8.0}, "peak_bytes": 5e9, "dtype": "float32"}
    step["operations"] = {"sample": 4e12, "embed": 2e12, "score": 10e12}
    pieces = {"step": step, "ceilings": {"tflops": {"float32": 5.0}}, "sft": {"seconds": {"step": 2.0}}}
    pieces["reference"] = {"seconds_of_a_sequence": {"sample": 10.0, "embed": 2.0, "score and update": 4.0}}
    found = gpu_report.derived({"models": {"m": pieces}, "sizes": {"batch": 4}}, "m")
    wanted = {"share of sample": 0.4, "share": 0.5, "share of step": 0.4, "speed-up": 8.0, "over_sft": 4.0}
    assert found == pytest.approx({**wanted, "gigabytes": 5.0})


def test_what_is_there_is_not_measured_again(results, monkeypatch):
    out, found = results
    monkeypatch.setattr(gpu, "in_fresh_process", lambda function, *args: pytest.fail("measured again"))
    assert run(out) == found
    with pytest.raises(pytest.fail.Exception):
        run(out, length=48)  # other sizes


def test_no_piece_is_begun_too_late(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu, "in_fresh_process", lambda function, job: {"seconds_in_all": 1.0})
    clock = iter(range(0, 10_000, 100))
    monkeypatch.setattr(gpu.time, "perf_counter", lambda: next(clock))
    found = run(tmp_path, minutes=5.0)
    assert list(found["models"]["tiny"]) == ["ceilings", "step", "adapters"]
    assert "run it again for the rest" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"model": "big"}, "--model big"), ({"piece": "all"}, "--piece all"), ({"steps": 2}, "--steps 2")],
)
def test_mistakes_are_told(tmp_path, changes, message):
    with pytest.raises(UsageError, match=message):
        run(tmp_path, **changes)


def test_the_command_says_what_is_wrong(tmp_path):
    command = [sys.executable, "benchmarks/gpu.py", "--model", "tiny", "--device", "gpu", "--out", tmp_path]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert "error: device 'gpu': expected auto, cpu, cuda or cuda:N" in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="measures a GPU, and there is none")
def test_a_gpu_has_a_gradient_in_every_kernel(tmp_path):
    found = run(tmp_path, device="cuda", piece="kernels")["models"]["tiny"]["kernels"]
    assert all(row["backward"] and row["seconds"] > 0 for row in found.values())
