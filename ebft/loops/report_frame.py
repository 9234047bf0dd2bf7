"""The frame of a panel in the report: axes with round ticks, as inline SVG, and numbers for people."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise

WIDTH, HEIGHT = 360, 180
LEFT, RIGHT, TOP, BOTTOM = 50, 342, 8, 158


def number(value: float | None, digits: int = 4) -> str:
    """A number for people: `digits` significant digits, thousands apart, a true minus; a dash if it is not finite."""
    if value is None or not math.isfinite(value):
        return "–"
    if 1000 <= abs(value) < 1e6:
        return f"{value:,.0f}".replace("-", "−")
    mantissa, exponent, power = f"{value:.{digits}g}".partition("e")
    return (f"{mantissa}e{int(power)}" if exponent else mantissa).replace("-", "−")


def value_range(values: list[float]) -> tuple[float, float]:
    """Smallest and largest value, widened where they (nearly) coincide so that an axis can be drawn."""
    low, high = min(values), max(values)
    if high - low <= 1e-9 * max(abs(low), abs(high)):
        margin = 0.05 * abs(high) or 0.5
        return low - margin, high + margin
    return low, high


def ticks(low: float, high: float, *, integer: bool = False) -> list[tuple[float, str]]:
    """Round positions inside [low, high] with labels that tell them apart."""
    from matplotlib.ticker import MaxNLocator

    locator = MaxNLocator(nbins=4, steps=[1, 2, 5, 10], integer=integer)
    values = [float(v) for v in locator.tick_values(low, high) if low <= v <= high]
    gap = min((b - a for a, b in pairwise(values)), default=0.0)
    decimals = max(0, -math.floor(math.log10(gap) + 1e-9)) if gap else 9
    plain = decimals <= 3 and max(map(abs, values)) < 1e6
    return [(v, f"{v:,.{decimals}f}".replace("-", "−") if plain else number(v, 6)) for v in values]


@dataclass(frozen=True)
class Frame:
    """The ranges of both axes, and where their values lie in the panel."""

    x_low: float
    x_high: float
    y_low: float
    y_high: float

    @classmethod
    def around(cls, steps: Sequence[float], values: Sequence[float]) -> Frame:
        """A frame that holds all points; `steps` are in order."""
        x_low, x_high = steps[0], steps[-1]
        if x_low == x_high:
            x_low, x_high = x_low - 1, x_high + 1
        return cls(x_low, x_high, *value_range(list(values)))

    def x(self, step: float) -> float:
        return LEFT + (step - self.x_low) / (self.x_high - self.x_low) * (RIGHT - LEFT)

    def y(self, value: float) -> float:
        return BOTTOM - (value - self.y_low) / (self.y_high - self.y_low) * (BOTTOM - TOP)

    def points(self, steps: Iterable[float], values: Iterable[float]) -> list[str]:
        """Coordinates as a path takes them."""
        return [f"{self.x(s):.1f} {self.y(v):.1f}" for s, v in zip(steps, values, strict=True)]

    def svg(self, marks: Iterable[str], *, label: str) -> str:
        """The panel as an SVG element: grid and ticks, then `marks`; colours come from the page's CSS."""
        parts = []
        for value, text in ticks(self.y_low, self.y_high):
            parts.append(f'<path class="grid" d="M{LEFT} {self.y(value):.1f}H{RIGHT}"/>')
            parts.append(f'<text x="{LEFT - 6}" y="{self.y(value) + 3.5:.1f}" text-anchor="end">{text}</text>')
        for value, text in ticks(self.x_low, self.x_high, integer=True):
            parts.append(f'<text x="{self.x(value):.1f}" y="{BOTTOM + 16}" text-anchor="middle">{text}</text>')
        name = escape(label, quote=True)
        return (
            f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{name}">{"".join(parts)}{"".join(marks)}</svg>'
        )
