"""The floor under sampling and scoring: the same matrix products of the same weights, and nothing else.

What a forward pass over T + K·N·(G-1) tokens cannot do without are its products with the weights. They are timed as
`torch.nn.functional.linear` on random inputs, with the model's own weights in the dtype in which the policy computes,
in the order in which the comb needs them. Attention, norms, drawing, casts of weights and recomputation are left out.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn.functional import linear

from ebft.errors import UsageError
from ebft.head_blocks import STATES_PER_BLOCK, TOKENS_PER_BLOCK
from ebft.policy import CausalPolicy

# A product: the weight [O,I] and the number of rows [rows,I] it is applied to.
Product = tuple[torch.Tensor, int]


def weights(policy: CausalPolicy) -> tuple[list[torch.Tensor], torch.Tensor]:
    """The weights of every nn.Linear of the decoder, adapters included, and the head's, in the compute dtype.

    A copy where the dtype differs; `requires_grad` as trained.

    Raises:
        UsageError: the decoder's products are not nn.Linear layers (GPT-2), so the floor would miss them.
    """
    head = policy.causal_lm.get_output_embeddings()
    layers = [module for module in policy.causal_lm.modules() if type(module) is nn.Linear and module is not head]
    if not layers:
        raise UsageError(f"{type(policy.causal_lm).__name__} has no nn.Linear in its layers: its floor is not known")

    def computed(weight: torch.Tensor) -> torch.Tensor:
        dtype = weight.dtype if policy.autocast is None else policy.autocast
        return weight.detach().to(dtype).requires_grad_(weight.requires_grad)

    return [computed(layer.weight) for layer in layers], computed(head.weight)


def sampling_products(
    layers: Sequence[torch.Tensor],
    head: torch.Tensor,
    *,
    length: int,
    count: int,
    rollouts: int,
    horizon: int,
    head_rows: int,
) -> list[Product]:
    """All products of one sequence's sampling: the trunk, the head at K rows, then G-1 steps of K·N rows.

    Args:
        length: the last anchor: nothing sees what follows it.
        head_rows: states that the head is applied to at once.
    """
    products = [(weight, length) for weight in layers] + in_blocks(head, count, head_rows)
    step = [(weight, count * rollouts) for weight in layers] + in_blocks(head, count * rollouts, head_rows)
    return products + step * (horizon - 1)


def scoring_products(
    layers: Sequence[torch.Tensor],
    head: torch.Tensor,
    *,
    length: int,
    count: int,
    rollouts: int,
    horizon: int,
) -> list[Product]:
    """All products of one sequence's scoring: T + K·N·(G-1) rows, the head at the anchors, the teeth and the trunk."""
    teeth = count * rollouts * (horizon - 1)
    few = STATES_PER_BLOCK.on(head.device)
    heads = [product for rows in (count, teeth, length - 1) for product in in_blocks(head, rows, few)]
    return [(weight, length + teeth) for weight in layers] + heads


def in_blocks(head: torch.Tensor, rows: int, size: int) -> list[Product]:
    """The head applied to `rows` states, `size` of them and a block of its vocabulary at a time.

    So the policy does it, and no other shape was found to be faster.
    """
    blocks = [
        block.detach().requires_grad_(head.requires_grad) for block in head.split(TOKENS_PER_BLOCK.on(head.device))
    ]
    return [(block, min(size, rows - start)) for block in blocks for start in range(0, rows, size)]


def operations(products: Sequence[Product]) -> int:
    """Multiplications and additions of the forward products."""
    return sum(2 * rows * weight.numel() for weight, rows in products)


class Operands(dict):
    """Random operands of products, [1,rows,width] of one dtype and device, made once for each shape."""

    def __missing__(self, key: tuple[int, int, torch.dtype, torch.device]) -> torch.Tensor:
        rows, width, dtype, device = key
        self[key] = torch.randn(1, rows, width, dtype=torch.float32, device=device).to(dtype)
        return self[key]


def multiply(products: Sequence[Product], operands: Operands, *, backward: bool) -> None:
    """Compute all products; with `backward` those of the gradients too: of the input, and of each trained weight."""
    for weight, rows in products:
        width, inputs = weight.shape
        entering = operands[rows, inputs, weight.dtype, weight.device]
        if not backward:
            with torch.no_grad():
                linear(entering, weight)
            continue
        entering = entering.detach().requires_grad_()
        wanted = [entering, weight] if weight.requires_grad else [entering]
        torch.autograd.grad(linear(entering, weight), wanted, operands[rows, width, weight.dtype, weight.device])
