"""What can be known to be wrong from the options alone, before a model is loaded."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ebft.assemble.answers import ANSWERS, answer_options, objectives_of
from ebft.assemble.loss import OF_THE_DIVERGENCE, check_loss_options
from ebft.assemble.optimizer import check_optimizer_options
from ebft.assemble.overlap import check_overlap
from ebft.assemble.policy import check_decode, check_gradient, check_offload
from ebft.assemble.reward import check_reward_options
from ebft.components import OPTION_NAMES, resolve_options
from ebft.components.methods import GIVEN, METHOD_OPTIONS, METHODS
from ebft.components.objectives import OBJECTIVES, objective_parts
from ebft.distributed import started
from ebft.errors import UsageError, flag

GROUPS = ("sampler", "features", "whitening", "objective", "estimator", "pg", "optimizer", "lr_schedule")

# What an option counts as that the method does not take: a term of weight 0, and the reward of held-out rollouts.
_WITHOUT = {
    **dict.fromkeys(METHOD_OPTIONS),
    **{"ce": 0.0, "pg_weight": 0.0, "kl": 0.0, "entropy": 0.0, "updates": 1, "minibatches": 1},
    **{"pg": "reinforce", "normalization": "sequence"},
    **{"objective": "feature_matching", "whitening": "none", "estimator": "rloo", "diversity": 1.0},
    **{"drop_zero_spread": False, "normalize_advantage": False},
}

DEFAULT_STEPS = 16

PER_TOKEN = ("hidden", "match")  # features that can be had of every token
OF_TOKENS = ("horizons", "token_baseline", "trace")  # options of rewards of tokens

# The smallest value of each numeric option; all must be finite.
_AT_LEAST = {
    "max_new_tokens": 1,  # before the horizon, which it stands for
    **dict.fromkeys(
        ("steps", "batch", "micro_batch", "rollouts", "horizon", "stride", "first", "ngram", "dimension"), 1
    ),
    **dict.fromkeys(
        (
            "lora",
            "ce",
            "kl",
            "pg_weight",
            "answer_weight",
            "entropy",
            "diversity",
            "seed",
            "context_tokens",
            "temperature",
            "lr",
        ),
        0,
    ),
    "eval_every": 0,
    **dict.fromkeys(("length", "held_out"), 2),
    "overlap": 1,
    **dict.fromkeys(("save_every", "keep", "updates", "minibatches"), 1),
    **dict.fromkeys(("max_grad_norm", "momentum", "weight_decay", "eps", "ema"), 0),
}


def settle(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options with what the method makes of those that nobody gave (None).

    Options that do not belong to the method count as a part of weight 0. They are None in `options`, so that this is
    to be called once; everything that is built wants what it returns.

    Raises:
        UsageError: an unknown method, or an option that it does not take.
    """
    given = {name: options[name] for name in METHOD_OPTIONS}
    method = options["method"]
    taken = resolve_options({"method": method}, given)["method"]
    settled = {**options, **_WITHOUT, **taken, **GIVEN.get(method, {})}
    if not settled["kl"]:  # then what it has by default beside it does not count
        settled |= {name: options[name] for name in OF_THE_DIVERGENCE if name in taken}
    if settled["horizon"] is None:
        settled["horizon"] = settled["max_new_tokens"]
    if options["steps"] is None and options["epochs"] is None:
        settled["steps"] = DEFAULT_STEPS
    return settled


def resolve_run(
    options: Mapping[str, Any], *, gradient: bool = True, processes: int | None = None
) -> dict[str, dict[str, Any]]:
    """Check the options of a run and give those of its components, by group, defaults filled in.

    Args:
        gradient: whether the policy is scored with gradient.
        processes: how many run; None: as many as `torchrun` started.

    Raises:
        UsageError: as `settle`, `check_options` and `ebft.components.resolve_options`.
    """
    settled = settle(options)
    given = {name: options[name] for name in OPTION_NAMES if name not in METHOD_OPTIONS}
    chosen = {group: settled[group] for group in GROUPS if settled[group] is not None}
    answers, of_answers = answer_options(settled), {}
    if answers is not None:
        of_answers = _given_of(answers["objective"], given)
        if answers["objective"] not in objective_parts(settled["objective"]):
            given = {name: value for name, value in given.items() if name not in of_answers}
    resolved = resolve_options(chosen, given)
    check_options(settled)
    if gradient:
        check_gradient(settled)
    if answers is not None:
        resolved[ANSWERS] = resolve_options({"objective": answers["objective"]}, of_answers)["objective"]
        if not answers["pg_weight"]:
            raise UsageError("--answer-weight 0 leaves whole answers out: use --method ebft")
        check_loss_options(answers)
    check_overlap(*objectives_of(settled), processes=started() if processes is None else processes)
    settled["steps"] = settled["steps"] or 1  # of epochs that nobody can count yet
    check_optimizer_options(settled, resolved)
    return resolved


def _given_of(objective: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """Of the options that the user gave those of an objective."""
    return {name: given[name] for name in OBJECTIVES[objective].options}


def describe_components(options: Mapping[str, Any], resolved: Mapping[str, Mapping]) -> dict[str, dict[str, Any]]:
    """What a run is made of, with all its options: the method, and each component that it uses, by group."""
    name, settled = options["method"], settle(options)
    taken = {*METHODS[name].options, *GIVEN.get(name, ())}
    used = [group for group in GROUPS if group in taken or group not in METHOD_OPTIONS]
    method = {"name": name, **{option: settled[option] for option in METHODS[name].options}}
    found = {"method": method, **{group: {"name": settled[group], **resolved[group]} for group in used}}
    answers = answer_options(settled)
    return found if answers is None else {**found, ANSWERS: {"name": answers["objective"], **resolved[ANSWERS]}}


def check_options(options: Mapping[str, Any]) -> None:
    """What can be known to be wrong from the options alone, as `settle` gives them.

    Raises:
        UsageError: one clear message, naming the option, its value and what is expected.
    """
    check_ranges(options)
    length, horizon, rollouts = options["length"], options["horizon"], options["rollouts"]
    if options["sampler"] != "full" and horizon >= length:
        raise UsageError(f"--horizon {horizon} does not fit --length {length}: a sequence needs context and a target")
    if options["temperature"] <= 0:
        raise UsageError(
            f"--temperature {options['temperature']}: expected a number > 0; greedy rollouts have no policy gradient"
        )
    if not 0 < options["top_p"] <= 1:
        raise UsageError(f"--top-p {options['top_p']}: expected a number in (0, 1]; 1 keeps every token")
    if rollouts == 1:
        matching = options["features"] is not None
        reason = "held-out feature matching compares rollouts with each other" if matching else None
        if matching and options["diversity"] > 0:
            reason = f"the diversity term (--diversity {options['diversity']}) compares rollouts with each other"
        elif options["estimator"] != "none":
            reason = f"the estimator {options['estimator']} compares a rollout with the others of its anchor"
        if reason is not None:
            raise UsageError(f"--rollouts 1: {reason}. Give 2 or more, better 3 or more")
    if not options["lr"] > 0:
        raise UsageError(f"--lr {options['lr']}: expected a number > 0")
    if options["epochs"] is not None and options["steps"] is not None:
        raise UsageError(f"--epochs {options['epochs']} and --steps {options['steps']}: give one of the two")
    if options["epochs"] is not None and not options["epochs"] > 0:
        raise UsageError(f"--epochs {options['epochs']}: expected a number > 0")
    check_loss_options(options)
    check_decode(options)
    check_offload(options)
    check_reward_options(options)
    check_stop(options)
    per_token = options["pooling"] == "none"
    if per_token and options["method"] != "ebft":
        raise UsageError(f"--pooling none keeps features per token, which --method {options['method']} has no use for")
    if per_token and options["credit"] is None:
        raise UsageError("--pooling none keeps features per token: say with --credit how tokens are rewarded")
    if options["credit"] is not None and not (per_token and options["features"] in PER_TOKEN):
        raise UsageError(
            f"--credit {options['credit']} wants features per token: add --features {' or '.join(PER_TOKEN)}, and"
            " --pooling none"
        )
    if options["token_baseline"] == "ridge" and options["batch"] < 2:
        raise UsageError(
            f"--batch {options['batch']}: --token-baseline ridge is fitted on the other sequences of a batch; give 2"
        )
    if options["credit"] is None:
        for name in OF_TOKENS:
            if options[name] is not None:
                raise UsageError(f"{flag(name)} {options[name]} is of rewards of tokens: add --credit reward_to_go")
    if rollouts == 1 and options["whitening"] in ("group", "sample"):
        raise UsageError(f"--whitening {options['whitening']} with --rollouts 1: one rollout has no moment; give more")


def check_stop(options: Mapping[str, Any]) -> None:
    if "" in (options["stop"] or ()):
        raise UsageError("--stop '': expected characters at which an answer ends")


def check_ranges(options: Mapping[str, Any]) -> None:
    for name, least in _AT_LEAST.items():
        value = options.get(name)
        if value is not None and not (math.isfinite(value) and value >= least):
            raise UsageError(f"{flag(name)} {value}: expected a number >= {least}")
