"""One whole run in its folder: measure held-out, train, measure again, leave everything where people look for it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from tensordict import TensorDictBase

from ebft.distributed import ProcessLost, check_same, from_first, is_first
from ebft.errors import UsageError
from ebft.files import clean_up, clear_disk_errors, exclusive, left_overs, make_folder, write_json
from ebft.loops import checkpoint
from ebft.loops.average import Average
from ebft.loops.display import Display, result_table, stage_table, watch_line
from ebft.loops.evaluate import concatenate, evaluate, mean, paired_difference
from ebft.loops.history import History
from ebft.loops.interrupt import Interrupted, stop_requests
from ebft.loops.loggers import close_logger, log_result, log_step
from ebft.loops.report import write_report, write_samples
from ebft.loops.samples import take_samples
from ebft.loops.train import NonFiniteLoss, Stage, train
from ebft.objectives.kl_controllers import KLController
from ebft.objectives.losses import EBFTLoss
from ebft.policy import CausalPolicy

if TYPE_CHECKING:
    from torchrl.record.loggers import Logger


@dataclass(frozen=True)
class Held:
    """A held-out measurement: per-sequence sums and counts of each metric, and a few samples."""

    sums: dict[str, tuple[torch.Tensor, torch.Tensor]]
    samples: list[dict[str, Any]]


def run(
    policy: CausalPolicy,
    pipeline: Mapping[str, Stage],
    loss: EBFTLoss,
    *,
    data: TensorDictBase,
    held_out: TensorDictBase,
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LRScheduler,
    reference: CausalPolicy,
    out: Path,
    steps: int,
    batch_size: int,
    seed: int,
    scoring: Mapping[str, Any],
    eval_batch: int = 8,
    save_every: int = 20,
    eval_every: int = 0,
    keep: int = 2,
    logger: Logger | None = None,
    controller: KLController | None = None,
    stateful: Mapping[str, checkpoint.Stateful] | None = None,
    training: Mapping[str, Any] | None = None,
    measuring: Mapping[str, Stage] | None = None,
    average: Average | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """Run, or go on with the run whose checkpoints lie in `out`.

    Several processes (`ebft.distributed`) call it alike, and one of them writes. Each reads the checkpoints, so `out`
    is in a place that all machines see; how many processes go on with a run makes no difference to it.

    Args:
        policy, pipeline, loss, optimizer, scheduler, scoring, controller: as in `ebft.loops.train.train`.
        measuring: pipeline of the held-out measurement, whose stages write rollouts, features and reward; None: the
            one that is trained with.
        average: of the weights. The measurement after training and the saved policy are then of the average; the last
            weights themselves are in the last checkpoint.
        training: further arguments of `ebft.loops.train.train`, or other ones (scoring): micro_batch,
            max_grad_norm, updates, ...
        stateful: parts of the pipeline with a state that belongs into checkpoints, by name.
        data, held_out: rows of batch size [M], see `ebft.data.packing.pack`.
        reference: the frozen start of the policy.
        out: the run's folder, see `open_folder`.
        save_every, keep: steps between checkpoints, and how many of them are kept.
        eval_every: steps between held-out measurements, which `held_out.csv` gets with the paired change from before;
            0 measures before and after only.
        logger: gets the metrics of every step too, see `ebft.loops.loggers.open_logger`; it is closed at the end.

    Returns:
        What `evaluation.json` holds: each metric before and after, the paired difference and its standard error, and
        the time of each stage.

    Raises:
        NonFiniteLoss: training stopped; the checkpoints are those of before.
        UsageError: another process runs in `out`.
        Interrupted: Ctrl-C; the last finished step is saved, `--resume` goes on.
        ProcessLost: another process ended.
    """
    display = Display(console or Console())
    first = is_first()  # of several processes, the one that writes
    history, checkpoints, training = History(out if first else None), out / "checkpoints", dict(training or {})
    measuring = pipeline if measuring is None else measuring
    final_weights = nullcontext if average is None else average.applied
    training["observers"] = [*training.get("observers", ()), history.observe]
    states = {**(stateful or {}), "history": history, **({} if controller is None else {"controller": controller})}
    if average is not None:
        states["average"] = average
    saved: dict[str, Any] = {"policy": policy, "optimizer": optimizer, "stateful": states}
    measure = {"data": held_out, "batch_size": eval_batch, "seed": seed, "scoring": scoring}
    with exclusive(out) if first else nullcontext(), stop_requests() as stop:
        if first:
            clean_up(out)
            clean_up(checkpoints)
        before = from_first(_load_held(out) if first else None)
        if before is None:
            before = _measure(policy, measuring, display, "held-out before", stop, **measure)
            if first:
                _save_held(out, before)
        start = checkpoint.restore(checkpoints, **saved, scheduler=scheduler, warn=display.console.print)
        check_same(policy.trainable().values(), start, what=f"the weights and the step of the checkpoint in {out}")
        if start and first:  # a kill may have come between a checkpoint and the removal of older ones
            checkpoint.prune(checkpoints, start, keep=keep)
        history.write()

        def measure_held_out(step: int) -> None:
            if eval_every:
                label = f"held-out at step {step}"
                with final_weights():
                    now = _measure(policy, measuring, display, label, stop, reference=reference, **measure)
                history.append_held_out(_held_out_row(step, before, now))

        if eval_every and not history.held_out:
            history.append_held_out(_held_out_row(0, before, before))
        if start and start < steps and start % max(eval_every, 1) == 0:
            measure_held_out(start)  # stopped between the checkpoint and the measurement
        records = train(
            policy,
            pipeline,
            loss,
            data,
            optimizer=optimizer,
            scheduler=scheduler,
            steps=steps,
            batch_size=batch_size,
            seed=seed,
            start=start,
            reference=reference,
            controller=controller,
            average=average,
            **{"scoring": scoring, **training},
        )
        saved_step = start
        try:
            for record in display.track(records, label="training", total=steps, done=start, describe=watch_line):
                history.append(record)
                log_step(logger, record)
                step = int(record["step"])
                ended, stopping = controller is not None and controller.stopped, stop()
                if step % save_every == 0 or step == steps or stopping or ended:
                    if first:
                        checkpoint.save(checkpoints, step, keep=keep, **saved)
                    saved_step = step
                if ended:
                    display.console.print(f"training ends after step {step}: divergence {record['kl']:.4g} (--kl-stop)")
                if stopping and step < steps:
                    if first:
                        write_report(out)
                    raise Interrupted(
                        f"stopped after step {step} of {steps}, which is saved in {out}; --resume goes on"
                    )
                if step < steps and not ended and step % max(eval_every, 1) == 0:
                    measure_held_out(step)
        except NonFiniteLoss as error:
            kept = f"The checkpoint of step {saved_step} is kept." if saved_step else "There is no checkpoint yet."
            raise NonFiniteLoss(f"{error} {kept}") from error
        except ProcessLost as error:
            raise ProcessLost(f"{error}. `run --resume --out {out}` goes on from the last checkpoint") from error
        with final_weights():
            label = "held-out after" if average is None else "held-out after, averaged weights"
            after = _measure(policy, measuring, display, label, stop, reference=reference, **measure)
        if eval_every:
            history.append_held_out(_held_out_row(len(history.rows), before, after))

        result = _result(before, after, history.rows, held_out)
        if not first:
            return result
        write_json(out / "evaluation.json", result)
        log_result(logger, result["metrics"], step=steps)
        close_logger(logger)
        samples = [
            {**s, "after": later["before"]} for s, later in zip(before.samples, after.samples, strict=True)
        ]  # "before" of the later measurement is what came after
        write_json(out / "samples.json", samples)
        write_samples(samples, out / "samples.md")
        with final_weights():
            policy.save_pretrained(out / "policy")
        write_report(out)
    _print_result(display.console, result, out, averaged=average is not None)
    return result


def open_folder(out: Path, *, resume: bool) -> None:
    """Make the run's folder, or check that it holds a run to resume.

    Raises:
        UsageError: it exists and is not empty (without `resume`), or holds no run (with it).
    """
    if resume:
        if not (out / "config.json").is_file():
            raise UsageError(
                f"--resume: {out} holds no run (no config.json). Give the run's folder with --out; a run that was"
                " stopped before its first file starts again without --resume"
            )
        return
    if out.exists() and (not out.is_dir() or set(out.iterdir()) - set(left_overs(out))):
        raise UsageError(
            f"--out {out} exists and is not empty. Choose another folder, or --resume to go on with that run"
        )
    with clear_disk_errors(out):
        make_folder(out)


def _measure(policy, pipeline, display, label, stop, *, data, batch_size, seed, scoring, reference=None) -> Held:
    parts: list[dict] = []
    samples: list[dict[str, Any]] = []
    batches = evaluate(policy, pipeline, data, batch_size=batch_size, seed=seed, reference=reference, scoring=scoring)
    total = math.ceil(len(data) / batch_size)
    for sums, td in display.track(batches, label=label, total=total):
        parts.append(sums)
        if not samples:
            samples = take_samples(td, policy.tokenizer)
        if stop():
            raise Interrupted(f"stopped during the measurement {label!r}; --resume goes on")
    return Held(concatenate(parts), samples)


def _held_out_row(step: int, before: Held, now: Held) -> dict[str, float]:
    """The metrics at a step, their paired changes from before and the standard errors of those."""
    row: dict[str, float] = {"step": step, **{name: mean(sums) for name, sums in now.sums.items()}}
    for name in now.sums:
        row[f"{name}_change"], row[f"{name}_standard_error"] = paired_difference(before.sums[name], now.sums[name])
    return row


def _result(before: Held, after: Held, rows: list[dict], held_out: TensorDictBase) -> dict[str, Any]:
    metrics = {}
    for name in after.sums:
        difference, error = paired_difference(before.sums[name], after.sums[name])
        metrics[name] = {
            "before": mean(before.sums[name]),
            "after": mean(after.sums[name]),
            "difference": difference,
            "standard_error": error,
        }
    tokens = sum(float(row["tokens_per_second"]) * float(row["time_step"]) for row in rows)
    stages = {}
    for column in dict.fromkeys(name for row in rows for name in row if name.startswith("time_")):
        seconds = sum(float(row.get(column) or 0) for row in rows)
        stages[column.removeprefix("time_")] = {
            "seconds": seconds,
            "tokens": round(tokens),
            "tokens_per_second": tokens / max(seconds, 1e-9),
        }
    return {
        "metrics": metrics,
        "stages": stages,
        "n_sequences": len(held_out),
        "n_anchors": int(before.sums["reward"][1].sum()),
    }


def _print_result(console: Console, result: Mapping[str, Any], out: Path, *, averaged: bool) -> None:
    console.print(result_table(result["metrics"], width=console.width))
    console.print(f"{result['n_sequences']} held-out sequences, {result['n_anchors']} anchors", highlight=False)
    console.print(stage_table(result["stages"]))
    what = {
        "report.html": "curves, samples, configuration (curves also in report.png)",
        "samples.md": "held-out rollouts before and after",
        "metrics.csv": "one row a step",
        "config.json": "everything needed to repeat the run",
        "policy/": f"the trained model{', its averaged weights (--ema)' * averaged}, for"
        " AutoModelForCausalLM.from_pretrained",
    }
    for name, meaning in what.items():
        console.print(f"{out / name}{'/' if name.endswith('/') else ''}  {meaning}", soft_wrap=True, highlight=False)


def _save_held(out: Path, held: Held) -> None:
    sums = {name: [x.tolist() for x in pair] for name, pair in held.sums.items()}
    write_json(out / "before.json", {"sums": sums, "samples": held.samples})


def _load_held(out: Path) -> Held | None:
    try:
        stored = json.loads((out / "before.json").read_text())
    except FileNotFoundError:
        return None
    sums = {
        name: (torch.tensor(total, dtype=torch.float64), torch.tensor(count, dtype=torch.float64))
        for name, (total, count) in stored["sums"].items()
    }
    return Held(sums, stored["samples"])
