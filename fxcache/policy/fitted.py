"""Forecast with weights that were fitted to recorded trajectories."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from fxcache.errors import PolicyError
from fxcache.policy.checks import check_integer
from fxcache.policy.forecast import Forecast, Taylor, check_forecast

#: A step that is forecast and the computed steps that it is forecast from, newest first.
Place = tuple[int, tuple[int, ...]]


@dataclass(frozen=True, kw_only=True)
class Fitted:
    """Weights from a table; found by `fxcache.tune` for one model, sampler and schedule.

    Args:
        table: weights by (step, past computed steps, newest first), one a past step.
        ring: how many past residuals are kept, 1 to 5; the longest past of the table.
        fallback: for what is not in the table (a miss that was not scheduled).

    Raises:
        PolicyError: for a table that does not fit the ring, or a fallback that needs a longer one.
    """

    table: Mapping[Place, Sequence[float]] = field(hash=False)
    ring: int = 3
    fallback: Forecast = Taylor(order=1)

    def __post_init__(self) -> None:
        check_integer("Fitted.ring", self.ring, 1, 5)
        check_forecast(self.fallback)
        if self.fallback.ring > self.ring:
            raise PolicyError(
                f"Fitted.fallback must need a ring of at most {self.ring}, got "
                f"{self.fallback!r}, which needs {self.fallback.ring}"
            )
        table = {(step, tuple(past)): tuple(w) for (step, past), w in self.table.items()}
        object.__setattr__(self, "table", table)
        for (step, past), weights in table.items():
            if not len(weights) == len(past) <= self.ring:
                raise PolicyError(
                    f"Fitted.table must hold one weight for each past step, at most {self.ring}, "
                    f"got {len(weights)} at step {step} from {past}"
                )
            if not all(math.isfinite(weight) for weight in weights):
                raise PolicyError(
                    f"Fitted.table must hold finite weights, got {weights} at step {step}"
                )

    def weights(self, step: int, past: Sequence[int]) -> list[float]:
        """The table's weights; the fallback's where it has none."""
        found = self.table.get((step, tuple(past)))
        if found is not None:
            return list(found)
        usable = past[: self.fallback.ring]
        return [*self.fallback.weights(step, usable), *[0.0] * (len(past) - len(usable))]
