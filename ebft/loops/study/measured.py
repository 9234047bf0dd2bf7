"""What the runs and evaluations of a study left, and the columns of its table."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ebft.loops.evaluation import prompts
from ebft.loops.evaluation import quantities as names
from ebft.loops.evaluation.quantities import Quantity, Totals
from ebft.loops.evaluation.result import Entry, look_up, read_totals
from ebft.loops.evaluation.run import PROMPTS, SEQUENCES

KINDS = (SEQUENCES, PROMPTS)


@dataclass(frozen=True)
class Column:
    """A column of the table: the quantity, of which kind of unit, and whether it should be `lower` or `higher`."""

    title: str
    quantity: Quantity
    kind: str
    better: str


@dataclass(frozen=True)
class Tested:
    """What one policy's evaluation found on the test half: values, and what every unit adds to them, by kind."""

    values: Mapping[str, list[Entry]]
    totals: Mapping[str, Totals]

    def value(self, column: Column) -> float | None:
        """The value of a column, None where it was not measured."""
        entry = look_up(self.values.get(column.kind, []), *column.quantity)
        return None if entry is None else entry["value"]


@dataclass(frozen=True)
class Cost:
    """Of the training behind one policy, from the start on: examples, tokens (with rollouts) and seconds."""

    examples: int
    tokens: int
    seconds: float

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.examples + other.examples, self.tokens + other.tokens, self.seconds + other.seconds)


@dataclass(frozen=True)
class Found:
    """Everything that a study has found so far.

    Attributes:
        tested, costs: arm -> seed -> of that policy. The base has no seed: its one policy stands under every seed.
        search: arm -> seconds of training the learning rates that were not chosen.
        choices: arm -> as `choice.choose` gives it.
        curves: arm -> seed -> metric of the runs -> points (examples seen, value on the validation half).
        failures: cell -> what went wrong.
    """

    tested: Mapping[str, Mapping[int, Tested]]
    costs: Mapping[str, Mapping[int, Cost]]
    search: Mapping[str, float]
    choices: Mapping[str, Mapping[str, Any]]
    curves: Mapping[str, Mapping[int, Mapping[str, list[tuple[float, float]]]]]
    failures: Mapping[str, str] = field(default_factory=dict)


def read_tested(folder: Path) -> Tested | None:
    """The evaluation in `folder`; None where it is not finished."""
    path = folder / "evaluation.json"
    if not path.is_file():
        return None
    values = json.loads(path.read_text(encoding="utf-8"))["values"]
    return Tested(values, {kind: read_totals(folder / f"{kind}.csv") for kind in values})


def columns_of(tested: Sequence[Tested], *, horizon: int) -> list[Column]:
    """The columns of Table 1 (arXiv 2603.12248) that were measured: of tests where there are some, else of references.

    Args:
        horizon: tokens of a rollout at which features are compared.
    """
    first = tested[0].values
    maps = dict.fromkeys(e["of"] for e in first[SEQUENCES] if e["metric"] == names.MATCHING)
    losses = [
        ("CE", Quantity(names.CROSS_ENTROPY, names.ALL)),
        ("CE of answers", Quantity(names.CROSS_ENTROPY, names.ANSWERS)),
        *((f"FM {name}", Quantity(names.MATCHING, name, horizon)) for name in maps),
    ]
    has_tests = any(e["metric"] == prompts.PASS for e in first.get(PROMPTS, []))
    by_reference = [(prompts.SENTENCE_BLEU, "BLEU"), (prompts.SENTENCE_CHRF, "chrF")]
    wanted = [(prompts.PASS, "pass")] if has_tests else by_reference
    found = [Column(title, quantity, SEQUENCES, "lower") for title, quantity in losses]
    for metric, label in wanted:
        found.append(Column(f"{label} greedy", Quantity(metric, names.GREEDY, 1), PROMPTS, "higher"))
        ks = sorted({e["at"] for e in first.get(PROMPTS, []) if e["metric"] == metric and not e["of"]})
        found += [Column(f"{label}@{k}", Quantity(metric, "", k), PROMPTS, "higher") for k in ks]
    more = (
        [("compiles", Quantity(prompts.COMPILES)), ("chrF@1", Quantity(prompts.SENTENCE_CHRF, "", 1))]
        if has_tests
        else [("corpus BLEU greedy", Quantity(names.BLEU, names.GREEDY))]
    )
    found += [Column(title, quantity, PROMPTS, "higher") for title, quantity in more]
    return [column for column in found if any(one.value(column) is not None for one in tested)]


def totals_for(tested: Tested, columns: Sequence[Column], kind: str) -> Totals:
    """Of one kind of unit those totals alone that the columns are made of."""
    wanted = {column.quantity for column in columns if column.kind == kind}
    corpora = {quantity.of for quantity in wanted if quantity.metric == names.BLEU}
    return {
        quantity: total
        for quantity, total in tested.totals[kind].items()
        if quantity in wanted or (quantity.metric == names.BLEU_STATISTICS and quantity.of in corpora)
    }
