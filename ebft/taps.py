"""What leaves the decoder layers of a model during a forward pass, and how to compute their inside twice."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


class _DeepEnough(Exception):
    """Raised inside a forward pass once the deepest layer asked for has been seen."""


def layer_outputs(
    forward: Callable[[], object], blocks: nn.ModuleList, layers: Sequence[int]
) -> dict[int, torch.Tensor]:
    """Run `forward` up to the deepest of `layers` and return their outputs.

    Args:
        forward: one forward pass of the model that holds `blocks`.
        blocks: its decoder layers.
        layers: layer i is the output of the i-th block (1-based), 0 what enters the first: the embeddings.

    Returns:
        layer -> [B,S,H].
    """
    seen: dict[int, torch.Tensor] = {}
    deepest = max(layers)

    def record(layer: int, state: torch.Tensor) -> None:
        seen[layer] = state
        if layer == deepest:
            raise _DeepEnough

    def entering(module, args, kwargs):
        record(0, args[0] if args else kwargs["hidden_states"])

    def leaving(layer, module, args, out):
        record(layer, out[0] if isinstance(out, tuple) else out)

    handles = [
        blocks[layer - 1].register_forward_hook(partial(leaving, layer))
        if layer
        else blocks[0].register_forward_pre_hook(entering, with_kwargs=True, prepend=True)
        for layer in set(layers)
    ]
    try:
        forward()
    except _DeepEnough:
        pass
    finally:
        for handle in handles:
            handle.remove()
    return seen


@contextmanager
def recomputed(blocks: Iterable[nn.Module]) -> Iterator[None]:
    """Activation checkpointing of `blocks` for forward passes inside: only what enters them is kept for backward.

    Transformers' own switch works in training mode alone, where dropout would be on.
    """
    blocks = list(blocks)
    before = [vars(block).get("forward") for block in blocks]  # None: that of its class, as a rule
    for block in blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    try:
        yield
    finally:
        for block, own in zip(blocks, before, strict=True):
            if own is None:
                del block.forward  # what was compiled with the method of the class is no longer valid for a copy of it
            else:
                block.forward = own
