"""Feature maps by name: (policy, reference, options) -> FeatureMap and a note."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from ebft.components.component import Component
from ebft.distributed import size
from ebft.errors import UsageError
from ebft.features.contract import FeatureMap
from ebft.policy import CausalPolicy


@dataclass(frozen=True)
class NotedMap:
    """A feature map with what the user should know of it before a run."""

    embed: FeatureMap
    note: str


def _sbert(policy: CausalPolicy, reference: CausalPolicy, *, encoder: str, context_tokens: int) -> NotedMap:
    from ebft.features.sbert import sbert

    dtype = "bfloat16" if policy.autocast is torch.bfloat16 else "float32"
    made = sbert(encoder, policy.tokenizer, context_tokens=context_tokens, device=str(policy.device), dtype=dtype)
    read = f"with the last {context_tokens} tokens of its prefix" if context_tokens else "without its prefix"
    return NotedMap(made, f"{encoder} reads the text of each rollout {read} (--context-tokens {context_tokens})")


def _hidden(
    policy: CausalPolicy, reference: CausalPolicy, *, backbone: str, layers: str, unit_norm: str, pooling: str
) -> NotedMap:
    from ebft.features.hidden import hidden
    from ebft.features.retokenized import retokenized_hidden

    network = frozen_network(policy, reference, backbone)
    options: dict[str, Any] = {"layers": parse_layers(layers), "normalization": unit_norm, "pooling": pooling}
    if network.tokenizer is policy.tokenizer or network.tokenizer.get_vocab() == policy.tokenizer.get_vocab():
        note = f"token ids are passed on to the backbone {backbone}, which has the policy's vocabulary"
        return NotedMap(_resident(network, hidden(network, **options)), note)
    made = retokenized_hidden(network, network.tokenizer, policy.tokenizer, **options)
    return NotedMap(
        _resident(network, made),
        f"the backbone {backbone} has another vocabulary than the policy: text is re-tokenised, which takes a forward"
        " pass for each prefix with a rollout",
    )


def _resident(network: CausalPolicy, embed: FeatureMap) -> FeatureMap:
    """The feature map, during which the network's weights are on the device."""
    if network.offload is None:
        return embed

    @wraps(embed)
    def embed_there(*args: Any, **options: Any) -> Any:
        with network.resident():
            return embed(*args, **options)

    return embed_there


def frozen_network(policy: CausalPolicy, reference: CausalPolicy, name: str) -> CausalPolicy:
    """The network whose states are features: the policy's `start`, its architecture with `random` weights, or a model.

    Raises:
        UsageError: a model that cannot be loaded.
    """
    if name == "start":
        return reference
    network = _random_network(policy) if name == "random" else _loaded_network(policy, name)
    if policy.offload_frozen:
        network.move_to_cpu()
    return network


def _random_network(policy: CausalPolicy) -> CausalPolicy:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(copy.deepcopy(policy.causal_lm.config), attn_implementation="sdpa")
    weights = next(policy.causal_lm.parameters())
    model = model.to(weights.device, weights.dtype).eval().requires_grad_(False)
    return CausalPolicy(model, policy.tokenizer, autocast=policy.autocast)


def _loaded_network(policy: CausalPolicy, name: str) -> CausalPolicy:
    dtype = "auto" if policy.autocast else str(next(policy.causal_lm.parameters()).dtype).removeprefix("torch.")
    # of several processes each has its GPU by now, and none may name one
    device = str(policy.device) if size() == 1 else policy.device.type
    return CausalPolicy.from_pretrained(name, device=device, dtype=dtype, frozen=True)


def _ngram(policy: CausalPolicy, reference: CausalPolicy, *, ngram: int, dimension: int) -> NotedMap:
    from ebft.features.ngram import ngram as make

    return NotedMap(make(ngram, dimension=dimension), f"{ngram}-grams of tokens, without their prefix")


def _match(policy: CausalPolicy, reference: CausalPolicy, *, match: str, dimension: int, pooling: str) -> NotedMap:
    from ebft.features.match import match as make

    return NotedMap(make(match, dimension=dimension, pooling=pooling), f"tokens of each rollout, by {match}")


def parse_layers(text: str) -> list[int | float] | str:
    """`0.25,0.5,0.75` (depth fractions), `4,8` (indices), `last` or `mean`."""
    if text in ("last", "mean"):
        return text
    try:
        return [float(part) if "." in part else int(part) for part in text.split(",")]
    except ValueError as error:
        raise UsageError(
            f"layers {text!r}: expected depth fractions (0.25,0.5,0.75), layer indices (4,8), 'last' or 'mean'"
        ) from error


FEATURES = {
    "sbert": Component(
        "sentence embedding of the rollout's text", {"encoder": "minilm-l6", "context_tokens": 0}, _sbert
    ),
    "hidden": Component(
        "hidden states of the frozen start of the policy (the paper's)",
        {"backbone": "start", "layers": "0.25,0.5,0.75", "unit_norm": "layer", "pooling": "last"},
        _hidden,
    ),
    "match": Component(
        "tokens at their places: share of a common prefix (strictly proper), or of equal positions",
        {"match": "prefix", "dimension": 2048, "pooling": "sum"},
        _match,
    ),
    "ngram": Component("hashed counts of token n-grams of the rollout", {"ngram": 2, "dimension": 2048}, _ngram),
}
