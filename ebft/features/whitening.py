"""Whitening of features: arXiv 2603.12248, (8) and appendix B, and what can be done about its side effects."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ebft.errors import UsageError
from ebft.features.second_moment import SecondMoment, inverse_root

_MODES = ("group", "sample", "population")


@torch.no_grad()
def whiten(
    rollout: Tensor,
    target: Tensor,
    *,
    mode: str = "group",
    moment: SecondMoment | None = None,
    tolerance: float = 1e-5,
) -> tuple[Tensor, Tensor]:
    """Whiten rollout features [...,N,D] and target features [...,D].

    * "group": φ̃ = (Σ̂†)^{1/2} φ with Σ̂ = (1/N) Σ_j φ_j φ_jᵀ over the N rollouts of the group (the paper, (8)). When the
      rollouts are linearly independent their whitened features are orthogonal, and the diversity term of the reward
      only penalises duplicates, (48).
    * "sample": the form of the authors' code, which multiplies by the N x N matrix (ΦΦᵀ)^{-1/2} from the left. The
      rollouts are those of "group" divided by √N. The target becomes a multiple of itself, another one for each
      rollout and possibly a negative one, so it comes back as [...,N,D]; the alignment is then
      ``cosine_similarity(rollout, target, dim=-1)``.
    * "population": φ̃ = (Σ†)^{1/2} φ with the second moment Σ held by `moment`. Whitened features of distinct rollouts
      keep their similarities, and Σ does not depend on the rollouts that it whitens, so baselines stay unbiased.

    Args:
        rollout: [...,N,D], any floating dtype.
        target: [...,D].
        mode: "group", "sample" or "population".
        moment: the second moment, for "population" only.
        tolerance: singular values of the features below this share of the largest count as zero.

    Returns:
        Whitened rollouts [...,N,D] and targets [...,D] ([...,N,D] in mode "sample"), float32, without gradient. Both
        are finite for any finite input: duplicates, zeros, rank one and N = 1 included.

    Raises:
        UsageError: unknown mode, `moment` missing or given where it does nothing, or shapes that do not fit.
    """
    if mode not in _MODES:
        raise UsageError(f"whitening mode={mode!r} is unknown: choose one of {', '.join(_MODES)}")
    if (moment is not None) != (mode == "population"):
        raise UsageError(
            f"mode={mode!r} with moment={'given' if moment is not None else None}:"
            " a SecondMoment belongs to mode='population', and to no other"
        )
    if rollout.ndim < 2 or rollout.shape[:-2] + rollout.shape[-1:] != target.shape:
        raise UsageError(
            f"rollout of shape {list(rollout.shape)} does not fit target of shape {list(target.shape)}:"
            " expected [...,N,D] and [...,D]"
        )
    if moment is not None:
        return moment.whiten(rollout, tolerance=tolerance), moment.whiten(target, tolerance=tolerance)
    # Double precision: the Gram matrix squares the condition number of the features.
    phi, psi = rollout.double(), target.double()
    values, vectors = torch.linalg.eigh(phi @ phi.mT)  # the squared singular values of Φ, [...,N]
    inverse = inverse_root(values, tolerance)  # 1/s
    mixing = (vectors * inverse[..., None, :]) @ vectors.mT  # ((ΦΦᵀ)†)^{1/2}
    if mode == "sample":
        return (mixing @ phi).float(), (mixing.sum(-1)[..., None] * psi[..., None, :]).float()
    # With Φ = U S Vᵀ: (Σ̂†)^{1/2} = √N V S⁻¹ Vᵀ = √N Φᵀ U S⁻³ Uᵀ Φ, and √N mixing Φ = √N U Vᵀ = Φ (Σ̂†)^{1/2}.
    root = phi.shape[-2] ** 0.5
    coefficients = (vectors.mT @ (phi @ psi[..., None])) * inverse[..., None] ** 3
    whitened_target = phi.mT @ (vectors @ coefficients)
    return (root * (mixing @ phi)).float(), (root * whitened_target[..., 0]).float()


class PopulationWhitening:
    """Values of a kernel on features whitened by a moment of other contexts, which is calibrated once or kept running.

    Args:
        values: (rollout [B,K,N,D], target [B,K,D], mask=[B,K]) -> values with the target and among the rollouts.
            Features per token are whitened position by position, all of them by one moment.
        calibration: batches to calibrate with, for whoever drives (`observe` takes them in).
        decay: None keeps the moment of the calibration; a number in (0, 1] lets `observe` go on with every batch after
            its rollouts have been scored, with this weight for what was seen before.
        shrinkage, centred, rank: of :class:`SecondMoment`.

    Raises:
        UsageError: an option out of its range; when called, nothing was observed yet.
    """

    def __init__(
        self,
        values: Callable[..., tuple[Tensor, Tensor]],
        *,
        calibration: int = 2,
        decay: float | None = None,
        shrinkage: float = 0.1,
        centred: bool = False,
        rank: int | None = None,
    ) -> None:
        if calibration < 1:
            raise UsageError(f"calibration={calibration}: expected 1 batch or more")
        self.calibration, self.running = calibration, decay is not None
        self._values = values
        self._moment: SecondMoment | None = None
        options: dict[str, Any] = {"shrinkage": shrinkage, "centred": centred, "rank": rank}
        self._options = {"decay": 1.0 if decay is None else decay, **options}
        self._make(1 if rank is None else rank + 1)  # refuses options out of range at once

    def __call__(self, rollout: Tensor, target: Tensor, *, mask: Tensor) -> tuple[Tensor, Tensor]:
        if self._moment is None:
            raise UsageError("population whitening has seen no features: calibrate it first, with `observe`")
        return self._values(*whiten(rollout, target, mode="population", moment=self._moment), mask=mask)

    def observe(
        self,
        rollout: Tensor,
        target: Tensor,
        mask: Tensor,
        rollout_mask: Tensor | None = None,
        target_mask: Tensor | None = None,
    ) -> None:
        """Take in the features of the contexts where mask [B,K] is True.

        Args:
            rollout, target: [B,K,N,D] and [B,K,D] of whole rollouts; [B,K,N,G,D] and [B,K,G,D] of their tokens.
            rollout_mask, target_mask: [B,K,N,G] and [B,K,G], of features of tokens: which of them there are.

        Raises:
            UsageError: features of tokens without their masks, or masks that do not fit.
        """
        both = torch.cat([rollout, target[:, :, None]], 2)
        if both.ndim == 4:
            real = mask[..., None].expand(both.shape[:-1])
        else:
            if rollout_mask is None or target_mask is None or rollout_mask.shape != rollout.shape[:-1]:
                shape = None if rollout_mask is None else list(rollout_mask.shape)
                raise UsageError(
                    f"features of tokens, of shape {list(rollout.shape)}, with a mask of shape {shape}: expected"
                    f" rollout_mask {list(rollout.shape[:-1])} and target_mask {list(target.shape[:-1])}"
                )
            real = torch.cat([rollout_mask, target_mask[:, :, None]], 2) & mask[..., None, None]
        if self._moment is None:
            self._moment = self._make(rollout.shape[-1])
        self._moment.update(both, real)

    def _make(self, dimension: int) -> SecondMoment:
        return SecondMoment(dimension, **self._options)

    def state_dict(self) -> dict[str, Any]:
        """The moment."""
        return {} if self._moment is None else {"dimension": self._moment.dimension, **self._moment.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state`."""
        self._moment = self._make(state["dimension"]) if state else None
        if self._moment is not None:
            self._moment.load_state_dict(state)
