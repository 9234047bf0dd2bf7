"""What is measured: totals over units, and what is computed from them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ebft.loops.evaluation.answers import corpus_bleu

ALL, ANSWERS = "all", "answers"
CROSS_ENTROPY, PERPLEXITY = "cross_entropy", "perplexity"
MATCHING, ALIGNMENT, SIMILARITY, REWARD = "feature_matching_loss", "alignment", "similarity", "reward"
DISTINCT, DUPLICATES, COPIES = "distinct_rollouts", "duplicate_rollouts", "copies_of_the_target"
ENTROPY, SURPRISAL, GAP, DRIFT = "entropy", "surprisal", "entropy_gap", "entropy_drift"
GENERATED, DATA = "generated", "data"
GREEDY = "greedy"  # of the one answer at temperature 0
BLEU, BLEU_STATISTICS = "corpus_bleu", "bleu_statistics"


class Quantity(NamedTuple):
    """A name, what it is of (a feature map, a kind of tokens), and where (a horizon, a place, a k)."""

    metric: str
    of: str = ""
    at: int | None = None


# Quantity -> what every unit adds to its sum and to its count, [M] float64 each; the value is sum over count.
Totals = Mapping[Quantity, tuple[Tensor, Tensor]]


def per_unit(values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Sum and count of `values` [B,...] where `mask` [B,...], for each of B units, float64 on the CPU."""
    total = torch.where(mask, values.double(), 0.0).flatten(1).sum(1)
    return total.cpu(), mask.flatten(1).sum(1).double().cpu()


def concatenate(parts: Sequence[Totals]) -> dict[Quantity, tuple[Tensor, Tensor]]:
    """Totals of all batches, units in their order."""
    return {q: (torch.cat([part[q][0] for part in parts]), torch.cat([part[q][1] for part in parts])) for q in parts[0]}


def derived(sums: Mapping[Quantity, Tensor], counts: Mapping[Quantity, Tensor]) -> dict[Quantity, Tensor]:
    """All values from totals over units, [...] each, in the order in which they are reported.

    The perplexity is e to the cross-entropy. The entropy gap at place k is the policy's entropy at the k-th generated
    token less that at the same place of the data; k = 1 has the same context, so the gap is 0 there. The drift is the
    slope of the least-squares line through that point, in nats per token (0 for a calibrated policy; Braverman et al.,
    arXiv 1906.05664, find that it is above 0).
    """
    values: dict[Quantity, Tensor] = {}
    statistics: dict[str, list[Tensor]] = {}
    for quantity, total in sums.items():
        if quantity.metric == BLEU_STATISTICS:
            statistics.setdefault(quantity.of, []).append(total)
            continue
        values[quantity] = total / counts[quantity]
        if quantity.metric == CROSS_ENTROPY:
            values[quantity._replace(metric=PERPLEXITY)] = values[quantity].exp()
    for of, parts in statistics.items():
        values[Quantity(BLEU, of)] = corpus_bleu(torch.stack(parts, -1))
    gaps = {
        q.at: value - values[Quantity(ENTROPY, DATA, q.at)]
        for q, value in values.items()
        if q.metric == ENTROPY and q.of == GENERATED and q.at is not None
    }
    values.update({Quantity(GAP, at=k): gap for k, gap in gaps.items()})
    if len(gaps) > 1:
        squares = sum((k - 1) ** 2 for k in gaps)
        values[Quantity(DRIFT)] = torch.stack([(k - 1) * gap for k, gap in gaps.items()]).sum(0) / squares
    return values
