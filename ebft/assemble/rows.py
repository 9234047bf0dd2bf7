"""From options to rows of training and held-out text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from tensordict import TensorDictBase

from ebft import schema
from ebft.data.documents import load_documents, split_documents
from ebft.data.packing import pack
from ebft.errors import UsageError
from ebft.samplers.anchors import strided


def read_documents(options: Mapping[str, Any]):
    """The training and the held-out documents of --data; needs no model, so a bad path is found at once."""
    return split_documents(load_documents(options["data"], text_field=options["text_field"]))


def pack_documents(
    documents, tokenizer, options: Mapping[str, Any], resolved: Mapping[str, Mapping]
) -> tuple[TensorDictBase, TensorDictBase]:
    """Training rows, and --held-out rows of held-out text: batch size [M].

    Raises:
        UsageError: fewer training rows than one batch.
    """
    train_rows, held_rows = (
        _usable(pack(part, tokenizer, length=options["length"]), options, resolved) for part in documents
    )
    if options["batch"] > len(train_rows):
        raise UsageError(
            f"--batch {options['batch']}: the training text gives only {len(train_rows)} sequences of"
            f" --length {options['length']}. Give more text, or a smaller batch or length"
        )
    return train_rows, _subset(held_rows, options["held_out"])


def _usable(rows: TensorDictBase, options: Mapping[str, Any], resolved: Mapping[str, Mapping]) -> TensorDictBase:
    """The rows in which at least one anchor fits, so that no batch is without one."""
    placement = {"stride": 1, "first": resolved["sampler"]["first"], "horizon": options["horizon"]}
    _, anchor_mask = strided(rows[schema.MASK], document_ids=rows[schema.DOCUMENT_IDS], **placement)
    return rows[anchor_mask.any(1)]


def _subset(rows: TensorDictBase, count: int) -> TensorDictBase:
    """`count` rows, the same ones for every seed, spread over the whole held-out text."""
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))
    return rows[order[:count]]
