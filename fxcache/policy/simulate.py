"""Replay a policy over a trajectory's metrics, without a model."""

import math
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
    steps: Sequence[int] | None = None,
    num_steps: int | None = None,
    branch: Hashable = None,
) -> list[Decision]:
    """What `policy` decides on a trajectory of one branch.

    `metrics` has one number a step (NaN where nothing is measured): the change since the step
    before; `steps` are the steps' numbers (None: from 0). Where the probe's reference is the last
    computed step, the changes since then are added up, which is about what would be measured.
    """
    adds_up = policy.probe is not None and policy.probe.reference == "computed"
    history, decisions = History(num_steps=num_steps, branch=branch), []
    since = 0.0
    for step, change in zip(steps or range(len(metrics)), metrics, strict=True):
        history.step = step
        since = change if math.isnan(since) else since + change
        metric = since if adds_up else change
        decision = policy.rule(metric, history)
        decisions.append(decision)
        if decision.is_hit:
            history.accumulated += decision.score
            history.hits_in_a_row += 1
        else:
            history.past = (step, *history.past)[: policy.forecast.ring]
            history.accumulated, history.hits_in_a_row = 0.0, 0
            history.computed += 1
            since = 0.0
    return decisions


def halving_threshold(
    policy: Any,
    metrics: Sequence[float],
    *,
    steps: Sequence[int] | None = None,
    num_steps: int | None,
    branch: Hashable,
) -> float | None:
    """The least threshold at which `policy` hits half of the steps, None if its limits forbid that.

    `policy` is a dataclass with a `threshold`; the rest as in `simulate`.
    """

    def hits_half(threshold: float) -> bool:
        other = replace(policy, threshold=threshold)
        decisions = simulate(other, metrics, steps=steps, num_steps=num_steps, branch=branch)
        return 2 * sum(decision.is_hit for decision in decisions) >= len(decisions)

    if not hits_half(_HIGHEST):
        return None
    low, high = _LOWEST, _HIGHEST
    for _ in range(_HALVINGS):
        middle = (low * high) ** 0.5
        low, high = (low, middle) if hits_half(middle) else (middle, high)
    return high
