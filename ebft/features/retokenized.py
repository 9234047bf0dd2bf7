"""Hidden states of a model that has another tokenizer than the policy: the text is decoded and tokenised again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ebft.errors import UsageError
from ebft.features.contract import FeatureMap, context_window, own_masks
from ebft.features.hidden import Backbone, layer_joiner, layer_numbers, pool_layers
from ebft.features.pooling import OF_ANY_LENGTH, WITH_CONTEXT, check_pooling, mean
from ebft.features.text import Decoder, check_decoder, decode_text, stack_vectors
from ebft.rows import batches_by_length


class EndingDecoder(Decoder, Protocol):
    """A decoder with a token that ends a text; every transformers tokenizer is one."""

    eos_token_id: int | None


class Row(NamedTuple):
    """A prefix with its continuation, in the backbone's tokens; `own` tells those of the continuation, `text` those
    that stand for text or an end (not the token that some models want at the start)."""

    tokens: tuple[int, ...]
    own: tuple[bool, ...]
    text: tuple[bool, ...]


def retokenized_hidden(
    backbone: Backbone,
    tokenizer: Any,
    decoder: EndingDecoder,
    *,
    layers: Sequence[int | float] | str = (0.25, 0.5, 0.75),
    normalization: str = "layer",
    pooling: str = "last",
) -> FeatureMap:
    """``ebft.features.hidden.hidden`` for a backbone whose token ids mean other text than the policy's.

    Each continuation is decoded together with its whole prefix, inside its document, and the text is encoded in one
    piece, as the backbone would meet it. What is pooled are the backbone's tokens that hold a character of the
    continuation: the first of them may begin in the prefix. The policy's EOS becomes the backbone's EOS, which belongs
    to the continuation; other special tokens are no text and are dropped; a token that the tokenizer puts at the start
    of every text stands there. A continuation without any token of text gets zeros.

    The tokens of a prefix depend on what follows it, so nothing is shared between rollouts: the cost is one forward
    pass for every distinct prefix with continuation, as with the kernel ``rows``.

    Args:
        backbone: the frozen network; its rows are embedded as sequences without anchors.
        tokenizer: the backbone's, a fast one of transformers.
        decoder: the policy's tokenizer.
        layers, normalization: as of ``hidden``.
        pooling: one of ``pooling.OF_ANY_LENGTH``, since continuations have any number of the backbone's tokens.

    Raises:
        UsageError: as ``hidden``; a pooling that keeps tokens apart; a tokenizer that cannot decode, or that cannot
            tell which characters its tokens stand for; ends of text that the backbone has no token for.
    """
    wanted = layer_numbers(layers, backbone.num_layers)
    join_layers = layer_joiner(normalization, average=layers == "mean")
    check_pooling(
        pooling, OF_ANY_LENGTH, " a backbone with another tokenizer, which has another number of tokens for each text"
    )
    encode = _encoder(tokenizer, decoder)

    def features(rows: list[Row], device: torch.device) -> Tensor:
        """[R,D]."""
        width = max(len(row.tokens) for row in rows)

        def padded(name: str, filler: int | bool) -> Tensor:
            lists = [[*getattr(row, name), *[filler] * (width - len(row.tokens))] for row in rows]
            return torch.tensor(lists, device=device)

        tokens, own, text = padded("tokens", 0), padded("own", False), padded("text", False)
        real = torch.tensor([[True] * len(r.tokens) + [False] * (width - len(r.tokens)) for r in rows], device=device)
        nothing, no_anchor = (
            tokens.new_zeros(len(rows), 1, 1, 0),
            torch.zeros(len(rows), 1, dtype=torch.bool, device=device),
        )
        _, trunk = backbone.hidden_states(
            tokens, real, tokens.new_ones(len(rows), 1), no_anchor, nothing, nothing.bool(),
            layers=sorted(set(wanted)),
        )  # fmt: skip
        states = [trunk[layer] for layer in wanted]
        if pooling == WITH_CONTEXT:
            return mean(join_layers(states), text & own.any(-1, keepdim=True))
        return pool_layers(states, own, join_layers, how=pooling)

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
        rollout_mask, target_mask = own_masks(anchor_mask, rollout_mask, target_mask)
        longest = int(torch.where(anchor_mask, anchors, 1).max())
        context, context_mask = context_window(tokens, mask, anchors, count=longest, document_ids=document_ids)
        both = torch.cat([rollout_tokens, target_tokens[:, :, None]], 2)  # [B,K,N+1,G]
        own = torch.cat([rollout_mask, target_mask[:, :, None]], 2)
        rows: list[Row | None] = []
        for valid, prefix, real, continuations, keeps in zip(
            anchor_mask.flatten().tolist(),
            *(x.flatten(0, 1).cpu() for x in (context, context_mask, both, own)),
            strict=True,
        ):
            ids = prefix[real].tolist()
            rows += [
                encode(ids, line[keep].tolist()) if valid and keep.any() else None
                for line, keep in zip(continuations, keeps, strict=True)
            ]
        known: dict[Row, Tensor] = {}
        for batch in batches_by_length(list({row for row in rows if row}), lambda row: len(row.tokens)):
            known |= zip(batch, features(batch, tokens.device).cpu(), strict=True)
        if not known:  # without any real anchor one token tells D
            dimension = features([Row((0,), (True,), (True,))], tokens.device).shape[-1]
        else:
            dimension = len(next(iter(known.values())))
        vectors = stack_vectors([row and known[row] for row in rows], dimension, tokens.device)
        vectors = vectors.view(*both.shape[:-1], dimension)
        return vectors[:, :, :-1], vectors[:, :, -1]

    return embed


def _encoder(tokenizer: Any, decoder: EndingDecoder):
    """(prefix ids, continuation ids) of the policy -> Row of the backbone."""
    check_decoder(decoder)
    if not getattr(tokenizer, "is_fast", False):
        raise UsageError(
            f"the backbone's tokenizer {type(tokenizer).__name__} does not tell which characters its tokens stand for:"
            " expected a fast tokenizer of transformers, or a backbone with the policy's tokenizer"
        )
    end = getattr(decoder, "eos_token_id", None)
    if end is not None and tokenizer.eos_token_id is None:
        raise UsageError(
            f"the policy ends texts with token {end}, but the backbone's tokenizer has no EOS token: set its eos_token,"
            " or use another backbone"
        )
    beginning = tokenizer("a").input_ids
    start = [tokenizer.bos_token_id] if beginning and beginning[0] == tokenizer.bos_token_id else []

    def encode(prefix: list[int], own: list[int]) -> Row:
        tokens, belongs = list(start), [False] * len(start)
        for piece, offset in _pieces([*prefix, *own], end):
            if piece == [end]:
                tokens.append(tokenizer.eos_token_id)
                belongs.append(offset >= len(prefix))
                continue
            before = piece[: max(0, len(prefix) - offset)]
            text = decode_text(decoder, piece)
            # A character whose bytes are split over the border is the continuation's.
            border = len(text) if before == piece else _shared(decode_text(decoder, before), text)
            found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
            tokens += found.input_ids
            belongs += [last > border for _, last in found.offset_mapping]
        return Row(tuple(tokens), tuple(belongs), tuple(i >= len(start) for i in range(len(tokens))))

    return encode


def _shared(left: str, right: str) -> int:
    """Characters that both texts begin with."""
    return next((i for i, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), min(len(left), len(right)))


def _pieces(ids: list[int], end: int | None) -> Iterator[tuple[list[int], int]]:
    """The ids between the tokens `end`, and these alone, each with the place where it starts."""
    start = 0
    for place, token in enumerate(ids):
        if token == end:
            if place > start:
                yield ids[start:place], start
            yield [token], place
            start = place + 1
    if start < len(ids):
        yield ids[start:], start
