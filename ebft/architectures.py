"""Which architectures can share a prefix between rollouts, and how. Fail closed: what is not proved is refused."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
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

# Mean error of logits, in standard deviations of the logits, that rounding explains. A mask that is ignored, a window
# that is lost or a state that is not carried on gives 0.1 and more.
_ROUNDING = {"half": 0.05, "single": 1e-3}


def why_not_a_comb(model: Any) -> str | None:
    """Why the layers of a model cannot attend through transformers' attention interface; None if they can."""
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or []) - _ATTENTION_LAYERS
    if kinds:
        return f"it has layers of type {sorted(kinds)}"
    if not getattr(model, "_supports_attention_backend", False):
        return "its attention is not pluggable in this version of transformers"
    return None


@torch.no_grad()
def comb_differs(policy: CausalPolicy) -> str | None:
    """Compare a tiny comb (5 tokens of trunk, a tooth of 2 at its 3rd) with two plain forward passes of the model.

    Returns:
        What is wrong with the forward pass over the comb; None when its logits are those of the model.
    """
    ids = probe_tokens(policy)
    trunk, tooth = ids[None, :5], ids[5:].view(1, 1, 1, 2)
    anchor, yes = torch.full_like(trunk[:, :1], 3), torch.ones_like(trunk[:, :1], dtype=torch.bool)
    layout = NestedPrefixLayout(anchor, yes, length=5, rollouts=1, horizon=2)
    score = attention.Score(layout, kernel="dense")
    windows: dict[int, int | None] = {}

    def comb(layer, query, key, value, rule):
        windows[layer] = rule.window
        return score(layer, query, key, value, rule)

    try:
        with policy.computing():
            got = policy.logits(policy.backbone(layout.pack(trunk, tooth), layout.positions(), comb))
    except Exception as error:  # what a family raises that is not known here
        return f"its forward pass failed: {type(error).__name__}: {error}"
    if lost := lost_windows(policy.causal_lm.config.get_text_config(), windows):
        return lost
    context = torch.cat([trunk[:, :3], tooth.view(1, 2)], 1)
    with policy.plain() as plain:
        on_trunk, on_context = (
            plain(input_ids=x, attention_mask=torch.ones_like(x), use_cache=False).logits for x in (trunk, context)
        )
    off = deviation(got, torch.cat([on_trunk, on_context[:, 3:]], 1))
    return None if off < rounding(policy) else f"its logits over a comb differ from its own by {off:.2g} deviations"


def lost_windows(config: Any, windows: Mapping[int, int | None]) -> str | None:
    """What is wrong with the sliding windows that the layers of a comb were told; None if nothing is.

    A family may window by its mask alone, of which a comb sees nothing. Logits of a few tokens cannot tell.

    Args:
        config: of the decoder; windows: by layer, what its attention was told.
    """
    kinds = getattr(config, "layer_types", None)
    if kinds:
        told = [layer for layer, window in windows.items() if window is not None]
        wanted = [layer for layer in windows if kinds[layer] == "sliding_attention"]
        if sorted(told) == sorted(wanted):
            return None
        return f"its sliding windows are those of layers {wanted}, its attention is told of those of {told}"
    if getattr(config, "sliding_window", None) and all(window is None for window in windows.values()):
        return f"its attention is not told of its sliding window of {config.sliding_window} tokens"
    return None


@torch.no_grad()
def refuse_unknown_head(policy: CausalPolicy) -> None:
    """Refuse a model whose logits are not those that `CausalPolicy.logits` computes from its last hidden states.

    Raises:
        UsageError: names the model.
    """
    ids = probe_tokens(policy)[None]
    with policy.plain() as plain:
        expected = plain(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
        try:
            got = policy.logits(policy.plain_states(ids, torch.ones_like(ids)))
        except Exception as error:  # what a family raises that is not known here
            raise UsageError(
                f"{type(policy.causal_lm).__name__}: its head does not go on its last hidden states"
                f" ({type(error).__name__}: {error}). Use another model"
            ) from error
    off = deviation(got, expected)
    if not off < rounding(policy):
        raise UsageError(
            f"{type(policy.causal_lm).__name__}: its logits differ from those of its head over its last hidden states"
            f" by {off:.2g} deviations; it does something to them that is not known here. Use another model"
        )


def probe_tokens(policy: CausalPolicy) -> torch.Tensor:
    """Seven tokens spread over the vocabulary."""
    vocabulary = policy.causal_lm.config.get_text_config().vocab_size
    return (torch.arange(1, 8, device=policy.device) * 7919) % vocabulary


def deviation(got: torch.Tensor, expected: torch.Tensor) -> float:
    """Mean absolute difference of logits in standard deviations of the expected ones; nan counts as infinite."""
    off = float((got.float() - expected.float()).abs().mean() / expected.float().std())
    return off if off == off else float("inf")


def rounding(policy: CausalPolicy) -> float:
    """The largest `deviation` that the precision of a policy explains."""
    half = policy.autocast is not None or next(policy.model.parameters()).dtype in (torch.bfloat16, torch.float16)
    return _ROUNDING["half" if half else "single"]


def decoder_layers(model: Any) -> nn.ModuleList:
    """The decoder layers of a causal language model.

    Raises:
        UsageError: there is no list of as many as its configuration says.
    """
    wanted = model.config.get_text_config().num_hidden_layers
    for module in model.base_model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == wanted:
            return module
    raise UsageError(f"{type(model).__name__}: no list of {wanted} decoder layers found")


def position_limits(model: Any) -> Iterator[tuple[int, str]]:
    """The most positions that a text may have, each with what a model does with them.

    Rotary frequencies of types "longrope" and "dynamic" depend on the longest text of a pass, or on what was read
    before: a token's log-prob is that of a pass over its own prefix only while all texts are short.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and name.rsplit(".", 1)[-1] in _POSITION_TABLES:
            limit = module.num_embeddings - getattr(module, "offset", 0)
            yield limit, f"knows {limit} positions"
            break
    config = model.config.get_text_config()
    rotary = getattr(config, "rope_parameters", None) or {}
    for rule in (rotary, *(rule for rule in rotary.values() if isinstance(rule, dict))):  # of all layers, or by type
        kind = rule.get("rope_type") or ""
        if "dynamic" in kind or kind == "longrope":
            limit = config.max_position_embeddings if "dynamic" in kind else rule["original_max_position_embeddings"]
            yield limit, f"changes its rotary frequencies ({kind}), of short texts too, beyond {limit} positions"


_POSITION_TABLES = ("wpe", "embed_positions", "position_embeddings", "position_embedding")
