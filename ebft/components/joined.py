"""Several feature maps by name, side by side."""

from __future__ import annotations

from typing import Any

from ebft.components.component import Component, select
from ebft.components.features import FEATURES
from ebft.errors import UsageError
from ebft.features.contract import FeatureMap
from ebft.policy import CausalPolicy


def joined(text: str) -> Component:
    """`hidden+0.5*sbert`: the parts, each of unit norm, side by side, with weights."""
    parts: dict[str, float] = {}
    for part in text.split("+"):
        weight, star, name = part.rpartition("*")
        select("features", FEATURES, name)
        try:
            value = float(weight) if star else 1.0
        except ValueError as error:
            raise UsageError(f"features join:{text}: expected a number before the *, found {weight!r}") from error
        if name in parts:
            raise UsageError(f"features join:{text}: {name} is there twice; give each map once")
        parts[name] = value
    entries = {name: FEATURES[name] for name in parts}

    def build(policy: CausalPolicy, reference: CausalPolicy, **options: Any) -> FeatureMap:
        from ebft.features.join import join

        maps = [
            entry.build(policy, reference, **{option: options[option] for option in entry.options})
            for entry in entries.values()
        ]
        return join(maps, list(parts.values()))

    return Component(
        f"{text} side by side", {o: v for entry in entries.values() for o, v in entry.options.items()}, build
    )
