"""A fixed schedule: which steps may be hits is known before the trajectory starts."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from fxcache.errors import PolicyError
from fxcache.policy.base import HIT, Decision, History
from fxcache.policy.forecast import Forecast, Reuse, check_forecast


@dataclass(frozen=True, kw_only=True)
class StepSchedule:
    """Reuse the stack's residual on the steps that a mask names.

    Nothing is measured and nothing is read back, so a step is one compiled region (and with CUDA
    graphs one replay). The span is the whole stack. On a GPU, announce trajectories
    (``denoiser.trajectory()``): otherwise the timestep is read back to recognise them, and inside
    an announced one every evaluation of a branch counts as a step.

    Args:
        mask: one boolean a step of the trajectory; True where the step is a hit. Steps without a
            residual (the first) and steps beyond the mask are computed.
        forecast: `Reuse()` or `Taylor(order=1)`.
        in_training: cache with gradients enabled too.

    Raises:
        PolicyError: for a mask that is empty or holds something else than booleans.
    """

    mask: Sequence[bool]
    forecast: Forecast = field(default_factory=Reuse)
    in_training: bool = False

    def __post_init__(self) -> None:
        mask = tuple(self.mask) if isinstance(self.mask, Iterable) else ()
        if not mask or not all(_is_boolean(value) for value in mask):
            raise PolicyError(f"mask must hold one boolean a step, got {self.mask!r}")
        object.__setattr__(self, "mask", tuple(map(bool, mask)))
        check_forecast(self.forecast)

    @property
    def measures(self) -> bool:
        return False

    @property
    def head_blocks(self) -> int:
        return 0

    @property
    def tail_blocks(self) -> int:
        return 0

    def decide(self, metric: float, history: History) -> Decision:
        """Hit where the mask says so, if there is something to reuse."""
        if not history.past:
            return Decision(False, "nothing cached")
        if history.step >= len(self.mask):
            return Decision(False, "beyond the mask")
        return HIT if self.mask[history.step] else Decision(False, "scheduled")


def _is_boolean(value: Any) -> bool:
    """Whether `value` is True, False, 0 or 1, also as a scalar of numpy or torch."""
    try:
        return bool(value in (True, False))
    except (TypeError, ValueError, RuntimeError):  # something of many elements
        return False
