"""From totals to values with intervals, and the files that hold them."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ebft.errors import UsageError
from ebft.files import write_atomically
from ebft.loops.evaluation.bootstrap import Estimate, bootstrap
from ebft.loops.evaluation.quantities import Quantity, Totals, derived

COLUMNS = ("unit", "metric", "of", "at", "sum", "count")
Entry = dict[str, Any]


def summarise(totals: Totals, **options: Any) -> list[Entry]:
    """Every value with its bootstrap interval over units.

    Args:
        totals: of one policy.
        options: of `bootstrap`.

    Returns:
        A list of metric, of, at, value, low, high, standard_error, and units: how many had anything to count.
    """
    quantities = list(totals)
    sums, counts = _columns(totals, quantities)

    def statistic(total: Tensor, count: Tensor) -> Tensor:
        return torch.stack(list(_values(quantities, total, count).values()), -1)

    return _entries(bootstrap(sums, counts, statistic, **options), totals, quantities)


def paired_differences(first: Totals, second: Totals, **options: Any) -> list[Entry]:
    """Every value of `second` less that of `first`, with the interval of the paired difference; as `summarise`.

    Raises:
        UsageError: other quantities, or another number of units.
    """
    return mean_differences([(first, second)], **options)


def mean_differences(pairs: Sequence[tuple[Totals, Totals]], **options: Any) -> list[Entry]:
    """The mean over pairs of every value of the second less that of the first, all of the same units; as `summarise`.

    A resample of units is the same for all pairs, so the interval is that of the mean.

    Raises:
        UsageError: other quantities, or another number of units.
    """
    first = pairs[0][0]
    quantities, units = list(first), _units(first)
    for totals in (totals for pair in pairs for totals in pair):
        if list(totals) != quantities or _units(totals) != units:
            raise UsageError(
                f"paired differences need the same quantities of the same units, found {len(quantities)} quantities of"
                f" {units} units and {len(totals)} of {_units(totals)}"
            )
    columns = [_columns(totals, quantities) for pair in pairs for totals in pair]
    sums, counts = (torch.cat(parts, 1) for parts in zip(*columns, strict=True))

    def statistic(total: Tensor, count: Tensor) -> Tensor:
        parts = zip(total.chunk(len(columns), -1), count.chunk(len(columns), -1), strict=True)
        values = [torch.stack(list(_values(quantities, *part).values()), -1) for part in parts]
        return torch.stack([after - before for before, after in zip(values[::2], values[1::2], strict=True)]).mean(0)

    return _entries(bootstrap(sums, counts, statistic, **options), first, quantities)


def csv_bytes(totals: Totals) -> bytes:
    """One line for each unit and quantity: its sum, its count (tidy data)."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for quantity, (sums, counts) in totals.items():
        for unit, (total, count) in enumerate(zip(sums.tolist(), counts.tolist(), strict=True)):
            at = "" if quantity.at is None else quantity.at
            writer.writerow([unit, quantity.metric, quantity.of, at, repr(total), repr(count)])
    return text.getvalue().encode()


def read_totals(path: Path) -> dict[Quantity, tuple[Tensor, Tensor]]:
    """What `csv_bytes` wrote.

    Raises:
        UsageError: the file is no such file.
    """
    found: dict[Quantity, list[tuple[float, float]]] = {}
    try:
        with open(path, newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                quantity = Quantity(row["metric"], row["of"], int(row["at"]) if row["at"] else None)
                found.setdefault(quantity, []).append((float(row["sum"]), float(row["count"])))
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise UsageError(f"{path} does not hold the values of an evaluation ({error})") from error
    return {
        q: tuple(torch.tensor(column, dtype=torch.float64) for column in zip(*rows, strict=True))  # type: ignore[misc]
        for q, rows in found.items()
    }


def write_totals(path: Path, totals: Totals) -> None:
    """`csv_bytes`, atomically."""
    write_atomically(path, csv_bytes(totals))


def look_up(entries: list[Entry], metric: str, of: str = "", at: int | None = None) -> Entry | None:
    """The entry of a quantity, None when it was not measured."""
    return next((e for e in entries if (e["metric"], e["of"], e["at"]) == (metric, of, at)), None)


def _units(totals: Totals) -> int:
    return len(next(iter(totals.values()))[0])


def _columns(totals: Totals, quantities: list[Quantity]) -> tuple[Tensor, Tensor]:
    """Sums and counts, [M,Q] each."""
    sums, counts = zip(*(totals[quantity] for quantity in quantities), strict=True)
    return torch.stack(sums, 1), torch.stack(counts, 1)


def _values(quantities: list[Quantity], sums: Tensor, counts: Tensor) -> dict[Quantity, Tensor]:
    by_name = (dict(zip(quantities, table.unbind(-1), strict=True)) for table in (sums, counts))
    return derived(*by_name)


def _entries(estimate: Estimate, totals: Totals, quantities: list[Quantity]) -> list[Entry]:
    one = torch.ones(len(quantities), dtype=torch.float64)
    everybody = _units(totals)
    entries = []
    for i, quantity in enumerate(_values(quantities, one, one)):
        units = int((totals[quantity][1] > 0).sum()) if quantity in totals else everybody
        numbers = {
            name: _finite(getattr(estimate, name)[i].item()) for name in ("value", "low", "high", "standard_error")
        }
        entries.append({**quantity._asdict(), **numbers, "units": units})
    return entries


def _finite(value: float) -> float | None:
    """JSON has no NaN."""
    return value if math.isfinite(value) else None
