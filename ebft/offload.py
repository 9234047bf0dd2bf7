"""Frozen weights that lie in CPU memory and come to the compute device while they are used."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


class Offload:
    """Where the frozen weights of a model are: in CPU memory, and inside `resident` on a device.

    They never change, so nothing is copied back: outside, the model holds the tensors in CPU memory again, and those on
    the device are free. Buffers, which are small, stay where they are.

    Args:
        model: its weights lie in CPU memory (`frozen_copy`, `move_to_cpu`) and want no gradient.
        device: where it computes.
    """

    def __init__(self, model: nn.Module, device: torch.device):
        self.device = device
        self._weights = list(model.parameters())
        self._at_home = [weight.data for weight in self._weights]
        self._users = 0

    @contextmanager
    def resident(self) -> Iterator[None]:
        """The weights are on the device; where this is entered again inside, they are there already."""
        if not self._users:
            for weight, at_home in zip(self._weights, self._at_home, strict=True):
                weight.data = at_home.to(self.device, non_blocking=True, copy=True)
        self._users += 1
        try:
            yield
        finally:
            self._users -= 1
            if not self._users:
                for weight, at_home in zip(self._weights, self._at_home, strict=True):
                    weight.data = at_home


def frozen_copy(model: nn.Module) -> nn.Module:
    """A copy of a model with its weights in CPU memory, frozen; the device never holds both."""
    weights = {id(w): nn.Parameter(_in_cpu_memory(w.data), requires_grad=False) for w in model.parameters()}
    return copy.deepcopy(model, weights)


def move_to_cpu(model: nn.Module) -> None:
    """Put the weights of a model into CPU memory, buffers aside."""
    for weight in model.parameters():
        weight.data = _in_cpu_memory(weight.data)


def _in_cpu_memory(weight: torch.Tensor) -> torch.Tensor:
    """A copy; of what lies on a GPU pinned, which it reads without the CPU's help."""
    return torch.empty_like(weight, device="cpu", pin_memory=weight.is_cuda).copy_(weight)
