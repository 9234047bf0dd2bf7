"""The benchmark of a GPU, on a CPU with a tiny model: every piece, a restart, failures, and what its numbers are."""

import json
import pickle
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks import gpu, gpu_pieces, gpu_reference, gpu_report, measure, reference_algorithm
from benchmarks.gpu_jobs import Job, Sizes
from ebft import static_decode
from ebft.errors import UsageError
from ebft.planning.speed import Device
from tests.runs import write_tiny_model

ROOT = Path(__file__).parents[1]
SMALL = {"device": "cpu", "batch": 2, "micro_batch": 1, "length": 40, "horizon": 4, "rollouts": 3, "steps": 3}
OF_GPUS = {"step-fast", "adapters-fast", "sft-flex", "decode-graph"}


def run(out, **changes):
    options = {"model": "tiny", "policy": "", "piece": ",".join(gpu.PIECES), "minutes": 9.0, "again": False}
    gpu.main(**{**options, **SMALL, **changes}, out=out)
    return json.loads((out / "gpu.json").read_text())["entries"]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """All pieces, in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu, "in_fresh_process", lambda function, *args, limit: function(*args))
        patch.setattr(static_decode, "BACKEND", "eager")  # a compiler of C++ takes long
        out = tmp_path_factory.mktemp("gpu")
        return out, run(out)


def pieces_of(results):
    (entry,) = results[1]
    return {**entry["card"], **entry["models"]["tiny"]}


def test_every_piece_is_measured_or_says_why_not(results):
    pieces = pieces_of(results)
    assert set(pieces) == set(gpu.PIECES)
    failed = {name: row["error"] for name, row in pieces.items() if "error" in row}
    assert set(failed) == OF_GPUS
    assert "CUDA graphs are of GPUs" in failed["decode-graph"]
    assert "CUDA graphs are of GPUs" in failed["step-fast"]
    assert "'flex' has no gradient on cpu" in failed["sft-flex"]
    assert "flex_pass" in pieces["sft-flex"]["traceback"]


def test_what_the_pieces_hold(results):
    pieces = pieces_of(results)
    assert pieces["ceilings"]["tflops"].keys() == {"bfloat16", "float32"}
    assert pieces["ceilings"]["gigabytes_per_second"] > 0.1
    assert set(pieces["step"]["seconds"]) == set(gpu_pieces.STAGES)
    assert (pieces["step"]["kernel"], pieces["step"]["decode"]) == ("chunked", "eager")
    assert set(pieces["sft"]["seconds"]) == {"score", "update", "step"}
    assert pieces["adapters"]["trained"] < pieces["step"]["trained"] == pieces["step"]["weights"]
    assert pieces["kernel-chunked"]["backward"]
    assert not pieces["kernel-flex"]["backward"]
    eager, compiled = pieces["decode-eager"], pieces["decode-compile"]
    assert eager["same_tokens"] == compiled["same_tokens"] == 1
    assert (eager["graphs"], compiled["graphs"]) == (0, 2)
    assert set(pieces["reference"]["seconds"]) == {"sample", "embed", "score and update"}
    assert pieces["reference"]["at_once"]["score and update"] == {"sequences": 2, "copies": 3}


def test_the_tables(results):
    text = (results[0] / "gpu.md").read_text()
    for words in (
        "| tiny | step |", "| tiny | compile |", "| tiny | sft |", "| tiny | flex (forward alone) |", "(aim 8×)",
        "| tiny | step-fast | UsageError: decode 'graph': the device is cpu", "| tiny | score and update |",
        "Ceilings: ", "| 2 · 3 |", "says nothing of a trained model",
    ):  # fmt: skip
        assert words in text
    for table in text.split("\n\n"):
        assert len({line.replace("\\|", "").count("|") for line in table.strip().splitlines()}) == 1


def test_the_plan_is_of_the_same_step(results):
    """All that lies there: weights, frozen copy, gradients, both states of the optimizer, in float32."""
    pieces = pieces_of(results)
    weights = pieces["step"]["weights"]
    assert pieces["plan-step"]["peak_bytes"] > 4 * 5 * weights
    assert set(pieces["plan-step"]["seconds"]) == {"sample", "embed", "score", "update", "step"}
    assert set(pieces["plan-sft"]["seconds"]) == {"score", "update", "step"}
    assert pieces["plan-adapters"]["peak_bytes"] < pieces["plan-step"]["peak_bytes"]
    graph = pieces["plan-step-fast"]["peak_bytes"] - pieces["plan-step"]["peak_bytes"]
    itemsize = 4 if pieces["step"]["dtype"] == "float32" else 2  # bfloat16 on processors that have it
    # keys and values, 2 heads of 16, 2 layers, 2 rows; of training and of measuring
    assert graph == 2 * 2 * 16 * 2 * 2 * itemsize * (40 + 9 * 3 * 3) * 2


def test_operations_are_those_of_the_products(results):
    """By hand: H=64, I=128, 2 layers, 4 heads of 16 of which 2 for keys, V=512; T=40, G=4, N=3, so K=9."""
    body = 2 * (64 * 64 * 2 + 2 * 64 * 32 + 3 * 64 * 128)
    head, teeth, columns = 64 * 512, 9 * 3 * 3, 9 * 3
    found = pieces_of(results)["step"]["operations"]
    assert found["score"] == 2 * 3 * 2 * (body * (40 + teeth) + head * (9 + teeth + 39))
    assert found["sample"] == 2 * 2 * (body * (40 + 3 * columns) + head * (9 + 3 * columns))
    assert found["embed"] == 2 * int(0.75 * 2 * body * (40 + 9 * 3 * 4))


def test_the_ceiling_counts_all_products_that_it_times(monkeypatch):
    monkeypatch.setattr(Device, "seconds", lambda self, run: 4.0 if run() is None else 0.0)
    done = []
    monkeypatch.setattr("ebft.planning.speed.multiply", lambda products, *args, **kwargs: done.extend(products))
    assert Device(torch.device("cpu")).throughput(torch.bfloat16) == len(done) * 2 * 1024**3 / 4
    assert all(weight.shape == (1024, 1024) and weight.dtype == torch.bfloat16 for weight, _ in done)


def test_what_follows_from_the_pieces():
    step = {"seconds": {"sample": 2.0, "score": 1.0, "update": 3.0, "step": 8.0}, "peak_bytes": 5e9, "dtype": "float32"}
    step["operations"] = {"sample": 4e12, "embed": 2e12, "score": 10e12}
    pieces = {"step": step, "sft": {"seconds": {"step": 4.0}}, "sft-flex": {"seconds": {"step": 2.0}}}
    pieces["reference"] = {"seconds": {"sample": 40.0, "embed": 8.0, "score and update": 16.0}}
    pieces["step-fast"] = {"error": "none"}
    entry = {"models": {"m": pieces}, "card": {"ceilings": {"tflops": {"float32": 5.0}}}}
    wanted = {"share of sample": 0.4, "share": 0.5, "share of step": 0.4, "speed-up": 8.0, "over_sft": 4.0}
    assert gpu_report.derived(entry, "m") == pytest.approx({**wanted, "gigabytes": 5.0})
    assert gpu_report.derived(entry, "m", "step-fast") == {}


def test_a_step_runs_with_the_kernel_and_decoder_it_is_told(monkeypatch):
    """On a GPU flex and graph; here others than the usual ones."""
    monkeypatch.setattr(static_decode, "BACKEND", "eager")
    seen, train = [], gpu_pieces.train

    def seeing(policy, *args, **options):
        seen.append(policy)
        return train(policy, *args, **options)

    monkeypatch.setattr(gpu_pieces, "train", seeing)
    monkeypatch.setattr("benchmarks.contestants.choose_precision", lambda *args: (torch.float32, None))
    job = Job("tiny", "step", "cpu", Sizes(2, 40, 4, 3, 1, 3))
    found = gpu_pieces.step(job, kernel="dense", decode="compile")
    (policy,) = seen
    assert (policy.kernel, policy.static._mode, policy.static.graphs) == ("dense", "compile", 2)
    assert policy.checkpointing
    assert (found["kernel"], found["decode"]) == ("dense", "compile")
    assert found["mismatch"] < 1e-5
    assert gpu_pieces.STEPS["step-fast"] == {"kernel": "flex", "decode": "graph"}


# ---- the authors' algorithm


@pytest.mark.parametrize(
    ("sizes", "wanted"),
    [((5, 3), [(5, 3), (2, 3), (1, 3), (1, 1)]), ((1, 4), [(1, 4), (1, 2), (1, 1)]), ((1, 1), [(1, 1)])],
)
def test_portions_are_halved(sizes, wanted):
    assert list(gpu_reference.portions(*sizes)) == wanted


def test_the_reference_takes_as_much_at_once_as_fits(monkeypatch):
    """A memory of four copies: of scoring alone, so that the other stages still take all at once."""
    score, clock, rows = reference_algorithm.score, [], []

    def little_memory(model, tokens, anchors, drawn):
        rows.append(len(tokens) * drawn.shape[2])
        if rows[-1] > 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return score(model, tokens, anchors, drawn)

    monkeypatch.setattr(reference_algorithm, "score", little_memory)
    monkeypatch.setattr(gpu_reference, "seconds", lambda call, device: clock.append(call()) or (1.0, None))
    found = gpu_reference.reference(Job("tiny", "reference", "cpu", Sizes(batch=4, length=20, horizon=4, rollouts=3)))
    assert rows == [12, 6, 3, 3]
    assert found["at_once"]["sample"] == found["at_once"]["embed"] == {"sequences": 4, "copies": 3}
    scored = found["at_once"]["score and update"]
    assert (scored["sequences"], scored["copies"]) == (1, 3)
    assert "out of memory" in scored["larger"]
    assert found["seconds"] == {"sample": 1.0, "embed": 1.0, "score and update": 4.0}  # of the whole batch
    assert len(clock) == 3


def test_a_reference_that_does_not_fit_at_all_says_so(monkeypatch):
    def full(*args, **options):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(reference_algorithm, "sample", full)
    found = gpu_pieces.measure(Job("tiny", "reference", "cpu", Sizes(batch=2, length=20, horizon=4, rollouts=3)))
    assert found["error"] == "OutOfMemoryError: CUDA out of memory"


# ---- failures, restarts, time


def measured(done):
    """Stands in for measuring: `done` gets the names, its values what they give."""
    return lambda function, job, limit: done(job) if callable(done) else done.append(job.piece) or {"value": 1}


@pytest.fixture
def bare(monkeypatch):
    """No tables: what the stand-ins give has no numbers."""
    monkeypatch.setattr(gpu_report, "markdown", lambda results: "")


def test_what_is_there_is_not_measured_again_and_what_failed_is(results, monkeypatch):
    out, found = results
    tried = []
    monkeypatch.setattr(
        gpu, "in_fresh_process", lambda function, job, limit: tried.append(job.piece) or {"error": "no"}
    )
    again = run(out)
    assert set(tried) == OF_GPUS
    assert {name for name, row in again[0]["models"]["tiny"].items() if row == {"error": "no"}} == OF_GPUS
    assert again[0]["models"]["tiny"]["step"] == found[0]["models"]["tiny"]["step"]


def test_a_piece_that_fails_stops_no_other_and_comes_last_the_next_time(tmp_path, monkeypatch, bare):
    tried, broken = [], True

    def process(function, job, limit):
        tried.append(job.piece)
        if job.piece == "step" and broken:
            raise RuntimeError("CUDA error: an illegal memory access was encountered\nmore")
        return None if job.piece == "sft" and broken else {"value": 1}

    monkeypatch.setattr(gpu, "in_fresh_process", process)
    (entry,) = run(tmp_path, piece="step,sft,reference")
    assert tried == ["step", "sft", "reference"]
    found = entry["models"]["tiny"]
    assert found["step"]["error"].startswith("RuntimeError: CUDA error: an illegal memory access")
    assert found["sft"] == {"error": "the system killed the process"}
    broken = False
    tried.clear()
    (entry,) = run(tmp_path, piece="step,kernel-flex,sft,reference")
    assert tried == ["kernel-flex", "step", "sft"]
    assert all(row == {"value": 1} for row in entry["models"]["tiny"].values())


def test_results_of_other_machines_and_sizes_stay(tmp_path, monkeypatch, bare):
    tried = []
    monkeypatch.setattr(gpu, "in_fresh_process", measured(tried))
    first = run(tmp_path, piece="step")
    assert [entry["sizes"]["length"] for entry in run(tmp_path, piece="step", length=48)] == [40, 48]
    where = gpu.machine(torch.device("cpu"))
    monkeypatch.setattr(gpu, "machine", lambda device: {**where, "device": "NVIDIA H300"})
    found = run(tmp_path, piece="step")
    assert [entry["machine"]["device"] for entry in found] == ["cpu", "cpu", "NVIDIA H300"]
    monkeypatch.setattr(gpu, "machine", lambda device: {**where, "platform": "another build"})
    assert run(tmp_path, piece="step") == found
    assert found[0] == first[0]
    assert tried == ["step"] * 3


def test_a_result_stays_where_measuring_it_again_fails(tmp_path, monkeypatch, bare):
    monkeypatch.setattr(gpu, "in_fresh_process", measured([]))
    found = run(tmp_path, piece="step,sft")
    assert run(tmp_path, piece="step", again=False) == found
    monkeypatch.setattr(gpu, "in_fresh_process", measured(lambda job: {"error": "no"}))
    assert run(tmp_path, piece="step", again=True) == found
    monkeypatch.setattr(gpu, "in_fresh_process", measured(lambda job: {"value": 2}))
    assert run(tmp_path, piece="step", again=True)[0]["models"]["tiny"] == {"step": {"value": 2}, "sft": {"value": 1}}


def test_a_file_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "gpu.json").write_text('{"models": {}}')
    with pytest.raises(UsageError, match=r"gpu.json does not hold results of this benchmark"):
        run(tmp_path)
    assert (tmp_path / "gpu.json").read_text() == '{"models": {}}'


def test_time_ends_a_run_and_what_began_late_is_no_failure(tmp_path, monkeypatch, capsys, bare):
    now, limits = [0.0], []
    monkeypatch.setattr(gpu.time, "perf_counter", lambda: now[0])

    def process(function, job, limit):
        limits.append(limit)
        now[0] += min(limit, 700)
        if job.piece in slow:
            raise TimeoutError
        return {"value": 1}

    monkeypatch.setattr(gpu, "in_fresh_process", process)
    slow = {"step"}
    (entry,) = run(tmp_path, piece="step,sft,reference", minutes=15.0)
    assert limits == [540, 360]  # no longer than is left
    assert entry["models"]["tiny"] == {"step": {"error": "stopped after 9 minutes"}, "sft": {"value": 1}}
    assert "minutes are over at tiny, reference: run it again" in " ".join(capsys.readouterr().out.split())
    slow = {"reference"}
    limits.clear()
    (entry,) = run(tmp_path, piece="step,sft,reference", minutes=5.0)
    assert limits == [300]
    assert entry["models"]["tiny"]["reference"] == {"error": "stopped after 5 minutes"}  # it had all there was


def test_a_piece_that_always_takes_too_long_does_not_block_the_rest(tmp_path, monkeypatch, bare):
    now, tried = [0.0], []

    def clock():
        now[0] += 1  # time passes before the first piece, too
        return now[0]

    def process(function, job, limit):
        tried.append(job.piece)
        if job.piece == "step":
            now[0] += limit
            raise TimeoutError
        return {"value": 1}

    monkeypatch.setattr(gpu.time, "perf_counter", clock)
    monkeypatch.setattr(gpu, "in_fresh_process", process)
    for _ in range(2):
        (entry,) = run(tmp_path, piece="step,sft")
    assert tried == ["step", "sft", "step"]
    assert entry["models"]["tiny"]["step"]["error"].startswith("stopped after")
    assert entry["models"]["tiny"]["sft"] == {"value": 1}


def sleep_and_write(path, seconds):
    time.sleep(seconds)
    path.write_text("done")


def test_a_process_that_takes_too_long_is_killed(tmp_path):
    start = time.perf_counter()
    with pytest.raises(TimeoutError):
        measure.in_fresh_process(sleep_and_write, tmp_path / "late", 60, limit=0.5)
    assert time.perf_counter() - start < 40
    assert not list(tmp_path.iterdir())


# ---- own weights, the card, mistakes


def test_own_weights_are_measured_over_text(tmp_path, monkeypatch):
    folder = write_tiny_model(tmp_path / "model")
    monkeypatch.setattr(gpu, "in_fresh_process", lambda function, *args, limit: function(*args))
    options = {"model": "", "policy": str(folder), "piece": "ceilings,step,reference", "length": 24}
    (entry,) = run(tmp_path, **options)
    (label,) = entry["models"]
    assert label == f"{folder} (own weights)"
    assert set(entry["models"][label]) == {"step"}
    assert set(entry["card"]) == {"ceilings"}
    job = Job(str(folder), "step", "cpu", Sizes(2, 24, 4, 3, 1, 3), own=True)
    policy = job.policy()
    rows = job.rows(policy)
    assert rows.batch_size == (2,)
    assert any(word in policy.tokenizer.decode(rows["tokens"][0]) for word in ("the", "import", "def", '"""'))


def test_the_ceilings_are_measured_once(tmp_path, monkeypatch, bare):
    tried = []
    monkeypatch.setattr(gpu, "in_fresh_process", measured(lambda job: tried.append((job.label, job.piece)) or {"a": 1}))
    run(tmp_path, model="tiny,smollm2-135m", piece="ceilings,step")
    assert tried == [("", "ceilings"), ("tiny", "step"), ("smollm2-135m", "step")]


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


def test_pieces_can_be_sent_to_a_process_of_their_own():
    job = Job("tiny", "kernel-dense", "cpu", Sizes(batch=1, length=20, horizon=4, rollouts=3))
    function, sent = pickle.loads(pickle.dumps((gpu.measure, job)))
    assert sent == job
    assert function is gpu_pieces.measure
