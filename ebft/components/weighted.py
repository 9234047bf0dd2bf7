"""Several components by name with weights: what stands behind `join:` and `combine:`."""

from __future__ import annotations

from collections.abc import Mapping

from ebft.components.component import Component, select
from ebft.errors import UsageError


def weighted_names(text: str, *, group: str, prefix: str, known: Mapping[str, Component]) -> dict[str, float]:
    """`hidden+0.5*sbert` to {"hidden": 1.0, "sbert": 0.5}.

    Args:
        text: what stands behind `prefix`.
        group, prefix: for messages, as in `--features join:...`.
        known: the components that may be named.

    Raises:
        UsageError: an unknown or repeated name, or a weight that is no number.
    """
    parts: dict[str, float] = {}
    for part in text.split("+"):
        weight, star, name = part.rpartition("*")
        select(group, known, name)
        try:
            value = float(weight) if star else 1.0
        except ValueError as error:
            raise UsageError(f"{group} {prefix}:{text}: expected a number before the *, found {weight!r}") from error
        if name in parts:
            raise UsageError(f"{group} {prefix}:{text}: {name} is there twice; give each once")
        parts[name] = value
    return parts
