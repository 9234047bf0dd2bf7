"""Objectives: from features to a loss, one pure function of tensors per step.

=================== =========================================================================================
module              what it holds
=================== =========================================================================================
``moments``         feature-matching reward and loss (the paper's)
``kernels``         the same under any kernel: kernel scores
``baselines``       rewards to advantages
``scores``          the two together, per rollout or per token
``shaping``         what one may do to advantages
``policy_gradient`` advantages to terms of a loss
``kl``              divergence from a reference
``kl_controllers``  what sets its weight while training goes on
``cross_entropy``   cross-entropy on the data
``schedules``       weights of the loss as functions of the step
``losses``          ``EBFTLoss``, the sum of all terms, as a torchrl module
``counts``          what its terms are divided by
``energy``          the tilt of the reference that feature matching wants
``energy_reward``   such an energy as a reward, and as a file
``component``       features to advantages, as a step of a pipeline
``verifiers``       texts to rewards (exact match, BLEU, chrF, unit tests, one's own), as a step of a pipeline
``combine``         weighted sums of rewards, and a step made of several
``diagnostics``     how much of a gradient is signal
=================== =========================================================================================

``cross_entropy.cross_entropy`` and ``combine.combine`` are not re-exported: the functions would hide the modules of
these names.
"""

from typing import TYPE_CHECKING, Any

from ebft.objectives.baselines import advantage
from ebft.objectives.combine import weighted_sum
from ebft.objectives.counts import totals
from ebft.objectives.diagnostics import gradient_signal_to_noise, signal_to_noise_of_sums
from ebft.objectives.energy import LinearEnergy, effective_sample_size, fit_tilt, resample, tilt_log_weights
from ebft.objectives.energy_reward import energy_reward, load_energy, save_energy
from ebft.objectives.kernels import kernel_score_reward, kernel_values
from ebft.objectives.kl import exact_kl, kl_estimate, kl_penalty
from ebft.objectives.kl_controllers import AdaptiveKL, ConstantKL, KLController, StopAbove
from ebft.objectives.moments import (
    conditional_feature_matching_loss,
    distinct_rollouts,
    effective_rollouts,
    feature_matching_profile,
    feature_matching_proxy,
    feature_matching_reward,
    moment_values,
)
from ebft.objectives.policy_gradient import cispo, clipped, reinforce, sequence_clipped, truncated_weight
from ebft.objectives.schedules import schedule
from ebft.objectives.scores import rollout_scores, token_scores
from ebft.objectives.verifiers import bleu, chrf, exact_match, unit_tests, verifier

if TYPE_CHECKING:
    from ebft.objectives.losses import EBFTLoss

__all__ = [
    "AdaptiveKL",
    "ConstantKL",
    "EBFTLoss",
    "KLController",
    "LinearEnergy",
    "StopAbove",
    "advantage",
    "bleu",
    "chrf",
    "cispo",
    "clipped",
    "conditional_feature_matching_loss",
    "distinct_rollouts",
    "effective_rollouts",
    "effective_sample_size",
    "energy_reward",
    "exact_kl",
    "exact_match",
    "feature_matching_profile",
    "feature_matching_proxy",
    "feature_matching_reward",
    "fit_tilt",
    "gradient_signal_to_noise",
    "kernel_score_reward",
    "kernel_values",
    "kl_estimate",
    "kl_penalty",
    "load_energy",
    "moment_values",
    "reinforce",
    "resample",
    "rollout_scores",
    "save_energy",
    "schedule",
    "sequence_clipped",
    "signal_to_noise_of_sums",
    "tilt_log_weights",
    "token_scores",
    "totals",
    "truncated_weight",
    "unit_tests",
    "verifier",
    "weighted_sum",
]


def __getattr__(name: str) -> Any:
    """EBFTLoss on first use: it is the only part that imports torchrl."""
    if name == "EBFTLoss":
        from ebft.objectives.losses import EBFTLoss

        return EBFTLoss
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
