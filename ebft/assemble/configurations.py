"""Configurations written as text, `name: features=hidden whitening=group`, to options; and what they share."""

from __future__ import annotations

import types
import typing
from collections.abc import Mapping
from typing import Any

from ebft.assemble.checks import OF_TOKENS, settle
from ebft.components import GROUPS
from ebft.components.component import nearest
from ebft.components.objectives import MATCHING
from ebft.errors import UsageError
from ebft.samplers.first_tokens import first_tokens

OF_SAMPLING = ("sampler", "stride", "first", "horizon", "rollouts", "temperature", "top_p", "first_token", "strata")
# What `run` does not have: its held-out measurement is of rollouts drawn independently.
OF_STRATA = {"first_token": str | None, "strata": int | None}
OF_MATCHING = ("features", "whitening", "objective", "diversity", "estimator", "credit")
OF_SHAPING = ("drop_zero_spread", "normalize_advantage", "clip_advantage")
_GROUPS = ("sampler", "features", "whitening", "objective", "estimator")  # their components' options are settable too


def settable(hints: Mapping[str, Any]) -> dict[str, Any]:
    """Option -> type, for the options that a configuration may set, from the type hints of `run`."""
    of_components = (option for group in _GROUPS for entry in GROUPS[group].values() for option in entry.options)
    known = {**hints, **OF_STRATA}
    names = (*OF_SAMPLING, *OF_MATCHING, *OF_TOKENS, *OF_SHAPING, *of_components)
    return {name: known[name] for name in dict.fromkeys(names)}


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
    own = parse_settings(settings, hints=hints)
    options = {**dict.fromkeys(OF_STRATA), **base, **own}
    options |= {name: value for name, value in settle(options).items() if name in OF_SAMPLING}
    check_strata(settle(options))
    if options["first_token"] is not None:
        if "estimator" in own:
            raise UsageError(f"{settings!r}: strata have an estimator of their own; leave out estimator")
        options["estimator"] = "none"  # nobody else's baseline
    return name or "defaults", options


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


def check_strata(options: Mapping[str, Any]) -> None:
    """Check what goes with chosen first tokens.

    Raises:
        UsageError: an option without its partner, or one that the estimator of strata does not have.
    """
    kind, strata = options["first_token"], options["strata"]
    if kind is None and strata is None:
        return
    if kind is None or strata is None:
        raise UsageError(f"first_token={kind} strata={strata}: give both, or neither")
    first_tokens(kind, strata=strata)
    if options["rollouts"] % strata:
        raise UsageError(f"rollouts={options['rollouts']} strata={strata}: expected a multiple of {strata} rollouts")
    if options["diversity"] > 0 and options["rollouts"] < 2 * strata:
        raise UsageError(
            f"rollouts={options['rollouts']} strata={strata}: the diversity term wants 2 rollouts in a stratum; give"
            f" {2 * strata}, or diversity=0"
        )
    allowed = {"top_p": (1.0,), "sampler": ("strided", "random"), "objective": MATCHING}
    for name, values in allowed.items():
        if options[name] not in values:
            expected = " or ".join(map(str, values))
            raise UsageError(f"first_token={kind} with {name}={options[name]}: expected {expected}")
    for name in (*OF_SHAPING, "token_baseline", "trace"):
        if options[name] not in (None, False):
            raise UsageError(f"first_token={kind} with {name}={options[name]}: strata have an estimator of their own")
    if options["credit"] not in (None, "reward_to_go"):
        raise UsageError(f"first_token={kind} with credit={options['credit']}: expected reward_to_go")


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
