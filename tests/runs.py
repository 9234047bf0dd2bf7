"""Whole runs on a tiny model: the command line's options for one, and what it left."""

import csv
import inspect
import io

from rich.console import Console

from ebft import cli
from ebft.assemble import GROUPS, build_pipeline, run_from_options
from ebft.components import OPTION_NAMES, resolve_options
from ebft.data import load_documents, pack
from ebft.policy import CausalPolicy


def tiny_options(folder, text):
    """The command line's options with their defaults, but for a tiny run."""
    parameters = inspect.signature(cli.run).parameters
    defaults = {name: p.default for name, p in parameters.items() if name not in ("context", "out", "resume", "force")}
    return defaults | {
        "policy": str(folder), "data": str(text), "device": "cpu", "dtype": "float32", "lora": 0,
        "length": 32, "stride": 9, "first": 5, "horizon": 4, "rollouts": 3, "features": "hidden", "steps": 6,
        "batch": 3, "micro_batch": 2, "kl": 0.1, "lr": 0.01, "held_out": 6, "save_every": 2,
    }  # fmt: skip


def go(options, out, *, resume=False, force=False, explicit=()):
    console = Console(file=io.StringIO())
    run_from_options(options, explicit=set(explicit), out=out, resume=resume, force=force, console=console)
    return console.file.getvalue()


def metrics(out):
    """The rows of metrics.csv without the columns that measure time."""
    with open(out / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    return [{k: v for k, v in row.items() if not k.startswith("time_") and k != "tokens_per_second"} for row in rows]


def parts(options, **changes):
    """Policy, pipeline and rows of a run with these options."""
    options = {**options, **changes}
    policy = CausalPolicy.from_pretrained(options["policy"], device="cpu", dtype="float32")
    chosen = {group: options[group] for group in GROUPS}
    given = {name: options[name] for name in OPTION_NAMES}
    pipeline = build_pipeline(policy, policy.reference(), options, resolve_options(chosen, given))
    rows = pack(load_documents(options["data"]), policy.tokenizer, length=options["length"])
    return policy, pipeline, rows[:8]
