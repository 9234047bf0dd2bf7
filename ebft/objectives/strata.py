"""Advantages of rollouts whose first tokens were chosen together, in strata: exactly unbiased.

The N rollouts of an anchor are S strata of n = N/S; see ``ebft.samplers.first_tokens``. Let w_c be the weight of a
stratum and q_cd that of a pair of strata, such that

    E_p f = E Σ_c w_c mean_{j∈c} f(ŷ_j),    E_{p×p} h = E Σ_{c,d} q_cd mean_{j∈c, j'∈d, j≠j'} h(ŷ_j, ŷ_j').

* "branches": the S-1 likeliest first tokens and the rest; w_c is the probability of the stratum, q_cd = w_c w_d.
* "distinct": first tokens drawn without replacement, a set C; w_c = p_c R(C,c) and q_cd = p_c p_d R(C,c,d),
  q_cc = p_c² R(C,c), with the leave-out ratios R(C,c) = P(C\\c | c is gone)/P(C) and R(C,c,d) of Kool, van Hoof and
  Welling, "Estimating gradients for discrete random variables by sampling without replacement", ICLR 2020.

The gradient of the score of a kernel k (see ``kernels``) is then that of the sum over rollouts of -c_j log p(ŷ_j),

    c_j = 2 w_j k(ŷ_j, y) - 2α Σ_{j'≠j} q_jj' k(ŷ_j, ŷ_j'),       w_j = w_c/n, q_jj' = q_cd/n² (q_cc/(n(n-1)) within).

Baselines. For tokens after the first anything that does not depend on the rollout's continuation will do: the weighted
mean reward of the other rollouts. For the first token it must not differ between strata, or it would be biased: for
"branches" it is the mean reward of the likeliest tokens' rollouts, which the draws of the rest do not touch; for
"distinct" Kool's, Σ_d q_cd 2 k(ŷ_d, y), of the alignment alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ebft.errors import UsageError

KINDS = ("branches", "distinct")


def stratum_weights(log_prob: Tensor, *, kind: str, strata: int) -> tuple[Tensor, Tensor]:
    """Weights of strata and of their pairs.

    Args:
        log_prob: [...,N] of the rollouts' first tokens under the policy.
        kind: "branches" or "distinct"; strata: S.

    Returns:
        w [...,S] and q [...,S,S], float64.

    Raises:
        UsageError: an unknown kind, or N that is no multiple of S.
    """
    if kind not in KINDS:
        raise UsageError(f"strata of kind {kind!r}: expected one of {', '.join(KINDS)}")
    if log_prob.shape[-1] % strata:
        raise UsageError(f"{log_prob.shape[-1]} rollouts do not fill {strata} strata evenly")
    prob = log_prob.double().exp().unflatten(-1, (strata, -1))[..., 0]
    if kind == "branches":
        known = prob[..., :-1]
        weights = torch.cat([known, (1 - known.sum(-1, keepdim=True)).clamp(min=0)], -1)
        return weights, weights[..., :, None] * weights[..., None, :]
    one, two = leave_out_ratios(prob)
    pairs = prob[..., :, None] * prob[..., None, :] * two
    own = torch.diag_embed(prob.square() * one)
    return prob * one, torch.where(torch.eye(strata, dtype=torch.bool, device=prob.device), own, pairs)


def leave_out_ratios(prob: Tensor) -> tuple[Tensor, Tensor]:
    """R(C,c) [...,S] and R(C,c,d) [...,S,S] (c ≠ d) of a set drawn without replacement, from its probabilities [...,S].

    P(C) = ∫ Π_{c∈C} (1 - exp(-t p_c/(1 - p(C)))) e^{-t} dt, and the same product without c over P(C) is R(C,c): the
    exponents do not change when c is gone. The integral is a trapezoid sum in log t, in which the integrand and all its
    derivatives vanish at both ends.
    """
    log_t = torch.linspace(-44, 6, 640, dtype=torch.float64, device=prob.device)
    t = log_t.exp()
    rate = prob / (1 - prob.sum(-1, keepdim=True)).clamp(min=1e-16)
    factor = -torch.expm1(-rate[..., None] * t)  # [...,S,Q]
    measure = t * (-t).exp()
    whole = factor.prod(-2)

    def ratio(gone: Tensor) -> Tensor:
        left = torch.where(gone > 0, whole[..., None, :] / gone, 0.0)
        return (left * measure).sum(-1) / (whole * measure).sum(-1)[..., None]

    one = ratio(factor)
    both = (factor[..., :, None, :] * factor[..., None, :, :]).flatten(-3, -2)
    two = ratio(both).unflatten(-1, (prob.shape[-1], -1))
    return one, two


def stratified_coefficients(
    k_target: Tensor, k_rollouts: Tensor, weights: Tensor, pairs: Tensor, *, kind: str, diversity: float
) -> tuple[Tensor, Tensor]:
    """N (c_j - baseline) of the first token and of the others, [...,N] each; see the head of this module.

    Times -log p, averaged over the N rollouts as the policy gradient does, they give the gradient of the score.

    Args:
        k_target: [...,N]; k_rollouts: [...,N,N], of ``kernels.kernel_values``.
        weights: [...,S]; pairs: [...,S,S]; kind: as for :func:`stratum_weights`.
        diversity: α ≥ 0.

    Raises:
        UsageError: a diversity term with one rollout in a stratum: it has no pair to compare.
    """
    rollouts, strata = k_target.shape[-1], weights.shape[-1]
    each = rollouts // strata
    if diversity > 0 and each < 2:
        raise UsageError(
            f"diversity={diversity} with {rollouts} rollouts in {strata} strata: the diversity term compares rollouts"
            f" of one stratum; give {2 * strata} rollouts, or diversity=0"
        )
    k_target, k_rollouts = k_target.double(), k_rollouts.double()
    stratum = torch.arange(strata, device=k_target.device).repeat_interleave(each)
    same = stratum[:, None] == stratum
    other = ~torch.eye(rollouts, dtype=torch.bool, device=k_target.device)
    w = weights[..., stratum] / each
    q_all = pairs[..., stratum, :][..., :, stratum] / each**2
    q = torch.where(same, q_all * each / max(1, each - 1), q_all) * other
    gain = 2 * w * k_target - 2 * diversity * (q * k_rollouts).sum(-1)

    mean_of_others = _reward_without(k_target, k_rollouts, w, q, other.expand_as(q), diversity)
    later = gain - w * mean_of_others
    if kind == "branches":
        likely = stratum < strata - 1
        usable = (other & likely).expand_as(q)
        first = gain - w * _reward_without(k_target, k_rollouts, w, q, usable, diversity, of=likely)[..., :1]
    else:
        first = gain - (q_all * 2 * k_target[..., None, :]).sum(-1)
    return rollouts * first, rollouts * later


def _reward_without(
    k_target: Tensor,
    k_rollouts: Tensor,
    w: Tensor,
    q: Tensor,
    usable: Tensor,
    diversity: float,
    *,
    of: Tensor | None = None,
) -> Tensor:
    """[...,N]: for every j the weighted mean reward, with weighted mean similarities, of the rollouts usable for it.

    `usable` [...,N,N] says which j' serve j; with `of` [N] it is those, for all j alike.
    """
    chosen = usable if of is None else of.expand_as(usable)
    weight = chosen * w[..., None, :]
    alignment = _share((weight * 2 * k_target[..., None, :]).sum(-1), weight.sum(-1))
    if not diversity:
        return alignment
    both = chosen[..., :, :, None] & chosen[..., :, None, :]
    pair = both * q[..., None, :, :]
    similarity = _share((pair * k_rollouts[..., None, :, :]).sum((-1, -2)), pair.sum((-1, -2)))
    return alignment - 2 * diversity * similarity


def _share(total: Tensor, weight: Tensor) -> Tensor:
    return total / torch.where(weight > 0, weight, 1.0)
