"""Weights of the loss that change over a run: pure functions of the step, so a resumed run needs no state for them."""

from __future__ import annotations

from collections.abc import Callable

from ebft.errors import UsageError

Schedule = Callable[[int], float]

_DEFAULTS = {"constant": None, "linear_decay": 0.0, "warm_up": 0.1}
SCHEDULES = tuple(_DEFAULTS)


def schedule(text: str, value: float, *, steps: int) -> Schedule:
    """A weight as a function of the step (0-based).

    ``constant``; ``linear_decay`` or ``linear_decay:END``, from `value` in a straight line that would reach END times
    `value` (END 0 when not given) after the last step; ``warm_up`` or ``warm_up:SHARE``, in a straight line from 0 up
    to `value` over the first SHARE of the steps (0.1 when not given), then constant. No step has weight 0, unless
    `value` is 0.

    Args:
        text: one of the above.
        value: the weight.
        steps: of the whole run.

    Raises:
        UsageError: unknown name, or a number where none belongs, is no number or is out of [0, 1].
    """
    name, colon, number = text.partition(":")
    if name not in _DEFAULTS or (colon and name == "constant"):
        raise UsageError(f"schedule {text!r} is not known; expected constant, linear_decay[:END] or warm_up[:SHARE]")
    share = _share(text, number) if colon else _DEFAULTS[name]
    if name == "constant" or share is None:
        return lambda step: value
    if name == "linear_decay":
        return lambda step: value * (1 - (1 - share) * min(step, steps - 1) / steps)
    rising = max(1, round(share * steps))
    return lambda step: value * min(1.0, (step + 1) / rising)


def _share(text: str, number: str) -> float:
    try:
        share = float(number)
    except ValueError:
        share = -1.0
    if not 0 <= share <= 1:
        raise UsageError(f"schedule {text!r}: expected a number in [0, 1] behind the colon, found {number!r}")
    return share
