"""A fixed schedule: which steps may be hits is known before the trajectory starts."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from fxcache.errors import PolicyError
from fxcache.policy.base import LEAST_INPUT, Decision, History, Span
from fxcache.policy.checks import check_integer, check_number
from fxcache.policy.named import NamedPolicy
from fxcache.policy.reasons import Reason


@dataclass(frozen=True, kw_only=True)
class StepSchedule(NamedPolicy):
    """Reuse the stack's residual on the steps that a mask names.

    Nothing is measured and nothing is read back, so a step is one compiled region (and with CUDA
    graphs one replay). The span is the whole stack. On a GPU, announce trajectories
    (``denoiser.trajectory()``): otherwise the timestep is read back to recognise them, and inside
    an announced one every evaluation of a branch counts as a step.

    Args:
        mask: one boolean a step of the trajectory; True where the step is a hit. Steps without a
            residual (the first) and steps beyond the mask are computed.
        input_share: in [0.1, 1]. At 1 a hit forecasts the stack's residual and adds it to the
            stream before the stack. The less, the more it forecasts the stream behind the stack
            itself: better where errors of its input would be carried on (DDIM with a model that
            predicts noise), worse where samplers add noise. `fxcache.tune` tries 1 and 0.1.
        forecast, decide, control_threshold, origin: see `NamedPolicy`.

    Raises:
        PolicyError: for a mask that is empty or holds something else than booleans, and an
            `input_share` outside its range.
    """

    mask: Sequence[bool]
    input_share: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("input_share", self.input_share, f"[{LEAST_INPUT}, 1]")
        mask = tuple(self.mask) if isinstance(self.mask, Iterable) else ()
        if not mask or not all(_is_boolean(value) for value in mask):
            raise PolicyError(f"mask must hold one boolean a step, got {self.mask!r}")
        object.__setattr__(self, "mask", tuple(map(bool, mask)))

    @classmethod
    def every(
        cls, n: int, *, num_steps: int, warmup_steps: int = 1, **options: Any
    ) -> "StepSchedule":
        """Compute the first `warmup_steps` steps of `num_steps`, and then every `n`-th.

        ``every(2, num_steps=6)`` computes steps 0, 2 and 4. `options` are those of the class.

        Raises PolicyError if `n`, `num_steps` or `warmup_steps` is below 1.
        """
        for name, value in (("n", n), ("num_steps", num_steps), ("warmup_steps", warmup_steps)):
            check_integer(name, value, 1)
        first = warmup_steps - 1
        mask = [step > first and (step - first) % n != 0 for step in range(num_steps)]
        return cls(mask=mask, **options)

    @property
    def span(self) -> Span:
        return Span(input_share=self.input_share)

    @property
    def num_computed(self) -> int:
        """How many of the mask's steps are computed: the first, and those that are no hits."""
        return 1 + sum(not hit for hit in self.mask[1:])

    def rule(self, metric: float, history: History) -> Decision:
        """Hit where the mask says so, if there is something to reuse."""
        if not history.past:
            return Decision(False, Reason.NOTHING_CACHED)
        if history.step >= len(self.mask):
            return Decision(False, Reason.BEYOND_MASK)
        is_hit = self.mask[history.step]
        return Decision(is_hit, None if is_hit else Reason.SCHEDULED)


def _is_boolean(value: Any) -> bool:
    """Whether `value` is True, False, 0 or 1, also as a scalar of numpy or torch."""
    try:
        return bool(value in (True, False))
    except (TypeError, ValueError, RuntimeError):  # something of many elements
        return False
