"""What whole answers are worth: pure functions of texts and of how they did."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ebft.errors import UsageError

BLEU_ORDERS = 4


def pass_at_k(passed: Tensor, *, k: int) -> Tensor:
    """Unbiased estimate of the chance that at least one of k answers passes (Chen et al., arXiv 2107.03374, (1)).

    1 - C(N-c, k) / C(N, k), c of the N answers passing.

    Args:
        passed: [...,N] bool, or 0 and 1.
        k: 1 to N.

    Returns:
        [...] float64.

    Raises:
        UsageError: `k` out of its range, or entries other than 0 and 1.
    """
    samples = _check_k(passed, k)
    if not ((passed == 0) | (passed == 1)).all():
        raise UsageError("pass_at_k: expected entries of 0 and 1; best_of_k takes any numbers")
    total = math.comb(samples, k)
    table = torch.tensor([1 - math.comb(samples - c, k) / total for c in range(samples + 1)], dtype=torch.float64)
    return table[passed.long().sum(-1)]


def best_of_k(values: Tensor, *, k: int) -> Tensor:
    """Unbiased estimate of the mean best of k answers: the mean of the best over all subsets of k.

    The i-th smallest of N is the best of C(i-1, k-1) subsets. Of 0 and 1 this is `pass_at_k`.

    Args:
        values: [...,N]; k: 1 to N.

    Returns:
        [...] float64.

    Raises:
        UsageError: `k` out of its range.
    """
    samples = _check_k(values, k)
    total = math.comb(samples, k)
    weights = torch.tensor([math.comb(i, k - 1) / total for i in range(samples)], dtype=torch.float64)
    return (values.double().cpu().sort(-1).values * weights).sum(-1)


def bleu_statistics(texts: Sequence[str], references: Sequence[str]) -> Tensor:
    """What every text adds to the BLEU of a corpus: [M,10] float64, for `corpus_bleu`.

    n-grams that are right for n = 1 to 4, all n-grams, and the lengths of text and reference, in tokens of sacrebleu's
    "13a".

    Raises:
        UsageError: not as many references as texts.
    """
    from sacrebleu.metrics import BLEU

    if len(texts) != len(references):
        raise UsageError(f"{len(texts)} texts but {len(references)} references; expected one for each text")
    metric = BLEU(effective_order=True)
    scores = [metric.sentence_score(text, [right]) for text, right in zip(texts, references, strict=True)]
    rows = [[*s.counts, *s.totals, s.sys_len, s.ref_len] for s in scores]
    return torch.tensor(rows, dtype=torch.float64).reshape(len(texts), 2 * BLEU_ORDERS + 2)


def corpus_bleu(statistics: Tensor) -> Tensor:
    """sacrebleu's BLEU of a corpus, in [0, 1], from summed `bleu_statistics`: [...,10] to [...] float64."""
    from sacrebleu.metrics import BLEU

    def one(row: list[int]) -> float:
        right, total, (length, reference) = row[:BLEU_ORDERS], row[BLEU_ORDERS:-2], row[-2:]
        return BLEU.compute_bleu(right, total, length, reference, smooth_method="exp").score / 100

    rows = statistics.round().long().reshape(-1, 2 * BLEU_ORDERS + 2).tolist()
    return torch.tensor([one(row) for row in rows], dtype=torch.float64).reshape(statistics.shape[:-1])


def _check_k(values: Tensor, k: int) -> int:
    samples = values.shape[-1]
    if not 1 <= k <= samples:
        raise UsageError(f"k={k}: expected 1 to {samples}, the number of answers to a prompt")
    return samples
