"""Kullback-Leibler divergence from the policy to a frozen reference: estimators and exact values."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from ebft.errors import UsageError
from ebft.objectives.scores import to_go


def kl_estimate(log_prob: Tensor, reference_log_prob: Tensor, *, estimator: str = "k2") -> Tensor:
    """Estimate of KL(policy ‖ reference) from one draw of the policy, elementwise.

    With the log-ratio l = log_prob - reference_log_prob (names after J. Schulman, "Approximating KL divergence", 2020):

    ====== ================ ===================== ============================== =====================================
    name   formula          expected value        expected gradient as a loss    expected gradient in the reward
    ====== ================ ===================== ============================== =====================================
    k1     l                KL(policy‖reference)  none: zero, do not minimise it that of KL(policy ‖ reference)
    k2     l² / 2           biased                that of KL(policy ‖ reference) biased: of E[l²/2] less that of the KL
    k3     exp(-l) - 1 + l  KL(policy‖reference)  that of KL(reference ‖ policy) of KL(policy‖reference) less that of
                                                                                 KL(reference‖policy)
    ====== ================ ===================== ============================== =====================================

    So k2 is for losses, k1 for rewards (:func:`kl_penalty`) and k3 (never negative) for logs; k3 as a loss pulls
    towards covering the reference.

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


def kl_penalty(
    log_prob: Tensor, reference_log_prob: Tensor, mask: Tensor, *, estimator: str = "k1", scope: str = "token"
) -> Tensor:
    """The divergence as part of the reward: what to subtract, times its weight, from the advantage of every token.

    With ``scope="token"`` a token is charged the estimates from its own position on (it cannot change those before),
    with "rollout" the estimate of the whole rollout, of its summed log-probs. In both, the mean over the other rollouts
    of the anchor at the same position is taken off, which depends on none of this rollout's tokens. With "k1" the
    policy gradient is that of the divergence between rollouts, exactly in expectation, in both scopes; with the other
    estimators it is what the table of :func:`kl_estimate` says.

    Args:
        log_prob: [...,N,G] of the policy; reference_log_prob: [...,N,G]. Neither gets a gradient.
        mask: [...,N,G] bool; what masked entries hold does not matter.
        estimator: "k1", "k2" or "k3"; scope: "token" or "rollout".

    Returns:
        Penalty [...,N,G], 0 where masked.

    Raises:
        UsageError: unknown estimator or scope, or shapes that disagree.
    """
    if scope not in ("token", "rollout"):
        raise UsageError(f"scope={scope!r} is not known; expected 'token' or 'rollout'")
    if mask.shape != log_prob.shape or reference_log_prob.shape != log_prob.shape:
        raise UsageError(
            f"mask has shape {list(mask.shape)} and reference_log_prob {list(reference_log_prob.shape)},"
            f" expected those of log_prob {list(log_prob.shape)}"
        )
    ours, theirs = (torch.where(mask, x.detach(), 0.0) for x in (log_prob, reference_log_prob))
    if scope == "token":
        charge = to_go(kl_estimate(ours, theirs, estimator=estimator))
    else:
        whole = kl_estimate(ours.sum(-1, keepdim=True), theirs.sum(-1, keepdim=True), estimator=estimator)
        charge = whole.expand_as(ours)
    count = charge.shape[-2]
    if count > 1:
        charge = charge - (charge.sum(-2, keepdim=True) - charge) / (count - 1)
    return torch.where(mask, charge, 0.0)


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


# Divergences that a loss may be of, by name: logits [...,V] of policy and reference -> [...].
EXACT: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "exact": exact_kl,
    "exact_forward": partial(exact_kl, direction="forward"),
}
