"""Measure, keep, judge: one measurement in its folder."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from tensordict import TensorDictBase
from torch import Tensor

from ebft.files import write_atomically, write_json
from ebft.loops.display import Display
from ebft.loops.interrupt import Interrupted, stop_requests
from ebft.loops.signal import statistics
from ebft.loops.signal.measure import measure
from ebft.loops.signal.plan import CROSS_ENTROPY, Plan
from ebft.loops.signal.show import draw_plot, markdown, print_table
from ebft.loops.signal.store import GradientStore
from ebft.policy import CausalPolicy

_FILES = {
    "signal.md": "the table",
    "signal.json": "every number",
    "signal.png": "the plot",
    "gradients/": "every gradient; with more --batches the command goes on from them",
}


def run_signal(
    policy: CausalPolicy,
    plan: Plan,
    data: TensorDictBase,
    parameters: Mapping[str, Tensor],
    *,
    out: Path,
    identity: Mapping[str, Any],
    batches: int,
    batch_size: int,
    replicates: int,
    seed: int,
    reference: str,
    micro_batch: int | None = None,
    made_with: Mapping[str, Any] | None = None,
    console: Console | None = None,
) -> tuple[dict[str, Any], Tensor]:
    """Measure what is not measured yet and write signal.json, signal.md and signal.png into `out`.

    Args:
        identity: what the gradients depend on beside the other arguments; a folder with another one is refused.
        made_with: kept in signal.json (versions, machine).
        reference: name of the configuration that cosines and gains refer to.

    Returns:
        What signal.json holds, and the Gram matrix [C,M,R,C,M,R].

    Raises:
        Interrupted: Ctrl-C; the finished batches are kept, the same command goes on.
    """
    display = Display(console or Console())
    names = plan.names()
    size = sum(p.numel() for p in parameters.values())
    store = GradientStore(out / "gradients", identity=identity, shape=(len(names), replicates, size))
    start = store.done
    with stop_requests() as stop:
        found = measure(
            policy,
            plan,
            data,
            parameters,
            batches=batches,
            batch_size=batch_size,
            replicates=replicates,
            seed=seed,
            micro_batch=micro_batch,
            start=start,
        )
        for gradients, cost in display.track(found, label="measuring", total=max(batches, start), done=start):
            store.add(gradients, cost)
            if stop() and store.done < batches:
                raise Interrupted(
                    f"stopped after {store.done} of {batches} batches, kept in {out}; run it again to go on"
                )
    gram = store.gram()
    result = {
        **judge(gram, names, store.cost, reference=reference),
        "identity": dict(identity),
        "weights": size,
        **(made_with or {}),
    }
    write_json(out / "signal.json", result)
    write_atomically(out / "signal.md", markdown(result).encode())
    draw_plot(result, out / "signal.png")
    print_table(display.console, result)
    for name, meaning in _FILES.items():
        display.console.print(f"{out}/{name}  {meaning}", soft_wrap=True, highlight=False)
    return result, gram


def judge(gram: Tensor, names: Sequence[str], cost: Sequence[float], *, reference: str) -> dict[str, Any]:
    """Every statistic of every configuration with its interval.

    Args:
        gram: [C,M,R,C,M,R] of at least 3 batches; names, cost: of the C configurations.

    Returns:
        ``rows``: name -> its statistics, each {value, error, low, high}; a value is None where it is not defined.
    """
    mark, last = names.index(reference), names.index(CROSS_ENTROPY)

    def all_statistics(m: statistics.Moments) -> Tensor:
        total, within = statistics.signal_to_noise(m), statistics.signal_to_noise_within(m)
        noise = m.square - m.within.diagonal()
        return torch.stack([
            total,
            within,
            statistics.cosine(m, mark),
            statistics.cosine_within(m, mark),
            statistics.single_cosine(m, mark),
            statistics.cosine(m, last),
            statistics.towards(m, mark),
            statistics.towards_within(m, mark),
            total / total[mark],
            within / within[mark],
            noise / noise[mark],
            m.cross.diagonal() / m.cross[mark, mark],
            m.square,
        ])  # fmt: skip

    labels = (
        "signal_to_noise",
        "signal_to_noise_within",
        "cosine_to_reference",
        "cosine_to_reference_within",
        "cosine_of_a_batch",
        "cosine_to_cross_entropy",
        "towards_reference",
        "towards_reference_within",
        "gain",
        "gain_within",
        "noise_ratio",
        "signal_ratio",
        "square",
    )
    estimates = statistics.jackknife(gram, lambda m: all_statistics(m).flatten())
    rows: dict[str, Any] = {name: {"token_forwards": cost[i]} for i, name in enumerate(names)}
    for number, label in enumerate(labels):
        for i, name in enumerate(names):
            rows[name][label] = _finite(estimates[number * len(names) + i])
    for i, name in enumerate(names):
        for kind in ("signal_to_noise", "signal_to_noise_within"):
            rows[name][f"{kind}_per_million"] = {
                key: None if value is None else value / cost[i] * 1e6 for key, value in rows[name][kind].items()
            }
    return {"rows": rows, "reference": reference, "batches": gram.shape[1], "replicates": gram.shape[2]}


def _finite(estimate: statistics.Estimate) -> dict[str, float | None]:
    """As JSON: None for what is not finite."""
    return {key: value if math.isfinite(value) else None for key, value in estimate._asdict().items()}
