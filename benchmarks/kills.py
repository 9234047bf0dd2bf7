"""Runs killed with SIGKILL at seeded moments and resumed, against the same run never stopped: bit for bit?

    python -m benchmarks.kills [--kills 200] [--seed 0] [--out benchmarks/results]

One process imports everything, then forks a child for every start of the run, which is the real one of the command
line on a tiny model, with all kinds of state: running whitening, a divergence controller, a learning rate that falls.
A child dies at a random moment, at a random operation on the file system, or at those of `DIRECTED`, before or after it
or in the middle of a write. It is then resumed, and killed again, until the kills of its trial are spent; then it ends
and its folder is compared: metrics, rewards, weights, measurements, samples, the last checkpoint, the names of files.

Linux only (fork, /proc). Threads and fork do not go together: it sets torch to one thread.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import random
import select
import shutil
import signal
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from benchmarks.faults import WHEN, Faults, Plan
from ebft.assemble.config import machine, versions
from ebft.loops import report
from tests.runs import go, metrics, tiny_options, write_tiny_model, write_tiny_text

# The first trial: what a checkpoint, the files beside it and the replacement of a folder are made of, in their order.
DIRECTED = (
    ("replace .config.json", "before"), ("replace .before.json", "after"), ("_append rewards.csv", "before"),
    ("_append metrics.csv", "half"), ("save_file", "half"), ("save optimizer.pt", "half"),
    ("fsync manifest.json", "before"), ("rename .step-000002.tmp", "before"), ("rename .step-000004.tmp", "before"),
    ("rename .step-000004.tmp", "after"), ("rename .step-000006.tmp", "after"), ("rename step-000002", "after"),
    ("unlink weights.safetensors", "after"), ("rename .policy.tmp", "before"), ("to its end", "before"),
    ("rename policy -> .policy.old", "after"),  # it is the second end that replaces the first
)  # fmt: skip
KILLS_OF_A_TRIAL = 4
AT_RANDOM, LEAST_AT_RANDOM = "at a random moment", 3  # where such a kill dies; trials go on until there were so many


@dataclass
class Outcome:
    """What came of all trials."""

    trials: int = 0
    differences: list[str] = field(default_factory=list)
    where: collections.Counter = field(default_factory=collections.Counter)

    @property
    def kills(self) -> int:
        return sum(self.where.values())


def start(
    options: dict[str, Any], out: Path, *, plan: Plan | None = None, delay: float | None = None
) -> tuple[str | None, list[str]]:
    """Run, or resume, in a child, and kill it as planned.

    Returns:
        Where it died, None if it came to its end before; and its file-system operations if it did.

    Raises:
        RuntimeError: the child failed by itself.
    """
    log = out.with_suffix(".log")
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        code = 1
        try:
            descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(descriptor, 1)
            os.dup2(descriptor, 2)
            faults = Faults(out, plan, writing)
            faults.install()
            go(options, out, resume=(out / "config.json").is_file())
            with os.fdopen(writing, "wb") as file:
                file.write(json.dumps(faults.log).encode())
            code = 0
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
        finally:
            os._exit(code)
    os.close(writing)
    if delay is not None:
        select.select([reading], [], [], delay)  # or until it ends
        os.kill(child, signal.SIGKILL)
    with os.fdopen(reading, "rb") as file:
        said = file.read()
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
        return (AT_RANDOM if plan is None else json.loads(said)), []
    if os.waitstatus_to_exitcode(status):
        raise RuntimeError(f"the run in {out} failed by itself:\n{log.read_text()}")
    return None, json.loads(said)


def contents(out: Path) -> dict[str, Any]:
    """Everything of a finished run that does not measure time or the machine."""
    last = max((out / "checkpoints").iterdir())
    states = torch.load(last / "optimizer.pt", weights_only=True)
    history = states.pop("history")
    rows = [{k: v for k, v in row.items() if "time_" not in k and k != "tokens_per_second"} for row in history["rows"]]
    return {
        "names": sorted(str(path.relative_to(out)) for path in out.rglob("*")),
        "metrics.csv": metrics(out),
        "metrics in the checkpoint": rows,
        "measurement": json.loads((out / "evaluation.json").read_text())["metrics"],
        **{name: (out / name).read_bytes() for name in ("rewards.csv", "before.json", "samples.json", "samples.md")},
        "weights": load_file(out / "policy" / "model.safetensors"),
        "weights in the checkpoint": load_file(last / "weights.safetensors"),
        "states": states,
    }


def same(left: Any, right: Any) -> bool:
    """Equal through and through, tensors bit for bit."""
    if isinstance(left, dict):
        return isinstance(right, dict) and left.keys() == right.keys() and all(same(left[k], right[k]) for k in left)
    if isinstance(left, list | tuple):
        return len(left) == len(right) and all(map(same, left, right))
    if isinstance(left, torch.Tensor):
        return left.dtype == right.dtype and torch.equal(left, right)
    return left == right


def measure(options: dict[str, Any], folder: Path, *, kills: int, seed: int) -> Outcome:
    """At least `kills` kills, `LEAST_AT_RANDOM` of them at random moments, over as many trials as it takes.

    The directed ones come first. Random moments are of the time that the whole run took; one that comes after the end
    of a run makes that time shorter, so that a machine that was slow at first does not draw for ever.
    """
    began = time.perf_counter()
    _, operations = start(options, folder / "whole")
    duration = time.perf_counter() - began
    expected, chance, outcome = contents(folder / "whole"), random.Random(seed), Outcome()

    def trial(planned: list[Plan | None], *, surely: bool = False) -> None:
        nonlocal duration
        out = folder / f"trial-{outcome.trials}"
        for plan in planned:
            died, _ = start(options, out, plan=plan, delay=None if plan else chance.uniform(0, duration))
            if died:
                outcome.where[died] += 1
            elif plan is None:
                duration *= 0.8
            elif surely and plan.operation != "to its end":
                outcome.differences.append(f"never reached: {plan}")
        start(options, out)
        found = contents(out)
        different = [key for key in expected if not same(expected[key], found[key])]
        outcome.differences += [f"{out.name}, {planned}: {key}" for key in different]
        outcome.trials += 1
        shutil.rmtree(out)

    trial([Plan(operation, when) for operation, when in DIRECTED], surely=True)
    while outcome.kills < kills:
        drawn = [Plan(chance.randrange(len(operations)), chance.choice(WHEN)) for _ in range(KILLS_OF_A_TRIAL)]
        trial([plan if chance.random() < 0.5 else None for plan in drawn][: kills - outcome.kills])
    while outcome.where[AT_RANDOM] < LEAST_AT_RANDOM:
        trial([None])
    return outcome


def tiny_run(folder: Path) -> dict[str, Any]:
    """Options of a run with every kind of state; its model and text are written into `folder`."""
    (folder / "model").mkdir()
    (folder / "text").mkdir()
    options = tiny_options(write_tiny_model(folder / "model"), write_tiny_text(folder / "text"))
    return {**options, "whitening": "population", "decay": 0.9, "kl_target": 0.001, "held_out": 4}


def table(result: dict[str, Any]) -> str:
    """The result as Markdown."""
    options = result["options"]
    lines = [
        "# Runs killed and resumed",
        "",
        f"A run of {options['steps']} steps with a checkpoint every {options['save_every']}, killed by SIGKILL"
        f" {result['kills']} times in {result['trials']} trials (`python -m benchmarks.kills`), resumed after each",
        "kill, and compared at its end with the run never stopped: metrics, rewards, measurements, samples, weights,",
        "the last checkpoint, the names of all files.",
        "",
        f"Differences: **{len(result['differences'])}**. It took {result['seconds']:.0f} s.",
        "",
        "| where it died | kills |",
        "|---|---|",
        *(f"| {where} | {count} |" for where, count in result["where"].items()),
        "",
        *(f"* {difference}" for difference in result["differences"]),
    ]
    return "\n".join(lines).rstrip() + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # threads of a pool do not survive a fork
    report.curves_png = lambda *args, **kwargs: b""  # a picture takes ten times as long as such a run
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as name:
        options = tiny_run(Path(name))
        outcome = measure(options, Path(name), kills=arguments.kills, seed=arguments.seed)
    result = {
        "kills": outcome.kills,
        "trials": outcome.trials,
        "differences": outcome.differences,
        "seconds": time.perf_counter() - began,
        "seed": arguments.seed,
        "where": dict(outcome.where.most_common()),
        "options": {k: v for k, v in options.items() if k not in ("policy", "data")},
        "machine": machine(torch.device("cpu")),
        "versions": versions(),
    }
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "kills.json").write_text(json.dumps(result, indent=2) + "\n")
    (arguments.out / "kills.md").write_text(table(result))
    print(table(result))
    return 1 if outcome.differences else 0


if __name__ == "__main__":
    sys.exit(main())
