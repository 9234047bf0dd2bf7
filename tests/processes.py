"""What several processes do together, and one alone: `python -m tests.processes FOLDER` leaves FOLDER/results.pt.

One process imports everything and then forks those that torchrun would start, joined by gloo: Linux only, and its torch
is kept to one thread, since threads do not survive a fork.
"""

from __future__ import annotations

import math
import os
import pickle
import random
import shutil
import socket
import subprocess
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor

from ebft import loading, schema
from ebft.distributed import ProcessLost, any_process, by_items, by_rows, check_same, joined, rank, share, sum_gradients
from ebft.errors import UsageError
from ebft.loops import report
from ebft.loops import run as run_module
from ebft.loops.history import History
from ebft.loops.train import train
from ebft.objectives.losses import EBFTLoss
from ebft.sharding import local
from tests.runs import go, parts, tiny_options, write_tiny_model, write_tiny_text

ROOT = Path(__file__).parents[1]
COUNTS = (1, 2, 4)

# The parts of a run that look at more than one row, together where they go together. Batches of 5 are shared out as
# 3 + 2 and 2 + 1 + 1 + 1, those of 3 as 2 + 1 and 1 + 1 + 1 + 0.
KINDS: dict[str, dict[str, Any]] = {
    "full weights": {"batch": 5, "estimator": "rloo_tuned", "normalize_advantage": True, "entropy": 0.01},
    "adapters": {
        **{"batch": 3, "lora": 2, "whitening": "population", "decay": 0.9, "sampler": "random", "ema": 0.5},
        **{"normalization": "token", "kl_target": 1e-4, "lr": 0.5},
    },
    "several updates": {
        **{"batch": 6, "pg": "clipped", "updates": 2, "minibatches": 2, "kl_in": "reward"},
        **{"drop_zero_spread": True, "features": "ngram"},
    },
    "credit of tokens": {"batch": 5, "pooling": "none", "credit": "reward_to_go", "token_baseline": "ridge"},
    "verifier": {"batch": 3, "objective": "verifier", "verifier": "chrf", "estimator": "rloo", "kl_mode": "exact"},
}

# As on a GPU: bfloat16 compute with float32 weights, and frozen weights in bfloat16 under float32 adapters.
HALVES: dict[str, dict[str, Any]] = {
    "bfloat16 compute": {"dtype": "auto", "batch": 3},
    "bfloat16 under adapters": {"dtype": "auto", "batch": 3, "lora": 2, "lr": 0.5},
}

COUNTS_OF = dict.fromkeys(KINDS, (2, 4)) | {"several updates": (4,), "credit of tokens": (2,), "verifier": (4,)}


def left_by(harness: str) -> tuple[Any, Any]:
    """Fixtures of a test module: the folder that a harness filled, and the results that it left there."""

    @pytest.fixture(scope="module")
    def folder(tmp_path_factory):
        """Filled by a process of its own, since the threads of this one do not survive a fork."""
        folder = tmp_path_factory.mktemp("processes")
        done = subprocess.run([sys.executable, "-m", harness, folder], cwd=ROOT, capture_output=True, text=True)
        assert (folder / "results.pt").is_file(), done.stderr[-4000:]
        return folder

    @pytest.fixture(scope="module")
    def results(folder):
        return torch.load(folder / "results.pt", weights_only=False)  # written by this test's own process

    return folder, results


def close(ours: float, theirs: float) -> bool:
    """Whether metrics of runs by different numbers of processes agree but for rounding."""
    return math.isclose(ours, theirs, rel_tol=2e-4, abs_tol=2e-6)


def prepare() -> None:
    """What a harness does first: one thread, as forks want it, no pictures, and bfloat16 for whom asks for `auto`."""
    torch.set_num_threads(1)
    loading._has_bfloat16_units = lambda device: True
    report.curves_png = lambda *args, **kwargs: b"no picture"


def run_options(folder: Path) -> dict[str, Any]:
    """Options of a tiny run on a model and a text that are written into `folder`."""
    for name in ("model", "text"):
        (folder / name).mkdir()
    options = tiny_options(write_tiny_model(folder / "model"), write_tiny_text(folder / "text"))
    chosen = {"steps": 2, "held_out": 3, "save_every": 1, "optimizer": "sgd", "lr": 0.1, "max_grad_norm": 0.5}
    return options | chosen


def main(folder: Path) -> None:
    prepare()
    options = run_options(folder)
    results: dict[str, Any] = {}
    for kind, chosen in KINDS.items():
        for count in (1, *COUNTS_OF[kind]):
            work = partial(whole_run, options | chosen, folder / f"{kind} {count}")
            results[kind, count] = together(count, work, folder)
    in_halves(options, folder, results)
    results["pieces"] = together(4, pieces, folder)
    for count in COUNTS:
        results["rows without anchors", count] = together(count, partial(rows_without_anchors, options), folder)
    out = folder / "broken"
    results["broken"] = together(2, partial(broken_run, options | {"batch": 5, "steps": 4}, out), folder)
    for count in (1, 2):
        copy = shutil.copytree(out, folder / f"mended {count}")
        together(count, partial(whole_run, options | {"batch": 5, "steps": 4}, copy, resume=True), folder)
    together(1, partial(whole_run, options | {"batch": 5, "steps": 4}, folder / "never broken"), folder)
    torch.save(results, folder / "results.pt")


def in_halves(options: dict[str, Any], folder: Path, results: dict[str, Any], *, shard: bool = False) -> None:
    """Runs of `HALVES` by one process and by two."""
    for kind, chosen in HALVES.items():
        for count in (1, 2):
            work = partial(whole_run, options | chosen | {"shard": shard and count > 1}, folder / f"{kind} {count}")
            results[kind, count] = together(count, work, folder)


def check_halves(folder: Path, results: dict[str, Any], kind: str) -> None:
    """Two processes have the same weights to the last bit, and made the update of one as far as bfloat16 tells."""
    (alone,), several = results[kind, 1], results[kind, 2]
    start = load_file(folder / "model" / "model.safetensors")
    zero = {name: start.get(name, torch.zeros_like(weight)) for name, weight in alone["weights"].items()}
    for own in several:
        assert all(weight.dtype == torch.float32 for weight in own["weights"].values())
        assert all(torch.equal(weight, several[0]["weights"][name]) for name, weight in own["weights"].items())
        same = [(a == b).float().mean().item() for a, b in zip(own["rollouts"], alone["rollouts"], strict=True)]
        assert min(same) > 0.95, same
        (ours, *_), (theirs, *_) = own["records"], alone["records"]
        for name in ("loss", "reward", "cross_entropy", "gradient_norm", "sampler_mismatch"):
            assert math.isclose(ours[name], theirs[name], rel_tol=0.05, abs_tol=0.005), (name, ours[name], theirs[name])
        moved, apart = (
            sum((own["weights"][name] - other[name]).square().sum() for name in other)
            for other in (zero, alone["weights"])
        )
        assert apart / moved < 0.05, (apart, moved)
        assert moved > 1e-6


def together(count: int, work: Callable[[], Any], folder: Path) -> list[Any]:
    """What `work` returns in each of `count` processes as torchrun starts them; where one fails, so does this."""
    port = free_port()
    children = []
    for process in range(count):
        child = os.fork()
        if not child:
            os.environ |= {"RANK": str(process), "LOCAL_RANK": str(process), "WORLD_SIZE": str(count)}
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
            try:
                # Rebuilds the thread pool that the fork broke, before threads that load a model do so at the same time:
                # torch raises "Invalid thread pool!" where two of them do.
                torch.set_num_threads(1)
                (folder / f"{process}.pickle").write_bytes(pickle.dumps(work()))
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(0)
        children.append(child)
    statuses = [os.waitpid(child, 0)[1] for child in children]  # 0, unless a signal ended it
    left = [folder / f"{process}.pickle" for process in range(count)]
    if failed := [process for process, path in enumerate(left) if not path.is_file()]:
        raise RuntimeError(f"processes {failed} of {count} left no result, statuses {statuses}: {work}")
    results = [pickle.loads(path.read_bytes()) for path in left]
    for path in left:
        path.unlink()
    return results


def free_port() -> int:
    """A port that nobody listens at, below those that the system gives out unasked.

    One of the latter can be taken by any connection between this answer and the process that listens there.
    """
    ports = list(range(20_000, 32_000))
    random.SystemRandom().shuffle(ports)
    for port in ports:
        with socket.socket() as found, suppress(OSError):
            found.bind(("127.0.0.1", port))
            return port
    raise RuntimeError("no free port from 20000 to 31999")


def whole_run(options: dict[str, Any], out: Path, **how: Any) -> dict[str, Any]:
    """A run of the command line; what this process saw of it. `how` is for `tests.runs.go`."""
    rollouts, policies, optimizers, records = [], [], [], []
    observe = History.observe

    def observing(self, td):
        rollouts.append(td.get(schema.ROLLOUT_TOKENS, None).clone())
        observe(self, td)

    def recording(policy, *args, **kwargs):
        policies.append(policy)
        optimizers.append(kwargs["optimizer"])
        for record in train(policy, *args, **kwargs):
            records.append(record)
            yield record

    History.observe, run_module.train = observing, recording
    with joined():
        said = go(options, out, **how)
        trained = policies[0].trainable()
        weights = {name: whole_tensor(weight.detach()) for name, weight in trained.items()}
        states = [v for own in optimizers[0].state.values() for v in own.values() if v.ndim]
        held = {
            "weights": sum(local(weight).numel() for weight in policies[0].model.parameters()),
            "states": sum(local(state).numel() for state in states),
        }
    return {"rollouts": rollouts, "records": records, "weights": weights, "said": said, "held": held}


def whole_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """A copy; of a sharded tensor the whole of it, for which all processes call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.clone()


def broken_run(options: dict[str, Any], out: Path) -> str:
    """A run of which one process raises an error in its third step."""

    def breaking(*args, **kwargs):
        for record in train(*args, **kwargs):
            if record["step"] == 2 and rank() == 1:
                yield record
                raise UsageError("process 1 has had enough")
            yield record

    run_module.train = breaking
    try:
        with joined():
            go(options, out)
    except UsageError as error:
        return f"{type(error).__name__}: {error} (told: {error.told})"
    return "no error"


def rows_without_anchors(options: dict[str, Any]) -> dict[str, Any]:
    """A step over 3 rows, 2 of which are too short for an anchor."""
    policy, pipeline, rows = parts(options)
    rows = rows[:3].clone()
    rows[schema.MASK][:2, 6:] = False
    optimizer = torch.optim.SGD(policy.trainable().values(), lr=0.1)
    loss = EBFTLoss(cross_entropy_coefficient=0.5, kl_coefficient=0.1)
    settings = {"steps": 1, "batch_size": 3, "seed": 0, "reference": policy.reference()}
    with joined():
        (record,) = train(policy, pipeline, loss, rows, optimizer=optimizer, **settings)
    return {"record": record, "weights": {name: w.detach().clone() for name, w in policy.trainable().items()}}


def pieces() -> dict[str, Any]:
    """The functions of `ebft.distributed`, in 4 processes."""
    found: dict[str, Any] = {}
    with joined():
        for count in (1, 3, 8, 9):
            own = share(count)
            found["share", count] = (own.start, own.stop)

            def double(x, *, y, scale, seen):
                seen.append(len(x))
                return x * scale, (y > 4), x.to(torch.bfloat16)[:, None].expand(-1, 2)

            x, seen = torch.arange(count, dtype=torch.float64), list[int]()
            found["rows", count] = (*by_rows(double, x, y=x, scale=2, seen=seen), seen)
            found["one tensor", count] = by_rows(lambda x: x + 1, x)
            found["items", count] = by_items(
                lambda words: [len(word) for word in words], ["ab" * i for i in range(count)]
            )
        parameters = [torch.nn.Parameter(torch.ones(size, dtype=dtype)) for size, dtype in SIZES]
        parameters[0].grad = torch.full_like(parameters[0], rank() + 1.0)
        if rank() == 2:
            parameters[2].grad = torch.full_like(parameters[2], 3.0)
        sum_gradients(parameters)
        found["gradients"] = [p.grad for p in parameters]
        found["any"] = [any_process(rank() == process) for process in (0, 3, 4)]
        check_same([torch.ones(3)], 1, what="ones")
        try:
            check_same([torch.full((3,), 1.0 + (rank() == 2))], 1, what="the weights")
        except UsageError as error:
            found["different"] = str(error)
    return found


SIZES = [(3, torch.float32), (2, torch.float32), (4, torch.bfloat16)]
LOST = ProcessLost.__name__

if __name__ == "__main__":
    main(Path(sys.argv[1]))
