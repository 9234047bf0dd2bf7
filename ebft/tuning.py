"""Numbers that decide how long something takes, and nothing but that and rounding."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class PerDevice:
    """How much is handled at once, by the kind of device.

    Attributes:
        cpu: as measured.
        cuda: an estimate, no GPU has been measured: larger, since there each call costs a launch, and few rows leave
            most of the device idle.
    """

    cpu: int
    cuda: int

    def on(self, device: torch.device) -> int:
        return self.cuda if device.type == "cuda" else self.cpu
