"""Packing: documents to rows of tokens of equal length, and the order in which a run sees the rows."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from tensordict import TensorDict, TensorDictBase
from transformers import PreTrainedTokenizerBase

from ebft.data.documents import Document
from ebft.errors import UsageError
from ebft.schema import DOCUMENT_IDS, MASK, SEQUENCE_IDS, TOKENS

# Documents that are tokenised at once: a tokenizer's own record of a text takes many times the memory of its tokens.
DOCUMENTS_AT_ONCE = 64


def pack(
    documents: Sequence[Document], tokenizer: PreTrainedTokenizerBase, *, length: int, eos: bool = True
) -> TensorDict:
    """Tokenise documents, join them and cut the stream into rows; every token lands in exactly one row.

    A row may hold the end of one document and the start of others, and a long document spans several rows. Names of
    special tokens in a text are read as those tokens; no others are added but EOS.

    A row's sequence id is a hash of its unmasked tokens, not its index, because sampling keys its random numbers by
    it: a row draws the same rollouts wherever it stands, in whatever subset, order or batch, and rows before an added
    document keep theirs. Rows with equal tokens share an id, hence their random numbers.

    Args:
        length: T, tokens in a row, at least 2 (a single token has nothing to predict).
        eos: end every document with the tokenizer's EOS token, which belongs to the document it ends.

    Returns:
        TensorDict of batch size [B], B = the rows of the whole set, with
        tokens [B, T] int64, the last row right-padded;
        mask [B, T] bool, False on padding;
        document_ids [B, T] int64, the index of each token's document, -1 on padding;
        sequence_ids [B] int64, not negative.

    Raises:
        UsageError: no tokens to pack, `length` below 2, or no EOS token in the tokenizer.
    """
    if length < 2:
        raise UsageError(f"length={length}: a row needs at least 2 tokens")
    if eos and tokenizer.eos_token_id is None:
        raise UsageError("eos=True, but the tokenizer has no EOS token: pass eos=False or set tokenizer.eos_token")
    stream, document_ids = _tokenise(documents, tokenizer, [tokenizer.eos_token_id] if eos else [])
    if not stream.size:
        raise UsageError(f"there is nothing to pack: {len(documents)} documents hold no tokens")
    padding = -stream.size % length
    mask = np.pad(np.ones(stream.size, dtype=bool), (0, padding)).reshape(-1, length)
    tokens = np.pad(stream, (0, padding), constant_values=padding_id(tokenizer)).reshape(-1, length)
    documents_of = np.pad(document_ids, (0, padding), constant_values=-1).reshape(-1, length)
    sequence_ids = [content_hash(row[real]) for row, real in zip(tokens, mask, strict=True)]
    return TensorDict(
        {
            TOKENS: torch.from_numpy(tokens),
            MASK: torch.from_numpy(mask),
            DOCUMENT_IDS: torch.from_numpy(documents_of),
            SEQUENCE_IDS: torch.tensor(sequence_ids, dtype=torch.int64),
        },
        batch_size=[len(tokens)],
    )


def batches(data: TensorDictBase, *, batch_size: int, seed: int, start: int = 0) -> Iterator[TensorDictBase]:
    """Endless batches of rows, in an order that depends on (data size, batch_size, seed) alone.

    Every epoch is a new permutation of the rows; the rows that do not fill a last batch sit that epoch out. Batch
    number i is the same whether the iterator started at 0 or at i, so a resumed run needs only its step.

    Args:
        data: batch size [M].
        start: number of the first batch, counted from 0 at the beginning of the run.

    Returns:
        Iterator of TensorDicts of batch size [B], B = `batch_size`.

    Raises:
        UsageError: `batch_size` not in 1..M, or a negative `start`.
    """
    rows = len(data)
    if not 1 <= batch_size <= rows:
        raise UsageError(f"batch_size={batch_size}: expected 1 to {rows}, the number of rows in the data")
    if start < 0:
        raise UsageError(f"start={start}: expected the number of a batch, 0 or more")
    return _batches(data, batch_size, seed, start)  # a function of its own, so that bad input raises at the call


def _batches(data: TensorDictBase, batch_size: int, seed: int, start: int) -> Iterator[TensorDictBase]:
    per_epoch = len(data) // batch_size
    epoch, first = divmod(start, per_epoch)
    while True:
        order = torch.randperm(len(data), generator=_epoch_generator(seed, epoch))
        for batch in range(first, per_epoch):
            yield data[order[batch * batch_size : (batch + 1) * batch_size]]
        epoch, first = epoch + 1, 0


def _epoch_generator(seed: int, epoch: int) -> torch.Generator:
    # Hashed, since seed + epoch would give run 1 in epoch 0 the order of run 0 in epoch 1.
    digest = hashlib.sha256(f"{seed} {epoch}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def _tokenise(
    documents: Sequence[Document], tokenizer: PreTrainedTokenizerBase, end: list[int]
) -> tuple[np.ndarray, np.ndarray]:
    """The stream of tokens [S] and the index of each token's document [S]."""
    if not documents:
        return np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64)
    pieces = []
    for start in range(0, len(documents), DOCUMENTS_AT_ONCE):
        encoded = tokenizer(
            [document.text for document in documents[start : start + DOCUMENTS_AT_ONCE]],
            add_special_tokens=False,
            return_attention_mask=False,
            verbose=False,  # else a document longer than the model's context draws a warning; the rows are not
        )["input_ids"]
        pieces += [np.array(ids + end, dtype=np.int64) for ids in encoded]
    lengths = [piece.size for piece in pieces]
    return np.concatenate(pieces), np.repeat(np.arange(len(pieces)), lengths)


def padding_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Any valid token serves, since the mask tells what is padding."""
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None:
            return token
    return 0


def content_hash(tokens: np.ndarray) -> int:
    """63 bits of a hash of the tokens, so that it fits an int64 as a non-negative number."""
    digest = hashlib.sha256(tokens.astype("<i8").tobytes()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
