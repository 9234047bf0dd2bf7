"""What `plan` predicts against what runs take: peak memory of a fresh process and time by stage.

    python benchmarks/plan.py [--policy smollm2-135m] [--setting NAME ...] [--out benchmarks/results]

Each setting is planned and then run for 3 steps in a fresh process, whose high-water mark of resident memory and median
times are taken. Writes plan.json and plan.md into OUT, after every setting; settings can be measured one by one.
"""

from __future__ import annotations

import io
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.measure import in_fresh_process, machine, peak_of_process
from ebft.assemble import plan_from_options, run_from_options
from ebft.commands.derived import run_defaults
from ebft.errors import UsageError
from ebft.files import make_folder, write_atomically, write_json
from ebft.loops import run as run_module
from ebft.loops.train import train

RESULTS = Path(__file__).parent / "results"
STEPS = 3
_COMMON = {"features": "hidden", "steps": STEPS, "held_out": 4, "stride": 8, "first": 8, "save_every": STEPS}
SETTINGS: dict[str, dict[str, Any]] = {
    "adapters": {"lora": 16, "length": 128, "batch": 4},
    "all weights": {"lora": 0, "length": 128, "batch": 4, "micro_batch": 2},
    "all weights, recomputed": {"lora": 0, "length": 256, "batch": 2, "checkpointing": True},
    "adapters, long": {"lora": 16, "length": 512, "batch": 2, "micro_batch": 1, "kl": 0.1},
}
STAGES = ("sample", "embed", "score", "update")


def measure(options: dict[str, Any]) -> dict[str, Any]:
    """Peak memory and stage times of a run, for a fresh process."""
    records: list[dict[str, float]] = []

    def recording(*args: Any, **kwargs: Any) -> Any:
        for record in train(*args, **kwargs):
            records.append(record)
            yield record

    run_module.train = recording
    with tempfile.TemporaryDirectory() as folder:
        console = Console(file=io.StringIO())
        run_from_options(options, explicit=set(), out=Path(folder) / "run", resume=False, console=console)
    times = {stage: statistics.median(r[f"time_{stage}"] for r in records) for stage in STAGES}
    cuda = torch.cuda.is_available()
    return {"peak": torch.cuda.max_memory_allocated() if cuda else peak_of_process(), "seconds": times}


def compare(policy: str, name: str) -> dict[str, Any]:
    """One setting, planned and run."""
    options = {**run_defaults(), **_COMMON, **SETTINGS[name], "policy": policy}
    planned = in_fresh_process(_plan, options)
    taken = in_fresh_process(measure, options)
    return {"setting": name, "planned": planned, "taken": taken}


def _plan(options: dict[str, Any]) -> dict[str, Any]:
    plan = plan_from_options(options, processes=1, console=Console(file=io.StringIO()))
    return {"peak": plan.peak, "seconds": plan.seconds, "floor": plan.floor}


def markdown(results: dict[str, Any]) -> str:
    """A table of all settings."""
    lines = [
        f"{results['policy']}, {results['machine']['processor']}, {results['machine']['threads']} threads.",
        "",
        "| setting | peak GiB planned | taken | ratio | " + " | ".join(f"{s} s planned | taken" for s in STAGES) + " |",
        "| --- | --- | --- | --- | " + " | ".join(["--- | ---"] * len(STAGES)) + " |",
    ]
    for row in results["rows"]:
        planned, taken = row["planned"], row["taken"]
        cells = [f"{planned['peak'] / 2**30:.2f}", f"{taken['peak'] / 2**30:.2f}"]
        cells.append(f"{planned['peak'] / taken['peak']:.2f}")
        cells += [f"{side['seconds'][stage]:.3g}" for stage in STAGES for side in (planned, taken)]
        lines.append(f"| {row['setting']} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main(
    policy: Annotated[str, typer.Option(help="Embedded name, folder or hub id.")] = "smollm2-135m",
    setting: Annotated[list[str] | None, typer.Option(help=f"Some of: {', '.join(SETTINGS)}.")] = None,
    out: Annotated[Path, typer.Option(help="Folder of plan.json and plan.md.")] = RESULTS,
) -> None:
    """Measure how far off `plan` is."""
    names = setting or list(SETTINGS)
    if unknown := [name for name in names if name not in SETTINGS]:
        raise UsageError(f"--setting {unknown[0]!r}: expected some of {', '.join(SETTINGS)}")
    make_folder(out)
    path = out / "plan.json"
    results = {"policy": policy, "machine": machine(torch.device("cuda" if torch.cuda.is_available() else "cpu"))}
    earlier = json.loads(path.read_text()) if path.is_file() else {}
    rows = earlier["rows"] if all(earlier.get(key) == value for key, value in results.items()) else []
    for name in names:
        Console().log(name)
        row = compare(policy, name)
        rows = [*(other for other in rows if other["setting"] != name), row]
        rows.sort(key=lambda found: list(SETTINGS).index(found["setting"]))
        write_json(path, {**results, "rows": rows})
        write_atomically(out / "plan.md", markdown({**results, "rows": rows}).encode())
    Console().print(markdown({**results, "rows": rows}), markup=False, soft_wrap=True)


if __name__ == "__main__":
    try:
        typer.run(main)
    except UsageError as error:
        raise SystemExit(f"error: {error}") from error
