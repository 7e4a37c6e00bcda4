"""The rules of policies in tensor arithmetic: what an exported program decides by.

All that a rule knows of a trajectory is one float64 vector, the *numbers*: the step that comes
next, the hits in a row, the sum of their scores, how many steps were computed, the error of the
forecast at the last of them (NaN: not known) and its growth, and the step of each entry (-1: it
holds nothing). The arithmetic is that of the rules themselves, and so are the decisions.
"""

import math
from typing import Any

import torch

from fxcache.errors import PolicyError
from fxcache.policy.adaptive_cache import AdaptiveCache
from fxcache.policy.base import Policy
from fxcache.policy.easy_cache import EasyCache
from fxcache.policy.first_block_cache import FirstBlockCache
from fxcache.policy.forecast import Corrected, Reuse, Taylor, Within, checked
from fxcache.policy.step_schedule import StepSchedule

STEP, HITS_IN_A_ROW, ACCUMULATED, COMPUTED, ERROR, GROWTH, ENTRIES = range(7)
#: What the caller sets: the threshold or tolerance, the number of steps (0: not known), and what is
#: decided for this branch by another one (-1: nothing, 0: a miss, 1: a hit if there can be one).
LIMIT, NUM_STEPS, LED = range(3)

Numbers = torch.Tensor
#: The policies that can be followed.
KNOWN = (FirstBlockCache, EasyCache, AdaptiveCache, StepSchedule)


def check_has_tensor_rule(policy: Policy) -> None:
    """Raise PolicyError unless an exported program can follow `policy`."""
    name = type(policy).__name__
    if type(policy) not in KNOWN:
        known = ", ".join(each.__name__ for each in KNOWN)
        raise PolicyError(
            f'{name} has no rule in tensor arithmetic, which form="cond" needs: {known} have; '
            f'form="pieces" takes any policy'
        )
    forecast = _inner(policy)
    if not isinstance(forecast, Reuse | Taylor):
        raise PolicyError(
            f'{forecast} has no weights in tensor arithmetic, which form="cond" needs: Reuse and '
            f'Taylor have; form="pieces" takes any forecast'
        )
    if getattr(policy, "control_threshold", None) is not None:
        raise PolicyError("control_threshold is not looked at in an exported program: leave it out")


def initial_numbers(ring: int) -> Numbers:
    """Those before the first step."""
    numbers = torch.full((ENTRIES + ring,), -1.0, dtype=torch.float64)
    numbers[:ENTRIES] = torch.tensor([0, 0, 0, 0, math.nan, 1])
    return numbers


def limit_of(policy: Any) -> float:
    """The threshold or tolerance that `policy` was made with (of a schedule: 0)."""
    return float(getattr(policy, "threshold", getattr(policy, "tolerance", 0.0)))


def decide(
    policy: Policy, metric: torch.Tensor, numbers: Numbers, settings: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Whether the next step is a hit (bool []), and the score that a hit adds (float64 []).

    `metric` is float32 [], NaN where nothing is measured.
    """
    is_hit, score = _by_itself(policy, metric, numbers, settings)
    led, is_held = settings[LED], (numbers[ENTRIES:] >= 0).any()
    can_follow = is_held if policy.probe is None else is_held & metric.isfinite()
    return torch.where(led < 0, is_hit, (led > 0) & can_follow), score


def forgetting(numbers: Numbers, is_broken: torch.Tensor) -> Numbers:
    """`numbers`, or those after which nothing is held where `is_broken`."""
    initial = initial_numbers(len(numbers) - ENTRIES).to(numbers.device)
    lost = torch.cat([numbers[:COMPUTED], initial[COMPUTED:]])
    return torch.where(is_broken, lost, numbers)


def entry_written(numbers: Numbers) -> torch.Tensor:
    """Which entry a miss writes (int64 []): the first that holds nothing, else the oldest."""
    return numbers[ENTRIES:].argmin()


def weights(policy: Policy, numbers: Numbers) -> torch.Tensor:
    """float32 [ring]: the weight of each entry in the forecast of the next step."""
    entries = numbers[ENTRIES:]
    nodes, order = _nodes(policy, entries)
    known, step = nodes >= 0, numbers[STEP]
    ahead = torch.where(_others(nodes), step - nodes, 1.0).prod(1)
    by_node = torch.where(known, ahead / _apart(nodes), 0.0)
    by_entry = torch.zeros_like(entries).scatter(0, order, by_node)
    if isinstance(policy, AdaptiveCache):
        by_entry = by_entry + _correction(policy, numbers)
    return by_entry.float()


def _others(nodes: torch.Tensor) -> torch.Tensor:
    """Of each node, which are others and known (bool [N, N])."""
    return (nodes >= 0) & ~torch.eye(len(nodes), dtype=torch.bool, device=nodes.device)


def _apart(nodes: torch.Tensor) -> torch.Tensor:
    """The product of the distances of each node to all others."""
    return torch.where(_others(nodes), nodes[:, None] - nodes, 1.0).prod(1)


def _correction(policy: AdaptiveCache, numbers: Numbers) -> torch.Tensor:
    """What `Corrected.correct` adds, by entry: each step between two computed ones is a hit."""
    steps, order = numbers[ENTRIES:].sort(descending=True)
    hits = steps[1] + torch.arange(1, policy.max_consecutive_hits + 1, device=steps.device)
    off = (hits[:, None] - steps[1:]).prod(1)
    lacking = torch.where(hits < steps[0], off, 0.0).sum()
    is_due = (steps[-1] >= 0) & (numbers[STEP] == steps[0] + 1)
    by_node = torch.where(is_due, lacking / _apart(steps), 0.0)
    return torch.zeros_like(steps).scatter(0, order, by_node)


def after_hit(numbers: Numbers, score: torch.Tensor) -> Numbers:
    """The numbers after a hit."""
    head = torch.stack(
        [numbers[STEP] + 1, numbers[HITS_IN_A_ROW] + 1, numbers[ACCUMULATED] + score]
    )
    return torch.cat([head, numbers[COMPUTED:]])


def after_miss(policy: Policy, numbers: Numbers, sums: torch.Tensor) -> Numbers:
    """The numbers after a miss; `sums` (float32 [2]) are those of the forecast's error."""
    step, entries, zero = numbers[STEP], numbers[ENTRIES:], torch.zeros_like(numbers[STEP])
    error, growth = torch.full_like(step, math.nan), torch.ones_like(step)
    if checked(policy) is not None:
        nodes, _ = _nodes(policy, entries)
        off, size = sums.double().unbind()
        relative = torch.where(size == 0, torch.where(off == 0, 0.0, math.inf), off / size)
        error = torch.where(nodes[-1] >= 0, relative, error)
        growth = _growth(step, nodes)
    head = torch.stack([step + 1, zero, zero, numbers[COMPUTED] + 1, error, growth])
    at = torch.arange(len(entries), device=entries.device) == entry_written(numbers)
    return torch.cat([head, torch.where(at, step, entries)])


def _inner(policy: Policy) -> Any:
    """What makes the forecast."""
    forecast = policy.forecast
    return forecast.inner if isinstance(forecast, Within | Corrected) else forecast


def _nodes(policy: Policy, entries: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The steps that a forecast is made of, newest first (-1: none), and their entries."""
    steps, order = entries.sort(descending=True)
    used = _inner(policy).ring
    return steps[:used], order[:used]


def _growth(step: torch.Tensor, nodes: torch.Tensor) -> torch.Tensor:
    return (step - nodes).abs().prod() / math.factorial(len(nodes))


def _by_itself(
    policy: Any, metric: torch.Tensor, numbers: Numbers, settings: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """What `decide` gives where no other branch leads. NaN compares false: a miss."""
    step, steps, limit = numbers[STEP], settings[NUM_STEPS], settings[LIMIT]
    is_held = (numbers[ENTRIES:] >= 0).any()
    if isinstance(policy, StepSchedule):
        hits = [at for at, is_hit in enumerate(policy.mask) if is_hit]
        named = step == torch.tensor(hits or [-1], dtype=step.dtype, device=step.device)
        return named.any() & is_held, torch.zeros_like(step)
    allowed = is_held & (step >= policy.warmup_steps)
    if policy.max_consecutive_hits is not None:
        allowed = allowed & (numbers[HITS_IN_A_ROW] < policy.max_consecutive_hits)
    if isinstance(policy, AdaptiveCache):
        nodes, _ = _nodes(policy, numbers[ENTRIES:])
        score = numbers[ERROR] * _growth(step, nodes) / numbers[GROWTH]
        slope = policy.slope
        share = torch.where(steps < 2, 1.0, 1 - slope + 2 * slope * step / (steps - 1))
        allowed = allowed & (nodes[-1] >= 0)
        allowed = allowed & ((steps == 0) | (step < steps - policy.final_steps))
        return allowed & (numbers[ACCUMULATED] + score < limit * share), score
    if policy.final_steps:
        allowed = allowed & (step < steps - policy.final_steps)
    if (policy.start, policy.end) != (0, 1):
        first, last = (torch.round(at * steps, decimals=6) for at in (policy.start, policy.end))
        allowed = allowed & (first <= step) & (step < last)
    score = metric.double()
    total = numbers[ACCUMULATED] + score
    if isinstance(policy, EasyCache):
        return allowed & (numbers[COMPUTED] >= 2) & (total.float() < limit.float()), score
    if policy.max_accumulated is not None:
        allowed = allowed & (total < policy.max_accumulated)
    return allowed & (metric < limit.float()), score
