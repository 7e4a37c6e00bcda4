"""What every policy answers: what is measured, what is skipped, and is this evaluation a hit?"""

import ctypes
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from fxcache.errors import PolicyError
from fxcache.policy.forecast import Forecast, checked
from fxcache.policy.probe import ProbeKind

#: The least `input_share` of a span: a hit's output always depends on the present input.
LEAST_INPUT = 0.1


@dataclass(frozen=True)
class ForecastError:
    """``mean|p - r| / mean|r|`` of a forecast p and the residual r that a miss computed.

    `steps` are that of the miss, then those of the residuals that p was made of, newest first.
    """

    steps: tuple[int, ...]
    value: float


@dataclass
class History:
    """What a policy knows of a branch's trajectory when it decides.

    `step` counts the trajectory's steps from 0; `num_steps` is their number if it was announced;
    `accumulated` is the sum of the scores of the hits since the last miss, `hits_in_a_row` their
    number; `past` are the steps of the residuals that are held, newest first (empty: none is);
    `computed` counts the misses since nothing was held; `branch` is the caller's name for it;
    `error` is that of the forecast at the last miss, for a policy with error control.
    """

    step: int = 0
    num_steps: int | None = None
    accumulated: float = 0.0
    hits_in_a_row: int = 0
    past: tuple[int, ...] = ()
    branch: Hashable = None
    computed: int = 0
    error: ForecastError | None = None


@dataclass(frozen=True)
class Decision:
    """A hit or a miss; a miss has a reason.

    `score` is what a hit adds to `History.accumulated`, and what was compared with the threshold.
    """

    is_hit: bool
    reason: str | None = None
    score: float = 0.0


@dataclass(frozen=True)
class Span:
    """The blocks that a hit skips: all but the first `head_blocks` and the last `tail_blocks`.

    With `whole_model`, the model itself: from its input to its output. What is kept of a stream is
    ``after - input_share * before``, and a hit adds it to ``input_share * before``: at 1 that is
    the residual; the less, the more it is the stream behind the span that is forecast.
    """

    head_blocks: int = 0
    tail_blocks: int = 0
    whole_model: bool = False
    input_share: float = 1.0


@dataclass(frozen=True)
class Origin:
    """Where a ready-made policy comes from: a preset, or a calibration.

    `model_classes` are the class names of the denoisers it was made for, `source` says who
    measured it.
    """

    preset: str
    model_classes: tuple[str, ...] = ()
    source: str = ""


@runtime_checkable
class Policy(Protocol):
    """The interface between policies and the runtime: four choices, and an option.

    Policies are frozen and hold no state. Any object with these members is one; it may have a
    `control_threshold`, too (see `NamedPolicy`).
    """

    @property
    def probe(self) -> ProbeKind | None:
        """What is measured. None: nothing, so a step is one region and nothing is read back;
        `rule` is given NaN."""

    @property
    def span(self) -> Span:
        """What a hit skips."""

    @property
    def forecast(self) -> Forecast:
        """What a hit puts in the place of the residual."""

    @property
    def decide(self) -> str:
        """Who decides where there are branches: "each" for itself, or the "first" of a step."""

    def rule(self, metric: float, history: History) -> Decision:
        """Decide on an evaluation whose probe measured `metric` (float32; may be NaN)."""


def check_policy(value: object) -> None:
    """Raise PolicyError unless `value` is a policy (an instance, not a class)."""
    if isinstance(value, type) or not isinstance(value, Policy):
        raise PolicyError(f"policy must be a policy like FirstBlockCache(...), got {value!r}")


def pieces_of(policy: Policy) -> tuple[object, ...]:
    """What of a policy is compiled into the pieces."""
    looks, is_checked = getattr(policy, "control_threshold", None), checked(policy) is not None
    return policy.span, policy.probe, policy.forecast.ring, looks, is_checked


def as_float32(value: float) -> float:
    """`value` rounded to float32, as the metric is: a score is compared in float32."""
    return ctypes.c_float(value).value
