"""The feature-matching loss over the horizon, before and after training, from the `profile.json` of an evaluation."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

from ebft.errors import UsageError
from ebft.loops.report_frame import Frame
from ebft.loops.report_verdict import aligned

LEGEND = (
    "Held-out data: the loss of the first tokens of the rollouts, up to each horizon. Bars are ± one standard error."
)
_KEYS = ("horizons", "before", "after", "before_standard_error", "after_standard_error")


def check_profile(profile: dict[str, Any]) -> dict[str, list[float]]:
    """The five lists of a profile; empty where there is none.

    Args:
        profile: `{"horizons": [int], "before": [float], "after": [float], "before_standard_error": [float],
            "after_standard_error": [float]}`, lists of one length, horizons rising; further keys are let be.

    Raises:
        UsageError: another form.
    """
    if not profile:
        return {}
    lists: dict[str, Any] = {key: profile.get(key) for key in _KEYS}
    length = len(lists["horizons"] or ())
    for key, values in lists.items():
        if not isinstance(values, list) or len(values) != length or not all(isinstance(v, int | float) for v in values):
            raise UsageError(f"profile.json: {key!r} is {values!r}, expected as many numbers as there are horizons")
    horizons = lists["horizons"]
    if not horizons or any(b <= a for a, b in pairwise(horizons)):
        raise UsageError(f"profile.json: 'horizons' is {horizons!r}, expected rising numbers of tokens")
    return lists


def profile_svg(profile: dict[str, list[float]]) -> str:
    """One panel: both curves with their standard errors, the start dashed."""
    horizons = profile["horizons"]
    ends = [
        value + sign * (error if math.isfinite(error) else 0.0)
        for when in ("before", "after")
        for value, error in zip(profile[when], profile[f"{when}_standard_error"], strict=True)
        if math.isfinite(value)
        for sign in (-1, 1)
    ]
    frame = Frame.around(horizons, ends or [0.0])
    marks = []
    for when in ("before", "after"):
        known = [
            (h, value, error if math.isfinite(error) else 0.0)
            for h, value, error in zip(horizons, profile[when], profile[f"{when}_standard_error"], strict=True)
            if math.isfinite(value)
        ]
        bars = "".join(f"M{frame.x(h):.1f} {frame.y(v - e):.1f}V{frame.y(v + e):.1f}" for h, v, e in known)
        line = "L".join(frame.points([h for h, *_ in known], [v for _, v, _ in known]))
        if known:
            marks.append(f'<path class="{when}" d="M{line}h0"/><path class="{when} bars" d="{bars}"/>')
    return frame.svg(marks, label="Feature-matching loss over the horizon, before and after training")


def profile_rows(profile: dict[str, list[float]]) -> list[list[str]]:
    """For every horizon: both losses with their standard errors."""
    rows = []
    for i, horizon in enumerate(profile["horizons"]):
        cells = [f"{horizon:,}"]
        for when in ("before", "after"):
            value, error = profile[when][i], profile[f"{when}_standard_error"][i]
            cells.append(f"{aligned(value, error)} ± {aligned(error, error)}")
        rows.append(cells)
    return rows
