"""Configurations written as text, `name: features=hidden whitening=group`, to options; and what they share."""

from __future__ import annotations

import types
import typing
from collections.abc import Mapping
from typing import Any

from ebft.components import GROUPS, OPTION_NAMES
from ebft.components.component import nearest
from ebft.errors import UsageError

OF_SAMPLING = ("sampler", "stride", "first", "horizon", "rollouts", "temperature", "top_p")
OF_MATCHING = ("features", "whitening", "objective", "diversity", "estimator", "credit")
OF_SHAPING = ("drop_zero_spread", "normalize_advantage", "clip_advantage")
_SETTABLE = tuple(dict.fromkeys((*OF_SAMPLING, *OF_MATCHING, *OF_SHAPING, *OPTION_NAMES)))


def settable(hints: Mapping[str, Any]) -> dict[str, Any]:
    """Option -> type, for the options that a configuration may set, from the type hints of `run`."""
    not_measured = set(OPTION_NAMES) - {o for g in GROUPS if g != "pg" for e in GROUPS[g].values() for o in e.options}
    return {name: hints[name] for name in _SETTABLE if name not in not_measured}


def parse_configuration(text: str, *, base: Mapping[str, Any], hints: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """The name of a configuration and all its options.

    Args:
        text: `name: option=value option=value`, or without a name, which is then the text itself.
        base: the options where the text sets none.
        hints: types of `run`'s options.

    Raises:
        UsageError: an option that is unknown or that a gradient does not depend on, or a value of another type.
    """
    name, colon, rest = text.partition(": ")
    settings = rest if colon else text
    name = (name if colon else text).strip()
    return name or "defaults", {**base, **parse_settings(settings, hints=hints)}


def parse_settings(text: str, *, hints: Mapping[str, Any]) -> dict[str, Any]:
    """`option=value option=value` to options."""
    allowed = settable(hints)
    found: dict[str, Any] = {}
    for part in text.split():
        option, equals, value = part.partition("=")
        key = option.removeprefix("--").replace("-", "_")
        if not equals or key not in allowed:
            raise UsageError(
                f"configuration {text!r}: {part!r}{nearest(key, allowed)}: expected option=value with an option of"
                f" {', '.join(allowed)}"
            )
        found[key] = _parse(key, value, allowed[key])
    return found


def _parse(option: str, value: str, hint: Any) -> Any:
    """A value of the type that the option has on the command line."""
    choices = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if value == "none" and type(None) in choices and str not in choices:
        return None
    kind = next(choice for choice in choices if choice is not type(None))
    if kind is bool:
        if value not in ("true", "false"):
            raise UsageError(f"{option}={value}: expected true or false")
        return value == "true"
    try:
        return kind(value)
    except ValueError as error:
        raise UsageError(f"{option}={value}: expected a value of type {kind.__name__}") from error
