"""Training and held-out data: sides that do not change when other data comes or goes."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import TypeVar

from ebft.errors import UsageError

Item = TypeVar("Item")


def split_by(
    items: Sequence[Item], key: Callable[[Item], str], *, held_out: float, what: str = "documents"
) -> tuple[list[Item], list[Item]]:
    """Split into (train, held out) by a hash of each item's key; items with equal keys land on one side.

    Only where that would leave a side empty is the key nearest the threshold moved over.

    Args:
        held_out: the expected fraction of keys that are held out.
        what: the items' name in errors.

    Raises:
        UsageError: fewer than two keys, or `held_out` outside (0, 1).
    """
    if not 0 < held_out < 1:
        raise UsageError(f"held_out={held_out}: expected a fraction between 0 and 1, both exclusive")
    if not items:
        raise UsageError(f"there are no {what} to split: give at least one")
    keys = [key(item) for item in items]
    place = {name: unit_hash(name) for name in keys}
    if len(place) == 1:
        raise UsageError(f"all {len(items)} {what} belong together, so nothing can be held out: give others as well")
    held = {name for name, value in place.items() if value < held_out}
    if not held:
        held = {min(place, key=place.__getitem__)}
    elif len(held) == len(place):
        held.remove(max(place, key=place.__getitem__))
    sides: tuple[list[Item], list[Item]] = ([], [])
    for item, name in zip(items, keys, strict=True):
        sides[name in held].append(item)
    return sides


def unit_hash(text: str) -> float:
    """A number in [0, 1) that depends on the text alone, the same on every machine."""
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:6], "big") / 2**48
