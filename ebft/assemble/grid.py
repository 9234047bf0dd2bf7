"""Which runs an ablation consists of: axes from text, cells from axes, each checked before the first one runs."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from ebft.components import GROUPS, OPTION_NAMES, choose
from ebft.components.component import nearest
from ebft.components.methods import FURTHER, GIVEN, with_defaults
from ebft.errors import UsageError, flag
from ebft.loops.ablation.results import Cell

DEFAULT = "default"

Parse = Callable[[str, str], Any]  # (option, text) -> value of the option's own type


def folder_name(cell: Cell) -> str:
    """The cell's name as that of a folder; where characters were replaced or cut a hash keeps it apart from others."""
    plain = cell.name.replace(", ", ",")
    safe = re.sub(r"[^\w.,=+-]+", "_", plain)[:120]
    return safe if safe == plain else f"{safe}-{hashlib.sha256(plain.encode()).hexdigest()[:6]}"


def default_name(axes: Iterable[str], options: Mapping[str, Any]) -> str:
    """A folder's name for a study of these axes around these options: the same for the same."""
    digest = hashlib.sha256(json.dumps(dict(options), sort_keys=True, default=str).encode()).hexdigest()[:8]
    return f"ablate-{'-'.join(axes)}-{digest}"


def parse_axes(texts: Iterable[str], *, known: Mapping[str, Any], parse: Parse) -> dict[str, list[Any]]:
    """Axes from `option=value,value,...`; where a value has commas of its own, `option=value;value` (or `value;`).

    The word `default` stands for the option's default.

    Args:
        known: option -> default, of those that may be varied.
        parse: text to a value of the option's own type; its errors are passed on.

    Raises:
        UsageError: no `=`, an unknown option (says the nearest), no values, an axis or a value given twice.
    """
    axes: dict[str, list[Any]] = {}
    for text in texts:
        written, equals, values = text.partition("=")
        name = written.strip().lstrip("-").replace("-", "_")
        if not equals:
            raise UsageError(f"--over {text}: expected option=value,value,... as in features=hidden,sbert")
        check_axis(name, known)
        if name in axes:
            raise UsageError(f"--over {text}: {name} is varied twice; give all its values at once")
        words = [word.strip() for word in values.split(";" if ";" in values else ",")]
        if ";" in values and not words[-1]:
            words.pop()
        if not words or "" in words:
            raise UsageError(f"--over {text}: expected one value or more after the =, none of them empty")
        axes[name] = [known[name] if word == DEFAULT else parse(name, word) for word in words]
    check_axes(axes, known)
    return axes


def check_axis(name: str, known: Mapping[str, Any]) -> None:
    """Refuse an option that cannot be varied."""
    if name == "seed":
        raise UsageError("--over seed: give the number of seeds with --seeds; they start at --seed")
    if name not in known:
        raise UsageError(f"--over {name}: there is no such option to vary{nearest(name, known)}")


def check_axes(axes: Mapping[str, Sequence[Any]], known: Mapping[str, Any]) -> None:
    """Refuse no axes, unknown ones, empty ones, and values that are there twice."""
    if not axes:
        raise UsageError("nothing to vary: give --over option=value,value,... once or more")
    for name, values in axes.items():
        check_axis(name, known)
        if not values:
            raise UsageError(f"--over {name}: expected one value or more")
        for value in values:
            if list(values).count(value) > 1:
                raise UsageError(f"--over {name}: {value} is there twice")


def make_cells(
    axes: Mapping[str, Sequence[Any]],
    base: Mapping[str, Any],
    *,
    given: Iterable[str] = (),
    one_at_a_time: bool = False,
) -> list[Cell]:
    """The cells of a grid, the last axis fastest; or the base and, axis by axis, each other value.

    An option of a component (`layers`) that `base` gives goes to the cells whose components take it.

    Args:
        base: the options of a run. Those of an axis are not used by a grid.
        given: which of them the user gave.

    Raises:
        UsageError: an option that is both varied in a grid and given, or one that no cell takes.
    """
    if one_at_a_time:
        settings: list[dict[str, Any]] = [{}]
        filled = with_defaults(base)
        settings += [{name: value} for name, values in axes.items() for value in values if value != filled[name]]
    else:
        for name in axes:
            if name in given:
                raise UsageError(
                    f"{flag(name)} {base[name]} and --over {name}: a grid takes its values from --over alone;"
                    " drop the former, or vary --one-at-a-time around it"
                )
        settings = [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]
    shared = [name for name in OPTION_NAMES if base.get(name) is not None]
    used: set[str] = set()
    cells = []
    for chosen in settings:
        options = {**base, **chosen}
        try:
            taken = taken_options(options)
        except UsageError as error:
            raise UsageError(f"cell {Cell(chosen, options).name}: {error}") from error
        dropped = [name for name in shared if name not in chosen and name not in taken]
        used.update(name for name in shared if name in taken)
        cells.append(Cell(chosen, {**options, **dict.fromkeys(dropped)}))
    for name in shared:
        if name not in used and name not in axes:
            raise UsageError(f"{flag(name)} {base[name]} applies to no cell of this ablation: leave it out")
    return cells


def check_cells(cells: Iterable[Cell], check: Callable[[Mapping[str, Any]], Any]) -> None:
    """Let `check` look at the options of every cell.

    Raises:
        UsageError: what it says, with the cell's name.
    """
    for cell in cells:
        try:
            check(cell.options)
        except UsageError as error:
            raise UsageError(f"cell {cell.name}: {error}") from error


def of_components(*groups: str) -> tuple[str, ...]:
    """The groups' names and all options of their components."""
    return (*groups, *(option for group in groups for entry in GROUPS[group].values() for option in entry.options))


def taken_options(options: Mapping[str, Any]) -> set[str]:
    """Options that the method and the chosen components take."""
    filled = with_defaults(options)
    filled |= GIVEN.get(filled.get("method", ""), {})
    chosen = [choose(group, filled[group]) for group in GROUPS if filled.get(group) is not None]
    further = FURTHER.get(filled.get("method", ""), {})
    chosen += [choose(group, name) for group, name in further.items()]
    return {option for component in chosen for option in component.options}
