"""How sure a number is: intervals over seeds, paired differences, errors over independent units by the jackknife."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ebft.errors import UsageError


class Interval(NamedTuple):
    """A mean, half the width of its interval (NaN where one value alone says nothing of it), and of how many values."""

    mean: float
    half_width: float
    number: int


def t_interval(values: Sequence[float], *, confidence: float = 0.95) -> Interval:
    """Mean of independent values and its interval by Student's t: mean ± t · s / √n with n - 1 degrees of freedom.

    It covers the mean of a normal population with this probability, for any number of values from 2 on. No values
    give NaN, one value gives no interval.

    Raises:
        UsageError: a `confidence` outside (0, 1).
    """
    if not 0 < confidence < 1:
        raise UsageError(f"confidence={confidence!r}: expected a number between 0 and 1")
    count = len(values)
    if count == 0:
        return Interval(math.nan, math.nan, 0)
    mean = math.fsum(values) / count
    if count == 1:
        return Interval(mean, math.nan, 1)
    deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (count - 1))
    return Interval(mean, reach(count - 1, confidence) * deviation / math.sqrt(count), count)


def reach(freedom: int, confidence: float = 0.95) -> float:
    """Half the width of an interval by Student's t in units of the standard error; NaN without degrees of freedom."""
    from scipy.stats import t  # half a second, which the command line need not wait for

    return float(t.ppf((1 + confidence) / 2, freedom)) if freedom > 0 else math.nan


def paired_interval(
    values: Mapping[Hashable, float], base: Mapping[Hashable, float], *, confidence: float = 0.95
) -> Interval:
    """`t_interval` of values - base over the keys (seeds) that both have; what only one of them has is left out.

    What a seed does to both cancels: the interval is that of the differences, not of two independent means.
    """
    shared = [key for key in values if key in base]
    return t_interval([values[key] - base[key] for key in shared], confidence=confidence)


def p_value(differences: Sequence[float]) -> float:
    """Of the two-sided t-test that paired differences have mean 0; NaN for fewer than two of them."""
    mean, error, count = t_interval(differences)
    if count < 2:
        return math.nan
    if error == 0:
        return 0.0 if mean else 1.0
    from scipy.stats import t

    return float(2 * t.sf(abs(mean) / error * reach(count - 1), count - 1))


class Jackknife(NamedTuple):
    """A statistic of all units, and what it is without each of them, [M] float64."""

    value: float
    without: Tensor


def jackknife(statistic: Callable[[Tensor], Tensor], units: Tensor) -> Jackknife:
    """A statistic of M independent units, and what it is without each of them (Efron, "The Jackknife", 1982).

    Args:
        statistic: from rows [m,...] of any number of units to a scalar.
        units: [M,...], a row a unit.
    """
    units = units.double()
    everything = torch.arange(len(units), device=units.device)
    rest = range(len(units)) if len(units) > 1 else ()
    without = [statistic(units[everything != left_out]).item() for left_out in rest]
    return Jackknife(statistic(units).item(), torch.tensor(without, dtype=torch.float64))


def standard_error(without: Tensor) -> float:
    """√((M-1)/M Σ (v_i - v̄)²) of the leave-one-out values [M]; NaN for fewer than 2 units, or where one is not finite.

    For a mean this is s/√M exactly. That of a difference between two statistics of the same units is the error of the
    differences of their leave-one-out values: paired.
    """
    count = len(without)
    if count < 2:
        return math.nan
    return math.sqrt((count - 1) / count * (without - without.mean()).square().sum().item())
