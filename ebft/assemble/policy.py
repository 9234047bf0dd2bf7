"""From options to the policy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ebft.policy import CausalPolicy


def load_policy(options: Mapping[str, Any]) -> CausalPolicy:
    """The policy that --policy, --lora, --device, --dtype, --attention and --checkpointing describe."""
    return CausalPolicy.from_pretrained(
        options["policy"],
        device=options["device"],
        dtype=options["dtype"],
        lora=options["lora"] or None,
        seed=options["seed"],
        kernel=options["attention"],
        checkpointing=options["checkpointing"],
    )
