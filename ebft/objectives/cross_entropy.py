"""Cross-entropy on the tokens of the data: the L_CE of the mixed objective (arXiv 2603.12248, section 2)."""

from __future__ import annotations

import torch
from torch import Tensor

from ebft.errors import UsageError


def cross_entropy(
    token_log_prob: Tensor, mask: Tensor, answer_mask: Tensor | None = None, document_ids: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Cross-entropy of every predicted token, and which of them count.

    Args:
        token_log_prob: [B,T-1]; entry t is log p(tokens[t+1] | tokens[0:t+1]), with gradient.
        mask: [B,T] True on real tokens.
        answer_mask: [B,T] True on the tokens to learn; None learns all.
        document_ids: [B,T]; None means one document per row.

    Returns:
        Terms [B,T-1], minus the log-prob where the token counts and 0 elsewhere, and the mask of those that count.

    Raises:
        UsageError: shapes that disagree.
    """
    counted = prediction_mask(mask, answer_mask, document_ids)
    if token_log_prob.shape != counted.shape:
        raise UsageError(
            f"token_log_prob has shape {list(token_log_prob.shape)}, expected {list(counted.shape)}:"
            f" one entry per token of mask {list(mask.shape)} but the first"
        )
    return torch.where(counted, -token_log_prob, 0.0), counted


def prediction_mask(mask: Tensor, answer_mask: Tensor | None = None, document_ids: Tensor | None = None) -> Tensor:
    """Which tokens after the first are learnt: real, in an answer, and not the first of a document.

    The first token of a document has another document, or nothing, as its context.

    Args:
        mask: [B,T]; answer_mask: [B,T] or None; document_ids: [B,T] or None.

    Returns:
        Mask [B,T-1]; entry t is about token t+1.

    Raises:
        UsageError: shapes that disagree.
    """
    for name, value in (("answer_mask", answer_mask), ("document_ids", document_ids)):
        if value is not None and value.shape != mask.shape:
            raise UsageError(f"{name} has shape {list(value.shape)}, expected that of mask {list(mask.shape)}")
    counted = mask[:, 1:]
    if answer_mask is not None:
        counted = counted & answer_mask[:, 1:]
    if document_ids is not None:
        counted = counted & (document_ids[:, 1:] == document_ids[:, :-1])
    return counted
