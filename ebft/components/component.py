"""What a named choice is made of."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ebft.errors import UsageError


@dataclass(frozen=True)
class Component:
    """A named choice: what it is, its options with their defaults, and how to make it."""

    summary: str
    options: Mapping[str, Any] = field(default_factory=dict)
    build: Callable[..., Any] = str  # estimators are chosen by name alone


def nearest(name: str, known) -> str:
    """` (did you mean 'x'?)`, or nothing when no known name is near."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" (did you mean {close[0]!r}?)" if close else ""


def select(group: str, known: Mapping[str, Component], name: str, *, also: str = "") -> Component:
    """The entry `name` of a group.

    Raises:
        UsageError: unknown name; says the nearest and all known ones, and what else may stand there (`also`).
    """
    if name not in known:
        raise UsageError(f"unknown {group} {name!r}{nearest(name, known)}: expected one of {', '.join(known)}{also}")
    return known[name]
