"""Numbers of the comparison of methods: paired differences, p-values, the time left."""

import math

import pytest
import torch
from matplotlib.axes import Axes

from ebft.loops.ablation.intervals import Interval, p_value
from ebft.loops.ablation.study import time_left
from ebft.loops.ablation.tables import with_error
from ebft.loops.evaluation.quantities import Quantity
from ebft.loops.evaluation.result import mean_differences, paired_differences
from ebft.loops.study import tables
from ebft.loops.study.differences import Difference
from ebft.loops.study.measured import Column, Found
from ebft.loops.study.plots import training_png


def test_the_time_left_knows_what_takes_long():
    taken = {"fast": [1.0, 3.0], "slow": [10.0]}
    assert time_left(taken, ["fast", "slow", "slow", "new"]) == 2 + 10 + 10 + 6
    assert time_left(taken, []) == 0


def test_the_mean_of_paired_differences():
    random = torch.Generator().manual_seed(0)
    q = Quantity("cross_entropy", "all")
    count = torch.randint(1, 9, (6,), generator=random).double()
    totals = [{q: (torch.rand(6, generator=random, dtype=torch.float64), count)} for _ in range(4)]
    (one, _), (other, _) = (paired_differences(totals[i], totals[i + 1], replicates=200) for i in (0, 2))
    both, _ = mean_differences([(totals[0], totals[1]), (totals[2], totals[3])], replicates=200)
    assert both["value"] == pytest.approx((one["value"] + other["value"]) / 2, rel=1e-12)
    # with equal counts the mean of differences is the difference of means, resample for resample
    halves = [{q: ((totals[i][q][0] + totals[i + 2][q][0]) / 2, count)} for i in (0, 1)]
    same, _ = paired_differences(*halves, replicates=200, method="percentile")
    both, _ = mean_differences([(totals[0], totals[1]), (totals[2], totals[3])], replicates=200, method="percentile")
    for end in ("value", "low", "high", "standard_error"):
        assert both[end] == pytest.approx(same[end], rel=1e-9)


def test_policies_that_did_not_move_have_no_p_value():
    column = Column("pass@1", Quantity("pass_at_k", at=1), "prompts", "higher")
    for half_width, said in ((1e-18, False), (0.001, True)):
        one = Difference("rlvr", "base", column, Interval(-0.0018, half_width, 3), 0.0, -0.1, 0.1)
        assert ("(p 0)" in tables._difference(one)) is said
    assert with_error(2.906, 1.351e-15) == with_error(2.906, 0.0) == "2.906 ± 0"
    assert with_error(2.906, 0.001) != "2.906 ± 0"


def test_what_is_measured_on_other_texts_is_drawn_apart(monkeypatch):
    drawn, draw = {}, Axes.errorbar

    def errorbar(axes, *args, label, **style):
        drawn[label] = style.get("linestyle")
        return draw(axes, *args, label=label, **style)

    monkeypatch.setattr(Axes, "errorbar", errorbar)
    curve = {"cross_entropy": [(0.0, 2.0), (8.0, 1.0)]}
    found = Found({}, {}, {}, {}, {"sft": {0: curve}, "rlvr": {0: curve}})
    assert training_png(found, level=0.95, title="x").startswith(b"\x89PNG")
    assert drawn == {"SFT": None, "RLVR (of answers alone)": "--"}


@pytest.mark.parametrize(
    ("half_width", "low", "high", "decided"),
    [
        *[
            (1, 0.5, 3, True),
            (3, 0.5, 3, False),
            (1, -0.5, 3, False),
            (math.nan, 0.5, 3, False),
            (1, math.nan, 3, False),
        ],
        *[(0.0, 0.5, 3, False), (1e-15, 0.5, 3, False), (1e-6, 0.5, 3, True)],
    ],
)
def test_a_difference_is_decided_by_seeds_and_texts(half_width, low, high, decided):
    column = Column("pass@1", Quantity("pass_at_k", at=1), "prompts", "higher")
    one = Difference("ebft", "sft", column, Interval(2.0, half_width, 3), 0.01, low, high)
    other = Difference("ebft", "sft", column, Interval(-2.0, half_width, 3), 0.01, -high, -low)
    assert one.decided is other.decided is decided
    assert (one.better, other.better) == (True, False)


def test_p_values_in_closed_form():
    """With 2 degrees of freedom P(|t| > x) = 1 - x / √(2 + x²)."""
    values = [1.0, 2.0, 6.0]
    x = 3.0 / (math.sqrt(7) / math.sqrt(3))
    assert p_value(values) == pytest.approx(1 - x / math.sqrt(2 + x * x), rel=1e-9)
    assert math.isnan(p_value([1.0]))
    assert (p_value([2.0, 2.0]), p_value([0.0, 0.0])) == (0.0, 1.0)
