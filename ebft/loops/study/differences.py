"""Every arm against every other: paired differences, and how sure they are over seeds and over texts."""

from __future__ import annotations

import itertools
import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

from ebft.loops.ablation.intervals import Interval, p_value, paired_interval
from ebft.loops.evaluation.result import look_up, mean_differences
from ebft.loops.study.measured import KINDS, Column, Found, Tested, totals_for

_ROUNDING = 1e-9  # of float64 sums of equal terms, relatively


@dataclass(frozen=True)
class Difference:
    """`arm` less `other` in one column, both trained with the same seeds and measured on the same texts.

    Attributes:
        seeds: mean and t-interval over seeds; p: of its t-test. They speak of other seeds on these texts.
        low, high: bootstrap (BCa) interval over texts of the mean over seeds: it speaks of other texts.
    """

    arm: str
    other: str
    column: Column
    seeds: Interval
    p: float
    low: float
    high: float

    @property
    def varied(self) -> bool:
        """Whether seeds differ.

        Where all give the same difference they have not moved their policies, as RLVR without any reward does: three
        times the same policy says nothing of other seeds.
        """
        return not self.seeds.half_width <= _ROUNDING * abs(self.seeds.mean)  # NaN for one seed

    @property
    def decided(self) -> bool:
        """Whether both intervals leave out 0, and seeds differ."""
        return self.varied and abs(self.seeds.mean) > self.seeds.half_width and (self.low > 0 or self.high < 0)

    @property
    def better(self) -> bool:
        """Whether the difference goes the way that is good for `arm`."""
        return (self.seeds.mean < 0) == (self.column.better == "lower")


def all_differences(
    found: Found, columns: Sequence[Column], *, replicates: int, level: float, seed: int
) -> list[Difference]:
    """Those of every two arms, the later one less the earlier one, over the seeds that both have.

    Args:
        replicates, level, seed: of the bootstrap; `level` is that of the t-intervals too.
    """
    options = {"replicates": replicates, "level": level, "seed": seed}
    pairs = itertools.combinations((arm for arm, tested in found.tested.items() if tested), 2)
    return [
        difference
        for other, arm in pairs
        for kind in KINDS
        for difference in _of_pair(found, arm, other, [c for c in columns if c.kind == kind], kind, options)
    ]


def _of_pair(
    found: Found, arm: str, other: str, columns: Sequence[Column], kind: str, options: dict
) -> list[Difference]:
    first, second = found.tested[other], found.tested[arm]
    seeds = [seed for seed in second if seed in first]
    if not columns or not seeds:
        return []
    pairs = [tuple(totals_for(of[seed], columns, kind) for of in (first, second)) for seed in seeds]
    entries = mean_differences(pairs, **options)  # type: ignore[arg-type]
    made = []
    for column in columns:
        before, after = _by_seed(first, column), _by_seed(second, column)
        interval = paired_interval(after, before, confidence=options["level"])
        p = p_value([after[seed] - before[seed] for seed in after if seed in before])
        entry = look_up(entries, *column.quantity)
        low, high = (math.nan if entry is None or entry[end] is None else entry[end] for end in ("low", "high"))
        made.append(Difference(arm, other, column, interval, p, low, high))
    return made


def _by_seed(tested: Mapping[int, Tested], column: Column) -> dict[Hashable, float]:
    values: dict[Hashable, float | None] = {seed: one.value(column) for seed, one in tested.items()}
    return {seed: value for seed, value in values.items() if value is not None}
