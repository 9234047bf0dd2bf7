"""What `benchmarks/gpu.py` measures: models, sizes, and one piece of work for a process of its own."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from tensordict import TensorDict
from transformers import AutoConfig

from benchmarks.contestants import Choice, random_tokens
from ebft import schema
from ebft.data import load_documents, pack
from ebft.loading import model_source
from ebft.policy import CausalPolicy
from ebft.samplers.anchors import strided

_QWEN = {"model_type": "qwen2", "vocab_size": 151936, "num_key_value_heads": 2, "tie_word_embeddings": True}
MODELS: dict[str, dict[str, Any]] = {
    "tiny": {
        **{"model_type": "llama", "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128},
        **{"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True},
    },
    "smollm2-135m": {
        **{"model_type": "llama", "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536},
        **{"num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True},
        **{"max_position_embeddings": 8192},
    },
    "qwen2.5-0.5b": {
        **_QWEN, "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14
    },
    "qwen2.5-1.5b": {
        **_QWEN, "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12
    },
}  # fmt: skip
MEASURED = ("smollm2-135m", "qwen2.5-0.5b", "qwen2.5-1.5b")


@dataclass(frozen=True)
class Sizes:
    """B sequences of T tokens, anchors every G, N rollouts; `micro_batch` sequences are scored at once."""

    batch: int = 16
    length: int = 1024
    horizon: int = 8
    rollouts: int = 4
    micro_batch: int = 4
    steps: int = 5  # the first two are not counted: they pay what is paid once


@dataclass(frozen=True)
class Job:
    """One piece of one model.

    Args:
        model: one of `MODELS`, with random weights; if `own`, an embedded name or a folder, with its own.
    """

    model: str
    piece: str
    device: str
    sizes: Sizes
    own: bool = False

    @property
    def label(self) -> str:
        """What the model is called in the results."""
        return f"{self.model} (own weights)" if self.own else self.model

    def policy(self, *, lora: int = 0, **options: Any) -> CausalPolicy:
        """The model, with recomputation; `options` are those of `CausalPolicy`."""
        name = self.model if self.own else "config:" + json.dumps(MODELS[self.model])
        return Choice(name, device=self.device, lora=lora).load(**{"checkpointing": True, **options})

    def config(self) -> Any:
        """The architecture."""
        if self.own:
            return AutoConfig.from_pretrained(model_source(self.model))
        return AutoConfig.for_model(**MODELS[self.model])

    def rows(self, policy: CausalPolicy) -> TensorDict:
        """B rows: random tokens, or for a model with its own weights text of the kind that it knows."""
        if self.own:
            enough = 10 * self.sizes.batch * self.sizes.length  # characters
            documents = load_documents("stdlib")
            before = accumulate((len(document.text) for document in documents), initial=0)
            few = [document for document, size in zip(documents, before, strict=False) if size < enough]
            return pack(few, policy.tokenizer, length=self.sizes.length)[: self.sizes.batch]
        tokens = random_tokens(policy, (self.sizes.batch, self.sizes.length)).cpu()
        return TensorDict(
            {
                schema.TOKENS: tokens,
                schema.MASK: torch.ones_like(tokens, dtype=torch.bool),
                schema.DOCUMENT_IDS: torch.zeros_like(tokens),
                schema.SEQUENCE_IDS: torch.arange(len(tokens)),
            },
            batch_size=[len(tokens)],
        )

    @property
    def place(self) -> Any:
        """Where anchors stand."""
        return partial(strided, stride=self.sizes.horizon, first=self.sizes.horizon, horizon=self.sizes.horizon)

    @property
    def anchors(self) -> int:
        """K of a row of random tokens."""
        return self.place(torch.ones(1, self.sizes.length, dtype=torch.bool))[0].shape[1]
