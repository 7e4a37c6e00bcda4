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
_UNAVOIDABLE = {
    "nothing cached",
    "warm-up",
    "final step",
    "outside start..end",
    "no rate yet",
    "max_consecutive_hits",
    "scheduled",
    "weights changed",
}
#: A branch that follows another one's decision.
_LED = "the first branch computed"
_CONTROL = "control changed"
_BEYOND = {"beyond the mask", "beyond the table"}


class Watch:
    """The decisions of one branch in one trajectory, which began at `first_step`."""

    def __init__(self, first_step: int = 0) -> None:
        self.first_step = first_step
        self.decisions: list[Decision] = []
        #: How much the probe changed since the step before, about.
        self.changes: list[float] = []
        self.metrics: list[float] = []
        #: How much the conditioning had changed where that forbade a hit.
        self.control: list[float] = []
        #: How often the metric alone forbade a hit, and how often there was one.
        self.above = self.hits = 0
        self._hits_in_a_row = 0

    def note(self, metric: float, decision: Decision, policy: Policy) -> None:
        if len(self.decisions) >= MAX_STEPS:  # somebody who never begins a new trajectory
            return
        probe = policy.probe
        adds_up = probe is not None and probe.reference == "computed"
        self.changes.append(metric / (self._hits_in_a_row + 1) if adds_up else metric)
        self._hits_in_a_row = self._hits_in_a_row + 1 if decision.is_hit else 0
        self.above += decision.reason == "above threshold"
        self.hits += decision.is_hit
        self.decisions.append(decision)
        self.metrics.append(metric)

    def forbidden(self, change: float) -> None:
        """Note that a hit was forbidden by this `change` of the conditioning."""
        if len(self.control) < MAX_STEPS:
            self.control.append(change)

    def verdict(self, policy: Policy) -> str | None:
        """One of "beyond" (the policy's table), "never", "control" (never, for the conditioning's
        sake), "always", "mixed"; None: too short, or another branch's.
        """
        if any(decision.reason in _BEYOND for decision in self.decisions):
            return "beyond"
        if len(self.decisions) < MIN_STEPS:
            return None
        free = self._free()
        hits = sum(decision.is_hit for decision in free)
        if not hits and 2 * len(self.control) >= len(free) > 0:
            return "control"
        if free and all(decision.reason == _LED for decision in free):
            return None
        if not hasattr(policy, "threshold"):
            return "mixed" if hits else None
        if hits == 0:
            return "never"
        return "always" if hits == len(free) else "mixed"

    def _free(self) -> list[Decision]:
        return [d for d in self.decisions if d.is_hit or d.reason not in _UNAVOIDABLE]

    @property
    def is_stuck(self) -> bool:
        """Whether the metric has forbidden every hit, and several."""
        return self.hits == 0 and self.above >= MIN_STEPS

    @property
    def is_judged(self) -> bool:
        """Whether some decision was free."""
        return bool(self._free())

    def complaint(self, policy: Any, num_steps: int | None, branch: Hashable) -> str | None:
        """What to tell the user about this trajectory, None if there is nothing to say."""
        name, verdict = type(policy).__name__, self.verdict(policy)
        where = "" if branch is None else f" in branch {branch!r}"
        if verdict == "beyond":
            beyond = sum(decision.reason in _BEYOND for decision in self.decisions)
            return (
                f"{name} was made for fewer steps than the trajectory has{where}: {beyond} step(s) "
                f"beyond it were computed, and the others are not placed well"
            )
        if verdict == "control":
            return self._of_control(policy, where)
        if verdict not in ("never", "always"):
            return None
        what = "never hit" if verdict == "never" else "hit on every step where it was free to"
        return (
            f"{name}(threshold={policy.threshold:g}) {what} in a trajectory of "
            f"{len(self.decisions)} evaluations{where}: {self._range()}. "
            f"{self._advice(policy, num_steps, branch)}"
        )

    def _of_control(self, policy: Any, where: str) -> str:
        limit, free = policy.control_threshold, len(self._free())
        largest = max(self.control, key=lambda change: math.inf if math.isnan(change) else change)
        advice = (
            f"A control_threshold above {largest:.4g} would have allowed them"
            if math.isfinite(largest)
            else "control_threshold=None does not look at it"
        )
        return (
            f"{type(policy).__name__}(control_threshold={limit:g}) never hit in a trajectory of "
            f"{len(self.decisions)} evaluations{where}: at {len(self.control)} of the {free} where "
            f"it was free to, the conditioning (control residuals, text, adapter features) had "
            f"changed since the last computed step, by up to {largest:.4g}. {advice}"
        )

    def _range(self) -> str:
        measured = [m for m in self.metrics if math.isfinite(m)] or [
            d.score
            for d in self.decisions
            if d.reason not in _UNAVOIDABLE and math.isfinite(d.score)
        ]
        if not measured:
            return "nothing was measured where it was free to hit"
        return f"the metric was {min(measured):.4g} to {max(measured):.4g}"

    def _advice(self, policy: Any, num_steps: int | None, branch: Hashable) -> str:
        try:
            threshold = halving_threshold(
                policy,
                self.changes,
                num_steps=num_steps,
                branch=branch,
                first_step=self.first_step,
            )
        except Exception:  # noqa: BLE001 - a policy of the user's that takes no other threshold
            return "Which threshold would have hit half of the steps is not known"
        if threshold is None:
            return "Its other limits do not let it hit half of the steps at any threshold"
        return f"A threshold of about {_rounded_up(threshold):.6g} would have hit half of the steps"


def _rounded_up(value: float) -> float:
    """`value` with three digits, not below it."""
    unit = 10.0 ** (math.floor(math.log10(value)) - 2)
    return math.ceil(value / unit) * unit
