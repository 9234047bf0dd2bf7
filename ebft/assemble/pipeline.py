"""From options to the stages of a pipeline."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ebft.components import choose
from ebft.features.contract import as_module
from ebft.objectives.component import objective
from ebft.objectives.scores import Values
from ebft.policy import CausalPolicy
from ebft.samplers.component import sampler


def build_values(options: Mapping[str, Any], resolved: Mapping[str, Mapping]) -> Values:
    """The kernel's values, of features whitened as asked for."""
    values = choose("objective", options["objective"]).build(**resolved["objective"])
    return choose("whitening", options["whitening"]).build(values, **resolved["whitening"])


def build_pipeline(
    policy: CausalPolicy,
    reference: CausalPolicy,
    options: Mapping[str, Any],
    resolved: Mapping[str, Mapping],
    values: Values | None = None,
) -> dict[str, Any]:
    """The stages sample, embed and reward, from the options of a run and the resolved options of its components.

    `values` are those of `build_values`, made here when left out.
    """
    make = {group: choose(group, options[group]).build for group in ("sampler", "features")}
    place, engine = make["sampler"](policy, horizon=options["horizon"], **resolved["sampler"])
    feature_map = make["features"](policy, reference, **resolved["features"])
    return {
        "sample": sampler(
            place,
            engine,
            horizon=options["horizon"],
            rollouts=options["rollouts"],
            temperature=options["temperature"],
            top_p=options["top_p"],
            eos=policy.tokenizer.eos_token_id,
        ),
        "embed": as_module(feature_map, documents=True),
        "reward": objective(
            values or build_values(options, resolved),
            credit=options["credit"],
            estimator=options["estimator"],
            diversity=options["diversity"],
            drop_zero_spread=options["drop_zero_spread"],
            normalize_advantage=options["normalize_advantage"],
            clip_advantage=options["clip_advantage"],
        ),
    }
