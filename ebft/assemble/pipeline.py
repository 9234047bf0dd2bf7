"""From options to the stages of a pipeline."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tensordict.nn import TensorDictModule

from ebft.assemble.reward import build_reward, decoder
from ebft.components import choose
from ebft.components.features import NotedMap
from ebft.features.contract import FeatureMap, as_module
from ebft.objectives.scores import Values
from ebft.policy import CausalPolicy
from ebft.samplers.component import sampler


def build_features(
    policy: CausalPolicy, reference: CausalPolicy, options: Mapping[str, Any], resolved: Mapping[str, Mapping]
) -> NotedMap:
    """The feature map, and what is to be said of it before training."""
    return choose("features", options["features"]).build(policy, reference, **resolved["features"])


def training_stages(stages: dict[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """Of all `stages`, which the held-out measurement runs, those that the method trains with."""
    wanted = {"sft": ()}.get(options["method"], tuple(stages))
    return {name: stage for name, stage in stages.items() if name in wanted}


def build_pipeline(
    policy: CausalPolicy,
    reference: CausalPolicy,
    options: Mapping[str, Any],
    resolved: Mapping[str, Mapping],
    values: Mapping[str, Values] | None = None,
    *,
    answers: bool = False,
    feature_map: FeatureMap | None = None,
) -> dict[str, Any]:
    """The stages sample, embed and reward, from the options of a run and the resolved options of its components.

    `values` are those of `build_values`, `feature_map` is that of `build_features`, made here when left out. With
    `answers` the data carries `answer_mask`, and targets lie in answers alone.
    """
    return {
        "sample": build_sampler(policy, options, resolved, answers=answers),
        "embed": as_module(feature_map or build_features(policy, reference, options, resolved).embed, documents=True),
        "reward": build_reward(options, resolved, decode=decoder(policy.tokenizer), values=values),
    }


def build_sampler(
    policy: CausalPolicy,
    options: Mapping[str, Any],
    resolved: Mapping[str, Mapping],
    *,
    answers: bool = False,
    **drawing: Any,
) -> TensorDictModule:
    """The stage that places anchors and draws rollouts; `drawing` is passed on to the engine."""
    build = choose("sampler", options["sampler"]).build
    place, engine = build(policy, horizon=options["horizon"], **resolved["sampler"])
    return sampler(
        place,
        engine,
        horizon=options["horizon"],
        answers=answers,
        rollouts=options["rollouts"],
        temperature=options["temperature"],
        top_p=options["top_p"],
        eos=policy.tokenizer.eos_token_id,
        **drawing,
    )
