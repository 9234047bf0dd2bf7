"""Memory of a run before it starts: what lies there all the time, and what each stage adds at its worst.

What a stage adds grows with the number of layers and with the tokens of sequences and rollouts, each by its own rate.
The rates are measured, not derived: the stages run, on a CPU and with their real code, on the same architecture with
1 and 2 layers, a vocabulary of a few tokens and little text. So whatever the architecture keeps for the backward pass
is counted, recomputation, adapters and autocast included. What depends on the vocabulary, and the keys and values of
sampling, are added by formulas.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from ebft.head_blocks import STATES_PER_BLOCK, TOKENS_PER_BLOCK
from ebft.loading import add_adapters
from ebft.planning.live import live_bytes
from ebft.policy import CausalPolicy, scales_logits

STAGES = ("embed", "score")
_VOCABULARY = 64  # of the probes
_PROBE = {"length": 96, "count": 4, "rollouts": 4, "horizon": 8}


@dataclass(frozen=True)
class Work:
    """What goes through a stage at once: rows of the batch, T, K, N and G."""

    rows: int
    length: int
    count: int
    rollouts: int
    horizon: int

    @property
    def trunk(self) -> int:
        """Tokens of the sequences."""
        return self.rows * self.length

    @property
    def columns(self) -> int:
        """Rollouts."""
        return self.rows * self.count * self.rollouts

    def teeth(self, stage: str) -> int:
        """Tokens of the rollouts that a stage computes: the last ones predict nothing."""
        return self.columns * (self.horizon - (stage != "embed"))


@dataclass(frozen=True)
class Kind:
    """How the policy is held: dtype of its weights, autocast, LoRA rank (0: none), kernel, checkpointing."""

    weights: torch.dtype
    autocast: torch.dtype | None = None
    lora: int = 0
    kernel: str | None = None
    checkpointing: bool = False


@dataclass(frozen=True)
class Rates:
    """Bytes that a stage adds: (constant, per token of the sequences, per token of the rollouts), each + slope · L."""

    constant: tuple[float, float]
    trunk: tuple[float, float]
    teeth: tuple[float, float]

    def at(self, layers: int, trunk: int, teeth: int) -> float:
        """Bytes for a model of so many layers and so many tokens."""
        rates = (base + slope * layers for base, slope in (self.constant, self.trunk, self.teeth))
        return sum(rate * amount for rate, amount in zip(rates, (1, trunk, teeth), strict=True))


def measure_rates(config: Any, kind: Kind) -> dict[str, Rates]:
    """The rates of every stage, from probes of the architecture `config` with 1 and 2 layers."""
    small = Work(rows=2, **_PROBE)
    longer = Work(rows=2, **{**_PROBE, "length": 2 * _PROBE["length"]})
    more = Work(rows=2, **{**_PROBE, "rollouts": 2 * _PROBE["rollouts"]})
    found: dict[tuple[Work, int], dict[str, int]] = {}
    for layers in (1, 2):
        policy = probe_policy(config, kind, layers)
        for work in (small, longer, more):
            found[work, layers] = _measure(policy, work)
    rates = {}
    for stage in STAGES:

        def rate(work: Work, other: Work, amount: int, stage: str = stage) -> tuple[float, float]:
            one, two = ((found[work, n][stage] - found[other, n][stage]) / amount for n in (1, 2))
            return 2 * one - two, two - one

        own = small.teeth(stage)
        trunk = rate(longer, small, longer.trunk - small.trunk)
        teeth = rate(more, small, more.teeth(stage) - own)
        one, two = (
            found[small, n][stage] - sum((r[0] + r[1] * n) * a for r, a in ((trunk, small.trunk), (teeth, own)))
            for n in (1, 2)
        )
        rates[stage] = Rates((2 * one - two, two - one), trunk, teeth)
    return rates


def kept_bytes(config: Any, kind: Kind, work: Work) -> float:
    """Keys and values of the sequences, and of the rollouts but for their last tokens."""
    text = config.get_text_config()
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    each = 2 * heads * width * text.num_hidden_layers * (kind.autocast or kind.weights).itemsize
    return each * (work.trunk + work.columns * (work.horizon - 1))


def sampling_bytes(config: Any, kind: Kind, embed: Rates, work: Work, *, head_rows: int) -> float:
    """Keys and values of the sequences and of the rollouts drawn so far, and one layer at work, or the head."""
    drawing = (
        4 * 4 * config.get_text_config().vocab_size * head_rows
    )  # logits, log-probs, probabilities and their running sums
    return kept_bytes(config, kind, work) + max(embed.at(1, work.trunk, 0), embed.at(1, work.columns, 0), drawing)


def logits_at_once(config: Any, head_rows: int, device: torch.device) -> int:
    """Logits that scoring has at a time: of a block of the vocabulary, or `head_rows` whole rows, if it scales them."""
    size = config.get_text_config().vocab_size
    if scales_logits(config):
        return head_rows * size
    return STATES_PER_BLOCK.on(device) * min(size, TOKENS_PER_BLOCK.on(device))


def scoring_bytes(config: Any, kind: Kind, score: Rates, work: Work, *, logits: int) -> float:
    """What is kept for the backward pass, with one layer at work, and the head: one after the other if recomputed.

    `logits` is how many the head has at a time.
    """
    text = config.get_text_config()
    trained, teeth = not kind.lora, work.teeth("score")
    # logits, their exponentials and two copies; of a trained weight two gradients
    head = 4 * (4 * logits + 2 * text.vocab_size * text.hidden_size * trained)
    layers = score.at(text.num_hidden_layers, work.trunk, teeth)
    if not kind.checkpointing:
        return layers + head
    states = (work.trunk + teeth) * text.hidden_size * (kind.autocast or kind.weights).itemsize
    return max(layers, text.num_hidden_layers * states + head)


def reading_bytes(config: Any, embed: Rates, work: Work, *, logits: int) -> float:
    """What scoring without a backward pass adds: states of the sequences and rollouts, and the head's logits."""
    states = embed.at(config.get_text_config().num_hidden_layers, work.trunk, work.teeth("score"))
    return states + 3 * 4 * logits


def probe_policy(config: Any, kind: Kind, layers: int) -> CausalPolicy:
    """A policy of the architecture `config` with so many layers, a vocabulary of a few tokens and random weights."""
    config = copy.deepcopy(config)
    text = config.get_text_config()
    text.num_hidden_layers, text.vocab_size = layers, _VOCABULARY
    if getattr(text, "layer_types", None):
        text.layer_types = list(text.layer_types)[:layers]
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        setattr(text, name, None)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: Any = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").to(kind.weights)
        if kind.lora:
            model = add_adapters(model, rank=kind.lora, seed=0, autocast=kind.autocast is not None)
    # flex has no gradient on a CPU; for the backward pass it keeps what chunked keeps, and a number per head and token,
    # which chunked keeps in float32 alone
    kernel = "chunked" if kind.kernel == "flex" else kind.kernel
    return CausalPolicy(model, autocast=kind.autocast, kernel=kernel, checkpointing=kind.checkpointing)


def _measure(policy: CausalPolicy, work: Work) -> dict[str, int]:
    rows = work.rows
    tokens = torch.arange(rows * work.length).view(rows, -1) % _VOCABULARY
    anchors = torch.linspace(1, work.length - work.horizon, work.count).long().expand(rows, -1)
    given = tokens, tokens >= 0, anchors, anchors > 0
    drawn = torch.ones(rows, work.count, work.rollouts, work.horizon, dtype=torch.int64)
    for parameter in policy.trainable().values():
        parameter.grad = torch.zeros_like(parameter)

    def embed() -> None:
        policy.hidden_states(*given, drawn, drawn > 0, layers=[policy.num_layers])

    def score() -> None:
        log_prob, token_log_prob = policy.score(*given, drawn, drawn > 0)
        (log_prob.sum() + token_log_prob.sum()).backward()

    runs: dict[str, Callable[[], None]] = {"embed": embed, "score": score}
    return {stage: live_bytes(run) for stage, run in runs.items()}
