"""Training methods by name: which options each takes, with the defaults that make it what people know.

A method is no code of its own: it says which stages and which terms of the loss a run is made of. Every option that
is not listed here belongs to all methods. What a method does not list does not apply to it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ebft.components.component import Component, select

_ROLLOUTS: dict[str, Any] = {"sampler": "strided", "horizon": 8, "rollouts": 4, "features": "sbert", "lr": 1e-3}
# The weight of each term of the loss, how it changes and how it is computed.
_CROSS_ENTROPY: dict[str, Any] = {"ce": 2.0, "ce_schedule": None}
_POLICY_GRADIENT: dict[str, Any] = {
    "pg": "reinforce",
    "pg_weight": 1.0,
    "pg_schedule": None,
    "normalization": "sequence",
    "updates": 1,
    "minibatches": 1,
    "truncate_weights": None,
    "score_temperature": None,
    "drop_zero_spread": False,
    "normalize_advantage": False,
    "clip_advantage": None,
    # rloo_tuned wants the fewest rollouts: `python benchmarks/estimators.py FOLDER --collect`, docs/estimators.png
    "estimator": "rloo_tuned",
}
_DIVERGENCE: dict[str, Any] = {
    "kl": 0.0,
    "kl_mode": None,
    "kl_in": None,
    "kl_scope": None,
    "kl_schedule": None,
    "kl_target": None,
    "kl_stop": None,
}
_MATCHING: dict[str, Any] = {
    "objective": "feature_matching",
    "whitening": "none",
    "diversity": 1.0,
    "credit": None,
    "horizons": None,
    "token_baseline": None,
    "trace": None,
}

METHODS = {
    "ebft": Component(
        "feature matching on short rollouts from every prefix, with cross-entropy (the paper's)",
        {**_ROLLOUTS, **_MATCHING, **_POLICY_GRADIENT, **_CROSS_ENTROPY, **_DIVERGENCE, "entropy": 0.0},
    ),
    "sft": Component(
        "cross-entropy alone: no rollouts but those of the held-out measurement",
        {**_ROLLOUTS, **_CROSS_ENTROPY, "ce": 1.0},
    ),
    # What GRPO is run with (arXiv 2402.03300, and DAPO's mean over tokens, arXiv 2503.14476, in place of one over each
    # answer's, which makes long wrong answers cheap).
    "rlvr": Component(
        "GRPO: whole answers to prompts, a verifiable reward, clipped ratios, divergence from the start",
        {
            **{"max_new_tokens": 128, "stop": None, "rollouts": 8, "lr": 1e-4},
            **{**_POLICY_GRADIENT, "estimator": "group_norm", "pg": "clipped", "normalization": "token"},
            **{**_DIVERGENCE, "kl": 0.04, "kl_mode": "k3"},
            **{**_CROSS_ENTROPY, "ce": 0.0, "entropy": 0.0},
        },
    ),
}
METHODS["mixed"] = Component(
    "ebft, and whole answers to the prompts of the data with a verifiable reward: the sum of both objectives",
    {
        **METHODS["ebft"].options,
        **{"max_new_tokens": 128, "stop": None, "answer_weight": 1.0, "answer_schedule": None},
    },
)
# What a method is, so that nobody may choose it.
GIVEN: dict[str, dict[str, Any]] = {"rlvr": {"sampler": "full", "objective": "verifier"}}
# What the further objective of a method is.
FURTHER: dict[str, dict[str, Any]] = {"mixed": {"sampler": "full", "objective": "verifier"}}
METHOD_OPTIONS = tuple(dict.fromkeys(option for entry in METHODS.values() for option in entry.options))


def with_defaults(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options with the method's defaults for those that nobody gave (None).

    Raises:
        UsageError: an unknown method.
    """
    defaults = select("method", METHODS, options["method"]).options if "method" in options else {}
    return {**options, **{name: value for name, value in defaults.items() if options.get(name) is None}}
