"""Sketches of score gradients: ∇ log p of every rollout, projected to few numbers that keep inner products.

With the sketches of all rollouts, the gradient of any reward, baseline and loss whose weights are per rollout is a sum
of them: it can be had without the model.
"""

from __future__ import annotations

import torch
from tensordict import TensorDictBase
from torch import Tensor

from ebft import schema
from ebft.errors import UsageError
from ebft.loops.scoring import score
from ebft.policy import CausalPolicy

SKETCH = ("rollout", "sketch")  # [B,K,N,S] float32


class Projection:
    """A count sketch (Charikar, Chen and Farach-Colton, 2002): every coordinate, with a random sign, into one of S.

    E⟨Sx, Sy⟩ = ⟨x, y⟩ over its randomness, with variance (‖x‖²‖y‖² + ⟨x, y⟩² - 2 Σ x_i² y_i²)/S.

    Args:
        size: P, numbers in a vector; dimension: S; seed: the same one gives the same projection everywhere.

    Raises:
        UsageError: `dimension` below 1.
    """

    def __init__(self, size: int, *, dimension: int, seed: int) -> None:
        if dimension < 1:
            raise UsageError(f"sketch dimension {dimension}: expected a whole number, 1 or more")
        generator = torch.Generator().manual_seed(seed)
        self.size, self.dimension = size, dimension
        self._place = torch.randint(dimension, (size,), generator=generator, dtype=torch.int32)
        self._sign = torch.randint(2, (size,), generator=generator, dtype=torch.int8)

    def __call__(self, vector: Tensor) -> Tensor:
        """[P] to [S], float32 on the CPU."""
        signed = vector.detach().float().cpu() * (2 * self._sign - 1)
        return torch.zeros(self.dimension).index_add_(0, self._place, signed)


def score_sketches(
    policy: CausalPolicy, td: TensorDictBase, projection: Projection, *, scoring: dict[str, float] | None = None
) -> Tensor:
    """Sketch of ∇ log p of every rollout, over all its tokens, in the policy's trained weights in their order.

    One forward pass for each anchor and one backward pass for each rollout; exact, and slow.

    Args:
        td: sequences with anchors and rollouts; scoring: temperature, top_p of the sampler.

    Returns:
        [B,K,N,S] float32, zeros at masked anchors.
    """
    leaves = list(policy.trainable().values())
    batch, count, rollouts, _ = td[schema.ROLLOUT_TOKENS].shape
    found = torch.zeros(batch, count, rollouts, projection.dimension)
    for b, k in td[schema.ANCHOR_MASK].nonzero().tolist():
        alone = _one_anchor(td, b, k)
        score(policy, alone, scoring=scoring)
        totals = alone[schema.POLICY_LOG_PROB][0, 0].sum(-1)
        for n in range(rollouts):
            last = n == rollouts - 1
            gradients = torch.autograd.grad(totals[n], leaves, retain_graph=not last, allow_unused=True)
            flat = [
                torch.zeros(p.numel()) if g is None else g.flatten().float().cpu()
                for g, p in zip(gradients, leaves, strict=True)
            ]
            found[b, k, n] = projection(torch.cat(flat))
    return found


def _one_anchor(td: TensorDictBase, b: int, k: int) -> TensorDictBase:
    """One sequence up to one of its anchors, with the rollouts from there."""
    length = int(td[schema.ANCHORS][b, k])
    part = td[b : b + 1].select(
        schema.ANCHORS, schema.ANCHOR_MASK, schema.ROLLOUT_TOKENS, schema.ROLLOUT_MASK, strict=True
    )
    for key in (schema.ANCHORS, schema.ANCHOR_MASK, schema.ROLLOUT_TOKENS, schema.ROLLOUT_MASK):
        part[key] = part[key][:, k : k + 1]
    for key in (schema.TOKENS, schema.MASK, schema.DOCUMENT_IDS):
        if key in td.keys():  # noqa: SIM118
            part[key] = td[key][b : b + 1, :length]
    return part
