"""One evaluation: measure rollouts from held-out rows and, where there are prompts, whole answers to them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tensordict import TensorDictBase

from ebft.data.examples import Example
from ebft.features.contract import FeatureMap
from ebft.loops.display import Display
from ebft.loops.evaluation.prompts import measure_answers
from ebft.loops.evaluation.quantities import GREEDY, Totals, concatenate
from ebft.loops.evaluation.rollouts import measure_rollouts
from ebft.loops.interrupt import Interrupted
from ebft.loops.stages import Stage
from ebft.policy import CausalPolicy
from ebft.samplers.component import Engine

SEQUENCES, PROMPTS = "sequences", "prompts"


@dataclass(frozen=True)
class Prompts:
    """Held-out prompts: rows of one prompt each, [M], their examples in the same order, and how to answer them."""

    rows: TensorDictBase
    examples: Sequence[Example]
    settings: Mapping[str, Any]  # of `measure_answers`: samples, ks, max_new_tokens, temperature, ...
    greedy: bool = False  # whether one more answer is given, at temperature 0
    fitting: int = 0  # prompts that are short enough; `rows` are some of them


@dataclass(frozen=True)
class Measured:
    """Totals of one policy by kind of unit, and the answers it gave: those drawn, and the greedy one of each prompt."""

    totals: Mapping[str, Totals]
    answers: list[list[str]] = field(default_factory=list)
    greedy: list[str] = field(default_factory=list)


def measure_policy(
    policy: CausalPolicy,
    sample: Stage,
    maps: Mapping[str, FeatureMap],
    rows: TensorDictBase,
    *,
    horizons: Sequence[int],
    batch_size: int,
    seed: int,
    display: Display,
    stop: Callable[[], bool],
    label: str,
    scoring: Mapping[str, float] | None = None,
    prompts: Prompts | None = None,
    engine: Engine | None = None,
    decode: Callable[..., list[str]] | None = None,
) -> Measured:
    """Measure one policy on everything, with progress on the display.

    Args:
        policy, sample, maps, rows, horizons, scoring: as in `rollouts.measure_rollouts`.
        prompts: held-out prompts, answered with `engine` and read with `decode`.
        stop: whether the user wants an end.
        label: what the progress is called.

    Raises:
        Interrupted: `stop` said so.
    """

    def track(batches: Iterable, what: str, count: int) -> list:
        found = []
        total = math.ceil(count / batch_size)
        for batch in display.track(batches, label=f"{label}{what}", total=total):
            found.append(batch)
            if stop():
                raise Interrupted("stopped during the evaluation; nothing was written")
        return found

    options: dict[str, Any] = {"batch_size": batch_size, "seed": seed}
    batches = measure_rollouts(policy, sample, maps, rows, horizons=horizons, scoring=scoring, **options)
    totals: dict[str, Totals] = {SEQUENCES: concatenate(track(batches, "rollouts", len(rows)))}
    if prompts is None:
        return Measured(totals)
    assert engine is not None
    assert decode is not None

    def answer(label: str, **changes: Any) -> tuple[Totals, list[list[str]]]:
        settings = {**prompts.settings, **changes, **options}
        answered = track(
            measure_answers(engine, decode, prompts.rows, prompts.examples, device=policy.device, **settings),
            label,
            len(prompts.rows),
        )
        return concatenate([found for found, _ in answered]), [group for _, texts in answered for group in texts]

    drawn, answers = answer("answers")
    totals[PROMPTS] = drawn
    if not prompts.greedy:
        return Measured(totals, answers)
    best, single = answer("greedy answers", samples=1, ks=[1], temperature=0.0)
    totals[PROMPTS] = {**drawn, **{quantity._replace(of=GREEDY): total for quantity, total in best.items()}}
    return Measured(totals, answers, [text for (text,) in single])
