"""Times of the contestants and of the floor under them, taken in turns in one process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from benchmarks.contestants import CONTESTANTS, COPIES, Contestant, Setting, floor
from benchmarks.measure import seconds, token_forwards
from ebft.policy import CausalPolicy

PARTS = {"sampling": ("sampling",), "scoring": ("scoring",), "both": ("sampling", "scoring")}
SLOW = 120.0  # seconds of a first run beyond which it is not repeated
LARGEST_DIFFERENCE = 0.1  # mean nats between the contestants' log-probs; a wrong mask gives far more, rounding less


class Run(NamedTuple):
    """One timed part of a contestant."""

    seconds: float
    token_forwards: int
    result: torch.Tensor


def warm_up(policy: CausalPolicy, setting: Setting, make: Callable[[CausalPolicy, Setting], Contestant]) -> None:
    """Pay once what libraries take on first use, at the shortest length of a setting."""
    contestant = make(policy, replace(setting, length=2 * setting.horizon))
    contestant.score(contestant.sample())
    policy.model.zero_grad(set_to_none=True)


def run(policy: CausalPolicy, contestant: Contestant, parts: Sequence[str], rollouts: torch.Tensor) -> dict[str, Run]:
    """Time the parts of one contestant; `rollouts` are what it scores."""
    calls: dict[str, Callable[[], torch.Tensor]] = {
        "sampling": contestant.sample,
        "scoring": lambda: contestant.score(rollouts),
    }
    done = {}
    for part in parts:
        with token_forwards(policy.causal_lm.get_input_embeddings()) as tokens:
            taken, result = seconds(calls[part], policy.device)
        done[part] = Run(taken, sum(tokens), result)
    policy.model.zero_grad(set_to_none=True)
    return done


def take_turns(
    policy: CausalPolicy,
    contestants: dict[str, Contestant],
    parts: Sequence[str],
    *,
    rollouts: torch.Tensor,
    repeats: int,
) -> dict[str, list[dict[str, Run]]]:
    """Contestant -> its runs, in turns; a contestant whose first run was slow has only that one."""
    runs: dict[str, list[dict[str, Run]]] = {name: [] for name in contestants}
    for _ in range(repeats):
        for name, contestant in contestants.items():
            if not runs[name] or elapsed(runs[name][0], parts) <= SLOW:
                runs[name].append(run(policy, contestant, parts, rollouts))
    return runs


def elapsed(done: dict[str, Run], parts: Sequence[str]) -> float:
    """Seconds of some parts of one run."""
    return sum(done[part].seconds for part in parts)


def compare(policy: CausalPolicy, setting: Setting, stages: list[str], repeats: int) -> list[dict[str, Any]]:
    """A row for every stage of one setting, all but the peaks of memory.

    Raises:
        RuntimeError: the contestants do not compute the same log-probabilities.
    """
    parts = [part for part in PARTS["both"] if any(part in PARTS[stage] for stage in stages)]
    for make in CONTESTANTS.values():
        warm_up(policy, setting, make)
    contestants = {name: make(policy, setting) for name, make in CONTESTANTS.items()}
    rollouts = contestants["ours"].sample()
    if "scoring" in parts:  # memory that the process touches for the first time costs it seconds of page faults, once
        run(policy, contestants["ours"], ["scoring"], rollouts)
        run(policy, contestants["reference"], ["scoring"], rollouts[:, :, :COPIES])
    contestants["floor"] = floor(policy, setting)
    runs = take_turns(policy, contestants, parts, rollouts=rollouts, repeats=repeats)
    agreement = agree(runs["reference"][-1], runs["ours"][-1])
    rows = []
    for stage in stages:
        row: dict[str, Any] = {"setting": str(setting), "stage": stage, **agreement}
        for name, done in runs.items():
            row[f"{name}_s"] = min(elapsed(one, PARTS[stage]) for one in done)
            row[f"{name}_repeats"] = len(done)
            if name in CONTESTANTS:
                row[f"{name}_token_forwards"] = sum(done[0][part].token_forwards for part in PARTS[stage])
        rows.append(row)
    return rows


def agree(reference: dict[str, Run], other: dict[str, Run]) -> dict[str, float]:
    """Share of equal tokens drawn, and mean difference of log-probs in nats; bounded, or the times mean nothing.

    Rounding moves a draw now and then, and what follows it with it: shares below 1 are expected in half precision.
    """
    found = {}
    if "sampling" in reference:
        found["same_tokens"] = (reference["sampling"].result == other["sampling"].result).float().mean().item()
    if "scoring" in reference:
        difference = (reference["scoring"].result - other["scoring"].result).abs().mean().item()
        found["log_prob_difference"] = difference
        if not difference < LARGEST_DIFFERENCE:
            raise RuntimeError(f"the contestants' log-probs differ by {difference:.3g} nats on average")
    return found
