"""From options to a measurement of signal and noise."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from ebft import schema
from ebft.assemble.checks import resolve_run, settle
from ebft.assemble.config import fingerprint, machine, versions
from ebft.assemble.configurations import OF_SAMPLING, parse_configuration, parse_settings
from ebft.assemble.pipeline import build_features, build_sampler
from ebft.assemble.policy import load_policy
from ebft.assemble.reward import build_reward, build_values, decoder
from ebft.assemble.rows import pack_data, read_data, usable_rows
from ebft.assemble.run import observe_moments
from ebft.components.features import parse_layers
from ebft.errors import UsageError
from ebft.features.hidden import layer_numbers
from ebft.features.module import as_module
from ebft.features.whitening import PopulationWhitening
from ebft.files import write_atomically, write_json
from ebft.loops.calibrate import calibrate
from ebft.loops.signal.components import allocation, allocation_markdown, halves
from ebft.loops.signal.measure import chosen_parameters
from ebft.loops.signal.plan import CROSS_ENTROPY, Configuration, Embedding, Plan, Sampling
from ebft.loops.signal.run import run_signal
from ebft.loops.stages import Stage
from ebft.objectives.scores import Values
from ebft.objectives.stratified import stratified_objective
from ebft.policy import CausalPolicy
from ebft.samplers.first_tokens import first_tokens

# The paper's recipe, and one change at a time.
PAPER = "features=hidden whitening=group alignment=cosine estimator=rloo"
DEFAULTS = (
    f"paper: {PAPER}",
    "dot: features=hidden",
    "alignment only: features=hidden diversity=0",
    "all horizons: features=hidden pooling=none credit=reward_to_go",
)


def signal_from_options(
    options: Mapping[str, Any],
    *,
    base: Mapping[str, Any],
    hints: Mapping[str, Any],
    out: Path | None,
    console: Console,
) -> dict[str, Any]:
    """Check the options, assemble every configuration, measure.

    Args:
        options: those of the command `signal`, by parameter name.
        base: the options of `run` with their defaults, which every configuration starts from; hints: their types.
        out: folder of the measurement; an unfinished one with the same options goes on.

    Returns:
        What signal.json holds.

    Raises:
        UsageError: any bad input, before a model is loaded where that can be known.
    """
    _check(options)
    base = {**base, **{name: options[name] for name in options if name in base}}
    base |= parse_settings(options["set"] or "", hints=hints)
    configurations = [parse_configuration(text, base=base, hints=hints) for text in options["config"] or DEFAULTS]
    names = [name for name, _ in configurations]
    for name in names:
        if names.count(name) > 1 or name == CROSS_ENTROPY:
            raise UsageError(f"configuration {name!r} is there twice, or always measured: give another name")
    reference = options["reference"] or names[0]
    if reference not in names:
        raise UsageError(f"--reference {reference!r}: expected the name of a configuration, one of {', '.join(names)}")
    resolved = [_resolve(name, settings) for name, settings in configurations]
    configurations = [(name, settle(settings)) for name, settings in configurations]
    for name, settings in configurations:
        if settings["sampler"] == "random" and options["replicates"] > 1:
            raise UsageError(
                f"configuration {name!r}: sampler=random draws anchors anew with the rollouts of every replicate, and"
                f" the noise of the two could not be told apart; give --replicates 1 (not {options['replicates']}), or"
                " another sampler"
            )
    if options["allocate"]:
        _check_allocation(configurations[0][1])
    out = out or Path("runs") / f"{time.strftime('%Y%m%d-%H%M%S')}-signal"

    data = read_data(base)
    policy = load_policy(base)
    base = settle(base)
    parameters = chosen_parameters(policy, options["parameters"])
    for name, weight in policy.trainable().items():
        weight.requires_grad_(name in parameters)  # no graph below the first layer that is measured
    rows, _ = pack_data(data, policy.tokenizer, base, resolved[0], console=console)
    for (_, settings), parts in zip(configurations, resolved, strict=True):
        rows = usable_rows(rows, settings, parts)
    console.print(
        f"{len(configurations)} configurations, {len(rows):,} sequences of {base['length']} tokens, gradients of"
        f" {sum(p.numel() for p in parameters.values()):,} weights on {policy.device}",
        highlight=False,
    )
    plan = build_plan(policy, configurations, resolved, rows, options, answers=data.answers, console=console)
    rollouts = configurations[0][1]["rollouts"]
    if options["allocate"]:
        plan = replace(plan, configurations=halves(plan.configurations[0], rollouts=rollouts))
        reference = plan.configurations[0].name
    identity = {
        "configurations": dict(configurations),
        **{name: value for name, value in options.items() if name not in _NOT_OF_GRADIENTS},
        # what a machine makes of `auto`, and a Python of its own library
        "precision": [str(next(policy.causal_lm.parameters()).dtype), str(policy.autocast)],
        "sequences": fingerprint(rows[schema.SEQUENCE_IDS]),
    }
    result, gram = run_signal(
        policy,
        plan,
        rows,
        parameters,
        out=out,
        identity=identity,
        batches=options["batches"],
        batch_size=options["batch"],
        replicates=options["replicates"],
        seed=options["seed"],
        reference=reference,
        micro_batch=options["micro_batch"],
        made_with={"versions": versions(), "machine": machine(policy.device)},
        console=console,
    )
    if options["allocate"]:
        costs = [row["token_forwards"] for row in result["rows"].values()][:4]
        stride = resolved[0]["sampler"]["stride"]
        result |= {"allocation": allocation(gram[:4, :, :, :4], costs, rollouts=rollouts, stride=stride)}
        write_json(out / "signal.json", result)
        text = allocation_markdown(result["allocation"])
        write_atomically(out / "allocation.md", text.encode())
        console.print(text, highlight=False)
    return result


_NOT_OF_GRADIENTS = ("batches", "config", "set", "reference")


def build_plan(
    policy: CausalPolicy,
    configurations: Sequence[tuple[str, Mapping[str, Any]]],
    resolved: Sequence[Mapping[str, Mapping]],
    rows,
    options: Mapping[str, Any],
    *,
    answers: bool,
    console: Console,
) -> Plan:
    """The parts of all configurations, those that are alike made once; moments are calibrated."""
    reference = policy.reference()
    samplings: dict[str, Sampling] = {}
    embeddings: dict[str, Embedding] = {}
    built = []
    for (name, settings), parts in zip(configurations, resolved, strict=True):
        drawing = _key(settings, OF_SAMPLING)
        if drawing not in samplings:
            scoring = {"temperature": settings["temperature"], "top_p": settings["top_p"]}
            kind, strata = settings["first_token"], settings["strata"]
            chosen = {} if kind is None else {"first": first_tokens(kind, strata=strata)}
            stage = build_sampler(policy, settings, parts, answers=answers, **chosen)
            samplings[drawing] = Sampling(stage, scoring)
        features = f"{settings['features']} {dict(parts['features'])}"
        if features not in embeddings:
            stage = as_module(build_features(policy, reference, settings, parts).embed, documents=True)
            embeddings[features] = Embedding(stage, _share(policy, settings, parts))
        values = build_values(settings, parts)
        for whitening in values.values():
            if isinstance(whitening, PopulationWhitening):
                console.print(f"{name}: calibrating the whitening on {whitening.calibration} batches", highlight=False)
                calibrate(
                    policy,
                    {"sample": samplings[drawing].stage, "embed": embeddings[features].stage},
                    rows,
                    partial(observe_moments, whitening),
                    count=whitening.calibration,
                    batch_size=options["batch"],
                    seed=options["seed"],
                )
        reward = _reward(policy, settings, parts, values)
        built.append(Configuration(name, drawing, features, reward))
    return Plan(samplings, embeddings, built)


def _reward(
    policy: CausalPolicy, settings: Mapping[str, Any], parts: Mapping[str, Mapping], values: Mapping[str, Values]
) -> Stage:
    """The stage that rewards rollouts, of independent ones or of strata."""
    if settings["first_token"] is None:
        return build_reward(settings, parts, decode=decoder(policy.tokenizer), values=values)
    return stratified_objective(
        values[settings["objective"]],
        kind=settings["first_token"],
        strata=settings["strata"],
        diversity=settings["diversity"],
        horizons=None if settings["credit"] is None else settings["horizons"] or "uniform",
    )


def _share(policy: CausalPolicy, settings: Mapping[str, Any], parts: Mapping[str, Mapping]) -> float:
    """The share of the policy's layers that the features pass through."""
    if not re.search(r"\bhidden\b", settings["features"]) or parts["features"]["backbone"] not in ("start", "random"):
        return 0.0
    layers = layer_numbers(parse_layers(parts["features"]["layers"]), policy.num_layers)
    return max(layers) / policy.num_layers


def _key(settings: Mapping[str, Any], names: Sequence[str]) -> str:
    return " ".join(f"{name}={settings[name]}" for name in names)


def _resolve(name: str, settings: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    try:
        return resolve_run(settings)
    except UsageError as error:
        raise UsageError(f"configuration {name!r}: {error}") from error


def _check(options: Mapping[str, Any]) -> None:
    if options["allocate"]:
        if len(options["config"] or ()) != 1:
            raise UsageError(f"--allocate with {len(options['config'] or ())} configurations: give one with --config")
        if options["replicates"] < 2:
            raise UsageError(
                f"--allocate with --replicates {options['replicates']}: it wants rollouts drawn anew; give 2"
            )
    for name, least in {"batches": 3, "replicates": 1, "batch": 1}.items():
        if options[name] < least:
            raise UsageError(f"--{name} {options[name]}: expected a number >= {least}")


def _check_allocation(settings: Mapping[str, Any]) -> None:
    """Check that half of the rollouts are a configuration too."""
    if settings["rollouts"] % 2 or settings["rollouts"] < 6:
        raise UsageError(
            f"--allocate with rollouts={settings['rollouts']}: it compares all rollouts with half of them; give an even"
            " number of 6 or more (--set rollouts=8)"
        )
    if settings["first_token"] is not None or settings["sampler"] != "strided":
        raise UsageError("--allocate is for rollouts drawn independently from strided anchors")
