"""Forecasters: what stands in for the residual that a hit does not compute.

Each is a weight vector over a ring of past residuals, so one fused operation serves all of them
and changing weights never recompiles.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from fxcache.errors import PolicyError
from fxcache.policy.checks import check_integer


@runtime_checkable
class Forecast(Protocol):
    """`ring` past residuals are kept; `weights` says how much of each makes the forecast."""

    @property
    def ring(self) -> int:
        """How many past residuals are kept."""

    def weights(self, step: int, past: Sequence[int]) -> list[float]:
        """Weights for the residuals computed at steps `past` (newest first) to forecast `step`."""


def check_forecast(value: object) -> None:
    """Raise PolicyError unless `value` is a forecaster."""
    if not isinstance(value, Forecast):
        raise PolicyError(
            f"forecast must be a forecaster like Reuse() or Taylor(order=1), got {value!r}"
        )


@dataclass(frozen=True, kw_only=True)
class Reuse:
    """The last residual as it is (First Block Cache, TeaCache, MagCache)."""

    @property
    def ring(self) -> int:
        return 1

    def weights(self, step: int, past: Sequence[int]) -> list[float]:
        return [1.0]


@dataclass(frozen=True, kw_only=True)
class Taylor:
    """Extrapolation by finite differences over the last computed steps, which may be uneven.

    The polynomial of degree `order` through the last ``order + 1`` residuals (of lower degree as
    long as fewer were computed). Source: TaylorSeer (arXiv 2503.06923), with divided differences,
    so that uneven distances between computed steps are taken into account.

    Args:
        order: degree, 1 to 4. Order 0 is `Reuse`.

    Raises:
        PolicyError: for another order.
    """

    order: int = 1

    def __post_init__(self) -> None:
        check_integer("Taylor.order", self.order, 1, 4)

    @property
    def ring(self) -> int:
        return self.order + 1

    def weights(self, step: int, past: Sequence[int]) -> list[float]:
        """Lagrange weights of the interpolating polynomial, evaluated at `step`."""
        if len(set(past)) < len(past):  # several evaluations of one step: the newest counts
            return [1.0] + [0.0] * (len(past) - 1)
        weights = []
        for j, at in enumerate(past):
            weight = 1.0
            for k, other in enumerate(past):
                if k != j:
                    weight *= (step - other) / (at - other)
            weights.append(weight)
        return weights
