"""Where a name becomes a component: what the command line offers, a file for each group.

Each entry says in one line what it is and which options it takes with which defaults. `choose` refuses an unknown name
(with the nearest known one), `resolve_options` an option that the chosen components do not take.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ebft.components.component import Component, select
from ebft.components.features import FEATURES
from ebft.components.joined import joined
from ebft.components.methods import METHODS
from ebft.components.objectives import ESTIMATORS, OBJECTIVES, combined
from ebft.components.optimizers import LR_SCHEDULES, OPTIMIZERS
from ebft.components.policy_gradients import POLICY_GRADIENTS
from ebft.components.samplers import SAMPLERS
from ebft.components.whitenings import WHITENINGS
from ebft.errors import UsageError, flag

GROUPS = {
    "method": METHODS,
    "sampler": SAMPLERS,
    "features": FEATURES,
    "whitening": WHITENINGS,
    "objective": OBJECTIVES,
    "estimator": ESTIMATORS,
    "pg": POLICY_GRADIENTS,
    "optimizer": OPTIMIZERS,
    "lr_schedule": LR_SCHEDULES,
}
OPTION_NAMES = tuple(
    dict.fromkeys(option for group in GROUPS.values() for entry in group.values() for option in entry.options)
)


def choose(group: str, name: str) -> Component:
    """The entry `name` of a group.

    Raises:
        UsageError: unknown name; says the nearest and all known ones.
    """
    if group == "features" and name.startswith("join:"):
        return joined(name.removeprefix("join:"))
    if group == "objective":
        return combined(name)
    also = ", or several of them as join:hidden+0.5*sbert" if group == "features" else ""
    return select(group, GROUPS[group], name, also=also)


def resolve_options(chosen: Mapping[str, str], given: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The options of each chosen component, defaults filled in.

    Args:
        chosen: group -> name.
        given: option -> value, None where the user gave none.

    Raises:
        UsageError: unknown component, or an option that none of the chosen components takes.
    """
    entries = {group: choose(group, name) for group, name in chosen.items()}
    taken = {option for entry in entries.values() for option in entry.options}
    for option, value in given.items():
        if value is not None and option not in taken:
            takers = [f"{g} {n}" for g, known in GROUPS.items() for n, e in known.items() if option in e.options]
            selection = ", ".join(f"{group} {name}" for group, name in chosen.items())
            raise UsageError(f"{flag(option)} {value} does not apply to {selection}; it belongs to {', '.join(takers)}")
    return {
        group: {
            option: default if given.get(option) is None else given[option] for option, default in entry.options.items()
        }
        for group, entry in entries.items()
    }
