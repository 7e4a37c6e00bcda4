"""First Block Cache, and with head and tail blocks DBCache."""

import math
from dataclasses import dataclass, field

from fxcache.errors import PolicyError
from fxcache.policy.base import HIT, Decision, History, as_float32
from fxcache.policy.checks import check_integer, check_number
from fxcache.policy.forecast import Forecast, Reuse, check_forecast


@dataclass(frozen=True, kw_only=True)
class FirstBlockCache:
    """Reuse the stack's residual while the first blocks' residual changes little.

    The metric is the residual diff ``mean|p - p*| / mean|p*|`` of the head residual p of the image
    stream and its value p* at the last computed step. Source: ParaAttention and Comfy-WaveSpeed
    (First Block Cache); with `head_blocks` and `tail_blocks`, cache-dit's DBCache.

    Args:
        threshold: a hit needs a residual diff below this. In [0, inf]: 0 never hits, inf hits
            whenever it may. 0.08 is the published setting for Flux.
        head_blocks: blocks that always run and whose residual is measured, at least 1.
        tail_blocks: blocks at the stack's end that always run.
        start, end: fractions of the trajectory's steps between which hits are allowed. Where they
            are not 0 and 1, announce ``denoiser.trajectory(num_steps=...)``.
        warmup_steps: this many steps at the trajectory's start are computed.
        max_consecutive_hits: at most so many hits in a row (None: no limit).
        max_accumulated: a hit also needs the sum of the diffs since the last computed step below
            this (None: no limit).
        forecast: `Reuse()` or `Taylor(order=1)`.
        in_training: cache with gradients enabled too.

    Raises:
        PolicyError: for a value outside its range.
    """

    threshold: float = 0.08
    head_blocks: int = 1
    tail_blocks: int = 0
    start: float = 0.0
    end: float = 1.0
    warmup_steps: int = 0
    max_consecutive_hits: int | None = None
    max_accumulated: float | None = None
    forecast: Forecast = field(default_factory=Reuse)
    in_training: bool = False

    def __post_init__(self) -> None:
        check_number("threshold", self.threshold, 0, math.inf)
        check_integer("head_blocks", self.head_blocks, 1)
        check_integer("tail_blocks", self.tail_blocks, 0)
        check_number("start", self.start, 0, 1)
        check_number("end", self.end, 0, 1)
        if self.start >= self.end:
            raise PolicyError(f"start must be below end, got start={self.start}, end={self.end}")
        check_integer("warmup_steps", self.warmup_steps, 0)
        if self.max_consecutive_hits is not None:
            check_integer("max_consecutive_hits", self.max_consecutive_hits, 0)
        if self.max_accumulated is not None:
            check_number("max_accumulated", self.max_accumulated, 0, math.inf)
        check_forecast(self.forecast)

    @property
    def measures(self) -> bool:
        return True

    def decide(self, metric: float, history: History) -> Decision:
        """Hit if the metric and every limit allow it; a miss names the first that does not."""
        if not history.past:
            return Decision(False, "nothing cached")
        if history.step < self.warmup_steps:
            return Decision(False, "warm-up")
        if not self._in_window(history):
            return Decision(False, "outside start..end")
        limit = self.max_consecutive_hits
        if limit is not None and not history.hits_in_a_row < limit:
            return Decision(False, "max_consecutive_hits")
        if not metric < as_float32(self.threshold):  # NaN compares false: a miss
            return Decision(False, "above threshold" if math.isfinite(metric) else "not finite")
        bound = self.max_accumulated
        if bound is not None and not history.accumulated + metric < bound:
            return Decision(False, "max_accumulated")
        return HIT

    def _in_window(self, history: History) -> bool:
        if self.start == 0 and self.end == 1:
            return True
        if history.num_steps is None:
            raise PolicyError(
                f"start={self.start} and end={self.end} are fractions of the trajectory's steps, "
                f"whose number is not known: call the sampler inside "
                f"`with denoiser.trajectory(num_steps=...)`"
            )
        # Rounded, so that 0.7 of 10 steps is 7 and not 7.000000000000001.
        first, last = (round(f * history.num_steps, 6) for f in (self.start, self.end))
        return first <= history.step < last
