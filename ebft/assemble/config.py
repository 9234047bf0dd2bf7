"""What a run remembers of how it was made: its options, the versions of what it used, the machine."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from ebft import __version__
from ebft.errors import UsageError

PACKAGES = ("torch", "transformers", "tensordict", "torchrl", "sentence-transformers", "peft")


def versions() -> dict[str, str]:
    """Of this project and of what it computes with."""
    return {"ebft": __version__, **{name: version(name) for name in PACKAGES}}


def stored_options(out: Path, options: Mapping[str, Any], explicit: set[str]) -> dict[str, Any]:
    """The options of the run in `out`; refuses those in `explicit` that differ."""
    try:
        stored = json.loads((out / "config.json").read_text())["options"]
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(f"--resume: {out / 'config.json'} does not hold the options of a run") from error
    changed = {name: options[name] for name in explicit if options[name] != stored.get(name)}
    if changed:
        differences = ", ".join(f"--{k.replace('_', '-')} {v} (was {stored.get(k)})" for k, v in changed.items())
        raise UsageError(f"--resume goes on with the options of {out}, but {differences}: leave them out")
    return {**options, **stored}


def machine(device: torch.device) -> dict[str, Any]:
    """Where it ran."""
    return {
        "platform": platform.platform(),
        "python": platform.python_version(),
        "processor": torch.cpu.get_capabilities().get("cpu_name") or platform.processor(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
    }
