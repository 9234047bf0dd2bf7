"""Policy gradients of many rewards from one backward pass.

The policy gradient is linear in the advantages: g = Σ_j A_j ∇log p(ŷ_j). Where the gradient of every rollout by itself
is at hand, that of any reward is a product of matrices. It is at hand for adapters that act on a rollout's own tokens
and on the last token of its prefix, which predicts the first of them: no other rollout sees these tokens, so the
gradient that a backward pass of Σ_j log p(ŷ_j) leaves at their outputs is that of ŷ_j alone. (The prefix before is read
as the frozen model wrote it. A policy trained that way is one whose adapters are switched on where a rollout starts.)

At the start LoRA's B is 0, so all of the gradient is B's: at every adapted layer Σ_t δ_t (A x_t)ᵀ, with δ_t the
gradient at the layer's output and x_t its input.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from ebft.errors import UsageError
from ebft.layout import NestedPrefixLayout
from ebft.policy import CausalPolicy


def score_gradients(
    policy: CausalPolicy,
    tokens: Tensor,
    mask: Tensor,
    anchors: Tensor,
    anchor_mask: Tensor,
    rollout_tokens: Tensor,
    rollout_mask: Tensor,
    *,
    advantages: Tensor,
    sets: int,
) -> Tensor:
    """Σ_j A_j ∇log p(ŷ_j) over the rollouts of each set, for several rewards at once.

    Args:
        policy: one with fresh LoRA adapters.
        tokens, mask, anchors, anchor_mask, rollout_tokens, rollout_mask: as of `CausalPolicy.score`, M = R·N rollouts
            of each anchor; anchors are 2 or more.
        advantages: [S,B,K,M], of S rewards.
        sets: R.

    Returns:
        [S,R,P] float32, P parameters of all B matrices.

    Raises:
        UsageError: a policy without adapters, or an anchor that has no token before the last of its prefix.
    """
    layers = [module.default for name, module in policy.model.named_modules() if name.endswith("lora_B")]
    if not layers:
        raise UsageError("score gradients want a policy with LoRA adapters")
    if (anchors[anchor_mask] < 2).any():
        raise UsageError("score gradients want prefixes of 2 tokens or more")
    sizes = [layer.weight.numel() for layer in layers]
    total = torch.zeros(len(advantages), sets, sum(sizes))
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    for b in range(len(tokens)):
        row = [x[b : b + 1] for x in (tokens, mask, anchors - 1, anchor_mask)]
        last = tokens[b][anchors[b] - 1][None, :, None, None].expand(-1, -1, rollout_tokens.shape[2], 1)
        drawn = torch.cat([last, rollout_tokens[b : b + 1]], -1)  # the last token of the prefix opens each tooth
        real = torch.cat([torch.ones_like(last, dtype=torch.bool), rollout_mask[b : b + 1]], -1)
        layout = NestedPrefixLayout(
            anchors[b : b + 1] - 1,
            anchor_mask[b : b + 1],
            length=tokens.shape[1],
            rollouts=drawn.shape[2],
            horizon=drawn.shape[3] - 1,
        )
        weights = advantages[:, b].unflatten(2, (sets, -1))  # [S,K,R,N]
        handles = [
            handle
            for layer, start, size in zip(layers, starts, sizes, strict=True)
            for handle in _watch(layer, partial(_add, layout, weights, total[..., start : start + size]))
        ]
        try:
            log_prob, _ = policy.score(*row, drawn, real)
            log_prob[..., 1:].sum().backward()
        finally:
            for handle in handles:
                handle.remove()
            policy.model.zero_grad(set_to_none=True)
    return total


def _watch(layer: nn.Linear, take):
    """Hooks that call take(inputs [1,S,r], gradient at the outputs [1,S,out]) in the backward pass."""
    seen: list[Tensor] = []
    return (
        layer.register_forward_hook(lambda module, args, out: seen.append(args[0].detach())),
        layer.register_full_backward_hook(lambda module, grad_in, grad_out: take(seen.pop(), grad_out[0])),
    )


def _add(layout: NestedPrefixLayout, weights: Tensor, total: Tensor, inputs: Tensor, gradient: Tensor) -> None:
    """Add the layer's part: total [S,R,out·r] += Σ_j A_j Σ_t δ_t (A x_t)ᵀ, over the teeth of the row."""
    x, delta = (layout.unpack(state.float())[1][0] for state in (inputs, gradient))  # [K,M,G,·]
    own = torch.einsum("kmgo,kmgi->kmoi", delta, x).flatten(2)  # of each rollout [K,M,out·r]
    sets = weights.shape[2]
    by_set = own.unflatten(1, (sets, -1)).transpose(0, 1).flatten(1, 2)  # [R,K·N,out·r]
    total += torch.bmm(weights.permute(2, 0, 1, 3).flatten(2), by_set).transpose(0, 1)
