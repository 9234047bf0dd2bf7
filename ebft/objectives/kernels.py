"""Kernel scores: how well rollouts match a target, under any kernel on features.

For a kernel k, the score of a policy p_θ(·|c) at a target y is

    S(p_θ, y) = E k(φ(ŷ), φ(ỹ)) - 2 E k(φ(ŷ), φ(y)) + k(φ(y), φ(y)),     ŷ, ỹ ~ p_θ(·|c) independent,

a squared maximum mean discrepancy between the rollouts and the target (Gneiting & Raftery, "Strictly Proper Scoring
Rules, Prediction, and Estimation", JASA 2007, section 5). The linear kernel gives the conditional feature-matching
loss of arXiv 2603.12248, (2).

What a score can tell apart. It is *proper* when no policy beats the data distribution, *strictly* proper when every
other policy is worse. All statements are about the distribution of the features φ(ŷ); they carry over to the
distribution of the tokens when φ is injective. They hold for ``diversity=1`` only.

============ ========================= ===================================================================
kernel       k(x, y)                   score
============ ========================= ===================================================================
linear       x·y                       proper; blind beyond the mean of the features
cosine       x·y / (‖x‖ ‖y‖)           proper; blind beyond the mean of the normalised features
polynomial   (x·y + offset)^degree     proper; blind beyond the moments up to ``degree``
rbf          exp(-‖x-y‖² / 2h²)        strictly proper: the kernel is characteristic (Steinwart & Ziegel,
                                       "Strictly proper kernel scores and characteristic kernels on compact
                                       spaces", ACHA 2021)
laplace      exp(-‖x-y‖ / h)           strictly proper, as rbf
energy       -‖x-y‖^p, 0 < p < 2       strictly proper among distributions with a finite p-th moment (Székely &
                                       Rizzo, "Energy statistics", JSPI 2013; Gneiting & Raftery 2007)
============ ========================= ===================================================================

Norms are Euclidean. A kernel whose bandwidth is fixed by hand is covered by the table; the median heuristic looks at
the rollouts it will score, so it is a practical choice without that guarantee.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ebft.errors import UsageError

_OPTIONS: dict[str, tuple[str, ...]] = {
    "linear": (),
    "cosine": (),
    "polynomial": ("degree", "offset"),
    "rbf": ("bandwidth",),
    "laplace": ("bandwidth",),
    "energy": ("power",),
}


KERNELS = tuple(_OPTIONS)


def kernel_values(
    rollout: Tensor,
    target: Tensor,
    *,
    kernel: str = "linear",
    bandwidth: float | None = None,
    power: float | None = None,
    degree: int | None = None,
    offset: float | None = None,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Kernel values of every rollout with its target and with the other rollouts of its anchor.

    Args:
        rollout: [...,N,D] features of the rollouts.
        target: [...,D] features of the target.
        kernel: one of the table at the head of this module, which also says what each score can tell apart.
        bandwidth: h > 0 of "rbf" and "laplace", in units of feature distance. None takes the median of the distances
            rollout-rollout and rollout-target over all anchors of the call (1 when the median is zero), so that it
            depends on the batch; the estimators of ``baselines.advantage`` are exactly unbiased for a given h only.
        power: exponent p of "energy", 0 < p < 2; 1 when None.
        degree: of "polynomial", at least 1; 2 when None.
        offset: of "polynomial", at least 0; 1.0 when None.
        mask: [...] bool, True on real anchors. Others get zeros, whatever their features, and stay out of the median.

    Returns:
        Values with the target [...,N] and among the rollouts [...,N,N], symmetric.

    Raises:
        UsageError: unknown kernel, an option the kernel does not have or out of its range, or shapes that disagree.
    """
    check_options(kernel, bandwidth=bandwidth, power=power, degree=degree, offset=offset)
    check_features(rollout, target)
    if mask is not None and mask.shape != rollout.shape[:-2]:
        raise UsageError(
            f"mask has shape {list(mask.shape)}, expected one entry per anchor {list(rollout.shape[:-2])}"
            f" for rollout features of shape {list(rollout.shape)}"
        )
    real = torch.ones(rollout.shape[:-2], dtype=torch.bool, device=rollout.device) if mask is None else mask
    points = torch.cat([rollout, target[..., None, :]], dim=-2)  # [...,N+1,D]: pairs with the target in the last column
    if kernel == "cosine":
        points = unit(points)
    if kernel in ("linear", "cosine"):
        values = points @ points.mT
    elif kernel == "polynomial":
        values = (points @ points.mT + (1.0 if offset is None else offset)) ** (2 if degree is None else degree)
    else:
        # the matrix-product form of cdist, its default for many points, loses the distances of close ones
        distance = torch.cdist(points, points, compute_mode="donot_use_mm_for_euclid_dist")
        if kernel == "energy":
            values = -(distance ** (1.0 if power is None else power))
        else:
            scaled = distance / (_median_distance(distance, real) if bandwidth is None else bandwidth)
            values = torch.exp(-(scaled**2) / 2 if kernel == "rbf" else -scaled)
    values = torch.where(real[..., None, None], values, 0.0)[..., :-1, :]
    return values[..., -1], values[..., :-1]


def kernel_score_reward(k_target: Tensor, k_rollouts: Tensor, *, diversity: float = 1.0) -> Tensor:
    """Reward whose policy gradient descends the kernel score (arXiv 2603.12248, (67), with any kernel).

    r_j = 2 k(ŷ_j, y) - (2 diversity / (N-1)) Σ_{j'≠j} k(ŷ_j, ŷ_j').

    Args:
        k_target: [...,N] kernel values of the rollouts with their target.
        k_rollouts: [...,N,N] kernel values among the rollouts of one anchor, symmetric; the diagonal is not used.
        diversity: the paper's α ≥ 0 (appendix C). Below 1 the score is not proper: it seeks modes.

    Returns:
        Reward [...,N].

    Raises:
        UsageError: shapes that disagree, negative `diversity`, or one rollout with `diversity` above 0.
    """
    check_values(k_target, k_rollouts, diversity=diversity)
    if diversity == 0:
        return 2 * k_target
    return 2 * k_target - 2 * diversity * mean_over_others(k_rollouts)


def mean_over_others(k_rollouts: Tensor) -> Tensor:
    """Mean kernel value of every rollout with the other rollouts of its anchor: [...,N,N] to [...,N], N ≥ 2."""
    count = k_rollouts.shape[-1]
    itself = torch.eye(count, dtype=torch.bool, device=k_rollouts.device)
    return k_rollouts.masked_fill(itself, 0.0).sum(-1) / (count - 1)


def unit(vectors: Tensor) -> Tensor:
    """Vectors [...,D] at unit Euclidean norm; zero vectors stay zero."""
    norm = vectors.norm(dim=-1, keepdim=True)
    return vectors / torch.where(norm > 0, norm, 1.0)


def check_features(rollout: Tensor, target: Tensor) -> None:
    """Check rollout features [...,N,D] against target features [...,D]."""
    if rollout.ndim < 2 or target.shape != rollout.shape[:-2] + rollout.shape[-1:]:
        raise UsageError(
            f"rollout features have shape {list(rollout.shape)} and target features {list(target.shape)};"
            " expected [..., rollouts, features] and the same without the rollouts' axis"
        )


def check_values(k_target: Tensor, k_rollouts: Tensor, *, diversity: float) -> None:
    """Check kernel values [...,N] against [...,N,N], and that `diversity` can be used with N rollouts."""
    if k_target.ndim < 1 or k_rollouts.shape != (*k_target.shape, k_target.shape[-1]):
        raise UsageError(
            f"k_target has shape {list(k_target.shape)} and k_rollouts {list(k_rollouts.shape)};"
            " expected [..., rollouts] and [..., rollouts, rollouts]"
        )
    check_diversity(diversity, rollouts=k_target.shape[-1])


def check_diversity(diversity: float, *, rollouts: int) -> None:
    """Check that the weight of the diversity term is usable with so many rollouts per anchor."""
    if not diversity >= 0:
        raise UsageError(f"diversity={diversity!r}: the weight of the diversity term must be 0 or more")
    if rollouts < 2 and diversity > 0:
        raise UsageError(
            f"diversity={diversity!r} with {rollouts} rollout per anchor: the diversity term compares a rollout with"
            " the others of its anchor; sample 2 or more rollouts, or set diversity=0"
        )


def check_options(kernel: str, **options: float | None) -> None:
    """Check a kernel's name and options; None stands for an option that was not given."""
    if kernel not in _OPTIONS:
        raise UsageError(f"kernel={kernel!r} is not known; expected one of {', '.join(_OPTIONS)}")
    for name, value in options.items():
        if value is None:
            continue
        if name not in _OPTIONS[kernel]:
            allowed = ", ".join(_OPTIONS[kernel]) or "no options"
            raise UsageError(f"{name}={value!r} does not apply to kernel={kernel!r}, which takes {allowed}")
        valid, wanted = {
            "bandwidth": (value > 0, "a number above 0, or None for the median heuristic"),
            "power": (0 < value < 2, "a number strictly between 0 and 2"),
            "degree": (value >= 1 and value == int(value), "a whole number of at least 1"),
            "offset": (value >= 0, "a number of at least 0"),
        }[name]
        if not valid:
            raise UsageError(f"{name}={value!r} is out of range for kernel={kernel!r}; expected {wanted}")


def _median_distance(distance: Tensor, real: Tensor) -> Tensor:
    """Median over the pairs of different points [...,M,M] of real anchors [...]; 1 where that is not positive."""
    points = distance.shape[-1]
    pairs = torch.ones(points, points, dtype=torch.bool, device=distance.device).triu(1)
    median = torch.where(pairs & real[..., None, None], distance.detach(), torch.nan).nanmedian()
    return torch.where(median > 0, median, 1.0)
