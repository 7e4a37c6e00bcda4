"""First Block Cache, and with head and tail blocks DBCache."""

from dataclasses import dataclass

from fxcache.policy.base import Decision, History, Span
from fxcache.policy.checks import check_integer, check_number
from fxcache.policy.named import ThresholdPolicy, compared
from fxcache.policy.probe import HeadResidual
from fxcache.policy.reasons import Reason


@dataclass(frozen=True, kw_only=True)
class FirstBlockCache(ThresholdPolicy):
    """Reuse the stack's residual while the first blocks' residual changes little.

    The metric is the residual diff ``mean|p - p*| / mean|p*|`` of the head residual p of the image
    stream and its value p* at the last computed step. Source: ParaAttention and Comfy-WaveSpeed
    (First Block Cache); with `head_blocks` and `tail_blocks`, cache-dit's DBCache.

    Args:
        threshold: a hit needs a residual diff below this. In [0, inf]: 0 never hits, inf hits
            whenever it may. 0.08 is the published setting for Flux.
        head_blocks: blocks that always run and whose residual is measured, at least 1.
        tail_blocks: blocks at the stack's end that always run.
        max_accumulated: a hit also needs the sum of the diffs since the last computed step below
            this (None: no limit).
        start, end, warmup_steps, final_steps, max_consecutive_hits: see `ThresholdPolicy`.
        forecast, decide, control_threshold, origin: see `NamedPolicy`.

    Raises:
        PolicyError: for a value outside its range.
    """

    threshold: float = 0.08
    head_blocks: int = 1
    tail_blocks: int = 0
    max_accumulated: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_integer("head_blocks", self.head_blocks, 1)
        check_integer("tail_blocks", self.tail_blocks, 0)
        if self.max_accumulated is not None:
            check_number("max_accumulated", self.max_accumulated, "[0, inf]")

    @property
    def probe(self) -> HeadResidual:
        return HeadResidual()

    @property
    def span(self) -> Span:
        return Span(self.head_blocks, self.tail_blocks)

    def rule(self, metric: float, history: History) -> Decision:
        """Hit if the metric and every limit allow it; a miss names the first that does not."""
        if (miss := self.forced(history)) is not None:
            return miss
        decision = compared(metric, metric, self.threshold)
        bound = self.max_accumulated
        if decision.is_hit and bound is not None and not history.accumulated + metric < bound:
            return Decision(False, Reason.MAX_ACCUMULATED, metric)
        return decision
