"""What sets the weight of the divergence from the reference while training goes on, and what ends training."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

from ebft.errors import UsageError


class KLController(Protocol):
    """Sets the coefficient of the divergence term from one optimiser step to the next."""

    @property
    def coefficient(self) -> float: ...

    @property
    def stopped(self) -> bool:
        """Whether training is to end."""
        ...

    def update(self, kl: float) -> float:
        """Take the measured divergence (in nats, positive when the policy moved away); return the new coefficient."""
        ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


@dataclass
class ConstantKL:
    """A coefficient that never changes."""

    coefficient: float
    stopped: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not (math.isfinite(self.coefficient) and self.coefficient >= 0):
            raise UsageError(f"coefficient={self.coefficient!r} of the divergence term: expected 0 or more")

    def update(self, kl: float) -> float:
        return self.coefficient

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to load: the coefficient is an option, not a state."""


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
    stopped: ClassVar[bool] = False

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


@dataclass
class StopAbove:
    """Ends training at the first measured divergence above `limit`; the coefficient is that of `controller`.

    Args:
        controller: sets the coefficient as long as training goes on.
        limit: in nats, above 0, normalised as the measured one.
        highest: divergence measured so far, which is the state; a run stopped by it goes on under a higher limit.

    Raises:
        UsageError: a limit that is not a number above 0.
    """

    controller: KLController
    limit: float
    highest: float = field(default=0.0, init=False)

    def __post_init__(self) -> None:
        if not (math.isfinite(self.limit) and self.limit > 0):
            raise UsageError(f"limit={self.limit!r} of the divergence: expected a finite number above 0")

    @property
    def coefficient(self) -> float:
        return self.controller.coefficient

    @property
    def stopped(self) -> bool:
        return self.highest > self.limit

    def update(self, kl: float) -> float:
        self.highest = max(self.highest, kl if kl <= math.inf else math.inf)  # one that is not a number stops too
        return self.coefficient if self.stopped else self.controller.update(kl)

    def state_dict(self) -> dict[str, Any]:
        return {"controller": self.controller.state_dict(), "highest": self.highest}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.controller.load_state_dict(state["controller"])
        self.highest = state["highest"]
