"""A running second moment of features, for whitening that does not depend on the group (arXiv 2603.12248, App. B)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ebft.errors import UsageError


def inverse_root(values: Tensor, tolerance: float) -> Tensor:
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
        """(Σ†)^{1/2} times features [...,D], float32; `tolerance` as in `ebft.features.whitening.whiten`.

        Raises:
            UsageError: another dimension, or nothing has been seen yet.
        """
        self._check(features)
        if self._weight == 0:
            raise UsageError("this SecondMoment has seen no features: update it from a calibration pass first")
        if self._spectrum is None:
            self._spectrum = self._decompose()
        values, vectors, rest = self._spectrum
        scales = inverse_root(torch.cat([values, values.new_tensor([rest])]), tolerance)
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
