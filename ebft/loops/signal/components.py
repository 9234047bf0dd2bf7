"""Where the noise of a gradient comes from, and how to spend tokens on it.

Over a batch of B sequences with K anchors each and N rollouts from every anchor, the variance of the gradient is taken
to be s + (a + ρ(N))/κ: s is what the sequences bring, a the anchors of one sequence, ρ the rollouts of one anchor, and
κ the density of anchors in units of the measured one. s, a and ρ are those of the measured batch; all fall as 1/B.
Anchors of a sequence count as exchangeable: effects that neighbours share beyond those of the sequence are ignored.

They are told apart by gradients of every second anchor, even and odd ones, and of all or half of the rollouts: products
of even with odd ones share the sequences alone, products of the same anchors with rollouts drawn anew share these too.
The number of rollouts enters as ρ(N) = p/(N-1) + q/(N-1)², which for a leave-one-out baseline and a reward that does
not interact with the score is exact with q = 0.

The cost of an update is that of the sequences plus κ N times that of one rollout from every anchor. Signal-to-noise²
per token does not depend on B, and for given N it is largest at κ² = (a + ρ(N)) C / (s N c), with C the cost of the
sequences and c that of a rollout from every anchor.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ebft.loops.signal.plan import Configuration
from ebft.loops.signal.statistics import Moments, jackknife

ROLLOUTS = (2, 3, 4, 6, 8, 12, 16, 32)
NAMES = ("sequences", "anchors", "rollouts", "rollouts_of_half")


class Components(NamedTuple):
    """Variance of the measured batch by source; none below 0."""

    sequences: float  # s
    anchors: float  # a
    first: float  # p of ρ(N) = p/(N-1) + q/(N-1)²
    second: float  # q


class Cost(NamedTuple):
    """Token-forwards of the measured batch."""

    sequences: float
    per_rollout: float  # of one rollout from every anchor


def halves(configuration: Configuration, *, rollouts: int) -> list[Configuration]:
    """The four configurations that tell the sources apart: even and odd anchors, with all and half of the rollouts."""
    return [
        replace(
            configuration, name=f"{configuration.name}, {label} anchors, {count} rollouts", parity=p, rollouts=count
        )
        for count in (rollouts, rollouts // 2)
        for p, label in enumerate(("even", "odd"))
    ]


def variances(m: Moments) -> Tensor:
    """[4]: s, a, ρ(N) and ρ(N/2) from the moments of :func:`halves`; unbiased, so they may be negative."""
    signal = m.cross[:2, :2].mean()
    shared = m.within[0, 1]
    again = m.within.diagonal()
    rho = (m.square - again) / 2
    full = again[:2].mean()
    return torch.stack([shared - signal, (full - shared) / 2, rho[:2].mean(), rho[2:].mean()])


def components(values: Sequence[float], *, rollouts: int) -> Components:
    """Fit ρ through its two points and put negative components to 0.

    Args:
        values: of :func:`variances`; rollouts: N.
    """
    sequences, anchors, all_of_them, half = values
    x, y = 1 / (rollouts - 1), 1 / (rollouts // 2 - 1)
    second = (half / y - all_of_them / x) / (y - x)
    first = all_of_them / x - second * x
    if second < 0:  # one parameter, by least squares
        first, second = (all_of_them * x + half * y) / (x * x + y * y), 0.0
    elif first < 0:
        first, second = 0.0, (all_of_them * x**2 + half * y**2) / (x**4 + y**4)
    return Components(max(0.0, sequences), max(0.0, anchors), max(0.0, first), max(0.0, second))


def price(cost: Sequence[float], *, rollouts: int) -> Cost:
    """The two parts of the cost, from what the whole and the half of the rollouts of even and odd anchors cost.

    Args:
        cost: [4], of :func:`halves`; every one holds the sequences once.
    """
    per_rollout = (cost[0] + cost[1] - cost[2] - cost[3]) / (rollouts - rollouts // 2)
    return Cost((cost[0] + cost[1] - rollouts * per_rollout) / 2, per_rollout)


def variance(parts: Components, *, density: float, rollouts: int) -> float:
    """Of a batch with the measured number of sequences."""
    x = 1 / (rollouts - 1)
    return parts.sequences + (parts.anchors + parts.first * x + parts.second * x * x) / density


def spent(cost: Cost, *, density: float, rollouts: int) -> float:
    """Token-forwards of such a batch."""
    return cost.sequences + density * rollouts * cost.per_rollout


def best_density(parts: Components, cost: Cost, *, rollouts: int, most: float) -> float:
    """κ of the largest signal-to-noise² per token, at most `most`."""
    noise = variance(parts._replace(sequences=0.0), density=1.0, rollouts=rollouts)
    if not parts.sequences:
        return most
    return min(most, math.sqrt(noise * cost.sequences / (parts.sequences * rollouts * cost.per_rollout)))


def allocation(gram: Tensor, cost: Sequence[float], *, rollouts: int, stride: int) -> dict[str, Any]:
    """The sources of noise with intervals, and for each N the density of anchors that pays best.

    Args:
        gram: [4,M,R,4,M,R] of :func:`halves`; cost: [4] token-forwards of them.
        rollouts: N; stride: tokens between anchors, as measured.

    Returns:
        ``variances``: name -> estimate; ``shares`` of the variance of the measured batch; ``table``: for each N the
        stride (at least 1) and the signal-to-noise² per token-forward, as a multiple of the measured batch's;
        ``best``: its best row.
    """
    estimates = jackknife(gram, variances)
    parts = components([e.value for e in estimates], rollouts=rollouts)
    paid = price(cost, rollouts=rollouts)

    def worth(density: float, count: int) -> float:
        return 1 / (variance(parts, density=density, rollouts=count) * spent(paid, density=density, rollouts=count))

    present = worth(1.0, rollouts)
    table = []
    for count in ROLLOUTS:
        density = best_density(parts, paid, rollouts=count, most=float(stride))
        gap = max(1, round(stride / density))
        table.append({"rollouts": count, "stride": gap, "gain": worth(stride / gap, count) / present})
    whole = variance(parts, density=1.0, rollouts=rollouts)
    return {
        "variances": {name: e._asdict() for name, e in zip(NAMES, estimates, strict=True)},
        "shares": {
            "sequences": parts.sequences / whole,
            "anchors": parts.anchors / whole,
            "rollouts": 1 - (parts.sequences + parts.anchors) / whole,
        },
        "components": parts._asdict(),
        "cost": paid._asdict(),
        "measured": {"rollouts": rollouts, "stride": stride},
        "table": table,
        "best": max(table, key=lambda row: row["gain"]),
    }


def allocation_markdown(result: Mapping[str, Any]) -> str:
    """The allocation as text and a table."""
    estimates = result["variances"]
    lines = ["| source | variance (95 % interval) | share |", "|---|---:|---:|"]
    for name in ("sequences", "anchors", "rollouts"):
        e = estimates[name]
        share = result["shares"][name]
        lines.append(f"| {name} | {e['value']:.3g} ({e['low']:.3g} to {e['high']:.3g}) | {share:.0%} |")
    measured = result["measured"]
    lines += [
        "",
        f"Signal-to-noise² per token-forward over that of {measured['rollouts']} rollouts from every"
        f" {measured['stride']}th prefix, at the best density of anchors:",
        "",
        "| rollouts | stride | gain |",
        "|---:|---:|---:|",
    ]
    lines += [f"| {row['rollouts']} | {row['stride']} | {row['gain']:.2f} |" for row in result["table"]]
    return "\n".join(lines) + "\n"
