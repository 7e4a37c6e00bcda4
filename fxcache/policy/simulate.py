"""Replay a policy over a trajectory's metrics, without a model."""

from collections.abc import Hashable, Sequence
from dataclasses import replace
from typing import Any

from fxcache.policy.base import Decision, History, Policy

#: Thresholds are searched between these, by factors.
_LOWEST, _HIGHEST, _HALVINGS = 1e-6, 1e6, 60


def simulate(
    policy: Policy,
    metrics: Sequence[float],
    *,
    num_steps: int | None = None,
    branch: Hashable = None,
) -> list[Decision]:
    """What `policy` decides on a trajectory of one branch.

    `metrics` has one number a step (NaN where nothing is measured). The metrics themselves may
    depend on the decisions (a reference at the last computed step); here they are as they are.
    """
    history, decisions = History(num_steps=num_steps, branch=branch), []
    for step, metric in enumerate(metrics):
        history.step = step
        decision = policy.rule(metric, history)
        decisions.append(decision)
        if decision.is_hit:
            history.accumulated += decision.score
            history.hits_in_a_row += 1
        else:
            history.past = (step, *history.past)[: policy.forecast.ring]
            history.accumulated, history.hits_in_a_row = 0.0, 0
            history.computed += 1
    return decisions


def halving_threshold(
    policy: Any, metrics: Sequence[float], *, num_steps: int | None, branch: Hashable
) -> float | None:
    """The least threshold at which `policy` hits half of the steps, None if its limits forbid that.

    `policy` is a dataclass with a `threshold`.
    """

    def hits_half(threshold: float) -> bool:
        other = replace(policy, threshold=threshold)
        decisions = simulate(other, metrics, num_steps=num_steps, branch=branch)
        return 2 * sum(decision.is_hit for decision in decisions) >= len(decisions)

    if not hits_half(_HIGHEST):
        return None
    low, high = _LOWEST, _HIGHEST
    for _ in range(_HALVINGS):
        middle = (low * high) ** 0.5
        low, high = (low, middle) if hits_half(middle) else (middle, high)
    return high
