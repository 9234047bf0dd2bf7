"""From options to a whole run."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from tensordict import TensorDictBase

from ebft import schema
from ebft.assemble.answers import ANSWERS, build_answers
from ebft.assemble.checks import describe_components, resolve_run, settle
from ebft.assemble.config import (
    check_same_text,
    fingerprint,
    machine,
    read_config,
    record_changes,
    resumed_options,
    version_changes,
    versions,
)
from ebft.assemble.loss import build_controller, build_loss, build_schedules
from ebft.assemble.optimizer import build_average, build_optimizer
from ebft.assemble.pipeline import build_features, build_pipeline, training_stages
from ebft.assemble.policy import load_policy
from ebft.assemble.protections import say_protections
from ebft.assemble.reward import build_values
from ebft.assemble.rows import check_prompts, pack_data, read_data, with_tests
from ebft.distributed import from_first, is_first, size
from ebft.errors import UsageError
from ebft.features.whitening import PopulationWhitening
from ebft.files import exclusive, write_atomically, write_json
from ebft.loops.calibrate import calibrate
from ebft.loops.checkpoint import newest, step_of
from ebft.loops.loggers import check_logger, open_logger
from ebft.loops.run import open_folder, run
from ebft.sharding import shard


def run_from_options(
    options: Mapping[str, Any],
    *,
    explicit: set[str],
    out: Path | None,
    resume: bool,
    console: Console,
    force: bool = False,
    before: Path | None = None,
) -> None:
    """Check the options, assemble the parts, run.

    Args:
        options: those of the command line, by parameter name.
        explicit: which of them the user gave; with `resume` the others are those of the run in `out`.
        force: with `resume`, go on with options that differ from those of the run, and with another text.
        before: the `before.json` of a run whose start is measured alike, to be used instead of measuring it again.

    Raises:
        UsageError: any bad input, before anything is written.
    """
    given, stored = dict(options), {}
    changed: dict[str, Any] = {}
    if force and not resume:
        raise UsageError("--force goes with --resume: it goes on with a run under other options")
    if resume:
        if out is None:
            raise UsageError("--resume needs --out, the folder of the run to go on with")
        open_folder(out, resume=True)
        stored = read_config(out)
        given, changed = resumed_options(out, stored["options"], given, explicit, force=force)
    resolved, options = resolve_run(given), settle(given)
    check_logger(options["logger"])
    parts = (options[part] for part in ("method", "features", "sampler"))
    name = re.sub(r"[^\w.]+", "-", "-".join(part for part in parts if part is not None))
    out = from_first(out or Path("runs") / f"{time.strftime('%Y%m%d-%H%M%S')}-{name}")
    if not resume and is_first() and out.exists():
        open_folder(out, resume=False)  # refused before the work; made after the checks

    data = read_data(options)
    whole = options["sampler"] == "full"
    if whole or ANSWERS in resolved:
        check_prompts(data, options)
    if whole and resolved["objective"].get("verifier") == "unit_tests":
        data = with_tests(data, options, console=console)
    console.print(f"method {options['method']}, policy {options['policy']}", highlight=False)
    policy = load_policy(options)
    if options["shard"] and size() == 1:
        console.print("--shard: one process has nothing to share; it trains as without")
    elif options["shard"]:
        shard(policy)
    reference = policy.reference()
    values = build_values(options, resolved)
    embed = None
    if options["features"] is not None:
        features = build_features(policy, reference, options, resolved)
        embed = features.embed
        console.print(f"features {options['features']}: {features.note}", highlight=False, soft_wrap=True)
    verifiers = {resolved[group].get("verifier") for group in ("objective", ANSWERS) if group in resolved}
    if "unit_tests" in verifiers:
        say_protections(console)
    measuring = build_pipeline(
        policy,
        reference,
        options,
        resolved,
        values,
        answers=data.answers,
        feature_map=embed,
        examples=data.example if whole else None,
    )
    pipeline = training_stages(measuring, options)
    train_rows, held_rows = pack_data(data, policy.tokenizer, options, resolved, console=console)
    options["steps"] = options["steps"] or steps_of(options["epochs"], len(train_rows), options["batch"])
    further = build_answers(policy, reference, options, resolved, data, console=console)
    parameters = list(policy.trainable().values())
    optimizer, scheduler = build_optimizer(parameters, options, resolved)
    loss = build_loss(options, resolved["pg"])
    console.print(
        f"{len(train_rows):,} training and {len(held_rows)} held-out"
        f" {'prompts with answers' if whole else 'sequences'} of {train_rows[schema.MASK].shape[1]} tokens;"
        f" {sum(p.numel() for p in parameters):,} trained weights on {policy.device}",
        highlight=False,
    )
    all_rows = [train_rows, held_rows, *(rows for each in further.values() for rows in (each.data, each.held_out))]
    config = {
        "options": given,
        "steps": options["steps"],
        "components": describe_components(given, resolved),
        "versions": versions(),
        "machine": machine(policy.device),
        "sequences": {
            "training": len(train_rows),
            "held_out": len(held_rows),
            "fingerprint": fingerprint(torch.cat([rows[schema.SEQUENCE_IDS] for rows in all_rows])),
        },
    }
    if not is_first():
        pass
    elif not resume:
        open_folder(out, resume=False)
        write_json(out / "config.json", config)
        if before is not None:
            write_atomically(out / "before.json", before.read_bytes())
    elif not check_same_text(out, stored.get("sequences", {}), config["sequences"], force=force) or changed:
        with exclusive(out):
            path = newest(out / "checkpoints", warn=console.print)
            record_changes(out, stored, config, set(changed), step=step_of(path) if path else 0)
    if other := version_changes(stored.get("versions", {})):
        console.print(f"other versions than at the start, so numbers may differ in their last digits: {other}")
    whitenings = {name: v for name, v in values.items() if isinstance(v, PopulationWhitening)}
    observers = [partial(observe_moments, whitening) for whitening in whitenings.values()]
    if whitenings:
        count = next(iter(whitenings.values())).calibration
        console.print(f"calibrating the whitening on {count} batches", highlight=False)
        calibrate(
            policy,
            measuring,
            train_rows,
            _each(observers),
            count=count,
            batch_size=options["batch"],
            seed=options["seed"],
        )
    scoring = {"temperature": options["temperature"], "top_p": options["top_p"]}
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
        scoring=scoring,
        save_every=options["save_every"],
        eval_every=options["eval_every"],
        keep=options["keep"],
        logger=open_logger(options["logger"], out, options) if is_first() else None,
        controller=build_controller(options),
        stateful={f"whitening_{name}": whitening for name, whitening in whitenings.items()},
        training={
            "scoring": {**scoring, "temperature": options["score_temperature"] or options["temperature"]},
            "micro_batch": options["micro_batch"],
            "max_grad_norm": options["max_grad_norm"],
            "updates": options["updates"],
            "minibatches": options["minibatches"],
            "truncation": options["truncate_weights"],
            "schedules": build_schedules(options),
            "observers": observers if pipeline and any(each.running for each in whitenings.values()) else [],
        },
        measuring=measuring,
        further=further,
        average=build_average(policy, options),
        console=console,
    )


def steps_of(epochs: float, rows: int, batch_size: int) -> int:
    """Batches in so many passes over the rows; those that do not fill a last batch sit a pass out."""
    return max(1, round(epochs * (rows // batch_size)))


def observe_moments(whitening: PopulationWhitening, td: TensorDictBase) -> None:
    """Show the features of a batch to the whitening."""
    whitening.observe(
        td[schema.ROLLOUT_FEATURES],
        td[schema.TARGET_FEATURES],
        td[schema.ANCHOR_MASK],
        td[schema.ROLLOUT_MASK],
        td[schema.TARGET_MASK],
    )


def _each(observers: Sequence[Callable[[TensorDictBase], None]]) -> Callable[[TensorDictBase], None]:
    def observe(td: TensorDictBase) -> None:
        for observer in observers:
            observer(td)

    return observe
