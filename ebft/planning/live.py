"""How many bytes of tensors are alive at once, on any device and whatever the allocator keeps."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Counts the memory of the tensors that are made inside, backward passes included.

    Attributes:
        peak: the most bytes that were alive at once. What single operations need inside is not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak = self._alive = 0
        self._known: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        before = {id(leaf.untyped_storage()) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)}
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                storage = leaf.untyped_storage()
                if id(storage) not in before and id(storage) not in self._known:
                    self._enter(storage)
        return out

    def _enter(self, storage: torch.UntypedStorage) -> None:
        key, size = id(storage), storage.nbytes()
        self._known[key] = weakref.ref(storage, partial(self._leave, key, size))
        self._alive += size
        self.peak = max(self.peak, self._alive)

    def _leave(self, key: int, size: int, reference: weakref.ref) -> None:
        if self._known.get(key) is reference:
            del self._known[key]
            self._alive -= size


def live_bytes(run: Callable[[], Any]) -> int:
    """The most bytes of new tensors that are alive at once during `run`."""
    with LiveBytes() as live:
        run()
    return live.peak
