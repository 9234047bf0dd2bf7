"""What a run remembers of how it was made: its options, the versions of what it used, the machine."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from ebft import __version__
from ebft.components.methods import with_defaults
from ebft.distributed import size
from ebft.errors import UsageError, flag
from ebft.files import write_json

PACKAGES = ("torch", "transformers", "tensordict", "torchrl", "sentence-transformers", "peft")


def versions() -> dict[str, str]:
    """Of this project and of what it computes with."""
    return {"ebft": __version__, **{name: version(name) for name in PACKAGES}}


# Options of training alone: the held-out measurement of the start is the same whatever they are. (Not `batch`: the
# whitening may be calibrated with batches; nor `estimator` and what shapes advantages: the samples show them.)
TRAINING_ALONE = {
    *(
        "steps",
        "epochs",
        "micro_batch",
        "overlap",
        "checkpointing",
        "offload_reference",
        "shard",
        "save_every",
        "eval_every",
        "keep",
        "logger",
    ),
    *("optimizer", "lr", "lr_schedule", "warm_up", "lr_end", "betas", "momentum", "nesterov", "weight_decay", "eps"),
    *("max_grad_norm", "ema", "pg", "clip", "updates", "minibatches", "truncate_weights", "score_temperature"),
    *("normalization", "pg_weight", "pg_schedule", "answer_weight", "answer_schedule"),
    *("ce", "ce_tokens", "ce_schedule", "entropy"),
    *("kl", "kl_mode", "kl_in", "kl_scope", "kl_schedule", "kl_target", "kl_stop"),
}


def read_config(out: Path) -> dict[str, Any]:
    """The `config.json` of the run in `out`; an option that came after that run began has its default.

    Raises:
        UsageError: it is not that of a run.
    """
    from ebft.commands.derived import run_defaults

    try:
        config = json.loads((out / "config.json").read_text())
        config["options"] = {**run_defaults(), **config["options"]}
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(f"--resume: {out / 'config.json'} does not hold the options of a run") from error
    return config


def resumed_options(
    out: Path, stored: Mapping[str, Any], options: Mapping[str, Any], explicit: set[str], *, force: bool
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The options that the run in `out` goes on with, and those among them that are new.

    Args:
        stored: the options of that run.
        explicit: which of `options` were given; the others do not count.

    Raises:
        UsageError: an option differs, without `force`.
    """
    was, now = with_defaults(stored), with_defaults(options)
    changed = {name: options[name] for name in sorted(explicit) if now[name] != was.get(name)}
    if changed and not force:
        differences = ", ".join(f"{flag(k)} {v} (was {was.get(k)})" for k, v in changed.items())
        raise UsageError(
            f"--resume goes on with the options of {out}, but {differences}: leave them out, or go on with the new ones"
            " with --force"
        )
    return {**options, **stored, **changed}, changed


def check_same_text(out: Path, stored: Mapping[str, Any], found: Mapping[str, Any], *, force: bool) -> bool:
    """Whether the sequences that a run goes on with are those that it began with; both as `sequences` in its config.

    Raises:
        UsageError: they are not, without `force`.
    """
    if stored == found:
        return True
    if not force:
        raise UsageError(
            f"--resume: --data is not the text that {out} began with (sequences: {dict(found)}, were {dict(stored)})."
            " Bring it back, or go on with the new text with --force"
        )
    return False


def record_changes(
    out: Path, old: Mapping[str, Any], new: dict[str, Any], changed: set[str], *, step: int
) -> dict[str, Any]:
    """Write the config that a run goes on with, with a record of what was changed at which step.

    Where the start would now be measured otherwise, its measurement is removed first, to be made again.
    """
    entry = {
        "from_step": step,
        "options": {name: {"was": old["options"].get(name), "now": new["options"][name]} for name in sorted(changed)},
        "sequences": {"was": old.get("sequences"), "now": new["sequences"]},
    }
    if old.get("sequences") == new["sequences"]:
        del entry["sequences"]
    if not changed <= TRAINING_ALONE or "sequences" in entry:
        (out / "before.json").unlink(missing_ok=True)
    config = {**new, "changes": [*old.get("changes", ()), entry]}
    write_json(out / "config.json", config)
    return config


def version_changes(stored: Mapping[str, Any]) -> str:
    """Packages whose version is not that in `stored`, in words; empty when there is none."""
    now = versions()
    changed = [name for name in now if stored.get(name, now[name]) != now[name]]
    return ", ".join(f"{name} {now[name]} (was {stored[name]})" for name in changed)


def fingerprint(sequence_ids: torch.Tensor) -> str:
    """Of rows [M] in their order, from their content hashes."""
    return hashlib.sha256(sequence_ids.cpu().numpy().astype("<i8").tobytes()).hexdigest()[:16]


def processor() -> str:
    """Its name, and the instructions that torch uses of it: one name may stand for several generations."""
    name = torch.cpu.get_capabilities().get("cpu_name") or platform.processor()
    return f"{name} ({torch.backends.cpu.get_cpu_capability()})"


def machine(device: torch.device) -> dict[str, Any]:
    """Where it ran."""
    return {
        "platform": platform.platform(),
        "python": platform.python_version(),
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "processes": size(),
    }
