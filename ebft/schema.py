"""The names and shapes of everything that travels in a pipeline's TensorDict, in one place.

Legend (used in every docstring of the project):

====== =====================================================
symbol meaning
====== =====================================================
B      sequences in a batch
T      tokens in a sequence (right-padded; ``mask`` tells)
K      anchors in a sequence: places where a rollout starts
N      rollouts per anchor
G      horizon: tokens per rollout
D      feature dimension
====== =====================================================

Anchor k of a sequence is a *prefix length* a_k >= 1: its context is ``tokens[0:a_k]``, its target is
``tokens[a_k : a_k+G]``, its rollouts are drawn from the policy given that context. The axis order is the nesting,
``[B, K, N, G]``. The root batch size is ``[B]``; nested entries share it, so slicing on B keeps groups whole.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from tensordict import TensorDictBase
from tensordict.utils import NestedKey

from ebft.errors import UsageError

TOKENS = "tokens"
MASK = "mask"
ANSWER_MASK = "answer_mask"
DOCUMENT_IDS = "document_ids"
EXAMPLE = "example"
SEQUENCE_IDS = "sequence_ids"
SEED = "seed"
ANCHORS = "anchors"
ANCHOR_MASK = "anchor_mask"
TARGET_TOKENS = ("target", "tokens")
TARGET_MASK = ("target", "mask")
TARGET_FEATURES = ("target", "features")
ROLLOUT_TOKENS = ("rollout", "tokens")
ROLLOUT_MASK = ("rollout", "mask")
ROLLOUT_LOG_PROB = ("rollout", "log_prob")
ROLLOUT_FEATURES = ("rollout", "features")
VERIFIED = ("rollout", "verified")
REWARD = ("rollout", "reward")
ADVANTAGE = ("rollout", "advantage")
POLICY_LOG_PROB = ("policy", "log_prob")
POLICY_TOKEN_LOG_PROB = ("policy", "token_log_prob")
POLICY_ENTROPY = ("policy", "entropy")
POLICY_DIVERGENCE = ("policy", "divergence")
REFERENCE_LOG_PROB = ("reference", "log_prob")
TOTAL_ROLLOUTS = ("total", "rollouts")
TOTAL_TOKENS = ("total", "tokens")
TOTAL_TRUNK_TOKENS = ("total", "trunk_tokens")


def metric(name: str) -> tuple[str, str]:
    """Key of a metric of shape [B, ...]; the loop reduces it once, when it is logged."""
    return ("metrics", name)


@dataclass(frozen=True)
class Field:
    """What an entry must look like, and which part of the pipeline writes it."""

    shape: str
    kind: str  # "int", "bool" or "float"
    writer: str


FIELDS: dict[NestedKey, Field] = {
    TOKENS: Field("B T", "int", "data"),
    MASK: Field("B T", "bool", "data"),
    ANSWER_MASK: Field("B T", "bool", "data (optional)"),
    DOCUMENT_IDS: Field("B T", "int", "data (optional)"),
    EXAMPLE: Field("B", "int", "data (prompts only): place of the row's example in the list of examples"),
    SEQUENCE_IDS: Field("B", "int", "data"),
    SEED: Field("B", "int", "the loop: run seed and step, repeated per row"),
    ANCHORS: Field("B K", "int", "anchor placement (ebft.samplers.anchors)"),
    ANCHOR_MASK: Field("B K", "bool", "anchor placement (ebft.samplers.anchors)"),
    TARGET_TOKENS: Field("B K G", "int", "a sampler (ebft.samplers)"),
    TARGET_MASK: Field("B K G", "bool", "a sampler (ebft.samplers)"),
    TARGET_FEATURES: Field("B K D", "float", "a feature map (ebft.features)"),
    ROLLOUT_TOKENS: Field("B K N G", "int", "a sampler (ebft.samplers)"),
    ROLLOUT_MASK: Field("B K N G", "bool", "a sampler (ebft.samplers)"),
    ROLLOUT_LOG_PROB: Field("B K N G", "float", "a sampler (ebft.samplers)"),
    ROLLOUT_FEATURES: Field("B K N D", "float", "a feature map (ebft.features)"),
    VERIFIED: Field("B K N", "float", "a verifier (ebft.objectives.verifiers)"),
    REWARD: Field("B K N", "float", "an objective (ebft.objectives)"),
    ADVANTAGE: Field("B K N", "float", "a baseline (ebft.objectives.baselines)"),
    POLICY_LOG_PROB: Field("B K N G", "float", "policy scoring (ebft.policy)"),
    POLICY_TOKEN_LOG_PROB: Field("B T-1", "float", "policy scoring (ebft.policy)"),
    POLICY_ENTROPY: Field("B K N G", "float", "policy scoring (ebft.policy)"),
    POLICY_DIVERGENCE: Field("B K N G", "float", "policy scoring (ebft.policy), with a reference"),
    REFERENCE_LOG_PROB: Field("B K N G", "float", "reference scoring (ebft.policy)"),
    TOTAL_ROLLOUTS: Field("B", "float", "the loop: rollouts of valid anchors in the whole batch, repeated per row"),
    TOTAL_TOKENS: Field("B", "float", "the loop: unmasked rollout tokens in the whole batch, repeated per row"),
    TOTAL_TRUNK_TOKENS: Field(
        "B", "float", "the loop: tokens under cross-entropy in the whole batch, repeated per row"
    ),
}


def check(td: TensorDictBase, *keys: NestedKey) -> None:
    """Check that `keys` are there with the legend's shapes and kinds, and that the letters agree among them.

    Raises:
        UsageError: names the key, the wanted and the found shape or dtype, and who writes it.
    """
    sizes: dict[str, tuple[int, NestedKey]] = {}
    for key in keys:
        field = FIELDS[key]
        value = td.get(key, None)
        if value is None:
            raise UsageError(f"key {key!r} is missing: wanted shape [{field.shape}], written by {field.writer}")
        shape = list(value.shape)
        letters = field.shape.split()
        if len(shape) != len(letters):
            raise UsageError(f"key {key!r} has shape {shape}, wanted [{field.shape}], written by {field.writer}")
        if _kind(value) != field.kind:
            raise UsageError(f"key {key!r} has dtype {value.dtype}, wanted {field.kind}, written by {field.writer}")
        for letter, size in zip(letters, shape, strict=True):
            name, _, offset = letter.partition("-")
            full = size + int(offset or 0)
            known, where = sizes.setdefault(name, (full, key))
            if known != full:
                raise UsageError(
                    f"key {key!r} has shape {shape}, wanted [{field.shape}] with {name}={known} as in {where!r}"
                    f" (found {name}={full}), written by {field.writer}"
                )


def _kind(value: torch.Tensor) -> str:
    if value.dtype == torch.bool:
        return "bool"
    return "float" if value.dtype.is_floating_point else "int"
