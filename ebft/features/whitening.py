"""Whitening of features: arXiv 2603.12248, (8) and appendix B, and what can be done about its side effects."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ebft.errors import UsageError

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
    inverse = _inverse_root(values, tolerance)  # 1/s
    mixing = (vectors * inverse[..., None, :]) @ vectors.mT  # ((ΦΦᵀ)†)^{1/2}
    if mode == "sample":
        return (mixing @ phi).float(), (mixing.sum(-1)[..., None] * psi[..., None, :]).float()
    # With Φ = U S Vᵀ: (Σ̂†)^{1/2} = √N V S⁻¹ Vᵀ = √N Φᵀ U S⁻³ Uᵀ Φ, and √N mixing Φ = √N U Vᵀ = Φ (Σ̂†)^{1/2}.
    root = phi.shape[-2] ** 0.5
    coefficients = (vectors.mT @ (phi @ psi[..., None])) * inverse[..., None] ** 3
    whitened_target = phi.mT @ (vectors @ coefficients)
    return (root * (mixing @ phi)).float(), (root * whitened_target[..., 0]).float()


def _inverse_root(values: Tensor, tolerance: float) -> Tensor:
    """Moore-Penrose 1/√λ of eigenvalues [...,R]: 0 where √λ <= tolerance · √λ_max."""
    limit = values.amax(-1, keepdim=True).clamp(min=0) * tolerance**2
    keep = values > limit.clamp(min=torch.finfo(values.dtype).tiny)
    return torch.where(keep, values, 1.0).rsqrt() * keep


class SecondMoment:
    """A running second moment of features over many contexts, for whitening that does not depend on the group.

    Update it with *other* contexts than those it is going to whiten: from a calibration pass, or with every batch
    after that batch has been whitened. Data-parallel processes must update with the same (gathered) features.

    The matrix is (1 - shrinkage)·Σ + shrinkage·(tr Σ / D)·I. With `rank`, only that many leading directions of Σ are
    kept, and the rest is spread evenly over the remaining directions, which keeps the trace.

    Args:
        dimension: D.
        decay: weight of what was seen before at each update; 1 keeps the mean over everything.
        shrinkage: in [0,1], share of the isotropic matrix.
        centred: use the covariance, and subtract the mean when whitening.
        rank: number of directions kept; all of them when left out. Memory and time are then D·rank, not D².

    Raises:
        UsageError: an option out of its range.
    """

    def __init__(
        self,
        dimension: int,
        *,
        decay: float = 1.0,
        shrinkage: float = 0.1,
        centred: bool = False,
        rank: int | None = None,
    ) -> None:
        if not 0 < decay <= 1:
            raise UsageError(f"decay={decay}: expected a number in (0, 1]")
        if not 0 <= shrinkage <= 1:
            raise UsageError(f"shrinkage={shrinkage}: expected a number in [0, 1]")
        if rank is not None and not 1 <= rank < dimension:
            raise UsageError(f"rank={rank}: expected a number from 1 to {dimension - 1}, or None for all {dimension}")
        self.dimension, self.decay, self.shrinkage, self.centred, self.rank = dimension, decay, shrinkage, centred, rank
        self._weight = 0.0
        self._mean = torch.zeros(dimension, dtype=torch.float64)
        # All directions: the weighted sum of φφᵀ, [D,D]. With a rank: orthogonal rows R [<=rank,D], where RᵀR is the
        # leading part of that sum, and the trace of the part left out.
        self._sum = torch.zeros(dimension if rank is None else 0, dimension, dtype=torch.float64)
        self._rest = 0.0
        self._spectrum: tuple[Tensor, Tensor, float] | None = None

    @torch.no_grad()
    def update(self, features: Tensor, mask: Tensor | None = None) -> None:
        """Take in features [...,D], all of them or those where mask [...] is True.

        Raises:
            UsageError: another dimension than that of the estimator.
        """
        self._check(features)
        x = (features.reshape(-1, self.dimension) if mask is None else features[mask]).double()
        if len(x) == 0:
            return
        self._to(x.device)
        old, new = self.decay * self._weight, len(x)
        mean = x.mean(0)
        if self.centred:  # scatter of the union = both scatters + a rank-one term (Chan, Golub and LeVeque 1979)
            between = (old * new / (old + new)) ** 0.5 * (mean - self._mean)
            x = torch.cat([x - mean, between[None]])
        self._mean += (new / (old + new)) * (mean - self._mean)
        self._weight = old + new
        if self.rank is None:
            self._sum = self.decay * self._sum + x.mT @ x
        else:
            self._compress(torch.cat([self.decay**0.5 * self._sum, x]), self.rank)
        self._spectrum = None

    @torch.no_grad()
    def whiten(self, features: Tensor, *, tolerance: float = 1e-5) -> Tensor:
        """(Σ†)^{1/2} times features [...,D], float32; `tolerance` as in :func:`whiten`.

        Raises:
            UsageError: another dimension, or nothing has been seen yet.
        """
        self._check(features)
        if self._weight == 0:
            raise UsageError("this SecondMoment has seen no features: update it from a calibration pass first")
        if self._spectrum is None:
            self._spectrum = self._decompose()
        values, vectors, rest = self._spectrum
        scales = _inverse_root(torch.cat([values, values.new_tensor([rest])]), tolerance)
        x = features.double()
        if self.centred:
            x = x - self._mean.to(x.device)
        scales, vectors = scales.to(x.device), vectors.to(x.device)
        inside = x @ vectors
        whitened = (inside * scales[:-1]) @ vectors.mT
        if self.rank is not None:
            whitened += scales[-1] * (x - inside @ vectors.mT)
        return whitened.float()

    def state_dict(self) -> dict[str, Any]:
        """What was seen so far."""
        return {"weight": self._weight, "mean": self._mean, "sum": self._sum, "rest": self._rest}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state`.

        Raises:
            UsageError: it is the state of an estimator of another dimension or rank.
        """
        rows, dimension = state["sum"].shape
        limit = self.dimension if self.rank is None else self.rank
        if dimension != self.dimension or rows > limit or (self.rank is None and rows != limit):
            raise UsageError(
                f"state of shape {[rows, dimension]} does not fit a SecondMoment with dimension={self.dimension} and"
                f" rank={self.rank}: make one with the options that the state was saved under"
            )
        self._weight, self._rest = float(state["weight"]), float(state["rest"])
        self._mean, self._sum = state["mean"].clone(), state["sum"].clone()
        self._spectrum = None

    def _check(self, features: Tensor) -> None:
        if features.ndim < 1 or features.shape[-1] != self.dimension:
            raise UsageError(f"features of shape {list(features.shape)}: expected [..., {self.dimension}]")

    def _to(self, device: torch.device) -> None:
        self._mean, self._sum = self._mean.to(device), self._sum.to(device)

    def _compress(self, rows: Tensor, rank: int) -> None:
        """Keep the `rank` leading directions of rowsᵀ·rows, add the trace of the others to the rest."""
        values, vectors = torch.linalg.eigh(rows @ rows.mT)
        self._rest = self.decay * self._rest + values[:-rank].clamp(min=0).sum().item()
        # Rows of zeros, or of rounding errors, have no direction: drop them.
        kept = vectors[:, -rank:][:, values[-rank:] > 1e-13 * values[-1].clamp(min=0)]
        self._sum = kept.mT @ rows

    def _decompose(self) -> tuple[Tensor, Tensor, float]:
        """Eigenvalues [R], eigenvectors [D,R] and the eigenvalue of all directions outside, shrunk."""
        if self.rank is None:
            values, vectors = torch.linalg.eigh(self._sum / self._weight)
            values, rest = values.clamp(min=0), 0.0
        else:
            norms = self._sum.norm(dim=-1)
            vectors = (self._sum / norms[:, None]).mT
            values, rest = norms**2 / self._weight, self._rest / self._weight
        isotropic = (values.sum().item() + rest) / self.dimension
        rest /= max(1, self.dimension - len(values))
        return self._shrink(values, isotropic), vectors, self._shrink(rest, isotropic)

    def _shrink(self, value: Any, isotropic: float) -> Any:
        return (1 - self.shrinkage) * value + self.shrinkage * isotropic


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
