"""AdaptiveCache: error control, as solvers with adaptive steps do it, in place of a threshold."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from fxcache.errors import PolicyError
from fxcache.policy.base import Decision, History
from fxcache.policy.checks import check_integer, check_number
from fxcache.policy.forecast import Corrected, Forecast, Reuse, Taylor
from fxcache.policy.named import NamedPolicy
from fxcache.policy.reasons import Reason

QUALITIES = {"high": 0.05, "balanced": 0.08, "fast": 0.12}


@dataclass(frozen=True, kw_only=True)
class AdaptiveCache(NamedPolicy):
    """Hit while the forecast is predicted to be off by less than a tolerance.

    Nothing is measured at a hit. At a miss the fresh residual is there, and so is what the forecast
    would have been: ``err = mean|p - r| / mean|r|``, over all streams. The error of a polynomial
    through the computed steps n grows with ``g(t) = prod |t - n| / (order + 1)!``, so with
    ``c = err / g`` of the last miss, a later step t adds ``c g(t)`` to a sum that starts at 0 after
    each miss. A step is a hit while that sum is below
    ``tolerance * (1 - slope + 2 slope t / (N - 1))`` of N steps: errors of early steps are carried
    through the whole solve. The first ``order + 2`` computed steps only learn. An error that is
    not finite is a miss. Fresh noise of a sampler makes forecasts bad, and so makes misses.

    What the hits of a run lacked becomes known at the miss that ends it, and the next hit adds it:
    a sampler sums its steps up, and so the sum is right again (`Corrected`).

    Where the number of steps is not known (no scheduler, no announcement), the slope counts as 0
    and no final step is kept free of hits.

    Source: error control by local extrapolation, e.g. Hairer, Norsett and Wanner, Solving Ordinary
    Differential Equations I, II.4.

    Args:
        tolerance: relative error of the residual, in [0, inf]. 0 never hits.
        order: degree of the polynomial, 0 (reuse) to 3. ``order + 2`` residuals a stream are kept.
        slope: in [0, 1], how much stricter the first step is than the middle.
        max_consecutive_hits: at least 1.
        warmup_steps, final_steps: so many steps at the start and at the end are computed.
        decide, control_threshold, origin: see `NamedPolicy`.

    Raises:
        PolicyError: for a value outside its range.
    """

    tolerance: float = 0.08
    order: int = 1
    slope: float = 0.6
    max_consecutive_hits: int = 4
    warmup_steps: int = 0
    final_steps: int = 1
    #: Follows from `order`.
    forecast: Forecast = field(init=False, repr=False, default=Reuse())

    def __post_init__(self) -> None:
        check_number("tolerance", self.tolerance, "[0, inf]")
        check_integer("order", self.order, 0, 3)
        check_number("slope", self.slope, "[0, 1]")
        check_integer("max_consecutive_hits", self.max_consecutive_hits, 1)
        check_integer("warmup_steps", self.warmup_steps, 0)
        check_integer("final_steps", self.final_steps, 0)
        inner = Taylor(order=self.order) if self.order else Reuse()
        object.__setattr__(self, "forecast", Corrected(inner=inner))
        super().__post_init__()

    @classmethod
    def for_quality(cls, quality: str, **others: Any) -> "AdaptiveCache":
        """The tolerance for "high" (0.05), "balanced" (0.08, the default) or "fast" (0.12); what
        they gave is in docs/policies.md. `others` are further arguments.
        """
        if quality not in QUALITIES:
            raise PolicyError(f"quality must be one of {', '.join(QUALITIES)}, got {quality!r}")
        return cls(tolerance=QUALITIES[quality], **others)

    def rule(self, metric: float, history: History) -> Decision:
        """Hit while the predicted errors since the last miss add up to less than the tolerance."""
        nodes, steps = history.past[: self.order + 1], history.num_steps
        if not nodes:
            return Decision(False, Reason.NOTHING_CACHED)
        if nodes[0] == history.step:
            return Decision(False, Reason.SAME_STEP)
        score, error = 0.0, history.error if len(nodes) > self.order else None
        if error is not None:  # that of a forecast of this step, as that of the last miss tells
            at, *before = error.steps
            score = error.value * self._growth(history.step, nodes) / self._growth(at, before)
        if history.step < self.warmup_steps:
            return Decision(False, Reason.WARM_UP, score)
        if steps is not None and history.step >= steps - self.final_steps:
            return Decision(False, Reason.FINAL_STEP, score)
        if error is None:
            return Decision(False, Reason.NO_ERROR)
        if history.hits_in_a_row >= self.max_consecutive_hits:
            return Decision(False, Reason.MAX_CONSECUTIVE_HITS, score)
        slope = 0.0 if steps is None or steps < 2 else self.slope
        share = 1 - slope + (2 * slope * history.step / (steps - 1) if slope and steps else 0)
        total = history.accumulated + score
        if total < self.tolerance * share:  # NaN compares false: a miss
            return Decision(True, None, score)
        reason = Reason.ABOVE_TOLERANCE if math.isfinite(total) else Reason.NOT_FINITE
        return Decision(False, reason, score)

    def _growth(self, step: int, nodes: Sequence[int]) -> float:
        """How the error of the polynomial through `nodes` grows until `step`."""
        return math.prod(abs(step - n) for n in nodes) / math.factorial(self.order + 1)
