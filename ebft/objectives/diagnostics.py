"""How good a gradient estimator is, measured on repeated draws of it."""

from __future__ import annotations

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
