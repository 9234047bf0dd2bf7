"""From the command line's options to the parts of a run; what needs no model is checked before one is loaded."""

from __future__ import annotations

import json
import math
import platform
import re
import time
from collections.abc import Mapping
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from tensordict import TensorDictBase

from ebft import __version__, schema
from ebft.build_loss import build_controller, build_loss, build_schedules, check_loss_options
from ebft.components import OPTION_NAMES, choose, resolve_options
from ebft.data.documents import load_documents, split_documents
from ebft.data.packing import pack
from ebft.draw import check_sampling
from ebft.errors import UsageError
from ebft.features.contract import as_module
from ebft.features.whitening import PopulationWhitening
from ebft.files import write_json
from ebft.loops.calibrate import calibrate
from ebft.loops.run import open_folder, run
from ebft.loops.show import SCALE, rollout_lines
from ebft.objectives.component import Values, objective
from ebft.policy import CausalPolicy
from ebft.samplers import snapshot
from ebft.samplers.anchors import single, strided
from ebft.samplers.component import sampler
from ebft.samplers.full import prompt_lengths

GROUPS = ("sampler", "features", "whitening", "objective", "estimator", "pg")
PACKAGES = ("torch", "transformers", "tensordict", "torchrl", "sentence-transformers", "peft")

# The smallest value of each numeric option; all must be finite.
_AT_LEAST = {
    **dict.fromkeys(
        ("steps", "batch", "micro_batch", "rollouts", "horizon", "stride", "first", "ngram", "dimension"), 1
    ),
    **dict.fromkeys(
        ("lora", "ce", "kl", "pg_weight", "entropy", "diversity", "seed", "context_tokens", "temperature", "lr"), 0
    ),
    **dict.fromkeys(("length", "held_out"), 2),
    **dict.fromkeys(("save_every", "updates"), 1),
}


def run_from_options(
    options: Mapping[str, Any], *, explicit: set[str], out: Path | None, resume: bool, console: Console
) -> None:
    """Check the options, assemble the parts, run.

    Args:
        options: those of the command line, by parameter name.
        explicit: which of them the user gave; with `resume` the others are those of the run in `out`.

    Raises:
        UsageError: any bad input, before anything is written.
    """
    options = dict(options)
    if resume:
        if out is None:
            raise UsageError("--resume needs --out, the folder of the run to go on with")
        open_folder(out, resume=True)
        options = _stored_options(out, options, explicit)
    check_options(options)
    chosen = {group: options[group] for group in GROUPS}
    given = {name: options[name] for name in OPTION_NAMES}
    resolved = resolve_options(chosen, given)
    name = re.sub(r"[^\w.]+", "-", f"{options['features']}-{options['sampler']}")
    out = out or Path("runs") / f"{time.strftime('%Y%m%d-%H%M%S')}-{name}"
    if not resume and out.exists():
        open_folder(out, resume=False)  # refused before the work; made after the checks

    documents = split_documents(load_documents(options["data"], text_field=options["text_field"]))
    console.print(f"policy {options['policy']}, features {options['features']}", highlight=False)
    policy = CausalPolicy.from_pretrained(
        options["policy"],
        device=options["device"],
        dtype=options["dtype"],
        lora=options["lora"] or None,
        seed=options["seed"],
        kernel=options["attention"],
        checkpointing=options["checkpointing"],
    )
    reference = policy.reference()
    values = build_values(options, resolved)
    pipeline = build_pipeline(policy, reference, options, resolved, values)
    train_rows, held_rows = (
        _usable(pack(part, policy.tokenizer, length=options["length"]), options, resolved) for part in documents
    )
    if options["batch"] > len(train_rows):
        raise UsageError(
            f"--batch {options['batch']}: the training text gives only {len(train_rows)} sequences of"
            f" --length {options['length']}. Give more text, or a smaller batch or length"
        )
    held_rows = _subset(held_rows, options["held_out"])
    parameters = list(policy.trainable().values())
    optimizer = torch.optim.AdamW(parameters, lr=options["lr"], betas=(0.9, 0.95), weight_decay=0.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, _warm_up_then_linear(options["steps"]))
    loss = build_loss(options, resolved["pg"])
    console.print(
        f"{len(train_rows):,} training and {len(held_rows)} held-out sequences of {options['length']} tokens;"
        f" {sum(p.numel() for p in parameters):,} trained weights on {policy.device}",
        highlight=False,
    )
    config = {
        "options": options,
        "components": {group: {"name": name, **resolved[group]} for group, name in chosen.items()},
        "versions": {"ebft": __version__, **{name: version(name) for name in PACKAGES}},
        "machine": _machine(policy.device),
        "sequences": {"training": len(train_rows), "held_out": len(held_rows)},
    }
    if not resume:
        open_folder(out, resume=False)
        write_json(out / "config.json", config)
    stateful, observers = {}, []
    if isinstance(values, PopulationWhitening):
        observe = partial(_observe, values)
        console.print(f"calibrating the whitening on {values.calibration} batches", highlight=False)
        calibrate(
            policy,
            pipeline,
            train_rows,
            observe,
            count=values.calibration,
            batch_size=options["batch"],
            seed=options["seed"],
        )
        stateful, observers = {"whitening": values}, [observe] if values.running else []
    run(
        policy,
        pipeline,
        loss,
        data=train_rows,
        held_out=held_rows,
        optimizer=optimizer,
        scheduler=scheduler,
        reference=reference,
        out=out,
        steps=options["steps"],
        batch_size=options["batch"],
        seed=options["seed"],
        scoring={"temperature": options["temperature"], "top_p": options["top_p"]},
        save_every=options["save_every"],
        controller=build_controller(options),
        stateful=stateful,
        training={
            "micro_batch": options["micro_batch"],
            "updates": options["updates"],
            "truncation": options["truncate_weights"],
            "schedules": build_schedules(options),
            "observers": observers,
        },
        console=console,
    )


def sample_from_options(options: Mapping[str, Any], *, console: Console) -> None:
    """Draw rollouts from the prefixes of one text and print them.

    Args:
        options: those of the command `sample`, by parameter name.

    Raises:
        UsageError: any bad input.
    """
    _check_ranges(options)
    settings = {name: options[name] for name in ("temperature", "top_p", "top_k", "min_p")}
    check_sampling(**settings)
    if options["sampler"] == "full":
        placement = {}
        for name in ("stride", "first"):
            if options[name] is not None:
                raise UsageError(f"--{name} {options[name]} does not apply to sampler full: it starts after the text")
    else:
        given = {name: options[name] for name in ("stride", "first")}
        placement = resolve_options({"sampler": options["sampler"]}, given)["sampler"]
    if not options["text"].is_file():
        raise UsageError(f"--text {options['text']}: no such file")
    document = load_documents(str(options["text"]))[0]
    policy = CausalPolicy.from_pretrained(options["policy"], device=options["device"], dtype=options["dtype"])
    tokens = pack([document], policy.tokenizer, length=options["length"], eos=False)[0].to(policy.device)
    tokens = tokens[schema.TOKENS][tokens[schema.MASK]]
    place, engine = _place_and_engine(policy, options["sampler"], placement, horizon=options["horizon"])
    anchors, anchor_mask = place(torch.ones_like(tokens, dtype=torch.bool)[None])
    legend = ", ".join(f"[{style}]{bound:g} and more[/{style}]" for bound, style in SCALE)
    console.print(f"probability of a token: {legend}", highlight=False)
    draw = {"rollouts": options["rollouts"], "seed": options["seed"], "eos": policy.tokenizer.eos_token_id, **settings}
    whole = options["sampler"] == "full"  # one prompt, its answers in full; else a line for each rollout
    for line in rollout_lines(
        policy.tokenizer, engine, tokens, anchors, anchor_mask, horizon=options["horizon"], **draw
    ):
        console.print(line, overflow="fold" if whole else "ellipsis", no_wrap=not whole)


def _place_and_engine(policy: CausalPolicy, name: str, placement: Mapping[str, int], *, horizon: int):
    """Where the rollouts of one text start and how they are drawn; `full` goes on after the text's end."""
    if name == "full":
        engine = partial(snapshot.sample, snapshot.cache_reader(policy)) if policy.not_shared else policy.sample
        return (lambda mask: single(prompt_lengths(mask))), engine
    place, engine = choose("sampler", name).build(policy, horizon=horizon, **placement)
    if name == "random":
        place = partial(place, seed=torch.zeros(1, dtype=torch.int64), sequence_ids=torch.zeros(1, dtype=torch.int64))
    return place, engine


def check_options(options: Mapping[str, Any]) -> None:
    """What can be known to be wrong from the options alone.

    Raises:
        UsageError: one clear message, naming the option, its value and what is expected.
    """
    _check_ranges(options)
    length, horizon, rollouts = options["length"], options["horizon"], options["rollouts"]
    if horizon >= length:
        raise UsageError(f"--horizon {horizon} does not fit --length {length}: a sequence needs context and a target")
    if options["temperature"] <= 0:
        raise UsageError(
            f"--temperature {options['temperature']}: expected a number > 0; greedy rollouts have no policy gradient"
        )
    if not 0 < options["top_p"] <= 1:
        raise UsageError(f"--top-p {options['top_p']}: expected a number in (0, 1]; 1 keeps every token")
    if rollouts == 1:
        reason = "held-out feature matching compares rollouts with each other"
        if options["diversity"] > 0:
            reason = f"the diversity term (--diversity {options['diversity']}) compares rollouts with each other"
        elif options["estimator"] != "none":
            reason = f"the estimator {options['estimator']} compares a rollout with the others of its anchor"
        raise UsageError(f"--rollouts 1: {reason}. Give 2 or more, better 3 or more")
    if not options["lr"] > 0:
        raise UsageError(f"--lr {options['lr']}: expected a number > 0")
    check_loss_options(options)
    per_token = options["pooling"] == "none"
    if per_token and options["credit"] is None:
        raise UsageError("--pooling none keeps features per token: say with --credit how tokens are rewarded")
    if options["credit"] is not None and not (per_token and options["features"] == "hidden"):
        raise UsageError(f"--credit {options['credit']} wants features per token: add --features hidden --pooling none")
    if per_token and options["whitening"] == "population":
        raise UsageError("--whitening population does not take features per token (--pooling none) yet; use group")
    if rollouts == 1 and options["whitening"] in ("group", "sample"):
        raise UsageError(f"--whitening {options['whitening']} with --rollouts 1: one rollout has no moment; give more")


def _check_ranges(options: Mapping[str, Any]) -> None:
    for name, least in _AT_LEAST.items():
        value = options.get(name)
        if value is not None and not (math.isfinite(value) and value >= least):
            raise UsageError(f"--{name.replace('_', '-')} {value}: expected a number >= {least}")


def build_values(options: Mapping[str, Any], resolved: Mapping[str, Mapping]) -> Values:
    """The kernel's values, of features whitened as asked for."""
    values = choose("objective", options["objective"]).build(**resolved["objective"])
    return choose("whitening", options["whitening"]).build(values, **resolved["whitening"])


def _observe(whitening: PopulationWhitening, td: TensorDictBase) -> None:
    whitening.observe(td[schema.ROLLOUT_FEATURES], td[schema.TARGET_FEATURES], td[schema.ANCHOR_MASK])


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


def _usable(rows: TensorDictBase, options: Mapping[str, Any], resolved: Mapping[str, Mapping]) -> TensorDictBase:
    """The rows in which at least one anchor fits, so that no batch is without one."""
    placement = {"stride": 1, "first": resolved["sampler"]["first"], "horizon": options["horizon"]}
    _, anchor_mask = strided(rows[schema.MASK], document_ids=rows[schema.DOCUMENT_IDS], **placement)
    return rows[anchor_mask.any(1)]


def _subset(rows: TensorDictBase, count: int) -> TensorDictBase:
    """`count` rows, the same ones for every seed, spread over the whole held-out text."""
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))
    return rows[order[:count]]


def _warm_up_then_linear(steps: int):
    """Learning-rate factor: up over the first 10 % of the steps, then linearly down to 5 %."""
    warm_up = max(1, steps // 10)
    return lambda step: min((step + 1) / warm_up, max(0.05, 1 - (step - warm_up) / max(1, steps - warm_up)))


def _stored_options(out: Path, options: Mapping[str, Any], explicit: set[str]) -> dict[str, Any]:
    try:
        stored = json.loads((out / "config.json").read_text())["options"]
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(f"--resume: {out / 'config.json'} does not hold the options of a run") from error
    changed = {name: options[name] for name in explicit if options[name] != stored.get(name)}
    if changed:
        differences = ", ".join(f"--{k.replace('_', '-')} {v} (was {stored.get(k)})" for k, v in changed.items())
        raise UsageError(f"--resume goes on with the options of {out}, but {differences}: leave them out")
    return {**options, **stored}


def _machine(device: torch.device) -> dict[str, Any]:
    return {
        "platform": platform.platform(),
        "python": platform.python_version(),
        "processor": torch.cpu.get_capabilities().get("cpu_name") or platform.processor(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
    }
