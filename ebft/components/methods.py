"""Training methods by name: which options each takes, with the defaults that make it what people know.

A method is no code of its own: it says which stages and which terms of the loss a run is made of. Every option that
is not listed here belongs to all methods. What a method does not list does not apply to it.
"""

from __future__ import annotations

from typing import Any

from ebft.components.component import Component

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
        {"sampler": "strided", **_MATCHING, **_POLICY_GRADIENT, **_CROSS_ENTROPY, **_DIVERGENCE, "entropy": 0.0},
    ),
    "sft": Component(
        "cross-entropy alone: no rollouts but those of the held-out measurement",
        {"sampler": "strided", **_CROSS_ENTROPY, "ce": 1.0},
    ),
}
METHOD_OPTIONS = tuple(dict.fromkeys(option for entry in METHODS.values() for option in entry.options))
