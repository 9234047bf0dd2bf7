"""Bootstrap intervals of anything that is made of totals over independent units (sequences, prompts).

All quantities of one measurement share their resamples, so intervals of differences between them are paired.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ebft.errors import UsageError

METHODS = ("bca", "percentile")
Statistic = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Estimate:
    """Values of S statistics, each [S] float64; without 2 units, or a finite value, the rest is NaN."""

    value: Tensor
    low: Tensor
    high: Tensor
    standard_error: Tensor


def ratio(sums: Tensor, counts: Tensor) -> Tensor:
    """Totals [...,Q] to their ratios [...,Q]: the mean in which every token (anchor, rollout) counts the same."""
    return sums / counts


def bootstrap(
    sums: Tensor,
    counts: Tensor,
    statistic: Statistic = ratio,
    *,
    replicates: int = 2000,
    level: float = 0.95,
    method: str = "bca",
    seed: int = 0,
) -> Estimate:
    """Statistics of totals with intervals by resampling units (Efron, "Better bootstrap confidence intervals", 1987).

    Args:
        sums, counts: [M,Q] float64, what each of M units adds to Q totals.
        statistic: totals [...,Q], [...,Q] -> [...,S].
        replicates: R, resamples.
        level: of the intervals, in (0, 1).
        method: "percentile": quantiles of the replicates; "bca": those corrected for bias and skewness, which covers
            better when units are few.
        seed: of the resamples; the same for the same M, whatever is measured.

    Returns:
        Estimate with entries [S]. Replicates in which a statistic is not finite are left out of its interval.

    Raises:
        UsageError: shapes that disagree, no unit, or an option out of its range.
    """
    if sums.ndim != 2 or sums.shape != counts.shape or not len(sums):
        raise UsageError(
            f"sums have shape {list(sums.shape)}, counts {list(counts.shape)}; expected [units, totals] for both, with"
            " one unit at least"
        )
    if method not in METHODS:
        raise UsageError(f"method={method!r} is not known; expected one of {', '.join(METHODS)}")
    if not 0 < level < 1 or replicates < 2:
        raise UsageError(f"level={level}, replicates={replicates}: expected a level in (0, 1) and 2 replicates or more")
    sums, counts = sums.double().cpu(), counts.double().cpu()
    value = statistic(sums.sum(0), counts.sum(0))
    if len(sums) < 2:
        nothing = torch.full_like(value, torch.nan)
        return Estimate(value, nothing, nothing, nothing)
    weights = resamples(len(sums), replicates=replicates, seed=seed)
    drawn = statistic(weights @ sums, weights @ counts)
    tails = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)[:, None].expand(2, len(value))
    if method == "bca":
        left_out = statistic(sums.sum(0) - sums, counts.sum(0) - counts)
        tails = _corrected(tails, value, drawn, left_out)
    low, high = _quantiles(drawn, tails)
    return Estimate(value, low, high, _standard_deviation(drawn))


def resamples(units: int, *, replicates: int, seed: int) -> Tensor:
    """[R,M] float64: how often each of M units is in each of R draws of M units with replacement."""
    drawn = torch.randint(units, (replicates, units), generator=torch.Generator().manual_seed(seed))
    return torch.zeros(replicates, units, dtype=torch.float64).scatter_add_(
        1, drawn, torch.ones(replicates, units, dtype=torch.float64)
    )


def _corrected(tails: Tensor, value: Tensor, drawn: Tensor, left_out: Tensor) -> Tensor:
    """Tail probabilities [2,S], corrected for the bias of replicates [R,S] and the skewness of the jackknife [M,S]."""
    finite = drawn.isfinite()
    total = finite.sum(0)
    below = ((drawn < value) & finite).sum(0) + ((drawn == value) & finite).sum(0) / 2
    bias = torch.special.ndtri(below / total).clamp(-8, 8)  # all replicates on one side: as far as it goes
    known = left_out.isfinite()
    deviation = torch.where(known, torch.nanmean(left_out.masked_fill(~known, torch.nan), 0) - left_out, 0.0)
    spread = deviation.square().sum(0)
    acceleration = torch.where(spread > 0, deviation.pow(3).sum(0) / (6 * spread.clamp(min=1e-300).pow(1.5)), 0.0)
    shifted = bias + torch.special.ndtri(tails)
    return torch.special.ndtr(bias + shifted / (1 - acceleration * shifted))


def _quantiles(drawn: Tensor, tails: Tensor) -> tuple[Tensor, Tensor]:
    """Quantiles [S], [S] of the finite replicates of [R,S] at tails [2,S], with linear interpolation."""
    finite = drawn.isfinite()
    ordered = torch.where(finite, drawn, torch.inf).sort(0).values
    last = (finite.sum(0) - 1).clamp(min=0)
    place = tails.nan_to_num(0.5) * last
    under = place.floor().long()
    over = torch.minimum(under + 1, last)
    low, high = ordered.gather(0, under), ordered.gather(0, over)
    # equal neighbours give themselves, to the last digit
    found = torch.where(low == high, low, low + (place - under) * (high - low))
    return tuple(torch.where(finite.any(0), found, torch.nan))  # type: ignore[return-value]


def _standard_deviation(drawn: Tensor) -> Tensor:
    """[R,S] -> [S] over the finite replicates."""
    finite = drawn.isfinite()
    total = finite.sum(0)
    centre = torch.where(finite, drawn, 0.0).sum(0) / total
    squares = torch.where(finite, (drawn - centre).square(), 0.0).sum(0)
    return torch.where(total > 1, (squares / (total - 1).clamp(min=1)).sqrt(), torch.nan)
