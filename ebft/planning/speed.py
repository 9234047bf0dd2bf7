"""Time of a step before the run: the matrix products that each stage cannot do without, timed on this device.

What a stage needs besides (attention, norms, drawing, the optimizer's Python) is a factor on top. On other devices and
for small models, where Python takes more time than the products, that factor is another: the products alone, the floor,
are given as well.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from ebft.planning.memory import Kind, Work
from ebft.planning.products import Operands, Product, multiply, operations

# Time of a stage over that of its products, SmolLM2-135M on two cores of a CPU: in float32 rows of 1024 tokens
# (benchmarks/results/sampling.md), in bfloat16, whose products take less, 128 to 512
# (medians of benchmarks/results/plan.json, the optimizer's time taken off).
_SINGLE = {"sample": 1.54, "embed": 1.54, "score": 1.45, "update": 1.45}
_HALF = {"sample": 2.3, "embed": 2.5, "score": 2.4, "update": 2.7}

_OPERATIONS = {"cpu": 6e10, "cuda": 2e13}  # that one measurement does at most; it is scaled up to what a stage needs
_WEIGHTS = 2**22  # of the optimizer's probe


def over_products(dtype: torch.dtype) -> dict[str, float]:
    """Stage -> its time over that of its products, where these are made in `dtype`."""
    return _HALF if dtype.itemsize == 2 else _SINGLE


@dataclass(frozen=True)
class Device:
    """Where products are timed."""

    device: torch.device

    def seconds(self, run: Callable[[], object]) -> float:
        """The shortest of three calls, after one that does not count."""
        times = []
        for _ in range(4):
            self._wait()
            start = time.perf_counter()
            run()
            self._wait()
            times.append(time.perf_counter() - start)
        return min(times[1:])

    def products(self, weights: Sequence[torch.Tensor], rows: int, *, backward: bool = False) -> float:
        """Seconds of `rows` rows through all `weights`; more rows than are measured are taken to cost in proportion."""
        if not rows:
            return 0.0
        each = operations([(weight, 1) for weight in weights]) * (3 if backward else 1)
        taken = max(1, min(rows, int(_OPERATIONS[self.device.type] / each)))
        work: list[Product] = [(weight, taken) for weight in weights]
        operands = Operands()
        return self.seconds(lambda: multiply(work, operands, backward=backward)) * rows / taken

    def throughput(self, dtype: torch.dtype) -> float:
        """Operations per second of large products one after the other: the ceiling of this device."""
        size, count = (8192, 20) if self.device.type == "cuda" else (1024, 1)
        work = [(torch.randn(size, size, device=self.device).to(dtype), size)] * count
        operands = Operands()
        return operations(work) / self.seconds(lambda: multiply(work, operands, backward=False))

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def update_seconds(make: Callable[[list[torch.Tensor]], torch.optim.Optimizer], trained: int, device: Device) -> float:
    """Seconds of an optimizer's step over `trained` weights, in proportion to one over fewer."""
    count = min(trained, _WEIGHTS)
    weight = torch.nn.Parameter(torch.zeros(count // 64 or 1, 64, device=device.device))
    weight.grad = torch.ones_like(weight)
    optimizer = make([weight])
    return device.seconds(optimizer.step) * trained / weight.numel()


def stage_seconds(
    layer: Sequence[torch.Tensor],
    head: torch.Tensor,
    *,
    layers: int,
    embedder: Sequence[torch.Tensor],
    embedded: float,
    kind: Kind,
    sampled: Work | None,
    scored: Work,
    parts: int,
    reference: bool,
    device: Device,
) -> dict[str, float]:
    """Floor of the stages, in seconds, of one process; the backward pass belongs to "update".

    Args:
        layer: weights of the linear layers of one decoder layer, in the compute dtype, `requires_grad` as trained.
        head: [V,H], likewise.
        layers: how many such layers.
        embedder: weights like `layer`, of the network that the feature map runs.
        embedded: how many such layers it runs.
        sampled: what is sampled and embedded at once; None without rollouts.
        scored: what is scored at once, `parts` times.
        reference: whether the frozen start scores too.
    """
    found: dict[str, float] = {}
    if sampled is not None:
        first = sampled.rows * sampled.count
        found["sample"] = layers * device.products(layer, sampled.trunk) + device.products([head], first)
        step = layers * device.products(layer, sampled.columns) + device.products([head], sampled.columns)
        found["sample"] += (sampled.horizon - 1) * step
        tokens = sampled.trunk + sampled.teeth("embed")
        found["embed"] = embedded * device.products(embedder, tokens) if embedded else 0
    teeth = 0 if sampled is None else scored.teeth("score")
    tokens, read = scored.trunk + teeth, scored.trunk + teeth + (0 if sampled is None else scored.rows * scored.count)
    forward, logits = layers * device.products(layer, tokens), device.products([head], read)
    both = layers * device.products(layer, tokens, backward=True)
    found["score"] = parts * (forward + logits) * (1 + reference)
    if head.requires_grad:  # its logits are computed again on the way back
        found["update"] = parts * (both - forward + device.products([head], read, backward=True))
    else:  # the gradient of a frozen head's input is found on the way there
        found["score"] += parts * logits
        found["update"] = parts * (both - forward)
    found["update"] += parts * forward * kind.checkpointing
    return found
