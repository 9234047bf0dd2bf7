"""From options to the policy."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ebft.errors import UsageError
from ebft.loading import choose_device
from ebft.memory import keep_freed_memory
from ebft.objectives.kl import EXACT
from ebft.policy import CausalPolicy
from ebft.static_decode import DECODES


def load_policy(options: Mapping[str, Any]) -> CausalPolicy:
    """The policy that --policy, --lora, --device, --dtype, --attention, --decode, ... describe."""
    keep_freed_memory()
    return CausalPolicy.from_pretrained(
        policy_folder(options["policy"]),
        device=options["device"],
        dtype=options["dtype"],
        lora=options["lora"] or None,
        seed=options["seed"],
        kernel=options["attention"],
        checkpointing=options["checkpointing"],
        decode=options["decode"],
        offload_frozen=options.get("offload_reference", False),
    )


def check_decode(options: Mapping[str, Any]) -> None:
    """Whether --decode is known, and of the sampler.

    Raises:
        UsageError: it is not.
    """
    name = options["decode"]
    if name not in DECODES:
        raise UsageError(f"--decode {name}: expected one of {', '.join(DECODES)}")
    if name == "graph" and choose_device(options["device"]).type == "cpu":
        raise UsageError("--decode graph: CUDA graphs are of GPUs, and the device is cpu; use eager or compile")
    if name != "eager" and options["shard"]:
        raise UsageError(
            f"--decode {name} with --shard: weights that are gathered for each batch are never where they were when"
            " the steps were compiled. Use --decode eager"
        )
    if name != "eager" and options["sampler"] in ("independent", "snapshot"):
        raise UsageError(
            f"--decode {name}: --sampler {options['sampler']} has no steps in static shapes; strided, random and full"
            " have"
        )


def check_gradient(options: Mapping[str, Any]) -> None:
    """Whether the kernel of --attention has a gradient on the device.

    Raises:
        UsageError: it has none.
    """
    device = choose_device(options["device"]).type if options["attention"] == "flex" else "cuda"
    if device != "cuda":
        raise UsageError(
            f"--attention flex: the device is {device}, where FlexAttention has no gradient. Use --attention chunked,"
            " or give --device cuda"
        )


def check_offload(options: Mapping[str, Any]) -> None:
    """Whether there is something that --offload-reference moves, and somewhere to move it, and no one else has it.

    Raises:
        UsageError: there is not, or it cannot be moved.
    """
    if not options["offload_reference"]:
        return
    if options["shard"]:
        raise UsageError(
            "--offload-reference with --shard: each process has a share of the frozen copy alone, and gathers it when"
            " it is used. Leave one of the two out"
        )
    if choose_device(options["device"]).type == "cpu":
        raise UsageError(
            "--offload-reference: the device is cpu, and the frozen copy lies in CPU memory anyway. Leave it out, or"
            " give --device cuda"
        )
    if options["lora"] and options["backbone"] in (None, "start"):
        raise UsageError(
            f"--offload-reference: with --lora {options['lora']} the start is the policy itself with its adapters off,"
            " and there is no frozen copy. Leave it out, or train all weights with --lora 0"
        )
    if options["kl_mode"] in EXACT:
        raise UsageError(
            f"--offload-reference: --kl-mode {options['kl_mode']} wants the head of the frozen copy in the backward"
            " pass. Use --kl-mode k1, k2 or k3"
        )


def policy_folder(name: str) -> str:
    """What to load for `name`: of the folder of a run the policy that it trained, else the name itself.

    Raises:
        UsageError: a run that has not finished, so that there is no policy in its folder.
    """
    if run_options(name) is None:
        return name
    if not (Path(name) / "policy" / "config.json").is_file():
        raise UsageError(
            f"policy {name}: this run has no trained policy (policy/) yet. Finish it with `run --resume --out {name}`"
        )
    return str(Path(name) / "policy")


def run_options(name: str) -> dict[str, Any] | None:
    """The options of the run whose folder `name` is, None for anything else."""
    path = Path(name) / "config.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    options = content.get("options") if isinstance(content, dict) else None
    return options if isinstance(options, dict) else None
