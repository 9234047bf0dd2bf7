"""From token ids to strings, for feature maps that read text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from ebft.errors import UsageError
from ebft.features.contract import FeatureMap, check_context_tokens, context_window

Texts = list[list[str | None]]
TextFunction = Callable[[list[str]], Tensor]


class Decoder(Protocol):
    """What is needed of a tokenizer; every transformers tokenizer has it."""

    def decode(self, ids: list[int], *, skip_special_tokens: bool, clean_up_tokenization_spaces: bool) -> str:
        """The text of a list of ids."""
        ...


def check_decoder(tokenizer: object) -> None:
    """Refuse what has no ``decode``."""
    if not callable(getattr(tokenizer, "decode", None)):
        raise UsageError(
            f"tokenizer {tokenizer!r} cannot decode, and these features are of text: expected the policy's tokenizer,"
            " with decode(ids, skip_special_tokens=, clean_up_tokenization_spaces=)"
        )


def decode_text(tokenizer: Decoder, ids: list[int]) -> str:
    """The text of `ids` without special tokens; bytes that make no character come out as the replacement character.

    Raises:
        UsageError: the tokenizer cannot decode these ids.
    """
    try:
        text = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    except (TypeError, ValueError, KeyError, IndexError, OverflowError, NotImplementedError) as error:
        raise UsageError(f"tokenizer {type(tokenizer).__name__} cannot decode the ids {ids}: {error}") from error
    # Half a surrogate pair, which some byte-level tokenizers emit, is no text: encoders raise on it.
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def continuation_texts(
    tokenizer: Decoder,
    tokens: Tensor,
    mask: Tensor,
    anchors: Tensor,
    anchor_mask: Tensor,
    rollout_tokens: Tensor,
    rollout_mask: Tensor,
    target_tokens: Tensor,
    target_mask: Tensor,
    *,
    context_tokens: int = 0,
    document_ids: Tensor | None = None,
) -> tuple[Texts, Texts]:
    """The strings of all rollouts and targets, one list per sequence; None at masked anchors.

    Each continuation is decoded together with the last `context_tokens` tokens of its own context, in one piece, so
    that a character whose bytes are split between them comes out whole; bytes that make no character come out as
    the replacement character. Special tokens are dropped: to a text encoder ``<|im_end|>`` is noise. A rollout that
    ends at once is the empty string, which is a text like any other.

    Args:
        tokenizer: decodes ids; the other arguments are those of a feature map (shapes in ``FeatureMap``).

    Returns:
        Rollout texts [B][K·N] and target texts [B][K].
    """
    context, context_mask = context_window(tokens, mask, anchors, count=context_tokens, document_ids=document_ids)

    def decode(prefix: list[int], ids: Tensor, keep: Tensor) -> str:
        return decode_text(tokenizer, [*prefix, *ids[keep].tolist()])

    context, context_mask, rollout_tokens, rollout_mask, target_tokens, target_mask, anchor_mask = (
        x.cpu() for x in (context, context_mask, rollout_tokens, rollout_mask, target_tokens, target_mask, anchor_mask)
    )
    batch, anchor_count, rollouts = rollout_tokens.shape[:3]
    rollout_texts: Texts = [[None] * (anchor_count * rollouts) for _ in range(batch)]
    target_texts: Texts = [[None] * anchor_count for _ in range(batch)]
    for b, k in anchor_mask.nonzero().tolist():
        prefix = context[b, k][context_mask[b, k]].tolist()
        target_texts[b][k] = decode(prefix, target_tokens[b, k], target_mask[b, k])
        for n in range(rollouts):
            rollout_texts[b][k * rollouts + n] = decode(prefix, rollout_tokens[b, k, n], rollout_mask[b, k, n])
    return rollout_texts, target_texts


def distinct_texts(*texts: Sequence[str | None]) -> list[str]:
    """Every string once, short ones first (little padding in a batch), in an order that depends on nothing else."""
    return sorted({text for group in texts for text in group if text is not None}, key=lambda text: (len(text), text))


def embed_texts(function: TextFunction, texts: list[str]) -> dict[str, Tensor]:
    """Apply `function` to distinct `texts`: a vector [D], float32, for each.

    Raises:
        UsageError: the function does not return one vector per string.
    """
    features = torch.as_tensor(function(texts)).float()
    if features.ndim != 2 or len(features) != len(texts):
        raise UsageError(
            f"the text function returned shape {list(features.shape)} for {len(texts)} strings:"
            f" expected [{len(texts)}, D]"
        )
    return dict(zip(texts, features, strict=True))


def stack_vectors(vectors: Sequence[Tensor | None], dimension: int, device: torch.device) -> Tensor:
    """Vectors [D] stacked to [M,D] on `device`, zeros for None."""
    zeros = torch.zeros(dimension)
    rows = [zeros if vector is None else vector.to(zeros.device) for vector in vectors]
    return torch.stack(rows).to(device)


def from_text_function(function: TextFunction, tokenizer: Decoder, *, context_tokens: int = 0) -> FeatureMap:
    """A feature map out of a function of strings.

    Args:
        function: takes a list of M distinct strings and returns features [M,D].
        tokenizer: turns token ids into strings; special tokens are dropped, see :func:`continuation_texts`.
        context_tokens: how many tokens of the anchor's context to put in front of each continuation.

    Raises:
        UsageError: `context_tokens` is negative; the tokenizer cannot decode; or, when called, the function returns
            another shape.
    """
    check_context_tokens(context_tokens)
    check_decoder(tokenizer)

    @torch.no_grad()
    def embed(
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
        rollout, target = continuation_texts(
            tokenizer, tokens, mask, anchors, anchor_mask,
            rollout_tokens, rollout_mask, target_tokens, target_mask,
            context_tokens=context_tokens, document_ids=document_ids,
        )  # fmt: skip
        # Without any real anchor the function is still asked once, for D.
        table = embed_texts(function, distinct_texts(*rollout, *target) or [""])
        dimension = len(next(iter(table.values())))

        def features(texts: Texts) -> Tensor:
            vectors = [None if text is None else table[text] for row in texts for text in row]
            return stack_vectors(vectors, dimension, tokens.device)

        rollout_shape = rollout_tokens.shape[:-1]
        return (
            features(rollout).view(*rollout_shape, dimension),
            features(target).view(*rollout_shape[:-1], dimension),
        )

    return embed
