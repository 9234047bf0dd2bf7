"""Objectives: from features to a loss, one pure function of tensors per step.

=================== =========================================================================================
module              what it holds
=================== =========================================================================================
``moments``         feature-matching reward and loss (the paper's)
``kernels``         the same under any kernel: kernel scores
``baselines``       rewards to advantages
``policy_gradient`` advantages to terms of a loss
``kl``              divergence from a reference
``cross_entropy``   cross-entropy on the data
``losses``          ``EBFTLoss``, the sum of the three, as a torchrl module
=================== =========================================================================================

``cross_entropy.cross_entropy`` is not re-exported: the function would hide the module of that name.
"""

from typing import TYPE_CHECKING, Any

from ebft.objectives.baselines import advantage
from ebft.objectives.kernels import kernel_score_reward, kernel_values
from ebft.objectives.kl import AdaptiveKL, ConstantKL, KLController, exact_kl, kl_estimate
from ebft.objectives.moments import (
    conditional_feature_matching_loss,
    distinct_rollouts,
    feature_matching_reward,
    moment_values,
)
from ebft.objectives.policy_gradient import cispo, clipped, reinforce, sequence_clipped

if TYPE_CHECKING:
    from ebft.objectives.losses import EBFTLoss, totals

__all__ = [
    "AdaptiveKL",
    "ConstantKL",
    "EBFTLoss",
    "KLController",
    "advantage",
    "cispo",
    "clipped",
    "conditional_feature_matching_loss",
    "distinct_rollouts",
    "exact_kl",
    "feature_matching_reward",
    "kernel_score_reward",
    "kernel_values",
    "kl_estimate",
    "moment_values",
    "reinforce",
    "sequence_clipped",
    "totals",
]


def __getattr__(name: str) -> Any:
    """EBFTLoss and totals on first use: they are the only part that imports torchrl."""
    if name in ("EBFTLoss", "totals"):
        from ebft.objectives import losses

        return getattr(losses, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
