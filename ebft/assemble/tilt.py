"""From options to a fitted energy and what it does to held-out text."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from tensordict import TensorDictBase

from ebft.assemble.checks import check_ranges
from ebft.assemble.config import versions
from ebft.assemble.pipeline import build_features, build_sampler
from ebft.assemble.rows import check_anchors, pack_data, read_data
from ebft.components import OPTION_NAMES, resolve_options
from ebft.components.methods import METHOD_OPTIONS
from ebft.draw import check_sampling
from ebft.errors import UsageError
from ebft.features.module import as_module
from ebft.files import write_json
from ebft.loops.display import Display
from ebft.loops.run import open_folder
from ebft.loops.tilt import METHODS, Rollouts, draw, fit, measure, together
from ebft.objectives.energy import LinearEnergy
from ebft.objectives.energy_reward import save_energy
from ebft.policy import CausalPolicy

_SAID = {
    "plain": "plain sampling",
    "resampled": "resampled by the tilt's weights",
    "best": "the rollout of least energy",
}


def tilt_from_options(options: Mapping[str, Any], *, out: Path | None, console: Console) -> dict[str, Any]:
    """Fit an energy, save it, measure it on held-out text.

    Args:
        options: those of the command `tilt`, by parameter name.
        out: folder of energy.safetensors and energy.json; None: runs/<time>-tilt-<features>.

    Returns:
        What energy.json holds.

    Raises:
        UsageError: any bad input, before anything is written.
    """
    _check(options)
    chosen = {group: options[group] for group in ("sampler", "features")}
    resolved = resolve_options(
        chosen, {name: options[name] for name in OPTION_NAMES if name in options and name not in METHOD_OPTIONS}
    )
    out = out or Path("runs") / f"{time.strftime('%Y%m%d-%H%M%S')}-tilt-{options['features'].replace(':', '-')}"
    if out.exists():
        open_folder(out, resume=False)  # refused before the work
    data = read_data({**options, "prompt_field": None, "answer_field": None, "tests_field": None, "chat": False})
    precision = {name: options[name] for name in ("device", "dtype")}
    policy = CausalPolicy.from_pretrained(options["policy"], **precision, frozen=True)
    sample = build_sampler(policy, options, resolved, answers=data.answers)
    embed = as_module(build_features(policy, policy, options, resolved).embed, documents=True)
    train_rows, held_rows = pack_data(
        data, policy.tokenizer, {**options, "batch": 1, "chat": False}, resolved, console=console
    )
    display = Display(console)

    def rollouts(rows: TensorDictBase, label: str, *, held_out: bool) -> Rollouts:
        batches = [part.to(policy.device) for part in rows.split(options["batch"])]
        drawn = draw(sample, embed, batches, seed=options["seed"], held_out=held_out)
        return together(display.track(drawn, label=label, total=len(batches)))

    fitting = {name: options[name] for name in ("beta", "max_norm", "diversity")}
    energy, fitted = None, {}
    if not options["per_context"]:
        seen = rollouts(train_rows[: options["sequences"]], "rollouts to fit", held_out=False)
        tilt = fit(seen, **fitting)
        energy = LinearEnergy(tilt.energy.chi.float())
        fitted = {
            "contexts": len(seen.features),
            "norm": tilt.energy.chi.norm().item(),
            "effective_rollouts": tilt.effective_rollouts.mean().item(),
        }
    found = measure(rollouts(held_rows, "held-out rollouts", held_out=True), energy, fitting=fitting)
    report = {
        "options": {name: value for name, value in options.items() if name != "out"},
        "features": {"features": options["features"], **resolved["features"]},
        "versions": versions(),
        "fitted": fitted,
        "held_out": found,
    }
    open_folder(out, resume=False)
    if energy is not None:
        save_energy(out / "energy.safetensors", energy, {name: report[name] for name in ("features", "options")})
    write_json(out / "energy.json", report)
    _show(console, report, out)
    return report


def _check(options: Mapping[str, Any]) -> None:
    check_ranges(options)
    check_anchors(options)
    check_sampling(temperature=options["temperature"], top_p=options["top_p"], top_k=None, min_p=None)
    if options["rollouts"] < 4 or options["rollouts"] % 2:
        raise UsageError(
            f"--rollouts {options['rollouts']}: expected an even number of at least 4; each half of them is measured"
        )
    if options["horizon"] >= options["length"]:
        raise UsageError(
            f"--horizon {options['horizon']} does not fit --length {options['length']}: a sequence needs context and a"
            " target"
        )
    if options["temperature"] == 0:
        raise UsageError("--temperature 0: greedy rollouts are all alike, so that no weights tell them apart")
    if options["pooling"] == "none":
        raise UsageError("--pooling none keeps features per token: an energy is one of whole rollouts")
    if options["beta"] is not None and options["max_norm"] is not None:
        raise UsageError(
            f"--beta {options['beta']} and --max-norm {options['max_norm']} are two ways to bound the tilt; give one"
        )
    if options["beta"] is None and options["max_norm"] is None:
        raise UsageError("give --beta, the inverse weight of the divergence, or --max-norm, the largest norm of χ")


def _show(console: Console, report: Mapping[str, Any], out: Path) -> None:
    held, gap = report["held_out"], report["held_out"]["moment_gap"]
    if report["fitted"]:
        fitted = report["fitted"]
        console.print(
            f"fitted on {fitted['contexts']} contexts: ‖χ‖ {fitted['norm']:.3g}, effective rollouts"
            f" {fitted['effective_rollouts']:.2f} of {report['options']['rollouts']}",
            highlight=False,
        )
    table = Table(title=f"Held-out: {held['contexts']} contexts, {held['rollouts'] // 2} rollouts each to choose from")
    for name in ("", "feature matching loss", "change ± s.e.", "token agreement", "change ± s.e."):
        table.add_column(name, justify="right" if name else "left")
    for method in METHODS:
        row = held["methods"][method]
        cells = []
        for name in ("feature_matching_loss", "token_agreement"):
            error = row[name]["standard_error"]
            change = f"{row[name]['difference']:+.4f} ± {float('nan') if error is None else error:.4f}"
            cells += [f"{row[name]['mean']:.4f}", "" if method == "plain" else change]
        table.add_row(_SAID[method], *cells)
    console.print(table)
    console.print(
        f"gap of the mean features {gap['before']:.4f} before, {gap['after']:.4f} after; effective rollouts"
        f" {held['effective_rollouts']:.2f}",
        highlight=False,
    )
    if report["fitted"]:
        console.print(f"{out / 'energy.safetensors'}  for run --objective energy --energy", soft_wrap=True)
    console.print(f"{out / 'energy.json'}  everything above", soft_wrap=True, highlight=False)
