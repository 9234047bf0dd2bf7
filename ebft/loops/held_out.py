"""What a run knows of held-out text: measured before, between and after training, and put side by side."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tensordict import TensorDictBase
from torch import Tensor

from ebft.files import write_json
from ebft.loops.display import Display
from ebft.loops.evaluate import concatenate, evaluate, mean, paired_difference
from ebft.loops.interrupt import Interrupted
from ebft.loops.objective import Objective, called
from ebft.loops.samples import take_samples
from ebft.loops.stages import Stage
from ebft.policy import CausalPolicy

Sums = dict[str, tuple[Tensor, Tensor]]

BEFORE, PROFILE = "before.json", "profile.json"
HELD_OUT_ROWS = 8  # that a run measures at once


@dataclass(frozen=True)
class Held:
    """A held-out measurement: per-sequence sums and counts of each metric, and a few samples.

    `profile` holds those of the feature-matching loss of the first g tokens, by g as text.
    """

    sums: Sums
    samples: list[dict[str, Any]]
    profile: Sums = field(default_factory=dict)


def measure(
    policy: CausalPolicy,
    pipeline: Mapping[str, Stage],
    further: Mapping[str, Objective],
    display: Display,
    label: str,
    stop: Callable[[], bool],
    *,
    data: TensorDictBase,
    batch_size: int,
    seed: int,
    profile: bool = False,
    **options: Any,
) -> Held:
    """Measure a policy with progress on the display.

    Args:
        pipeline, data: what is measured first; further: objectives of which the reward is, `<name>_reward`.
        stop: whether the user wants an end.
        profile: also the feature-matching loss over the horizon.
        options: reference and scoring of `ebft.loops.evaluate.evaluate`.

    Raises:
        Interrupted: `stop` said so.
    """

    def one(stages: Mapping[str, Stage], rows: TensorDictBase, what: str, **more: Any) -> tuple[list[dict], list[dict]]:
        parts: list[dict] = []
        samples: list[dict[str, Any]] = []
        batches = evaluate(policy, stages, rows, batch_size=batch_size, seed=seed, **more, **options)
        for sums, td in display.track(batches, label=what, total=math.ceil(len(rows) / batch_size)):
            parts.append(sums)
            if not samples:
                samples = take_samples(td, policy.tokenizer)
            if stop():
                raise Interrupted(f"stopped during the measurement {what!r}; --resume goes on")
        return parts, samples

    parts, samples = one(pipeline, data, label, profile=profile)
    sums = concatenate(parts)
    for name, objective in further.items():
        assert objective.held_out is not None
        more, texts = one(objective.measuring or objective.pipeline, objective.held_out, f"{label}, {name}")
        sums[called("reward", name)] = concatenate(more)["reward"]
        samples += texts
    return Held(sums, samples, concatenate([part["profile"] for part in parts]))


def row_at(step: int, before: Held, now: Held) -> dict[str, float]:
    """The metrics at a step, their paired changes from before and the standard errors of those."""
    row: dict[str, float] = {"step": step, **{name: mean(sums) for name, sums in now.sums.items()}}
    for name in now.sums:
        row[f"{name}_change"], row[f"{name}_standard_error"] = paired_difference(before.sums[name], now.sums[name])
    return row


def before_and_after(before: Held, after: Held) -> dict[str, dict[str, float]]:
    """Each metric before and after, the paired difference and its standard error."""
    metrics = {}
    for name in after.sums:
        difference, error = paired_difference(before.sums[name], after.sums[name])
        metrics[name] = {
            "before": mean(before.sums[name]),
            "after": mean(after.sums[name]),
            "difference": difference,
            "standard_error": error,
        }
    return metrics


def profile_of(before: Held, after: Held) -> dict[str, list[float]]:
    """What `profile.json` holds, see `ebft.loops.report_profile.check_profile`; empty where one was not measured."""
    horizons = sorted(before.profile.keys() & after.profile.keys(), key=int)
    if not horizons:
        return {}
    found: dict[str, list[float]] = {"horizons": [int(horizon) for horizon in horizons]}
    for when, held in (("before", before), ("after", after)):
        values = [_with_error(held.profile[horizon]) for horizon in horizons]
        found[when], found[f"{when}_standard_error"] = map(list, zip(*values, strict=True))
    return found


def _with_error(sums: tuple[Tensor, Tensor]) -> tuple[float, float]:
    """The mean of a metric and its standard error, sequences as the units."""
    return paired_difference((torch.zeros_like(sums[0]), sums[1]), sums)


def save_before(out: Path, held: Held) -> None:
    """Keep the measurement of the start in the run's folder."""
    stored = {name: {key: [x.tolist() for x in pair] for key, pair in getattr(held, name).items()} for name in _TOTALS}
    write_json(out / BEFORE, {**stored, "samples": held.samples})


def load_before(out: Path) -> Held | None:
    """The measurement of the start in the run's folder, None where there is none."""
    try:
        stored = json.loads((out / BEFORE).read_text())
    except FileNotFoundError:
        return None
    totals = {
        name: {
            key: (torch.tensor(total, dtype=torch.float64), torch.tensor(count, dtype=torch.float64))
            for key, (total, count) in stored.get(name, {}).items()
        }
        for name in _TOTALS
    }
    return Held(samples=stored["samples"], **totals)


_TOTALS = ("sums", "profile")
