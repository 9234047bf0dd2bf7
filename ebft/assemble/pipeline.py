"""From options to the stages of a pipeline."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ebft.assemble.reward import build_reward, decoder
from ebft.components import choose
from ebft.features.contract import as_module
from ebft.objectives.scores import Values
from ebft.policy import CausalPolicy
from ebft.samplers.component import sampler


def build_pipeline(
    policy: CausalPolicy,
    reference: CausalPolicy,
    options: Mapping[str, Any],
    resolved: Mapping[str, Mapping],
    values: Mapping[str, Values] | None = None,
    *,
    answers: bool = False,
) -> dict[str, Any]:
    """The stages sample, embed and reward, from the options of a run and the resolved options of its components.

    `values` are those of `build_values`, made here when left out. With `answers` the data carries `answer_mask`, and
    targets lie in answers alone.
    """
    make = {group: choose(group, options[group]).build for group in ("sampler", "features")}
    place, engine = make["sampler"](policy, horizon=options["horizon"], **resolved["sampler"])
    feature_map = make["features"](policy, reference, **resolved["features"])
    return {
        "sample": sampler(
            place,
            engine,
            horizon=options["horizon"],
            answers=answers,
            rollouts=options["rollouts"],
            temperature=options["temperature"],
            top_p=options["top_p"],
            eos=policy.tokenizer.eos_token_id,
        ),
        "embed": as_module(feature_map, documents=True),
        "reward": build_reward(options, resolved, decode=decoder(policy.tokenizer), values=values),
    }
