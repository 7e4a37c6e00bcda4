"""What every policy answers: which blocks are the span, and is this evaluation a hit?"""

import ctypes
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from fxcache.policy.forecast import Forecast


@dataclass
class History:
    """What a policy knows of a branch's trajectory when it decides.

    `step` counts the trajectory's steps from 0; `num_steps` is their number if it was announced;
    `accumulated` is the sum of the metrics of the hits since the last miss, `hits_in_a_row` their
    number; `past` are the steps of the residuals that are held, newest first (empty: none is).
    """

    step: int = 0
    num_steps: int | None = None
    accumulated: float = 0.0
    hits_in_a_row: int = 0
    past: tuple[int, ...] = ()


@dataclass(frozen=True)
class Decision:
    """A hit or a miss; a miss has a reason."""

    is_hit: bool
    reason: str | None = None


HIT = Decision(True)


@runtime_checkable
class Policy(Protocol):
    """The interface between policies and the runtime. Policies are frozen and hold no state."""

    @property
    def measures(self) -> bool:
        """Whether `decide` needs a metric. If not, a step is one region and nothing is read back;
        `decide` is given NaN."""

    @property
    def head_blocks(self) -> int:
        """Blocks at the start of the stack that always run."""

    @property
    def tail_blocks(self) -> int:
        """Blocks at the end of the stack that always run."""

    @property
    def forecast(self) -> Forecast:
        """What a hit puts in the place of the residual."""

    @property
    def in_training(self) -> bool:
        """Whether to cache while gradients are enabled."""

    def decide(self, metric: float, history: History) -> Decision:
        """Decide on an evaluation whose probe's residual diff is `metric` (float32; may be NaN)."""


def as_float32(value: float) -> float:
    """`value` rounded to float32, as the metric is: a score is compared in float32."""
    return ctypes.c_float(value).value
