"""Notices that a policy never hits, or always, and says what would have hit half of the steps."""

import math
from collections.abc import Hashable
from typing import Any

from fxcache.policy import Decision, Policy
from fxcache.policy.simulate import halving_threshold

#: Shorter trajectories say nothing.
MIN_STEPS = 4
MAX_STEPS = 1000
#: Misses that are no verdict on what was measured.
_UNAVOIDABLE = {"nothing cached", "warm-up", "final step", "outside start..end", "no rate yet"}


class Watch:
    """The decisions of one branch in one trajectory."""

    def __init__(self) -> None:
        self.decisions: list[Decision] = []
        self.metrics: list[float] = []

    def note(self, metric: float, decision: Decision) -> None:
        if len(self.decisions) >= MAX_STEPS:  # somebody who never begins a new trajectory
            return
        self.decisions.append(decision)
        self.metrics.append(metric)

    def complaint(self, policy: Policy, num_steps: int | None, branch: Hashable) -> str | None:
        """What to tell the user about this trajectory, None if there is nothing to say."""
        free = [d for d in self.decisions if d.is_hit or d.reason not in _UNAVOIDABLE]
        if len(self.decisions) < MIN_STEPS or not hasattr(policy, "threshold"):
            return None
        hits = sum(decision.is_hit for decision in free)
        if hits == 0:
            what = "never hit"
        elif hits == len(free):
            what = "hit on every step where it was free to"
        else:
            return None
        where = "" if branch is None else f" in branch {branch!r}"
        return (
            f"{type(policy).__name__}(threshold={policy.threshold:g}) {what} in a trajectory of "
            f"{len(self.decisions)} evaluations{where}: {self._range()}. "
            f"{self._advice(policy, num_steps, branch)}"
        )

    def _range(self) -> str:
        measured = [m for m in self.metrics if math.isfinite(m)] or [
            d.score for d in self.decisions if d.reason not in _UNAVOIDABLE
        ]
        if not measured:
            return "nothing was measured where it was free to hit"
        return f"the metric was {min(measured):.4g} to {max(measured):.4g}"

    def _advice(self, policy: Any, num_steps: int | None, branch: Hashable) -> str:
        threshold = halving_threshold(policy, self.metrics, num_steps=num_steps, branch=branch)
        if threshold is None:
            return "Its other limits do not let it hit half of the steps at any threshold"
        return f"A threshold of about {_rounded_up(threshold):.6g} would have hit half of the steps"


def _rounded_up(value: float) -> float:
    """`value` with three digits, not below it."""
    unit = 10.0 ** (math.floor(math.log10(value)) - 2)
    return math.ceil(value / unit) * unit
