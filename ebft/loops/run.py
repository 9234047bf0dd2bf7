"""One whole run in its folder: measure held-out, train, measure again, leave everything where people look for it."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from tensordict import TensorDictBase

from ebft.distributed import ProcessLost, check_same, check_seen, from_first, is_first, lost_processes
from ebft.errors import UsageError
from ebft.files import clean_up, clear_disk_errors, exclusive, left_overs, make_folder, write_json
from ebft.loops import checkpoint
from ebft.loops.average import Average
from ebft.loops.display import Display, profile_line, result_table, stage_table, watch_line
from ebft.loops.held_out import (
    HELD_OUT_ROWS,
    PROFILE,
    Held,
    before_and_after,
    load_before,
    measure,
    profile_of,
    row_at,
    save_before,
)
from ebft.loops.history import History
from ebft.loops.interrupt import Interrupted, stop_requests
from ebft.loops.loggers import close_logger, log_result, log_step
from ebft.loops.objective import Objective
from ebft.loops.report import write_report, write_samples
from ebft.loops.stages import Stage
from ebft.loops.train import NonFiniteLoss, train
from ebft.objectives.kl_controllers import KLController
from ebft.objectives.losses import EBFTLoss
from ebft.policy import CausalPolicy

if TYPE_CHECKING:
    from torchrl.record.loggers import Logger


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
    eval_batch: int = HELD_OUT_ROWS,
    save_every: int = 20,
    eval_every: int = 0,
    keep: int = 2,
    logger: Logger | None = None,
    controller: KLController | None = None,
    stateful: Mapping[str, checkpoint.Stateful] | None = None,
    training: Mapping[str, Any] | None = None,
    measuring: Mapping[str, Stage] | None = None,
    further: Mapping[str, Objective] | None = None,
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
        further: of `ebft.loops.train.train`, with held-out rows, of which the reward is measured too.
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
        What `evaluation.json` holds: each metric before and after, the paired difference and its standard error, the
        feature-matching loss over the horizon (also as `profile.json`), and the time of each stage.

    Raises:
        NonFiniteLoss: training stopped; the checkpoints are those of before.
        UsageError: another process runs in `out`; or one of those that run together does not see it.
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
    on = {"data": held_out, "batch_size": eval_batch, "seed": seed, "scoring": scoring}
    with exclusive(out) if first else nullcontext(), stop_requests() as stop:
        check_seen(out)
        if first:
            clean_up(out)
            clean_up(checkpoints)
        before = from_first(load_before(out) if first else None)
        if before is None:
            before = measure(policy, measuring, further or {}, display, "held-out before", stop, profile=True, **on)
            if first:
                save_before(out, before)
        start = checkpoint.restore(checkpoints, **saved, scheduler=scheduler, warn=display.console.print)
        weights = [] if policy.sharded else policy.trainable().values()  # sharded ones differ
        check_same(weights, start, what=f"the weights and the step of the checkpoint in {out}")
        if start and first:  # a kill may have come between a checkpoint and the removal of older ones
            checkpoint.prune(checkpoints, start, keep=keep)
        history.write()

        def measure_held_out(step: int) -> None:
            if eval_every:
                label = f"held-out at step {step}"
                with final_weights():
                    now = measure(policy, measuring, further or {}, display, label, stop, reference=reference, **on)
                history.append_held_out(row_at(step, before, now))

        if eval_every and not history.held_out:
            history.append_held_out(row_at(0, before, before))
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
            further=further,
            **{"scoring": scoring, **training},
        )
        saved_step = start
        try:
            with lost_processes():
                for record in display.track(records, label="training", total=steps, done=start, describe=watch_line):
                    history.append(record)
                    log_step(logger, record)
                    step = int(record["step"])
                    ended, stopping = controller is not None and controller.stopped, stop()
                    if step % save_every == 0 or step == steps or stopping or ended:
                        if first or policy.sharded:
                            checkpoint.save(checkpoints, step, keep=keep, **saved)
                        saved_step = step
                    if ended:
                        reached = f"divergence {record['kl']:.4g}"
                        display.console.print(f"training ends after step {step}: {reached} (--kl-stop)")
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
            after = measure(
                policy, measuring, further or {}, display, label, stop, profile=True, reference=reference, **on
            )
        if eval_every:
            history.append_held_out(row_at(len(history.rows), before, after))

        result = _result(before, after, history.rows, held_out)
        if not first:
            if policy.sharded:
                with final_weights():
                    policy.save_pretrained(out / "policy")  # gives its share
            return result
        write_json(out / "evaluation.json", result)
        if "profile" in result:
            write_json(out / PROFILE, result["profile"])
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


def _result(before: Held, after: Held, rows: list[dict], held_out: TensorDictBase) -> dict[str, Any]:
    tokens = sum(float(row["tokens_per_second"]) * float(row["time_step"]) for row in rows)
    stages = {}
    for column in dict.fromkeys(name for row in rows for name in row if name.startswith("time_")):
        seconds = sum(float(row.get(column) or 0) for row in rows)
        stages[column.removeprefix("time_")] = {
            "seconds": seconds,
            "tokens": round(tokens),
            "tokens_per_second": tokens / max(seconds, 1e-9),
        }
    profile = profile_of(before, after)
    return {
        "metrics": before_and_after(before, after),
        **({"profile": profile} if profile else {}),
        "stages": stages,
        "n_sequences": len(held_out),
        "n_anchors": int(before.sums["reward"][1].sum()),
    }


def _print_result(console: Console, result: Mapping[str, Any], out: Path, *, averaged: bool) -> None:
    console.print(result_table(result["metrics"], width=console.width))
    console.print(f"{result['n_sequences']} held-out sequences, {result['n_anchors']} anchors", highlight=False)
    if "profile" in result:
        console.print(profile_line(result["profile"]), highlight=False)
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
