"""From the options of a run to what it will take."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoConfig

from ebft.assemble.checks import resolve_run, settle
from ebft.assemble.optimizer import build_optimizer
from ebft.assemble.policy import policy_folder
from ebft.components.features import parse_layers
from ebft.errors import UsageError
from ebft.features.hidden import layer_numbers
from ebft.loading import choose_device, choose_precision, model_source
from ebft.loops.held_out import HELD_OUT_ROWS
from ebft.planning.memory import Kind, Work
from ebft.planning.plan import Plan, Step, count_weights, predict
from ebft.planning.speed import Device
from ebft.samplers.anchors import strided

_GIB = 2**30


def plan_from_options(options: Mapping[str, Any], *, processes: int, console: Console) -> Plan:
    """Print, and return, what a run with these options takes in each of `processes` processes.

    Raises:
        UsageError: options that a run would refuse, or a model that cannot be planned for.
    """
    if processes < 1:
        raise UsageError(f"--processes {processes}: expected a whole number >= 1")
    resolved, settled = resolve_run(options, processes=processes), settle(options)
    if settled["attention"] in ("dense", "rows"):
        raise UsageError(f"--attention {settled['attention']}: its memory is not planned for; chunked and flex are")
    if settled["method"] not in ("ebft", "sft"):
        raise UsageError(f"--method {settled['method']}: whole answers are not planned for; ebft and sft are")
    if settled["sampler"] not in ("strided", "random"):
        raise UsageError(f"--sampler {settled['sampler']}: only strided and random are planned for")
    device = choose_device(settled["device"])
    config = _config(settled["policy"])
    kind = _kind(settled, device)
    step = _step(config, kind, settled, resolved, processes)

    def make(parameters: list[torch.Tensor]) -> torch.optim.Optimizer:
        return build_optimizer(parameters, {**settled, "steps": settled["steps"] or 1}, resolved)[0]

    console.print("measuring the architecture with 1 and 2 layers, and products on this device", highlight=False)
    base = _resident() if device.type == "cpu" else 0
    sharers = processes if settled["shard"] else 1
    plan = predict(config, kind, step, make_optimizer=make, device=device, sharers=sharers)
    if base:
        plan.parts["process"] = base
    _print(plan, settled, device, kind, processes, console)
    return plan


def _config(name: str) -> Any:
    source = model_source(policy_folder(name))
    try:
        return AutoConfig.from_pretrained(source)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UsageError(f"policy {name!r}: its configuration could not be loaded: {reason}") from error


def _kind(options: Mapping[str, Any], device: torch.device) -> Kind:
    weights, autocast = choose_precision(options["dtype"], device)
    frozen = autocast if options["lora"] and autocast else weights
    return Kind(frozen, autocast, options["lora"], options["attention"], options["checkpointing"])


def _step(config: Any, kind: Kind, options: Mapping[str, Any], resolved: Mapping[str, Mapping], processes: int) -> Step:
    length, horizon = options["length"], options["horizon"]
    placed = {name: resolved["sampler"][name] for name in ("stride", "first")}
    anchors, _ = strided(torch.ones(1, length, dtype=torch.bool), horizon=horizon, **placed)

    def work(rows: int) -> Work:
        return Work(rows, length, anchors.shape[1], options["rollouts"], horizon)

    share = -(-options["batch"] // processes)
    of_update = -(-(options["batch"] // options["minibatches"]) // processes)
    at_once = min(options["micro_batch"] or of_update, of_update)
    network, backbone = (config, kind), 0.0
    layers: tuple[int, ...] = ()
    if options["features"] == "hidden":
        network, backbone = _backbone(resolved["features"]["backbone"], config, kind)
        layers = layer_numbers(parse_layers(resolved["features"]["layers"]), _depth(network[0]))
    wide = network[0].get_text_config().hidden_size
    return Step(
        sampled=work(share),
        drawn=work(-(-share // options["overlap"])),
        measured=work(min(options["held_out"], -(-HELD_OUT_ROWS // processes))),
        scored=work(at_once),
        parts=options["minibatches"] * -(-of_update // at_once),
        updates=options["updates"],
        minibatches=options["minibatches"],
        rollouts=options["method"] != "sft",
        depth=max(layers, default=0) / _depth(network[0]),
        taps=len(layers) * wide * (kind.autocast or kind.weights).itemsize,
        reference=bool(options["kl"]),
        average=options["ema"] is not None,
        backbone=backbone,
        network=None if network[0] is config else network,
        captured=options["decode"] == "graph",
        offload=options["offload_reference"],
    )


def _backbone(name: str, config: Any, kind: Kind) -> tuple[tuple[Any, Kind], float]:
    """The architecture and kind of the network that features are states of, and its bytes besides the policy's."""
    if name == "start":
        return (config, kind), 0.0
    if name == "random":
        return (config, kind), count_weights(config, kind)[0] * kind.weights.itemsize
    named = _config(name)
    own = Kind(kind.autocast or kind.weights, kind.autocast, kernel=kind.kernel)
    return (named, own), count_weights(named, own)[0] * own.weights.itemsize


def _depth(config: Any) -> int:
    return config.get_text_config().num_hidden_layers


def _resident() -> int:
    """Bytes that this process holds now; 0 where the system does not tell."""
    path = Path("/proc/self/statm")
    return int(path.read_text().split()[1]) * 4096 if path.exists() else 0


def _print(
    plan: Plan, options: Mapping[str, Any], device: torch.device, kind: Kind, processes: int, console: Console
) -> None:
    where = f"{processes} {'process' if processes == 1 else 'processes, each'}, {device}"
    if options["shard"]:
        where += ", weights shared" if processes > 1 else ", nothing to share"
    memory = Table(title=f"Memory ({where})", title_justify="left")
    memory.add_column("held all the time")
    memory.add_column("GiB", justify="right")
    for name, size in plan.parts.items():
        if size:
            memory.add_row(name, f"{size / _GIB:.2f}")
    memory.add_section()
    worst = max(plan.stages, key=lambda name: plan.stages[name])
    for name, size in plan.stages.items():
        memory.add_row(f"{name} adds{' (the worst)' * (name == worst)}", f"{size / _GIB:.2f}")
    memory.add_section()
    memory.add_row("peak", f"{plan.peak / _GIB:.2f}")
    console.print(memory)
    if plan.offloaded:
        held = ", ".join(f"{name} {size / _GIB:.2f} GiB" for name, size in plan.offloaded.items() if size)
        console.print(f"in CPU memory: {held}", highlight=False)
    there = _available(device)
    if there and plan.peak > there:
        console.print(
            f"[bold red]more than the {there / _GIB:.1f} GiB that are free here:[/bold red] a smaller --micro-batch,"
            " --checkpointing, --offload-reference, --lora, --dtype bfloat16 or more processes, and of several --shard,"
            " take less",
            highlight=False,
        )
    speed = Table(title="Time of a step, without held-out measurements", title_justify="left")
    for name in ("stage", "seconds", "products alone"):
        speed.add_column(name, justify="left" if name == "stage" else "right")
    for stage, seconds in plan.seconds.items():
        floor = plan.floor.get(stage)
        speed.add_row(stage, f"{seconds:.3g}", "" if floor is None else f"{floor:.3g}")
    speed.add_section()
    speed.add_row("step", f"{plan.step:.3g}", "")
    console.print(speed)
    if options["features"] not in ("hidden", "ngram", "match") and options["method"] != "sft":
        console.print(f"features {options['features']}: the encoder's own time and memory are not in it")
    named = options["backbone"] not in (None, "start", "random") and options["features"] == "hidden"
    if named and _config(options["backbone"]).vocab_size != _config(options["policy"]).vocab_size:
        console.print(
            f"--backbone {options['backbone']} has another vocabulary: it re-tokenises, and reads each prefix again"
            " with every rollout, which takes more time and memory than is planned here for embedding",
            highlight=False,
        )
    dtype = kind.autocast or kind.weights
    name = str(dtype).removeprefix("torch.")
    console.print(
        f"{plan.tokens * processes / plan.step:,.0f} tokens/s; this device multiplies {name} matrices at"
        f" {Device(device).throughput(dtype) / 1e12:.3g} TFLOP/s",
        highlight=False,
    )
    if options["steps"]:
        console.print(f"{options['steps']} steps: {plan.step * options['steps'] / 60:.1f} min", highlight=False)


def _available(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    path = Path("/proc/meminfo")
    lines = path.read_text().splitlines() if path.exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), 0)
