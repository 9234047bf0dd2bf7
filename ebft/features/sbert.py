"""Sentence embeddings of rollouts and targets."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ebft import assets
from ebft.errors import UsageError
from ebft.features.contract import check_context_tokens
from ebft.features.text import (
    Decoder,
    Texts,
    check_decoder,
    continuation_texts,
    distinct_texts,
    embed_texts,
    stack_vectors,
)

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def sbert(
    model: Any,
    tokenizer: Decoder,
    *,
    context_tokens: int = 0,
    batch_size: int = 64,
    device: str | torch.device | None = None,
    dtype: str = "float32",
    cached_texts: int = 20_000,
) -> SentenceFeatures:
    """A feature map that embeds the decoded text with a sentence encoder; features have unit norm.

    Special tokens are dropped from the text (see ``ebft.features.text``). An encoder reads a limited number of word
    pieces and ignores what follows them.

    Args:
        model: name of an embedded model, a folder or a hub id of a sentence-transformers model; or an encoder object,
            with ``encode(texts, batch_size=, convert_to_tensor=, show_progress_bar=) -> [M,D]``.
        tokenizer: the *policy's* tokenizer, which turns its ids into text.
        context_tokens: how many tokens of the anchor's context to put in front of each continuation.
        batch_size: strings per forward of the encoder.
        device: where a model given by name is put; sentence-transformers chooses when left out.
        dtype: "float32", or "bfloat16" for autocast: about twice as fast on processors with bfloat16 arithmetic, with
            inner products of the features off by up to 5e-3.
        cached_texts: how many target texts to remember; 0 remembers none.

    Raises:
        UsageError: the name is no sentence-transformers model; the tokenizer cannot decode; an option has a value that
            is not allowed; or, when called, the context would push the continuation out of what the encoder reads.
    """
    if isinstance(model, str):
        model = _load(model, device)
    elif device is not None:
        raise UsageError(f"device={device!r} applies to a model given by name: move your own encoder yourself")
    return SentenceFeatures(
        model, tokenizer, context_tokens=context_tokens, batch_size=batch_size, dtype=dtype, cached_texts=cached_texts
    )


class SentenceFeatures:
    """The feature map made by :func:`sbert`: it holds the encoder and remembers the embeddings of targets.

    A call embeds each distinct string once. The targets of a sequence are embedded together and remembered by their
    text, so that they cost nothing in later epochs with the same anchors. What is embedded together never depends on
    what is remembered, so the features are a function of the arguments alone and a resumed run repeats exactly.

    Attributes:
        texts: strings asked for so far.
        distinct: of these, distinct ones within their call.
        encoded: strings given to the encoder.
    """

    def __init__(
        self, encoder: Any, tokenizer: Decoder, *, context_tokens: int, batch_size: int, dtype: str, cached_texts: int
    ) -> None:
        check_context_tokens(context_tokens)
        check_decoder(tokenizer)
        if dtype not in _DTYPES:
            raise UsageError(f"dtype={dtype!r} is unknown: choose one of {', '.join(_DTYPES)}")
        if batch_size < 1 or cached_texts < 0:
            raise UsageError(f"batch_size={batch_size}, cached_texts={cached_texts}: expected 1 or more, and 0 or more")
        self.encoder = encoder
        self.tokenizer = tokenizer
        self.context_tokens = context_tokens
        self.batch_size = batch_size
        self.dtype = _DTYPES[dtype]
        self.cached_texts = cached_texts
        self.texts = self.distinct = self.encoded = 0
        self._cache: OrderedDict[bytes, dict[str, Tensor]] = OrderedDict()
        self._cached = 0

    @torch.no_grad()
    def __call__(
        self,
        tokens: Tensor,
        mask: Tensor,
        anchors: Tensor,
        anchor_mask: Tensor,
        rollout_tokens: Tensor,
        rollout_mask: Tensor,
        target_tokens: Tensor,
        target_mask: Tensor,
        *,
        document_ids: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Rollout features [B,K,N,D] and target features [B,K,D]; see ``FeatureMap``."""
        shape = rollout_tokens.shape[:-1]
        self._check_length(rollout_tokens.shape[-1])
        rollout, target = continuation_texts(
            self.tokenizer, tokens, mask, anchors, anchor_mask,
            rollout_tokens, rollout_mask, target_tokens, target_mask,
            context_tokens=self.context_tokens, document_ids=document_ids,
        )  # fmt: skip
        self._count(rollout, target)
        target_tables = [self._target_table(distinct_texts(row)) for row in target]
        # A rollout that equals a target of its sequence has that target's vector, to the last bit.
        others = [[t for t in row if t not in table] for row, table in zip(rollout, target_tables, strict=True)]
        table = self._encode(distinct_texts(*others))
        tables = [table | own for own in target_tables]
        dimension = next((len(vector) for known in tables for vector in known.values()), 0) or self._dimension()

        def features(texts: Texts) -> Tensor:
            vectors = [
                None if text is None else known[text] for row, known in zip(texts, tables, strict=True) for text in row
            ]
            return stack_vectors(vectors, dimension, tokens.device)

        return features(rollout).view(*shape, dimension), features(target).view(*shape[:-1], dimension)

    def _target_table(self, texts: list[str]) -> dict[str, Tensor]:
        """Embeddings of the distinct targets of one sequence, remembered from the last time they were seen."""
        if self.cached_texts == 0 or not texts:
            return self._encode(texts)
        key = hashlib.blake2b(repr(texts).encode("utf-8", "backslashreplace"), digest_size=16).digest()
        if key in self._cache:
            self._cache.move_to_end(key)
            return self._cache[key]
        table = self._cache[key] = self._encode(texts)
        self._cached += len(texts)
        while self._cached > self.cached_texts:
            self._cached -= len(self._cache.popitem(last=False)[1])
        return table

    def _encode(self, texts: list[str]) -> dict[str, Tensor]:
        """Unit vectors of distinct strings, on the CPU."""
        if not texts:
            return {}
        self.encoded += len(texts)
        return embed_texts(self._forward, texts)

    def _forward(self, texts: list[str]) -> Tensor:
        device = torch.device(getattr(self.encoder, "device", "cpu"))
        # Also with float32: features must not depend on an autocast around the caller.
        with torch.autocast(device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16):
            features = self.encoder.encode(
                texts, batch_size=self.batch_size, convert_to_tensor=True, show_progress_bar=False
            )
        # Encoders run in inference mode, whose tensors autograd refuses; the division makes ordinary ones.
        return normalize(features.float(), dim=-1).cpu()

    def _dimension(self) -> int:
        """D, in a batch without any real anchor."""
        return self._forward([""]).shape[-1]

    def _count(self, rollout: Texts, target: Texts) -> None:
        rows = [*rollout, *target]
        self.texts += sum(text is not None for row in rows for text in row)
        self.distinct += len(distinct_texts(*rows))

    def _check_length(self, horizon: int) -> None:
        limit = getattr(self.encoder, "max_seq_length", None)
        if self.context_tokens and limit is not None and self.context_tokens + horizon > limit:
            raise UsageError(
                f"context_tokens={self.context_tokens} and a horizon of {horizon} tokens make a longer text than the"
                f" {limit} word pieces that the encoder reads, so it would not see the end: use fewer context tokens"
            )


def _load(name: str, device: str | torch.device | None) -> Any:
    # Imported here: it takes seconds, and only this constructor needs it.
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.util import is_sentence_transformer_model

    folder = str(assets.resolve(name))
    hint = "expected an embedded model such as minilm-l6, a folder or a hub id of one"
    try:
        known = is_sentence_transformer_model(folder)
    except Exception as error:  # whatever the hub's client raises: no network, no such name, no permission
        raise UsageError(f"{name!r} could not be looked up; {hint}: {error}") from error
    if not known:
        raise UsageError(f"{name!r} is no sentence-transformers model (it has no modules.json); {hint}")
    return SentenceTransformer(folder, device=None if device is None else str(device), trust_remote_code=False)
