"""Feature maps measured: what hidden states and sentence embeddings cost, and which features carry the signal.

    python benchmarks/features.py [--stage hidden,sbert,signal] [--maps hidden,sbert-0,...] [--quick] ...

Stages:

    hidden   time and memory of the map `hidden` (layers up to 0.75) against N full passes of the whole model
    sbert    share of duplicates among the strings of real rollouts, and the time that embedding them once saves
    signal   for each map and whitening, on the same real rollouts over held-out code and prose: see feature_signal.py

Rollouts and advantages are kept in CACHE, results in OUT/features.json and features.md after every map, and the plot in
PLOT: a run that was stopped goes on where it was, and the same options give the same numbers. What OUT holds of other
maps, measured on the same rollouts and the same machine, stays there.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache as remembered
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import feature_cost, features_report
from benchmarks.contestants import Choice, Setting
from benchmarks.feature_maps import NAMES, FeatureBank
from benchmarks.feature_rollouts import SOURCES, Draw, agreement, arguments, key_of, stored_rollouts
from benchmarks.feature_signal import measure, signal_to_noise
from benchmarks.measure import in_fresh_process, machine
from benchmarks.sampling import merged
from benchmarks.score_gradients import score_gradients
from ebft.cache import cache_dir
from ebft.components.whitenings import WHITENINGS
from ebft.errors import UsageError
from ebft.features.sbert import sbert

ROOT = Path(__file__).parents[1]
STAGES = ("hidden", "sbert", "signal")
QUICK = {"sequences": 2, "length": 48, "stride": 16, "first": 16, "rollouts": 3, "resamples": 3}
Say = Callable[[str], None]


@dataclass(frozen=True)
class Plan:
    """What is asked for."""

    stages: list[str]
    sources: list[str]
    maps: list[str]
    whitenings: list[str]
    settings: list[Setting]
    repeats: int
    encoder: Any
    cache: Path


def benchmark(
    choice: Choice, draw: Draw, plan: Plan, *, earlier: dict[str, Any], save: Callable[[dict[str, Any]], None], say: Say
) -> dict[str, Any]:
    """Measure everything asked for; `save` gets the results so far after every row.

    `earlier` are results that are kept where the circumstances are the same.
    """
    policy = remembered(choice.load)
    dtype = str(policy().autocast or next(policy().model.parameters()).dtype).removeprefix("torch.")
    results: dict[str, Any] = {"machine": machine(policy().device), "choice": asdict(choice), "compute_dtype": dtype}
    circumstances = {name for name in results if name != "machine"}
    same_machine = _but_threads(earlier.get("machine")) == _but_threads(results["machine"])
    same = same_machine and all(earlier.get(name) == results[name] for name in circumstances)
    results |= {"draw": asdict(draw), "hidden": [], "sbert": [], "signal": []}
    if same:
        results["hidden"] = earlier["hidden"]
        if earlier["draw"] == results["draw"] or not {"sbert", "signal"} & set(plan.stages):
            results |= {name: earlier[name] for name in ("draw", "sbert", "signal")}
    for setting in plan.settings if "hidden" in plan.stages else []:
        say(f"hidden: {setting}")
        row = feature_cost.compare(choice, setting, repeats=plan.repeats) | {"threads": torch.get_num_threads()}
        results["hidden"] = merged(results["hidden"], [row], "setting")
        save(results)
        for name in feature_cost.WAYS:
            say(f"hidden: {setting}, memory of {name}")
            row[f"{name}_peak"] = in_fresh_process(feature_cost.peak, choice, setting, name)
            save(results)
    for source in plan.sources if {"sbert", "signal"} & set(plan.stages) else []:
        say(f"{source}: rollouts")
        td = stored_rollouts(policy, f"{choice.policy} {dtype}", source, draw, plan.cache)
        if "sbert" in plan.stages:
            say(f"{source}: distinct strings")
            made = sbert(plan.encoder, policy().tokenizer, dtype="bfloat16" if dtype == "bfloat16" else "float32")
            rows = feature_cost.distinct_strings(
                made, td, source=source, rollouts=draw.rollouts, repeats=plan.repeats, contexts=(0, 16)
            )
            results["sbert"] = merged(results["sbert"], rows, "source", "context_tokens")
            save(results)
        if "signal" in plan.stages:
            signal(policy(), td, source, draw, plan, results, save=save, say=say)
    return results


def signal(
    policy: Any, td: Any, source: str, draw: Draw, plan: Plan, results: dict[str, Any], *, save: Callable, say: Say
) -> None:
    """Add the rows of one source to results["signal"]: first without the gradient, map by map, then with it."""
    keys = ("source", "features", "whitening")
    settings = [(source, name, whitening) for name in plan.maps for whitening in plan.whitenings]
    done = {tuple(row[key] for key in keys): row for row in results["signal"]}
    about = (results["choice"], results["compute_dtype"], results["draw"], str(plan.encoder))
    stored = {one: plan.cache / f"advantages-{key_of(*about, one)}.safetensors" for one in settings}
    missing = [s for s in settings if s not in done or ("snr2" not in done[s] and not stored[s].is_file())]
    bank = FeatureBank(policy, plan.encoder)
    same = agreement(td)
    names = [name for name in plan.maps if any(setting[1] == name for setting in missing)]
    for name, (rollout, target) in bank.features(td, names):
        say(f"{source}: {name}")
        for setting in [s for s in missing if s[1] == name]:
            row, gain = measure(rollout, target, same, whitening=setting[2], group=draw.rollouts)
            save_file({"advantages": gain.contiguous()}, stored[setting])
            results["signal"] = merged(results["signal"], [dict(zip(keys, setting, strict=True)) | row], *keys)
        save(results)
    done = {tuple(row[key] for key in keys): row for row in results["signal"]}
    waiting = [setting for setting in settings if "snr2" not in done[setting]]
    if not waiting:
        return
    say(f"{source}: gradients of {len(waiting)} rewards")
    gains = torch.stack([load_file(stored[setting])["advantages"] for setting in waiting])
    inputs = [x.to(policy.device) for x in arguments(td)[:6]]
    gradients = score_gradients(policy, *inputs, advantages=gains, sets=draw.resamples)
    for setting, gradient in zip(waiting, gradients, strict=True):
        done[setting]["snr2"] = signal_to_noise(gradient @ gradient.mT)
    save(results)


def _but_threads(machine: dict[str, Any] | None) -> dict[str, Any]:
    return {name: value for name, value in (machine or {}).items() if name != "threads"}


def main(
    policy: Annotated[str, typer.Option(help="Embedded name, folder or hub id.")] = "smollm2-135m",
    encoder: Annotated[str, typer.Option(help="Sentence encoder of the maps sbert-*.")] = "minilm-l6",
    stage: Annotated[str, typer.Option(help="Some of the stages, with commas between.")] = ",".join(STAGES),
    sources: Annotated[str, typer.Option(help="Some of code, prose.")] = ",".join(SOURCES),
    maps: Annotated[str, typer.Option(help="Some of the maps, with commas between.")] = ",".join(NAMES),
    whitenings: Annotated[str, typer.Option(help="Some of the whitenings.")] = ",".join(WHITENINGS),
    sequences: Annotated[int, typer.Option(help="B, held-out rows of each text.")] = 8,
    length: Annotated[int, typer.Option(help="T, tokens of a row.")] = 112,
    stride: Annotated[int, typer.Option(help="Tokens between anchors.")] = 12,
    first: Annotated[int, typer.Option(help="Context tokens before the first anchor; 2 or more.")] = 32,
    horizon: Annotated[int, typer.Option(help="G, tokens of a rollout.")] = 8,
    rollouts: Annotated[int, typer.Option(help="N, rollouts of a group; 3 or more.")] = 4,
    resamples: Annotated[int, typer.Option(help="R, independent groups of each anchor; 3 or more.")] = 6,
    rank: Annotated[int, typer.Option(help="Of the LoRA adapters whose gradient is taken.")] = 4,
    settings: Annotated[str, typer.Option(help="Settings T or T:G:N of the stage hidden.")] = "1024",
    repeats: Annotated[int, typer.Option(help="Timed runs of which the best counts.")] = 2,
    seed: Annotated[int, typer.Option(help="Chooses the rows and keys the rollouts.")] = 0,
    dtype: Annotated[str, typer.Option(help="auto or a torch dtype.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    cache: Annotated[Path | None, typer.Option(help="Folder of rollouts (default in the cache of ebft).")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of features.json (default benchmarks/results).")] = None,
    plot: Annotated[Path | None, typer.Option(help="The plot (default docs/features.png).")] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Two short rows, results in CACHE/quick: shows that it runs.")
    ] = False,
) -> None:
    """Measure feature maps."""
    size = dict(zip(QUICK, (sequences, length, stride, first, rollouts, resamples), strict=True)) | (
        QUICK if quick else {}
    )
    least = {"first": 2, "rollouts": 3, "resamples": 3, "sequences": 2}
    for option, value in {**size, "rank": rank, "repeats": repeats, "horizon": horizon}.items():
        if value < least.get(option, 1):
            raise UsageError(f"--{option} {value}: expected a whole number >= {least.get(option, 1)}")
    chosen = {
        option: _some(option, text, known)
        for option, text, known in (
            ("stage", stage, STAGES),
            ("sources", sources, tuple(SOURCES)),
            ("maps", maps, NAMES),
            ("whitenings", whitenings, tuple(WHITENINGS)),
        )
    }
    cache = cache or cache_dir() / "features-benchmark"
    cache.mkdir(parents=True, exist_ok=True)
    results_folder = out or (cache / "quick" if quick else ROOT / "benchmarks" / "results")
    plot_file = plot or (cache / "quick" / "features.png" if quick else ROOT / "docs" / "features.png")
    plan = Plan(
        *(chosen[name] for name in ("stage", "sources", "maps", "whitenings")),
        settings=Setting.parse("64" if quick else settings),
        repeats=repeats,
        encoder=encoder,
        cache=cache,
    )
    console = Console()
    with console.status("loading") as status:

        def say(what: str) -> None:
            console.log(what)
            status.update(what)

        results = benchmark(
            Choice(policy, dtype, device, rank),
            Draw(**size, horizon=horizon, seed=seed),
            plan,
            earlier=features_report.read(results_folder),
            save=lambda results: features_report.write(results_folder, plot_file, results),
            say=say,
        )
    console.print(features_report.markdown(results), markup=False, soft_wrap=True)


def _some(option: str, text: str, known: tuple[str, ...]) -> list[str]:
    names = text.split(",")
    if unknown := [name for name in names if name not in known]:
        raise UsageError(f"--{option} {unknown[0]}: expected some of {', '.join(known)}")
    return names


if __name__ == "__main__":
    try:
        typer.run(main)
    except UsageError as error:
        raise SystemExit(f"error: {error}") from error
