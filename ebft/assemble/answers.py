"""The objective that a method adds to its own: whole answers to prompts with a verifiable reward."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console

from ebft.assemble.loss import build_loss, build_schedules
from ebft.assemble.overlap import overlap_stages
from ebft.assemble.pipeline import build_pipeline
from ebft.assemble.rows import Data, check_batch, spread_rows, whole_rows, with_tests
from ebft.components.methods import FURTHER
from ebft.loops.objective import Objective
from ebft.policy import CausalPolicy

ANSWERS = "answers"  # in the names of metrics, and the group of its resolved options

# Those of the first objective alone.
_WITHOUT = {
    **{"features": None, "whitening": "none", "diversity": 1.0, "credit": None, "entropy": 0.0},
    **{"ce": 0.0, "ce_schedule": None},
}


def answer_options(options: Mapping[str, Any]) -> dict[str, Any] | None:
    """The settled options as they are for whole answers; None for a method without a further objective."""
    if options["method"] not in FURTHER:
        return None
    weight = {"pg_weight": options["answer_weight"], "pg_schedule": options["answer_schedule"]}
    return {**options, **_WITHOUT, **FURTHER[options["method"]], **weight, "horizon": options["max_new_tokens"]}


def objectives_of(options: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The settled options of each objective: those of the run, and as they are for whole answers, if it has some."""
    answers = answer_options(options)
    return [dict(options), *([] if answers is None else [answers])]


def build_answers(
    policy: CausalPolicy,
    reference: CausalPolicy,
    options: Mapping[str, Any],
    resolved: Mapping[str, Mapping],
    data: Data,
    *,
    console: Console,
) -> dict[str, Objective]:
    """The further objective by its name; nothing for a method without.

    Raises:
        UsageError: data without prompts, or fewer of them than a batch.
    """
    own = answer_options(options)
    if own is None:
        return {}
    if resolved[ANSWERS]["verifier"] == "unit_tests":
        data = with_tests(data, own, console=console)
    parts = {**resolved, "objective": resolved[ANSWERS], "sampler": {}}
    measuring = build_pipeline(policy, reference, own, parts, answers=True, examples=data.example)
    rows, held_out = whole_rows(data, policy.tokenizer, own)
    check_batch(rows, own)
    held_out = spread_rows(held_out, own["held_out"])
    console.print(f"whole answers: {len(rows):,} training and {len(held_out)} held-out prompts", highlight=False)
    loss = build_loss(own, resolved["pg"])
    pipeline, schedules = overlap_stages(measuring, own), build_schedules(own)
    return {ANSWERS: Objective(pipeline, loss, rows, own["batch"], schedules, held_out, measuring)}
