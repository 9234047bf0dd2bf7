"""Which architectures can share a prefix between rollouts. Fail closed: what we do not know is refused by name."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ebft import attention
from ebft.errors import UsageError
from ebft.layout import NestedPrefixLayout

if TYPE_CHECKING:
    from ebft.policy import CausalPolicy

# Layer types whose keys and values can be shared by all rollouts of a prefix.
_ATTENTION_LAYERS = {"full_attention", "sliding_attention"}

# Mean error of logits over a comb, in standard deviations of the logits, that rounding explains. A mask that is ignored
# or a window that is lost gives 0.1 and more.
_ROUNDING = {"half": 0.05, "single": 1e-3}


def refuse_unservable(model: Any) -> None:
    """Refuse architectures whose layers do not attend through transformers' attention interface.

    Raises:
        UsageError: names the model, the reason and the sampler that can serve it.
    """
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or []) - _ATTENTION_LAYERS
    if kinds:
        raise UsageError(_refusal(model, f"it has layers of type {sorted(kinds)}"))
    if getattr(config, "is_encoder_decoder", False):
        raise UsageError(_refusal(model, "it is an encoder-decoder"))
    if not getattr(model, "_supports_attention_backend", False):
        raise UsageError(_refusal(model, "its attention is not pluggable in this version of transformers"))


@torch.no_grad()
def check_against_plain_forward(policy: CausalPolicy) -> None:
    """Compare a tiny comb (5 tokens of trunk, a tooth of 2 at its 3rd) with two plain forward passes of the model.

    Raises:
        UsageError: the forward pass over a comb fails, or its logits are not those of the model.
    """
    model = policy.causal_lm
    ids = (torch.arange(1, 8, device=policy.device) * 7919) % model.config.get_text_config().vocab_size
    trunk, tooth = ids[None, :5], ids[5:].view(1, 1, 1, 2)
    anchor, yes = torch.full_like(trunk[:, :1], 3), torch.ones_like(trunk[:, :1], dtype=torch.bool)
    layout = NestedPrefixLayout(anchor, yes, length=5, rollouts=1, horizon=2)
    try:
        with policy.computing():
            comb = attention.Score(layout, kernel="dense")
            got = policy.logits(policy.backbone(layout.pack(trunk, tooth), layout.positions(), comb))
    except (TypeError, RuntimeError, AttributeError) as error:
        raise UsageError(_refusal(model, f"its forward pass failed: {error}")) from error
    context = torch.cat([trunk[:, :3], tooth.view(1, 2)], 1)
    with policy.plain() as plain:
        on_trunk, on_context = (
            plain(input_ids=x, attention_mask=torch.ones_like(x), use_cache=False).logits for x in (trunk, context)
        )
    expected = torch.cat([on_trunk, on_context[:, 3:]], 1).float()
    off = (got.float() - expected).abs().mean() / expected.std()
    half = policy.autocast is not None or next(model.parameters()).dtype in (torch.bfloat16, torch.float16)
    if not off < _ROUNDING["half" if half else "single"]:
        raise UsageError(_refusal(model, f"its logits over a comb differ from its own by {off:.2g} deviations"))


def _refusal(model: nn.Module, reason: str) -> str:
    return (
        f"{type(model).__name__} cannot share a prefix between rollouts: {reason}."
        " Use the 'independent' sampler for it, or another model."
    )
