"""torch's fused attention on a CPU, as a part of a longer row of keys: with the logarithm of its normalizer.

The two operators are those behind `scaled_dot_product_attention` there, which returns no normalizer. Backward computes
weights anew from the normalizer that it is given: with that of the longer row they are the weights in that row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ebft.attention.rule import ScoreRule

_FORWARD = "_scaled_dot_product_flash_attention_for_cpu"


def serves(query: Tensor, value: Tensor, rule: ScoreRule) -> bool:
    """Whether fused attention computes this layer, and tells its normalizer, where `query` lies.

    In half precision it rounds weights before they are normalized, which a sampler and a scorer that cut the row
    differently would not do alike: it is for float32 and float64.
    """
    fine = query.dtype in (torch.float32, torch.float64)
    alike = query.shape[-1] == value.shape[-1] and query.dtype == value.dtype
    return fine and alike and rule.softcap is None and query.device.type == "cpu" and hasattr(torch.ops.aten, _FORWARD)


def forward(
    query: Tensor, key: Tensor, value: Tensor, scaling: float, *, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Attention of query [X,R,Q,E] over key and value [X,S,E], each of which serves R heads.

    Args:
        bias: [1,1,Q,S] float32, added to scaling·q·k; None: all keys are visible.

    Returns:
        Output [X,R,Q,E] and log Σ_s exp(scaling·q·k_s + bias) [X,R,Q], in at least float32.
    """
    keys, values = _for_each(query, key), _for_each(query, value)
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, keys, values, 0.0, False, attn_mask=_as(bias, query), scale=scaling
    )


def backward(
    gradient: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    normalizer: Tensor,
    scaling: float,
    *,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """What these keys contribute to the gradients, if they are a part of what `out` and `normalizer` are of.

    Args:
        gradient: of `out`; query, out: [X,R,Q,E]; key, value: [X,S,E]; normalizer [X,R,Q].
        bias: as in `forward`.

    Returns:
        Contributions to the gradients of query [X,R,Q,E], key and value [X,S,E].
    """
    keys, values = _for_each(query, key), _for_each(query, value)
    on_query, on_keys, on_values = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        gradient, query, keys, values, out, normalizer, 0.0, False, attn_mask=_as(bias, query), scale=scaling
    )
    return on_query, on_keys.sum(1), on_values.sum(1)


def _for_each(query: Tensor, x: Tensor) -> Tensor:
    """[X,S,E] -> a view [X,R,S,E]."""
    return x[:, None].expand(-1, query.shape[1], -1, -1)


def _as(bias: Tensor | None, query: Tensor) -> Tensor | None:
    """The operators take float32, or what the query is."""
    return bias.double() if bias is not None and query.dtype == torch.float64 else bias
