"""How good a gradient estimator is, measured on repeated draws of it."""

from __future__ import annotations

from collections.abc import Sequence
from math import inf

from torch import Tensor

from ebft.errors import UsageError


def gradient_signal_to_noise(gradients: Tensor) -> Tensor:
    """‖E g‖² / E‖g - E g‖² of a gradient estimator, from M independent draws of it.

    Numerator and denominator are each estimated without bias: the variance with M - 1, and the squared norm of the
    mean less the share of the variance that is left in it, without which pure noise would look like signal. Of two
    unbiased estimators the one with the larger ratio needs the smaller batch. The estimate can be negative when there
    is little signal.

    Args:
        gradients: [M,P], one flat gradient a row, M ≥ 2.

    Returns:
        Ratio, a scalar; infinite when all draws are equal and not 0, not a number when all are 0.

    Raises:
        UsageError: another shape, or fewer than 2 draws.
    """
    if gradients.ndim != 2 or len(gradients) < 2:
        raise UsageError(f"gradients have shape {list(gradients.shape)}, expected [M,P] with M of at least 2")
    noise = gradients.var(0).sum()
    signal = gradients.mean(0).square().sum() - noise / len(gradients)
    return signal / noise


def signal_to_noise_of_sums(squared_norms: Sequence[float], shares: Sequence[float]) -> float:
    """The same of the gradient of one batch, from the norms of sums over parts of the batch, as its running sums are.

    For parts drawn independently and alike, the sum g_f of the parts that make up a share f of the batch has
    E‖g_f‖² = f² S + f V, with S = ‖E g‖² and V the variance of the whole batch's gradient. So ‖g_f‖² - f ‖g_1‖² has
    the expectation -f (1 - f) S, and S is estimated without bias from all f together (two of them are what McCandlish
    et al., arXiv 1812.06162, appendix A.1, use); V is what is left of ‖g_1‖². No gradient is kept. One batch says
    little: average signal and noise over many, or look at the running mean.

    Args:
        squared_norms: ‖g_f‖² of each sum, the last of them the whole batch's.
        shares: f of each sum, between 0 and 1, and 1 for the last; at least 2 of them.

    Returns:
        S / V; can be negative, and is infinite or not a number where V is 0.

    Raises:
        UsageError: fewer than 2 sums, another number of shares than of norms, or shares out of their range.
    """
    parts = all(0 < f < 1 for f in shares[:-1])
    if len(squared_norms) < 2 or len(shares) != len(squared_norms) or not parts or abs(shares[-1] - 1) > 1e-9:
        raise UsageError(
            f"norms of {len(squared_norms)} sums with shares {list(shares)}: expected 2 or more, with shares below 1"
            " but for the last, which is 1"
        )
    whole = squared_norms[-1]
    before = list(zip(squared_norms[:-1], shares[:-1], strict=True))
    signal = sum(f * whole - norm for norm, f in before) / sum(f * (1 - f) for _, f in before)
    noise = whole - signal
    return signal / noise if noise else signal * inf
