"""Signal and noise of stochastic gradients from their inner products: pairwise estimators and the jackknife.

A gradient g = μ + s + e has a mean μ over everything, a part s that the sequences of the batch bring and a part e of
the rollouts. Batches are independent, and every batch has R replicates: the same sequences, rollouts drawn again. Then

    signal²  ‖μ‖²            = E⟨g_i, g_j⟩           over different batches,
    within²  ‖μ‖² + E‖s‖²    = E⟨g_ir, g_is⟩         over different replicates of one batch,
    square   all of it       = E‖g‖²,

each estimated without bias by its average (a U-statistic); none needs the mean. The signal-to-noise² of a batch is
signal²/(square - signal²), of the rollouts of given sequences within²/(square - within²).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from scipy.stats import t as student
from torch import Tensor

from ebft.errors import UsageError


class Moments(NamedTuple):
    """Averages of inner products between the gradients of C configurations."""

    cross: Tensor  # [C,C] over different batches
    within: Tensor  # [C,C] over different replicates of one batch; NaN for one replicate
    square: Tensor  # [C] of a gradient with itself


class Estimate(NamedTuple):
    """A value with its jackknife standard error and the bounds of its interval."""

    value: float
    error: float
    low: float
    high: float


def moments(gram: Tensor) -> Moments:
    """The unbiased averages of inner products.

    Args:
        gram: [C,M,R,C,M,R] float64, of C configurations, M batches and R replicates.

    Raises:
        UsageError: another shape, or fewer than 2 batches.
    """
    if gram.ndim != 6 or gram.shape[:3] != gram.shape[3:]:
        raise UsageError(f"gram has shape {list(gram.shape)}; expected [C,M,R,C,M,R]")
    _, batches, replicates = gram.shape[:3]
    if batches < 2:
        raise UsageError(f"{batches} batch: signal is what independent batches share; give 2 or more")
    by_batch = gram.mean((2, 5))  # [C,M,C,M]
    same = by_batch.diagonal(dim1=1, dim2=3).sum(-1)
    cross = (by_batch.sum((1, 3)) - same) / (batches * (batches - 1))
    own = gram.diagonal(dim1=1, dim2=4)  # [C,R,C,R,M]
    paired = own.diagonal(dim1=1, dim2=3).sum((-1, -2))  # [C,C]: the same replicate
    pairs = batches * replicates * (replicates - 1)
    within = (own.sum((1, 3, 4)) - paired) / pairs if pairs else torch.full_like(cross, math.nan)
    return Moments(cross, within, paired.diagonal() / (batches * replicates))


def jackknife(gram: Tensor, statistic: Callable[[Moments], Tensor], *, level: float = 0.95) -> list[Estimate]:
    """A statistic of the moments with intervals from leaving out one batch at a time.

    The errors are those of sums of products, for which the jackknife is too wide where the signal is weak: there it
    doubles the variance (Efron and Stein, "The jackknife estimate of variance", Annals of Statistics 1981), so that
    intervals are up to √2 longer than they need be.

    Args:
        gram: as in :func:`moments`, of 3 batches or more.
        statistic: from moments to values [S].
        level: of the interval value ± t·error with Student's t of M-1 degrees of freedom.

    Returns:
        An estimate for each of the S values; the value is that of all batches.
    """
    batches = gram.shape[1]
    if batches < 3:
        raise UsageError(f"{batches} batches: an interval needs 3 or more")
    value = statistic(moments(gram))
    left_out = []
    for batch in range(batches):
        kept = [i for i in range(batches) if i != batch]
        left_out.append(statistic(moments(gram[:, kept][:, :, :, :, kept])))
    parts = torch.stack(left_out)
    error = ((batches - 1) / batches * (parts - parts.mean(0)).square().sum(0)).sqrt()
    reach = float(student.ppf((1 + level) / 2, batches - 1)) * error
    return [Estimate(*row) for row in torch.stack([value, error, value - reach, value + reach], -1).tolist()]


def signal_to_noise(m: Moments) -> Tensor:
    """[C]: ‖μ‖²/(E‖g‖² - ‖μ‖²) of a batch."""
    signal = m.cross.diagonal()
    return signal / (m.square - signal)


def signal_to_noise_within(m: Moments) -> Tensor:
    """[C]: the same for given sequences, with only their rollouts drawn anew; infinite where nothing is drawn."""
    signal = m.within.diagonal()
    noise = m.square - signal
    drawn = noise > 1e-9 * m.square
    return torch.where(drawn, signal / torch.where(drawn, noise, 1.0), torch.inf)


def cosine(m: Moments, other: int) -> Tensor:
    """[C]: cosine between the mean gradients of each configuration and of `other`; NaN where a norm is not positive."""
    return _cosine(m.cross, other)


def cosine_within(m: Moments, other: int) -> Tensor:
    """[C]: the same from replicates of the same sequences: their mean gradients, averaged over batches."""
    return _cosine(m.within, other)


def single_cosine(m: Moments, other: int) -> Tensor:
    """[C]: E⟨g, μ'⟩/(√E‖g‖² ‖μ'‖), how far one batch's gradient points along the mean gradient of `other`."""
    return m.cross[:, other] / (m.square * m.cross[other, other]).sqrt()


def towards(m: Moments, other: int) -> Tensor:
    """[C]: signal-to-noise² along the mean gradient of `other`, ⟨μ,μ'⟩²/(‖μ'‖² (E‖g‖² - ‖μ‖²)), signed.

    What counts when configurations are to make progress on the same objective: signal across it is of no use.
    """
    along = m.cross[:, other]
    return along * along.abs() / (m.cross[other, other] * (m.square - m.cross.diagonal()))


def towards_within(m: Moments, other: int) -> Tensor:
    """[C]: the same for given sequences: along their own mean gradient of `other`, against the noise of rollouts."""
    along, noise = m.within[:, other], m.square - m.within.diagonal()
    drawn = noise > 1e-9 * m.square
    value = along * along.abs() / (m.within[other, other] * torch.where(drawn, noise, 1.0))
    return torch.where(drawn, value, torch.inf)


def _cosine(products: Tensor, other: int) -> Tensor:
    own = products.diagonal()
    square = own * own[other]
    return torch.where((own > 0) & (own[other] > 0), products[:, other] / square.abs().sqrt(), torch.nan)
