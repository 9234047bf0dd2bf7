"""Several feature maps by name, side by side."""

from __future__ import annotations

from typing import Any

from ebft.components.component import Component
from ebft.components.features import FEATURES, NotedMap
from ebft.components.weighted import weighted_names
from ebft.policy import CausalPolicy


def joined(text: str) -> Component:
    """`hidden+0.5*sbert`: the parts, each of unit norm, side by side, with weights.

    An option of several parts whose defaults differ has the default None: to each part its own.
    """
    parts = weighted_names(text, group="features", prefix="join", known=FEATURES)
    entries = {name: FEATURES[name] for name in parts}

    def build(policy: CausalPolicy, reference: CausalPolicy, **options: Any) -> NotedMap:
        from ebft.features.join import join

        maps = [
            entry.build(
                policy,
                reference,
                **{name: own if options[name] is None else options[name] for name, own in entry.options.items()},
            )
            for entry in entries.values()
        ]
        made = join([part.embed for part in maps], list(parts.values()))
        return NotedMap(made, "; ".join(part.note for part in maps))

    defaults: dict[str, Any] = {}
    for entry in entries.values():
        for name, value in entry.options.items():
            defaults[name] = value if defaults.setdefault(name, value) == value else None
    return Component(f"{text} side by side", defaults, build)
