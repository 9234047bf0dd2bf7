"""Plain words on a metric before and after training."""

from __future__ import annotations

import math

from ebft.loops.report_frame import number

# A metric's better direction is known by the words in its name; for any other name the report does not judge.
_LOWER = ("loss", "cross_entropy", "perplexity", "error", "seconds")
_HIGHER = ("reward", "bleu", "comet", "accuracy", "pass", "similarity", "tokens_per_second")


def better_direction(name: str) -> str | None:
    """Whether a metric should be "lower" or "higher", from the words in its name; None where they do not tell."""
    found = [
        direction
        for direction, words in (("lower", _LOWER), ("higher", _HIGHER))
        if any(f"_{word}_" in f"_{name.lower()}_" for word in words)
    ]
    return found[0] if len(found) == 1 else None


def verdict(name: str, difference: float, standard_error: float) -> tuple[str, str]:
    """Plain words on a paired difference (after − before), and a CSS class: "good", "bad" or "".

    A change counts as shown where it is larger than two standard errors.
    """
    if not (math.isfinite(difference) and math.isfinite(standard_error)):
        return "no verdict: difference or standard error not known", ""
    if abs(difference) <= 2 * standard_error:
        return "no difference shown", ""
    better = better_direction(name)
    moved = "rose" if difference > 0 else "fell"
    if better is None:
        return moved, ""
    good = (difference > 0) == (better == "higher")
    return (f"{moved}: better", "good") if good else (f"{moved}: worse", "bad")


def aligned(value: float, error: float) -> str:
    """A number with decimals down to the second digit of its standard error, where that is a sensible count."""
    if not (math.isfinite(value) and math.isfinite(error) and 1e-6 <= error < 1e3 and abs(value) < 1e6):
        return number(value)
    return f"{value:,.{max(0, 1 - math.floor(math.log10(error)))}f}".replace("-", "−")
