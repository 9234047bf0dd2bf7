"""Colours of the lines of a plot."""

from __future__ import annotations

# Dark ones first; the light ones are for plots of many lines.
COLOURS = (
    *("#2a5db0", "#c0541a", "#2e8540", "#7b3fa0", "#8a6d00", "#b0306a", "#1a8f9a", "#555555"),
    *("#e8896b", "#7fb3e6", "#86c06a", "#dd9ac8"),
)


def colours(count: int) -> list[str]:
    """One for each of `count` lines; after twelve they repeat."""
    return [COLOURS[i % len(COLOURS)] for i in range(count)]
