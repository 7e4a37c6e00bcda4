"""What the named policies have in common: options, limits, and the comparison."""

import math
from dataclasses import dataclass

from fxcache.errors import PolicyError
from fxcache.policy.base import Decision, History, Origin, Span, as_float32
from fxcache.policy.checks import check_integer, check_number
from fxcache.policy.forecast import Forecast, Reuse, check_forecast
from fxcache.policy.probe import ProbeKind
from fxcache.policy.reasons import Reason

#: What `decide` may be.
DECIDE = ("each", "first")


@dataclass(frozen=True, kw_only=True)
class NamedPolicy:
    """The options of every named policy. See `ThresholdPolicy` for those that measure.

    Unless a policy says otherwise, nothing is measured and a hit skips the whole stack.

    Args:
        forecast: what a hit puts in the place of the residual: `Reuse()`, `Taylor(order=1)`, ...
        decide: where a step has several branches (cond, uncond), "each" decides for itself, or the
            "first" of a step for the others.
        control_threshold: a hit also needs every conditioning input (what the caller gives the
            model beside its noisy sample and the time: control residuals, text, adapter features)
            to have changed by less than this since the last computed step, as residual diff
            ``mean|c - c*| / mean|c*|``. In [0, inf]; 0 never hits. A value that is not finite, and
            an input that came or went, is too much at any threshold. Costs a copy of these inputs
            and, at each step that would be a hit, one more read-back (the only one, of a policy
            that measures nothing). None: hits do not look at them, which costs nothing.
        origin: where a ready-made policy comes from; set by `preset` and by calibration.
    """

    forecast: Forecast = Reuse()
    decide: str = "each"
    control_threshold: float | None = None
    origin: Origin | None = None

    @property
    def probe(self) -> ProbeKind | None:
        return None

    @property
    def span(self) -> Span:
        return Span()

    def __post_init__(self) -> None:
        check_forecast(self.forecast)
        if self.decide not in DECIDE:
            raise PolicyError(f"decide must be one of {DECIDE}, got {self.decide!r}")
        if self.control_threshold is not None:
            check_number("control_threshold", self.control_threshold, "[0, inf]")
        if not isinstance(self.origin, Origin | None):
            raise PolicyError(f"origin must be {Origin | None}, got {self.origin!r}")


@dataclass(frozen=True, kw_only=True)
class ThresholdPolicy(NamedPolicy):
    """A policy that hits while the sum of its scores since the last miss is below a threshold (of
    `FirstBlockCache`: the last score alone).

    Args:
        threshold: in [0, inf]: 0 never hits, inf hits whenever it may.
        start, end: fractions of the trajectory's steps between which hits are allowed. Where they
            are not 0 and 1, announce ``denoiser.trajectory(num_steps=...)``.
        warmup_steps: this many steps at the trajectory's start are computed.
        final_steps: this many steps at its end are computed. Not 0: announce as above.
        max_consecutive_hits: at most so many hits in a row (None: no limit).
    """

    threshold: float
    start: float = 0.0
    end: float = 1.0
    warmup_steps: int = 0
    final_steps: int = 0
    max_consecutive_hits: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("threshold", self.threshold, "[0, inf]")
        check_number("start", self.start, "[0, 1]")
        check_number("end", self.end, "[0, 1]")
        if self.start >= self.end:
            raise PolicyError(f"start must be below end, got start={self.start}, end={self.end}")
        check_integer("warmup_steps", self.warmup_steps, 0)
        check_integer("final_steps", self.final_steps, 0)
        if self.max_consecutive_hits is not None:
            check_integer("max_consecutive_hits", self.max_consecutive_hits, 0)

    @property
    def needs_num_steps(self) -> bool:
        """Whether it cannot decide without the number of steps."""
        return (self.start, self.end) != (0, 1) or self.final_steps > 0

    def rule(self, metric: float, history: History) -> Decision:
        """Hit if the sum and every limit allow it; a miss names the first that does not."""
        if (miss := self.forced(history)) is not None:
            return miss
        score = self.score(metric)
        return compared(score, history.accumulated + score, self.threshold)

    def score(self, metric: float) -> float:
        """What an evaluation that measured `metric` adds to the sum."""
        return metric

    def forced(self, history: History) -> Decision | None:
        """The miss that must be whatever was measured, None if nothing forces one."""
        # What needs the number of steps says so at once, not when half of it is computed.
        if history.num_steps is None and self.needs_num_steps:
            raise PolicyError(
                f"start={self.start}, end={self.end}, final_steps={self.final_steps} of "
                f"{type(self).__name__} need the number of the trajectory's steps, which is not "
                f"known: call the sampler inside `with denoiser.trajectory(num_steps=...)` (and "
                f"slot=... for a request of a batch), or set start=0, end=1 and final_steps=0"
            )
        steps, limit = history.num_steps or 0, self.max_consecutive_hits
        if not history.past:
            reason = Reason.NOTHING_CACHED
        elif history.step < self.warmup_steps:
            reason = Reason.WARM_UP
        elif self.final_steps and history.step >= steps - self.final_steps:
            reason = Reason.FINAL_STEP
        elif (self.start, self.end) != (0, 1) and not (
            # Rounded, so that 0.7 of 10 steps is 7 and not 7.000000000000001.
            round(self.start * steps, 6) <= history.step < round(self.end * steps, 6)
        ):
            reason = Reason.OUTSIDE_WINDOW
        elif limit is not None and history.hits_in_a_row >= limit:
            reason = Reason.MAX_CONSECUTIVE_HITS
        else:
            return None
        return Decision(False, reason)


def compared(score: float, total: float, threshold: float) -> Decision:
    """A hit if `total` is below `threshold`, in float32. NaN compares false: a miss."""
    if as_float32(total) < as_float32(threshold):
        return Decision(True, None, score)
    return Decision(
        False, Reason.ABOVE_THRESHOLD if math.isfinite(total) else Reason.NOT_FINITE, score
    )
