"""What the benchmark of sampling and scoring runs: a policy, a setting, and the ways to sample and score with it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks import reference_algorithm
from ebft.errors import UsageError
from ebft.head import chosen_log_probs
from ebft.loading import add_adapters, choose_device, choose_precision
from ebft.memory import keep_freed_memory
from ebft.planning import products
from ebft.policy import CausalPolicy
from ebft.samplers.anchors import strided

# Copies of the row that the reference scores at once. Four of 1,024 tokens and their rollouts need more than 24 GB.
COPIES = 2


@dataclass(frozen=True)
class Choice:
    """Which policy is measured: enough to load it again in another process."""

    policy: str
    dtype: str = "auto"
    device: str = "auto"
    lora: int = 0

    def load(self, **options: Any) -> CausalPolicy:
        """The policy; `config:JSON` is a model of that configuration with random weights.

        Args:
            options: of `CausalPolicy`.

        Raises:
            UsageError: a policy that cannot be loaded, or a configuration that is none.
        """
        keep_freed_memory()  # as the commands do; all contestants share the process
        if not self.policy.startswith("config:"):
            return CausalPolicy.from_pretrained(
                self.policy, device=self.device, dtype=self.dtype, lora=self.lora or None, **options
            )
        device = choose_device(self.device)
        weights, autocast = choose_precision(self.dtype, device)
        try:
            config = AutoConfig.for_model(**json.loads(self.policy.removeprefix("config:")))
        except (ValueError, TypeError) as error:
            raise UsageError(
                f"policy {self.policy!r}: {error}. Expected config: and a JSON object with model_type and options"
            ) from error
        torch.manual_seed(0)
        with device:  # where random numbers are drawn, too: a CPU takes long over those of a large model
            model: Any = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
        model = model.to(device, autocast if self.lora and autocast else weights)
        if self.lora:
            model = add_adapters(model, rank=self.lora, seed=0, autocast=autocast is not None)
        return CausalPolicy(model, autocast=autocast, **options)


class Inputs(NamedTuple):
    """tokens, mask [1,T] and anchors, anchor_mask [1,K], as `CausalPolicy.sample` takes them."""

    tokens: torch.Tensor
    mask: torch.Tensor
    anchors: torch.Tensor
    anchor_mask: torch.Tensor


@dataclass(frozen=True)
class Setting:
    """One sequence of T random tokens, anchors every G tokens, N rollouts of G tokens from each."""

    length: int
    horizon: int = 8
    rollouts: int = 4

    @classmethod
    def parse(cls, text: str) -> list[Setting]:
        """`256,1024:32:8` -> settings T and T:G:N.

        Raises:
            UsageError: anything else.
        """
        try:
            found = [cls(*map(int, part.split(":"))) for part in text.split(",")]
        except (ValueError, TypeError) as error:
            raise UsageError(
                f"settings {text!r}: expected T or T:G:N, with commas between, like 256,1024:32:8"
            ) from error
        if any(min(setting.length, setting.horizon, setting.rollouts) < 1 for setting in found):
            raise UsageError(f"settings {text!r}: expected whole numbers >= 1")
        return found

    def __str__(self) -> str:
        return f"T={self.length} G={self.horizon} N={self.rollouts}"

    def inputs(self, policy: CausalPolicy) -> Inputs:
        """The sequence and its anchors.

        Raises:
            UsageError: no anchor fits.
        """
        mask = torch.ones(1, self.length, dtype=torch.bool, device=policy.device)
        anchors, anchor_mask = strided(mask, stride=self.horizon, first=self.horizon, horizon=self.horizon)
        tokens = random_tokens(policy, (1, self.length))
        return Inputs(tokens, mask, anchors, anchor_mask)


def random_tokens(policy: CausalPolicy, shape: tuple[int, ...]) -> torch.Tensor:
    """Uniform over the vocabulary, always the same ones."""
    random = torch.Generator().manual_seed(0)
    size = policy.causal_lm.get_input_embeddings().num_embeddings
    return torch.randint(size, shape, generator=random).to(policy.device)


class Contestant(NamedTuple):
    """One way to do it.

    Attributes:
        sample: draws rollout tokens [1,K,N,G].
        score: rollout tokens -> their log-probs [1,K,N,G], detached; leaves the gradient of the sum of all log-probs,
            those of the sequence's own tokens too, in the parameters.
    """

    sample: Callable[[], torch.Tensor]
    score: Callable[[torch.Tensor], torch.Tensor]


def ours(policy: CausalPolicy, setting: Setting) -> Contestant:
    """The comb: `CausalPolicy.sample` and `.score`."""
    inputs = setting.inputs(policy)

    def sample() -> torch.Tensor:
        return policy.sample(*inputs, rollouts=setting.rollouts, horizon=setting.horizon, seed=0)[0]

    def score(rollouts: torch.Tensor) -> torch.Tensor:
        everything = torch.ones_like(rollouts, dtype=torch.bool)
        policy.model.zero_grad(set_to_none=True)
        return _backward(*policy.score(*inputs, rollouts, everything))

    return Contestant(sample, score)


def reference(policy: CausalPolicy, setting: Setting) -> Contestant:
    """The authors' algorithm on the plain model, with scoring in micro-batches of `COPIES` copies."""
    inputs = setting.inputs(policy)
    tokens, anchors = inputs.tokens, inputs.anchors

    def sample() -> torch.Tensor:
        with policy.plain() as model:
            return reference_algorithm.sample(
                model, tokens, anchors, rollouts=setting.rollouts, horizon=setting.horizon, seed=0
            )[0]

    def score(rollouts: torch.Tensor) -> torch.Tensor:
        policy.model.zero_grad(set_to_none=True)
        parts: list[torch.Tensor] = []
        for part in rollouts.split(COPIES, 2):
            with policy.plain() as model:
                log_prob, token_log_prob = reference_algorithm.score(model, tokens, anchors, part)
            # the sequence's own tokens count once, however many passes there are
            parts.append(_backward(log_prob, token_log_prob if not parts else token_log_prob[:0]))
        return torch.cat(parts, 2)

    return Contestant(sample, score)


CONTESTANTS = {"reference": reference, "ours": ours}


def floor(policy: CausalPolicy, setting: Setting) -> Contestant:
    """The matrix products of `ours` alone: it draws nothing and returns what it is given, or no token."""
    anchors = setting.inputs(policy).anchors
    layers, head = products.weights(policy)
    operands = products.Operands()
    shape: dict[str, int] = {"count": anchors.shape[1], "rollouts": setting.rollouts, "horizon": setting.horizon}
    sampling = products.sampling_products(layers, head, length=int(anchors.max()), head_rows=policy.head_rows, **shape)
    scoring = products.scoring_products(layers, head, length=setting.length, **shape)

    def sample() -> torch.Tensor:
        products.multiply(sampling, operands, backward=False)
        return anchors.new_zeros(0)

    def score(rollouts: torch.Tensor) -> torch.Tensor:
        products.multiply(scoring, operands, backward=True)
        return rollouts

    return Contestant(sample, score)


def _backward(log_prob: torch.Tensor, token_log_prob: torch.Tensor) -> torch.Tensor:
    (log_prob.sum() + token_log_prob.sum()).backward()
    return log_prob.detach()


def plain_pass(policy: CausalPolicy, setting: Setting) -> None:
    """A causal forward and backward pass of the plain model over one row of as many tokens as `ours` scores.

    The head is applied to as many states and in the same chunks.
    """
    policy.model.zero_grad(set_to_none=True)
    count = setting.inputs(policy).anchors.shape[1]
    teeth = count * setting.rollouts * (setting.horizon - 1)
    row = random_tokens(policy, (1, setting.length + teeth))
    with policy.plain():
        states = policy.plain_states(row, torch.ones_like(row, dtype=torch.bool))[0]
    with policy.computing():
        places = torch.arange(count + teeth + setting.length - 1, device=row.device) % (row.shape[1] - 1)
        head = policy.causal_lm.get_output_embeddings()
        matrix = head.weight if type(head) is nn.Linear and head.bias is None else None
        log_prob, _ = chosen_log_probs(
            policy.logits, states[places], row[0, places + 1, None], rows=policy.head_rows, settings={}, weight=matrix
        )
    _backward(log_prob, log_prob[:0])
