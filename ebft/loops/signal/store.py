"""Measured gradients on disk, so that memory is bounded and a stopped measurement goes on; and their Gram matrix."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ebft.errors import UsageError
from ebft.files import clear_disk_errors, write_json

_COLUMNS = 1 << 16  # of the gradients that are in memory at once, in float64


class GradientStore:
    """Gradients [M,C,R,P] float32 in a file, batch by batch, and what they were measured with.

    Args:
        folder: made if it is not there.
        identity: everything that the gradients depend on; a store that was made with something else is refused.
        shape: (C, R, P).

    Raises:
        UsageError: the folder holds the gradients of another measurement.
    """

    def __init__(self, folder: Path, *, identity: Mapping[str, Any], shape: tuple[int, int, int]) -> None:
        self.folder, self.shape = folder, shape
        identity = json.loads(json.dumps({**identity, "gradients": shape}, default=str))
        self._state: dict[str, Any] = {"identity": identity, "cost": []}
        found = read_state(folder)
        if found is not None:
            other = found["identity"]
            differing = sorted(key for key in {*other, *identity} if other.get(key) != identity.get(key))
            if differing:
                raise UsageError(
                    f"{folder} holds a measurement with other {', '.join(differing)}: give those, or another --out"
                )
            self._state = found

    @classmethod
    def open(cls, folder: Path, *, shape: tuple[int, int, int]) -> GradientStore:
        """The store that is in `folder`, whatever it was measured with."""
        found = read_state(folder)
        if found is None:
            raise UsageError(f"{folder} holds no measurement")
        identity = {key: value for key, value in found["identity"].items() if key != "gradients"}
        return cls(folder, identity=identity, shape=shape)

    @property
    def done(self) -> int:
        """Batches that are stored."""
        return len(self._state["cost"])

    @property
    def cost(self) -> list[float]:
        """[C]: mean token-forwards of a batch."""
        return torch.tensor(self._state["cost"], dtype=torch.float64).mean(0).tolist()

    def add(self, gradients: Tensor, cost: list[float]) -> None:
        """Append the gradients [C,R,P] of the next batch; an interrupted call leaves the store as it was."""
        with clear_disk_errors(self._file):
            self.folder.mkdir(parents=True, exist_ok=True)
            size = 4 * self.shape[0] * self.shape[1] * self.shape[2]
            with open(self._file, "r+b" if self._file.exists() else "w+b") as file:
                file.seek(self.done * size)
                file.write(np.ascontiguousarray(gradients.numpy(), dtype="<f4").tobytes())
        self._state["cost"].append(cost)
        write_json(self.folder / "state.json", self._state)

    def gram(self) -> Tensor:
        """All inner products [C,M,R,C,M,R], float64."""
        count, replicates, size = self.shape
        stored = np.memmap(self._file, dtype="<f4", mode="r", shape=(self.done * count * replicates, size))
        total = torch.zeros(len(stored), len(stored), dtype=torch.float64)
        for begin in range(0, size, _COLUMNS):
            block = torch.from_numpy(stored[:, begin : begin + _COLUMNS].astype("f8"))
            total += block @ block.T
        shape = (self.done, count, replicates)
        return total.view(*shape, *shape).permute(1, 0, 2, 4, 3, 5).contiguous()

    @property
    def _file(self) -> Path:
        return self.folder / "gradients.f32"


def read_state(folder: Path) -> dict[str, Any] | None:
    """What a store in `folder` remembers; None where there is none.

    Raises:
        UsageError: a file that cannot be read.
    """
    path = folder / "state.json"
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise UsageError(f"{path} is not the state of a measurement: remove {folder}, or give another --out") from error
