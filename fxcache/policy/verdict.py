"""What to tell the user of a trajectory: the policy never hit, or always, or is for other steps."""

import math
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

from fxcache.policy.base import Policy
from fxcache.policy.reasons import Reason
from fxcache.policy.simulate import halving_threshold
from fxcache.report import Record

#: Shorter trajectories say nothing.
MIN_STEPS = 4
#: Of longer ones, the first steps say enough.
MAX_STEPS = 1000
_BEYOND = {Reason.BEYOND_MASK, Reason.BEYOND_TABLE}
#: Verdicts on what was measured or predicted, so that another threshold might have hit.
_MEASURED = {
    Reason.ABOVE_THRESHOLD,
    Reason.ABOVE_TOLERANCE,
    Reason.MAX_ACCUMULATED,
    Reason.NOT_FINITE,
    Reason.CONTROL_CHANGED,
}
_FORCED = {*Reason} - _MEASURED


def verdict(
    policy: Any, branches: Mapping[Hashable, Sequence[Record]], num_steps: int | None
) -> str | None:
    """One sentence on a trajectory, given the evaluations of each branch; None if all is well.

    Branches that are too short, or that followed another one, have no say; where the others differ,
    some hit, and nothing is said.
    """
    own = {name: seen[:MAX_STEPS] for name, seen in branches.items()}
    kinds = {name: kind for name, seen in own.items() if (kind := _kind(policy, seen)) is not None}
    if not kinds or (len(set(kinds.values())) > 1 and set(kinds.values()) != {"never", "control"}):
        return None
    name = min(kinds, key=lambda name: kinds[name] != "control")
    kind, seen = kinds[name], own[name]
    made, where = type(policy).__name__, "" if name is None else f" in branch {name!r}"
    length = f"in a trajectory of {len(seen)} evaluations{where}"
    if kind == "beyond":
        beyond = sum(each.reason in _BEYOND for each in seen)
        return (
            f"{made} was made for fewer steps than the trajectory has{where}: {beyond} step(s) "
            f"beyond it were computed, and the others are not placed well"
        )
    if kind == "control":
        limit = f"{made}(control_threshold={policy.control_threshold:g})"
        return f"{limit} never hit {length}: {_of_control(seen)}"
    if kind == "intolerant":
        off = min((each.score for each in _free(seen)), default=math.nan)
        later = f", and later it would have been off by {off:.2g} at least" * math.isfinite(off)
        return (
            f"{made}(tolerance={policy.tolerance:g}) never hit {length}: its forecast learns from "
            f"the first {policy.order + 2} computed steps{later}. With few steps, or a sampler "
            f"that puts fresh noise in, there is nothing to win"
        )
    if kind == "mixed":
        return None
    what = "never hit" if kind == "never" else "hit on every step where it was free to"
    return (
        f"{made}(threshold={policy.threshold:g}) {what} {length}: {_range(seen)}. "
        f"{_advice(policy, seen, num_steps, name)}"
    )


def _kind(policy: Any, seen: Sequence[Record]) -> str | None:
    if any(each.reason in _BEYOND for each in seen):
        return "beyond"
    if len(seen) < MIN_STEPS:
        return None
    free = _free(seen)
    hits = sum(each.is_hit for each in free)
    looks = getattr(policy, "control_threshold", None) is not None
    changed = looks * sum(each.reason == Reason.CONTROL_CHANGED for each in free)
    if not hits and 2 * changed >= len(free) > 0:
        return "control"
    if getattr(policy, "tolerance", 0) > 0 and not hits:
        return "intolerant"
    if not free:
        return None
    if not hasattr(policy, "threshold"):
        return "mixed" if hits else None
    if not hits:
        return "never"
    return "always" if hits == len(free) else "mixed"


def _free(seen: Sequence[Record]) -> list[Record]:
    """The evaluations that could have been hits and misses. A reason of the user's own counts."""
    return [each for each in seen if each.is_hit or each.reason not in _FORCED]


def _of_control(seen: Sequence[Record]) -> str:
    changes = [each.score for each in seen if each.reason == Reason.CONTROL_CHANGED]
    largest = max(changes, key=lambda change: math.inf if math.isnan(change) else change)
    advice = (
        f"A control_threshold above {largest:.4g} would have allowed them"
        if math.isfinite(largest)
        else "control_threshold=None does not look at it"
    )
    return (
        f"at {len(changes)} of the {len(_free(seen))} where it was free to, the conditioning "
        f"(control residuals, text, adapter features) had changed since the last computed step, "
        f"by up to {largest:.4g}. {advice}"
    )


def _range(seen: Sequence[Record]) -> str:
    measured = [each.metric for each in seen if each.metric is not None]
    if not measured:
        measured = [each.score for each in _free(seen)]
    finite = [value for value in measured if math.isfinite(value)]
    if not finite:
        return "nothing was measured where it was free to hit"
    return f"the metric was {min(finite):.4g} to {max(finite):.4g}"


def _advice(policy: Policy, seen: Sequence[Record], num_steps: int | None, branch: Hashable) -> str:
    adds_up = policy.probe is not None and policy.probe.reference == "computed"
    changes, in_a_row = [], 0
    for each in seen:
        metric = math.nan if each.metric is None else each.metric
        changes.append(metric / (in_a_row + 1) if adds_up else metric)
        in_a_row = in_a_row + 1 if each.is_hit else 0
    steps = [each.step for each in seen]
    try:
        threshold = halving_threshold(
            policy, changes, steps=steps, num_steps=num_steps, branch=branch
        )
    except Exception:  # noqa: BLE001 - a policy of the user's that takes no other threshold
        return "Which threshold would have hit half of the steps is not known"
    if threshold is None:
        return "Its other limits do not let it hit half of the steps at any threshold"
    unit = 10.0 ** (math.floor(math.log10(threshold)) - 2)  # three digits, and not below it
    rounded = math.ceil(threshold / unit) * unit
    return f"A threshold of about {rounded:.6g} would have hit half of the steps"
