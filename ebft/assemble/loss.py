"""From options to the loss of a run, the schedules of its weights and what controls the divergence."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ebft.components import choose
from ebft.errors import UsageError, flag
from ebft.objectives.kl import EXACT
from ebft.objectives.kl_controllers import AdaptiveKL, ConstantKL, KLController, StopAbove
from ebft.objectives.losses import EBFTLoss
from ebft.objectives.policy_gradient import check_cap
from ebft.objectives.schedules import Schedule, schedule
from ebft.objectives.shaping import check_limit

# Options that mean something only when the weight of the divergence is above 0.
OF_THE_DIVERGENCE = ("kl_mode", "kl_in", "kl_scope", "kl_schedule", "kl_target", "kl_stop")
# Option of a schedule -> option of its weight, attribute of the loss.
_SCHEDULES = {
    "pg_schedule": ("pg_weight", "policy_gradient_coefficient"),
    "ce_schedule": ("ce", "cross_entropy_coefficient"),
    "kl_schedule": ("kl", "kl_coefficient"),
}


def check_loss_options(options: Mapping[str, Any]) -> None:
    """What can be known to be wrong about the loss from the options alone.

    Raises:
        UsageError: names the option, its value and what is expected.
    """
    if not options["kl"]:
        for name in OF_THE_DIVERGENCE:
            _refuse(options, name, "there is no divergence term; give --kl a weight above 0")
    for name, (weight, _) in _SCHEDULES.items():
        if options[name] is not None and not options[weight]:
            _refuse(options, name, f"its weight is 0; give {flag(weight)} a number above 0")
    if options["kl_schedule"] is not None and options["kl_target"] is not None:
        _refuse(options, "kl_schedule", "the weight follows --kl-target; give one of the two")
    if options["kl_mode"] in EXACT and options["top_p"] < 1:
        _refuse(
            options,
            "kl_mode",
            f"--top-p {options['top_p']} drops tokens, and one that the start drops makes the divergence infinite; use"
            " --top-p 1, or k2",
        )
    for name in ("updates", "minibatches"):
        if options[name] > 1 and options["pg"] == "reinforce":
            _refuse(
                options,
                name,
                "reinforce is right for the first update only; use --pg clipped, sequence_clipped or cispo",
            )
    if options["batch"] % options["minibatches"]:
        _refuse(options, "minibatches", f"--batch {options['batch']} does not split into that many equal parts")
    if options["minibatches"] > 1 and options["truncate_weights"] is not None:
        _refuse(options, "truncate_weights", "its weights are those before the first update; use --minibatches 1")
    if options["score_temperature"] is not None:
        _check_score_temperature(options)
    if options["truncate_weights"] is not None:
        check_cap(options["truncate_weights"])
    if options["clip_advantage"] is not None:
        check_limit(options["clip_advantage"])
    build_schedules(options)
    build_controller(options)


def _check_score_temperature(options: Mapping[str, Any]) -> None:
    if not (math.isfinite(options["score_temperature"]) and options["score_temperature"] > 0):
        _refuse(options, "score_temperature", "expected a number > 0")
    if options["pg"] != "reinforce":
        _refuse(
            options,
            "score_temperature",
            f"--pg {options['pg']} takes ratios to the sampler's log-probs, which are of --temperature"
            f" {options['temperature']}; use --pg reinforce",
        )
    if options["truncate_weights"] is not None:
        _refuse(options, "score_temperature", "--truncate-weights would take the difference for one of the sampler")


def trains_on_rollouts(options: Mapping[str, Any]) -> bool:
    """Whether the loss has a term of rollouts: cross-entropy alone has none."""
    return bool(options["pg_weight"] or options["kl"] or options["entropy"])


def build_loss(options: Mapping[str, Any], policy_gradient: Mapping[str, Any]) -> EBFTLoss:
    """The loss; `policy_gradient` holds the resolved options of --pg."""
    scopes = {} if options["kl_scope"] is None else {"kl_scope": options["kl_scope"]}
    return EBFTLoss(
        policy_gradient=choose("pg", options["pg"]).build(**policy_gradient),
        policy_gradient_coefficient=options["pg_weight"],
        cross_entropy_coefficient=options["ce"],
        kl_coefficient=options["kl"],
        kl_in=options["kl_in"] or "loss",
        kl_estimator=options["kl_mode"],
        entropy_coefficient=options["entropy"],
        cross_entropy_tokens=options["ce_tokens"],
        normalization=options["normalization"],
        **scopes,
    )


def build_schedules(options: Mapping[str, Any]) -> dict[str, Schedule]:
    """Attribute of the loss -> its schedule, for the weights that have one."""
    return {
        attribute: schedule(options[name], options[weight], steps=options["steps"] or 1)
        for name, (weight, attribute) in _SCHEDULES.items()
        if options[name] is not None
    }


def build_controller(options: Mapping[str, Any]) -> KLController | None:
    """What follows the measured divergence; None when nothing does."""
    target, limit = options["kl_target"], options["kl_stop"]
    if target is None and limit is None:
        return None
    controller: KLController = ConstantKL(options["kl"]) if target is None else AdaptiveKL(options["kl"], target)
    return controller if limit is None else StopAbove(controller, limit)


def _refuse(options: Mapping[str, Any], name: str, why: str) -> None:
    if options[name] is not None:
        raise UsageError(f"{flag(name)} {options[name]}: {why}")
