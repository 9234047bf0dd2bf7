"""From options to the stages of a pipeline."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tensordict.nn import TensorDictModule, TensorDictSequential

from ebft import schema
from ebft.assemble.loss import trains_on_rollouts
from ebft.assemble.overlap import overlap_stages
from ebft.assemble.reward import build_reward, build_verify, decoder, reader
from ebft.components import choose
from ebft.components.features import NotedMap
from ebft.components.verifiers import Reference
from ebft.features.contract import FeatureMap
from ebft.features.module import as_module
from ebft.objectives.scores import Values
from ebft.policy import CausalPolicy
from ebft.samplers import full
from ebft.samplers.component import sampler
from ebft.samplers.stop import stopping
from ebft.sharding import run_whole


def build_features(
    policy: CausalPolicy, reference: CausalPolicy, options: Mapping[str, Any], resolved: Mapping[str, Mapping]
) -> NotedMap:
    """The feature map, and what is to be said of it before training."""
    return choose("features", options["features"]).build(policy, reference, **resolved["features"])


def training_stages(stages: dict[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """Of all `stages`, which the held-out measurement runs, those to train with: none for cross-entropy alone."""
    return overlap_stages(stages, options) if trains_on_rollouts(options) else {}


def build_pipeline(
    policy: CausalPolicy,
    reference: CausalPolicy,
    options: Mapping[str, Any],
    resolved: Mapping[str, Mapping],
    values: Mapping[str, Values] | None = None,
    *,
    answers: bool = False,
    feature_map: FeatureMap | None = None,
    examples: Callable[[int], Reference] | None = None,
) -> dict[str, Any]:
    """The stages sample, embed, verify and reward, from the options of a run and the resolved ones of its components.

    Without --features there is nothing to embed, without a verifier nothing to verify.

    Args:
        values: those of `build_values`; feature_map: that of `build_features`; made here when left out.
        answers: the data carries `answer_mask`, and targets lie in answers alone.
        examples: of rows of prompts, by their entry `example`.
    """
    stages: dict[str, Any] = {"sample": run_whole(build_sampler(policy, options, resolved, answers=answers), policy)}
    if options["features"] is not None:
        embed = feature_map or build_features(policy, reference, options, resolved).embed
        running = [reference] if resolved["features"].get("backbone") == "start" else []
        stages["embed"] = run_whole(as_module(embed, documents=options["sampler"] != "full"), *running)
    decode = decoder(policy.tokenizer, stop=_stop(options))
    by = schema.SEQUENCE_IDS if examples is None else schema.EXAMPLE
    texts: dict[str, Any] = {"decode": decode, "examples": examples, "by": by}
    verify = build_verify(options, resolved, **texts)
    if verify is not None:
        stages["verify"] = verify
    stages["reward"] = build_reward(options, resolved, values=values, judged=True, **texts)
    return stages


def build_sampler(
    policy: CausalPolicy,
    options: Mapping[str, Any],
    resolved: Mapping[str, Mapping],
    *,
    answers: bool = False,
    **drawing: Any,
) -> TensorDictSequential:
    """The stage that places anchors and draws rollouts; `drawing` is passed on to the engine.

    Whole answers end at the sequences of --stop, and come with the metrics `answer_tokens` and
    `answers_at_limit` (share of answers with as many tokens as are allowed).
    """
    build = choose("sampler", options["sampler"]).build
    place, engine = build(policy, horizon=options["horizon"], **resolved["sampler"])
    whole = options["sampler"] == "full"
    if _stop(options):
        engine = stopping(engine, read=reader(policy.tokenizer), stop=_stop(options))
    stage = sampler(
        place,
        engine,
        horizon=options["horizon"],
        documents=not whole,
        answers=answers,
        rollouts=options["rollouts"],
        temperature=options["temperature"],
        top_p=options["top_p"],
        eos=policy.tokenizer.eos_token_id,
        **drawing,
    )
    return TensorDictSequential(*stage, _lengths()) if whole else stage


def _stop(options: Mapping[str, Any]) -> Sequence[str]:
    """What whole answers end at besides EOS; short rollouts end at nothing else."""
    return (options["stop"] or ()) if options["sampler"] == "full" and "stop" in options else ()


def _lengths() -> TensorDictModule:
    return TensorDictModule(
        full.answer_lengths,
        in_keys=[schema.ROLLOUT_MASK, schema.ANCHOR_MASK],
        out_keys=[schema.metric("answer_tokens"), schema.metric("answers_at_limit")],
        strict=True,
    )
