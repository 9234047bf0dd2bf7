"""Sampling and scoring over combs, measured against the authors' algorithm, the matrix products, and themselves.

    python benchmarks/sampling.py [--policy smollm2-135m | FOLDER | config:JSON] [--lengths 256,1024:32:8] ...

A setting is T or T:G:N (8 and 4 unless given), with an anchor every G tokens. For each one the reference and the comb
take turns in one process; peaks of memory come from a fresh process for each contestant and stage. The floor is the
time of the comb's matrix products alone. Stages:

    sampling    N rollouts from every prefix         curve     the comb's time over lengths
    scoring     their log-probs, with backward       memory    scoring against a plain causal pass over as many tokens
    both        one after the other                peaks     memory of the stages in the first column, or, without
                                                             them, of those that OUT has times of

Writes sampling.json and sampling.md into OUT, after every row. What OUT holds of other settings, measured with the same
policy on the same machine, stays there: settings can be measured one by one.
"""

from __future__ import annotations

import math
import statistics
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import sampling_report
from benchmarks.comparison import PARTS, compare, take_turns, warm_up
from benchmarks.contestants import CONTESTANTS, COPIES, Choice, Setting, ours, plain_pass, random_tokens
from benchmarks.measure import in_fresh_process, machine, peak_increase
from ebft.errors import UsageError
from ebft.policy import CausalPolicy

STAGES = (*PARTS, "peaks", "curve", "memory")
RESULTS = Path(__file__).parent / "results"


def peak(choice: Choice, setting: Setting, name: str, stage: str) -> int:
    """Bytes that a stage of a contestant needs above the loaded policy; for a fresh process.

    Stages are those compared and `plain`, the plain pass, which is the same for all contestants.
    """
    policy = choice.load()
    warm_up(policy, setting, CONTESTANTS[name])
    contestant = CONTESTANTS[name](policy, setting)
    count = setting.inputs(policy).anchors.shape[1]
    rollouts = random_tokens(policy, (1, count, setting.rollouts, setting.horizon))
    calls: dict[str, Callable[[], Any]] = {
        "sampling": contestant.sample,
        "scoring": lambda: contestant.score(rollouts),
        "both": lambda: contestant.score(contestant.sample()),
        "plain": lambda: plain_pass(policy, setting),
    }
    return peak_increase(calls[stage], policy.device)


def curve_point(policy: CausalPolicy, setting: Setting, repeats: int) -> dict[str, Any]:
    """Time and token-forwards of the comb alone at one length."""
    warm_up(policy, setting, ours)
    contestant = ours(policy, setting)
    rollouts = contestant.sample()
    runs = take_turns(policy, {"ours": contestant}, PARTS["both"], rollouts=rollouts, repeats=repeats)["ours"]
    point: dict[str, Any] = {"setting": str(setting), "repeats": len(runs)}
    for part in PARTS["both"]:
        point[f"{part}_s"] = min(one[part].seconds for one in runs)
        point[f"{part}_token_forwards"] = runs[0][part].token_forwards
    return point


def growth(points: list[dict[str, Any]], part: str) -> float:
    """Exponent of seconds against token-forwards: the slope of their logarithms; 1 is linear."""
    sizes, times = ([math.log(point[f"{part}_{unit}"]) for point in points] for unit in ("token_forwards", "s"))
    return statistics.linear_regression(sizes, times).slope


def merged(rows: list[dict[str, Any]], new: list[dict[str, Any]], *keys: str) -> list[dict[str, Any]]:
    """`rows` with `new` ones at the end, or in the place of those with the same values under `keys`.

    The new rows are the dictionaries given. Peaks of memory that they lack are taken from the row they replace.
    """
    at = {tuple(row[key] for key in keys): place for place, row in enumerate(rows)}
    found = list(rows)
    for row in new:
        place = at.get(tuple(row[key] for key in keys))
        if place is None:
            found.append(row)
            continue
        row.update({name: value for name, value in rows[place].items() if name.endswith("_peak") and name not in row})
        found[place] = row
    return found


def benchmark(
    choice: Choice,
    *,
    settings: list[Setting],
    curve: list[Setting],
    memory: list[Setting],
    stages: list[str],
    repeats: int,
    earlier: dict[str, Any],
    save: Callable[[dict[str, Any]], None],
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Measure everything asked for; `save` gets the results so far after every row, `say` what is being done.

    `earlier` are results, of other settings too, that are kept where the circumstances are the same.

    Raises:
        UsageError: peaks of a setting that nothing is known of.
    """
    policy = choice.load()
    results: dict[str, Any] = {"machine": machine(policy.device), "choice": asdict(choice)}
    results["reference_copies"] = COPIES
    results["compute_dtype"] = str(policy.autocast or next(policy.model.parameters()).dtype).removeprefix("torch.")
    results["trained"] = sum(p.numel() for p in policy.trainable().values())
    same = all(earlier.get(name) == value for name, value in results.items())
    tables: dict[str, Any] = {"rows": [], "curve": [], "growth": {}, "memory": []}
    results |= {name: earlier[name] for name in tables} if same else tables
    compared = [stage for stage in stages if stage in PARTS]
    for setting in settings:
        if compared:
            say(f"{setting}: time of {', '.join(compared)}")
            rows = compare(policy, setting, compared, repeats)
            results["rows"] = merged(results["rows"], rows, "setting", "stage")
            save(results)
        else:
            rows = [row for row in results["rows"] if row["setting"] == str(setting)]
            if "peaks" in stages and not rows:
                raise UsageError(
                    f"--stage {','.join(stages)}: nothing of {setting} was timed here: expected some of"
                    f" {', '.join(PARTS)} before peaks"
                )
        for row in rows if "peaks" in stages else []:
            for name in CONTESTANTS:
                say(f"{setting}: memory of {row['stage']}, {name}")
                row[f"{name}_peak"] = in_fresh_process(peak, choice, setting, name, row["stage"])
                save(results)
    for setting in curve if "curve" in stages else []:
        say(f"{setting}: curve")
        results["curve"] = merged(results["curve"], [curve_point(policy, setting, repeats)], "setting")
        if len(results["curve"]) > 1:
            results["growth"] = {part: growth(results["curve"], part) for part in PARTS["both"]}
        save(results)
    for setting in memory if "memory" in stages else []:
        say(f"{setting}: memory against a plain pass")
        scored, plain = (in_fresh_process(peak, choice, setting, "ours", stage) for stage in ("scoring", "plain"))
        row = {"setting": str(setting), "ours_peak": scored, "plain_peak": plain}
        results["memory"] = merged(results["memory"], [row], "setting")
        save(results)
    return results


def main(
    policy: Annotated[str, typer.Option(help="Embedded name, folder, hub id or config:JSON.")] = "smollm2-135m",
    lengths: Annotated[str, typer.Option(help="Settings T or T:G:N to compare.")] = "256,512,1024,1024:32:8",
    curve: Annotated[str, typer.Option(help="Settings of the curve.")] = "64,128,256,512,1024,2048",
    memory: Annotated[str, typer.Option(help="Settings of scoring's memory against a plain pass.")] = "1024",
    stage: Annotated[str, typer.Option(help="Some of the stages, with commas between.")] = ",".join(STAGES),
    dtype: Annotated[str, typer.Option(help="auto or a torch dtype, as for CausalPolicy.from_pretrained.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    lora: Annotated[int, typer.Option(help="Rank of LoRA adapters; 0 trains all weights.")] = 0,
    repeats: Annotated[
        int, typer.Option(help="Runs of which the best counts; one of what takes over two minutes.")
    ] = 4,
    out: Annotated[Path, typer.Option(help="Folder of sampling.json and sampling.md.")] = RESULTS,
) -> None:
    """Measure sampling and scoring over combs."""
    stages = stage.split(",")
    if unknown := [name for name in stages if name not in STAGES]:
        raise UsageError(f"--stage {unknown[0]}: expected some of {', '.join(STAGES)}")
    for option, value, least in (("repeats", repeats, 1), ("lora", lora, 0)):
        if value < least:
            raise UsageError(f"--{option} {value}: expected a whole number >= {least}")
    settings = {
        name: Setting.parse(text) for name, text in (("settings", lengths), ("curve", curve), ("memory", memory))
    }
    console = Console()

    def save(results: dict[str, Any]) -> None:
        sampling_report.write(out, results)

    with console.status("loading") as status:

        def say(what: str) -> None:
            console.log(what)
            status.update(what)

        results = benchmark(
            Choice(policy, dtype, device, lora),
            **settings,
            stages=stages,
            repeats=repeats,
            earlier=sampling_report.read(out),
            save=save,
            say=say,
        )
    console.print(sampling_report.markdown(results), markup=False, soft_wrap=True)


if __name__ == "__main__":
    try:
        typer.run(main)
    except UsageError as error:
        raise SystemExit(f"error: {error}") from error
