"""A whole plan: memory by parts and stages, and time by stage, of each process of a run."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from ebft.planning.memory import (
    Kind,
    Work,
    kept_bytes,
    logits_at_once,
    measure_rates,
    probe_policy,
    reading_bytes,
    sampling_bytes,
    scoring_bytes,
)
from ebft.planning.products import weights
from ebft.planning.shares import Gathered, gathered
from ebft.planning.speed import Device, over_products, stage_seconds, update_seconds
from ebft.policy import HEAD_ROWS

_PROBED = 64  # weights on a side of the matrix whose optimizer state is measured

MakeOptimizer = Callable[[list[torch.Tensor]], torch.optim.Optimizer]


@dataclass(frozen=True)
class Plan:
    """What a run takes on each device.

    Attributes:
        parts: bytes that are there all the time, by what they hold.
        stages: bytes that each stage adds at its worst.
        floor: seconds in a step of the matrix products of each stage, on this device.
        seconds: seconds of each stage, with what comes on top.
        tokens: of sequences and rollouts in a step, of this process.
        trained: how many weights are trained.
        offloaded: bytes in CPU memory of what lies there while it is not used, by what they hold.
    """

    parts: dict[str, float]
    stages: dict[str, float]
    floor: dict[str, float]
    seconds: dict[str, float]
    tokens: int
    trained: int
    offloaded: dict[str, float]

    @property
    def peak(self) -> float:
        """Bytes at the worst moment."""
        return sum(self.parts.values()) + max(self.stages.values())

    @property
    def step(self) -> float:
        """Seconds of a step."""
        return sum(self.seconds.values())


@dataclass(frozen=True)
class Step:
    """What a process does in a step.

    Args:
        sampled: what it samples and embeds, and `measured`, what at once in a held-out measurement.
        scored: what it scores at once, `parts` times in each of `updates` passes over the batch.
        minibatches: updates of the weights in each pass.
        rollouts: whether it trains on rollouts at all.
        depth: share of the layers that the feature map runs; 0 if it runs none.
        taps: bytes of features and of the states that they are made of, of a token of a rollout.
        reference: whether the frozen start scores too.
        average: whether a running average of the weights is kept.
        backbone: bytes of a feature backbone of its own; 0 where the features are the start's, or of no network.
        captured: whether the steps of sampling are CUDA graphs, which keep their keys and values.
        offload: whether frozen networks lie in CPU memory while they are not used.
        drawn: what it samples at once, if not all.
        network: architecture and kind of the network that the feature map runs; None: the policy's.
    """

    sampled: Work
    measured: Work
    scored: Work
    parts: int
    updates: int = 1
    minibatches: int = 1
    rollouts: bool = True
    depth: float = 0.0
    taps: int = 0
    reference: bool = False
    average: bool = False
    backbone: float = 0.0
    captured: bool = False
    offload: bool = False
    drawn: Work | None = None
    network: tuple[Any, Kind] | None = None


def predict(
    config: Any, kind: Kind, step: Step, *, make_optimizer: MakeOptimizer, device: torch.device, sharers: int = 1
) -> Plan:
    """The plan of a policy of architecture `config`.

    Args:
        sharers: how many processes share weights, gradients and states (`run --shard`); 1: each has all of them. Time
            is without what they send.

    Raises:
        UsageError: layers whose products are not known (GPT-2).
    """
    text = config.get_text_config()
    whole, trained = count_weights(config, kind)
    frozen_bytes = kind.weights.itemsize
    trained_bytes = 4 if kind.lora else kind.weights.itemsize
    per_weight = state_bytes(make_optimizer)
    drawn = step.drawn or step.sampled
    frozen = {"frozen copy": 0.0 if kind.lora else whole * frozen_bytes, "feature backbone": step.backbone}
    parts = {
        "weights": whole * frozen_bytes + (trained * trained_bytes if kind.lora else 0),
        **({} if step.offload else frozen),
        "gradients": trained * trained_bytes,
        "optimizer": trained * per_weight * trained_bytes / 4,
        "average": 4 * trained * step.average,
        "decoding graphs": sum(kept_bytes(config, kind, work) for work in (drawn, step.measured)) * step.captured,
    }
    rates = measure_rates(config, kind)
    wide, widest_drawn = (max(work, step.measured, key=lambda work: work.rows) for work in (step.sampled, drawn))
    network, network_kind = step.network or (config, kind)
    network_layers = network.get_text_config().num_hidden_layers
    embed = 0.0
    if step.depth:
        embedding_rates = measure_rates(network, network_kind) if step.network else rates
        embed = embedding_rates["embed"].at(network_layers, wide.trunk, wide.teeth("embed"))
    scored = step.scored if step.rollouts else Work(step.scored.rows, step.scored.length, 0, 0, 1)
    visiting = frozen if step.offload else dict.fromkeys(frozen, 0.0)
    embedding = (visiting["feature backbone"] or visiting["frozen copy"]) * bool(step.depth)
    extra = Gathered()
    if sharers > 1:
        sizes = {"whole": whole, "trained": trained, "frozen_bytes": frozen_bytes, "trained_bytes": trained_bytes}
        extra = gathered(config, lora=bool(kind.lora), **sizes)
        embedding += extra.whole * (step.depth > 0 and not step.backbone)
    # the start scores one rollout of an anchor in held-out measurements, and all of them for a divergence in the loss
    read = [(replace(step.measured, rollouts=1), extra.whole), *[(scored, extra.forward)] * step.reference]
    head_rows = HEAD_ROWS.on(device)
    logits = logits_at_once(config, head_rows, device)
    stages = {
        "sample": sampling_bytes(config, kind, rates["embed"], widest_drawn, head_rows=head_rows) + extra.whole,
        "embed": embed + step.taps * wide.teeth("embed") + embedding,
        "score": max(
            scoring_bytes(config, kind, rates["score"], scored, logits=logits) + extra.backward,
            visiting["frozen copy"]
            + max(reading_bytes(config, rates["embed"], work, logits=logits) + more for work, more in read),
        ),
        # torch's optimizers make one more tensor of each weight, on a GPU of all weights at once
        "update": 4 * trained if device.type == "cuda" else 4 * text.vocab_size * text.hidden_size * (not kind.lora),
    }
    if sharers > 1:
        parts = {name: size if name == "feature backbone" else size / sharers for name, size in parts.items()}
        stages["update"] /= sharers
    timed = Device(device)
    layer, head = linear_weights(config, kind, device)
    embedder = linear_weights(network, network_kind, device)[0] if step.network else layer
    floor = stage_seconds(
        layer,
        head,
        layers=text.num_hidden_layers,
        embedder=embedder,
        embedded=step.depth * network_layers,
        kind=kind,
        sampled=step.sampled if step.rollouts else None,
        scored=step.scored,
        parts=step.parts,
        reference=step.reference,
        device=timed,
    )
    floor |= {stage: floor[stage] * step.updates for stage in ("score", "update")}
    beside = over_products(kind.autocast or kind.weights)
    seconds = {stage: value * beside[stage] for stage, value in floor.items()}
    seconds["update"] += update_seconds(make_optimizer, trained, timed) * step.updates * step.minibatches
    tokens = step.sampled.trunk + step.sampled.columns * step.sampled.horizon * step.rollouts
    return Plan(parts, stages, floor, seconds, tokens, trained, frozen if step.offload else {})


def count_weights(config: Any, kind: Kind) -> tuple[int, int]:
    """How many weights the model has, adapters aside, and how many are trained."""
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(copy.deepcopy(config), attn_implementation="sdpa")
    whole = sum(parameter.numel() for parameter in model.parameters())
    if not kind.lora:
        return whole, whole
    head = model.get_output_embeddings()
    linear = [m for m in model.modules() if isinstance(m, torch.nn.Linear) and m is not head]
    return whole, sum(kind.lora * (m.in_features + m.out_features) for m in linear)


def state_bytes(make_optimizer: MakeOptimizer) -> float:
    """Bytes that an optimizer keeps for each float32 weight, from one step of it over a small matrix."""
    weight = torch.nn.Parameter(torch.zeros(_PROBED, _PROBED))
    weight.grad = torch.ones_like(weight)
    optimizer = make_optimizer([weight])
    optimizer.step()
    kept = [value for value in optimizer.state[weight].values() if isinstance(value, torch.Tensor)]
    return sum(value.nbytes for value in kept) // weight.numel()


def linear_weights(config: Any, kind: Kind, device: torch.device) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Random weights like those of one decoder layer's linear layers, adapters included, and of the head."""
    text = config.get_text_config()
    policy = probe_policy(config, kind, 1)
    policy.model.to(device)
    layer, small = weights(policy)
    head = torch.randn(text.vocab_size, small.shape[1], device=device).to(small.dtype)
    return layer, head.requires_grad_(small.requires_grad)
