"""Examples to rows of tokens: packed for training on answers, or one prompt a row for sampling whole answers.

Prompt and answer become tokens apart from each other, so that the prompt's tokens are the same in training, where the
answer follows, and in sampling, where it does not. As in `packing.pack`, no special tokens are added but EOS and those
of the chat template.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from tensordict import TensorDict
from transformers import PreTrainedTokenizerBase

from ebft.data.examples import Example
from ebft.data.packing import content_hash, padding_id
from ebft.errors import UsageError
from ebft.schema import ANSWER_MASK, DOCUMENT_IDS, EXAMPLE, MASK, SEQUENCE_IDS, TOKENS

OPEN_ROWS = 64  # rows that a next example may still go into: keeps packing linear in the number of examples


@dataclass(frozen=True)
class Tokenised:
    """The tokens of an example, and its number in the list it came from."""

    example: int
    prompt: list[int]
    answer: list[int]


def tokenise(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, *, chat: bool = False, eos: bool = True
) -> list[Tokenised]:
    """Tokens of every prompt and, with EOS at its end, of every answer.

    Args:
        chat: put prompts as a user's message into the tokenizer's chat template; the answer follows as it is.

    Raises:
        UsageError: there is nothing to tokenise, or the tokenizer has no chat template or EOS token that is asked for.
    """
    if not examples:
        raise UsageError("there are no examples to tokenise: give at least one")
    if eos and tokenizer.eos_token_id is None:
        raise UsageError("eos=True, but the tokenizer has no EOS token: pass eos=False or set tokenizer.eos_token")
    prompts = [_chat(example.prompt, tokenizer) if chat else example.prompt for example in examples]
    encoded = [_encode(texts, tokenizer) for texts in (prompts, [example.answer for example in examples])]
    end = [tokenizer.eos_token_id] if eos else []
    return [Tokenised(i, prompt, answer + end) for i, (prompt, answer) in enumerate(zip(*encoded, strict=True))]


def pack_examples(
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    *,
    length: int,
    chat: bool = False,
    eos: bool = True,
) -> TensorDict:
    """Pack whole examples into rows, each into the first row with room for it.

    An example that is longer than a row has one of its own and loses the end of its answer, with EOS; one whose prompt
    leaves no room for an answer is left out. `count_unfit` counts both.

    Args:
        length: T, tokens in a row.
        chat, eos: as in `tokenise`.

    Returns:
        TensorDict of batch size [B], B = the rows of the whole set, as `packing.pack` gives it:
        tokens [B, T] int64, right-padded;
        mask [B, T] bool, False on padding;
        answer_mask [B, T] bool, True on answers and their EOS;
        document_ids [B, T] int64, the number of each token's example, -1 on padding;
        sequence_ids [B] int64, a hash of the row's tokens.

    Raises:
        UsageError: what `tokenise` raises, or no prompt leaves room for an answer.
    """
    pieces = [piece for piece in tokenise(examples, tokenizer, chat=chat, eos=eos) if len(piece.prompt) < length]
    if not pieces:
        raise UsageError(
            f"length={length}: none of the {len(examples)} prompts leaves room for an answer. Give more tokens to a row"
        )
    rows = _first_fit(pieces, length)
    tokens = torch.full((len(rows), length), padding_id(tokenizer))
    answer_mask = torch.zeros(len(rows), length, dtype=torch.bool)
    document_ids = torch.full((len(rows), length), -1)
    for r, row in enumerate(rows):
        at = 0
        for piece in row:
            whole = (piece.prompt + piece.answer)[:length]
            tokens[r, at : at + len(whole)] = torch.tensor(whole)
            answer_mask[r, at + len(piece.prompt) : at + len(whole)] = True
            document_ids[r, at : at + len(whole)] = piece.example
            at += len(whole)
    return _rows(tokens, document_ids >= 0, {ANSWER_MASK: answer_mask, DOCUMENT_IDS: document_ids})


def prompt_rows(
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    *,
    length: int,
    chat: bool = False,
    answers: bool = False,
) -> TensorDict:
    """A prompt a row, for sampling whole answers and verifying them; longer prompts than `length` are left out.

    Args:
        length: the most tokens that a row may have; T is the longest one's.
        answers: the example's answer with EOS follows the prompt, its end cut off where it does not fit; prompts that
            leave no room for any of it are left out, see `count_unfit`.

    Returns:
        TensorDict of batch size [B]: tokens [B, T] int64, right-padded; mask [B, T] bool; sequence_ids [B] int64;
        example [B] int64, the place in `examples` where the answer and the tests are; with `answers` answer_mask
        [B, T] bool, True on answers and their EOS.

    Raises:
        UsageError: what `tokenise` raises, or no prompt is short enough.
    """
    # An empty prompt has no token to predict from.
    room = length - 1 if answers else length
    tokenised = tokenise(examples, tokenizer, chat=chat, eos=answers)
    pieces = [piece for piece in tokenised if 0 < len(piece.prompt) <= room]
    if not pieces:
        raise UsageError(f"length={length}: all {len(examples)} prompts are longer. Allow more tokens")
    wholes = [(piece.prompt + piece.answer * answers)[:length] for piece in pieces]
    tokens = torch.full((len(pieces), max(map(len, wholes))), padding_id(tokenizer))
    mask, answer_mask = (torch.zeros_like(tokens, dtype=torch.bool) for _ in range(2))
    for r, (piece, whole) in enumerate(zip(pieces, wholes, strict=True)):
        tokens[r, : len(whole)] = torch.tensor(whole)
        mask[r, : len(whole)] = True
        answer_mask[r, len(piece.prompt) : len(whole)] = True
    marked = {ANSWER_MASK: answer_mask} if answers else {}
    return _rows(tokens, mask, {**marked, EXAMPLE: torch.tensor([piece.example for piece in pieces])})


def count_unfit(
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    *,
    length: int,
    chat: bool = False,
    eos: bool = True,
) -> tuple[int, int]:
    """How many examples `pack_examples` leaves out, and of how many more it cuts the answer."""
    pieces = tokenise(examples, tokenizer, chat=chat, eos=eos)
    without = sum(len(piece.prompt) >= length for piece in pieces)
    return without, sum(len(piece.prompt) + len(piece.answer) > length for piece in pieces) - without


def _chat(prompt: str, tokenizer: PreTrainedTokenizerBase) -> str:
    if not tokenizer.chat_template:
        raise UsageError("chat=True, but the tokenizer has no chat template: the model was not trained to chat")
    messages = [{"role": "user", "content": prompt}]
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)  # type: ignore[return-value]


def _encode(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    return tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]


def _first_fit(pieces: Sequence[Tokenised], length: int) -> list[list[Tokenised]]:
    """Rows of pieces, in the order in which rows were begun."""
    rows: list[list[Tokenised]] = []
    room: list[tuple[int, int]] = []  # (tokens free, row), of rows that are not full
    for piece in pieces:
        size = min(len(piece.prompt) + len(piece.answer), length)
        for number, (free, row) in enumerate(room):
            if size <= free:
                rows[row].append(piece)
                room[number] = (free - size, row)
                break
        else:
            rows.append([piece])
            room.append((length - size, len(rows) - 1))
        room = [(free, row) for free, row in room[-OPEN_ROWS:] if free > 2]
    return rows


def _rows(tokens: torch.Tensor, mask: torch.Tensor, more: dict[str, torch.Tensor]) -> TensorDict:
    ids = [content_hash(row[real].numpy()) for row, real in zip(tokens, mask, strict=True)]
    return TensorDict(
        {TOKENS: tokens, MASK: mask, **more, SEQUENCE_IDS: torch.tensor(ids, dtype=torch.int64)},
        batch_size=[len(tokens)],
    )
