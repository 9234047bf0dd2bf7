"""A small comb with all that can be uneven in one, and what tests ask of a policy that scores it."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.models import VOCABULARY


def comb(seed=0, batch=2, length=13, count=3, rollouts=2, horizon=3):
    """Random tokens, per-row anchors (one masked), padding in the last row, and rollouts (one cut short)."""
    random = torch.Generator().manual_seed(seed)
    tokens = torch.randint(2, VOCABULARY, (batch, length), generator=random)
    mask = torch.ones(batch, length, dtype=torch.bool)
    mask[-1, -2:] = False
    anchors = torch.stack([torch.randperm(length - horizon - 2, generator=random)[:count] + 1 for _ in range(batch)])
    anchor_mask = torch.ones(batch, count, dtype=torch.bool)
    if count > 1:
        anchor_mask[0, -1] = False
    rollout = torch.randint(2, VOCABULARY, (batch, count, rollouts, horizon), generator=random)
    rollout_mask = anchor_mask[:, :, None, None].expand(rollout.shape).clone()
    if horizon > 1:
        rollout_mask[-1, 0, 0, 1:] = False
    return tokens, mask, anchors, anchor_mask, rollout, rollout_mask


def gradients(model, loss):
    parameters = [p for p in model.parameters() if p.requires_grad]
    return torch.autograd.grad(loss, parameters, allow_unused=True)


class LargestOverTheVocabulary(TorchDispatchMode):
    """The most rows of any tensor [..., V] that an operation returns, the head's own gradient [H, V] apart."""

    def __init__(self, size):
        self.size, self.rows = size, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor) and tensor.ndim and tensor.shape[-1] == self.size:
                self.rows = max(self.rows, tensor.numel() // self.size)
        return out
