"""Kullback-Leibler divergence from the policy to a frozen reference: estimators, exact values, coefficients."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from ebft.errors import UsageError


def kl_estimate(log_prob: Tensor, reference_log_prob: Tensor, *, estimator: str = "k2") -> Tensor:
    """Estimate of KL(policy ‖ reference) from one draw of the policy, elementwise.

    With the log-ratio l = log_prob - reference_log_prob (names after J. Schulman, "Approximating KL divergence", 2020):

    ====== ================ ===================== ===========================================
    name   formula          expected value        expected gradient, used as a loss
    ====== ================ ===================== ===========================================
    k1     l                KL(policy‖reference)  none: zero, do not minimise it
    k2     l² / 2           biased                that of KL(policy ‖ reference)
    k3     exp(-l) - 1 + l  KL(policy‖reference)  that of KL(reference ‖ policy)
    ====== ================ ===================== ===========================================

    So k2 is for losses, k3 (never negative) for logs, and k3 as a loss pulls towards covering the reference.

    What the draw is decides which distributions are meant. Log-probs of single tokens give the divergence between the
    next-token distributions in the contexts that were visited; its gradient does not see that another policy visits
    other contexts. Log-probs summed over a rollout give the divergence between distributions of whole rollouts, as
    in arXiv 2603.12248, (10), with the full gradient and a larger variance. The values of k1 and k3, summed over a
    rollout's tokens, have the divergence of whole rollouts as their expectation too.

    Args:
        log_prob: [...] with gradient.
        reference_log_prob: [...]; gets no gradient.
        estimator: "k1", "k2" or "k3".

    Returns:
        Estimate [...].

    Raises:
        UsageError: unknown estimator or shapes that disagree.
    """
    if reference_log_prob.shape != log_prob.shape:
        raise UsageError(
            f"reference_log_prob has shape {list(reference_log_prob.shape)},"
            f" expected that of log_prob {list(log_prob.shape)}"
        )
    log_ratio = log_prob - reference_log_prob.detach()
    if estimator == "k1":
        return log_ratio
    if estimator == "k2":
        return log_ratio.square() / 2
    if estimator == "k3":
        return torch.expm1(-log_ratio) + log_ratio
    raise UsageError(f"kl estimator {estimator!r} is not known; expected 'k1', 'k2' or 'k3'")


def exact_kl(logits: Tensor, reference_logits: Tensor, *, direction: str = "reverse") -> Tensor:
    """Divergence between two next-token distributions, summed over the vocabulary, with its exact gradient.

    Args:
        logits: [...,V] of the policy; any temperature already applied.
        reference_logits: [...,V]; gets no gradient.
        direction: "reverse" for KL(policy ‖ reference), "forward" for KL(reference ‖ policy).

    Returns:
        Divergence [...] in nats; infinite where the second distribution excludes what the first allows.

    Raises:
        UsageError: unknown direction or shapes that disagree.
    """
    if logits.shape != reference_logits.shape:
        raise UsageError(f"reference_logits have shape {list(reference_logits.shape)}, expected {list(logits.shape)}")
    policy, reference = logits.log_softmax(-1), reference_logits.detach().log_softmax(-1)
    if direction == "reverse":
        first, second = policy, reference
    elif direction == "forward":
        first, second = reference, policy
    else:
        raise UsageError(f"direction={direction!r} is not known; expected 'reverse' or 'forward'")
    possible = first > -torch.inf  # a token of probability 0 counts 0, whatever the second distribution says
    difference = torch.where(possible, first, 0.0) - torch.where(possible, second, 0.0)
    return (first.exp() * difference).sum(-1)


class KLController(Protocol):
    """Sets the coefficient of the divergence term from one optimiser step to the next."""

    coefficient: float

    def update(self, kl: float) -> float:
        """Take the measured divergence (in nats, positive when the policy moved away); return the new coefficient."""
        ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


@dataclass
class ConstantKL:
    """A coefficient that never changes."""

    coefficient: float

    def __post_init__(self) -> None:
        if not (math.isfinite(self.coefficient) and self.coefficient >= 0):
            raise UsageError(f"coefficient={self.coefficient!r} of the divergence term: expected 0 or more")

    def update(self, kl: float) -> float:
        return self.coefficient

    def state_dict(self) -> dict[str, Any]:
        return {"coefficient": self.coefficient}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.coefficient = state["coefficient"]


@dataclass
class AdaptiveKL:
    """A coefficient that rises while the measured divergence is above `target` and falls while it is below.

    coefficient ← coefficient · (1 + rate · clamp(kl/target - 1, -0.2, 0.2)) (Ziegler et al., arXiv 1909.08593,
    section 2.2, where rate = 0.1).

    Args:
        coefficient: start, above 0 (it is only ever multiplied).
        target: wanted divergence in nats, above 0, normalised as the measured one.
        rate: size of a step, above 0 and below 5 (so that the coefficient stays positive).

    Raises:
        UsageError: an argument out of range, or (when updated) a divergence that is not finite.
    """

    coefficient: float
    target: float
    rate: float = 0.1

    def __post_init__(self) -> None:
        for name, top in (("coefficient", math.inf), ("target", math.inf), ("rate", 5.0)):
            value = getattr(self, name)
            if not 0 < value < top:
                limit = "" if top == math.inf else f" and below {top:g}"
                raise UsageError(f"{name}={value!r} of the adaptive divergence term: expected a number above 0{limit}")

    def update(self, kl: float) -> float:
        if not math.isfinite(kl):
            raise UsageError(f"kl={kl!r}: the coefficient can only follow a finite divergence; skip this update")
        error = min(max(kl / self.target - 1, -0.2), 0.2)
        self.coefficient *= 1 + self.rate * error
        return self.coefficient

    def state_dict(self) -> dict[str, Any]:
        return {"coefficient": self.coefficient}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.coefficient = state["coefficient"]
