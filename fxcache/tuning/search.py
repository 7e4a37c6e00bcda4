"""Find a schedule: the shortest path over the errors that forecasts would have made.

All of it works on the Gram matrix of the residuals of recorded trajectories,
``G[a, b] = <r_a, r_b>``: a forecast that is linear in past residuals has the squared error
``v @ G @ v`` with its weights and -1 at the step itself in v, whatever was computed in between. So
one uncached trajectory tells the errors of every forecaster under every schedule.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from fxcache.policy.fitted import Place
from fxcache.policy.forecast import lagrange

#: How much of a forecast's error another one has, a step apart.
ALIKE = 0.9
#: How much of a hit's squared error counts although the next computed step tells it.
LEFT = 0.2

Past = tuple[int, ...]
Weights = Callable[[int, Past], Sequence[float]]


def squared_error(gram: torch.Tensor, step: int, past: Past, weights: Sequence[float]) -> float:
    """Squared norm of forecast minus residual at `step`; `gram` is finite, float64 [T, T]."""
    at = [step, *past]
    v = torch.tensor([-1.0, *weights], dtype=torch.float64)
    return max(0.0, float(v @ gram[at][:, at] @ v))


def fit_weights(gram: torch.Tensor, step: int, past: Past, *, ridge: float = 1e-3) -> list[float]:
    """Weights of sum 1 that minimise the squared error over the recorded trajectories.

    With sum 1 the error is ``w @ E @ w`` with E the Gram matrix of the differences to the residual
    at `step`; ``ridge * trace(E) / n * |w - (1, 0, ...)|^2`` is added, so that it has no unit.
    """
    past_at, n = list(past), len(past)
    cross = gram[past_at, step]
    differences = gram[past_at][:, past_at] - cross[:, None] - cross[None, :] + gram[step, step]
    k = ridge * float(differences.trace()) / n
    reuse = torch.eye(n, dtype=torch.float64)[0]
    if _distance(gram, step, past) == 0:
        return [float(weight) for weight in reuse]
    system = differences + k * torch.eye(n, dtype=torch.float64)
    right = torch.stack([k * reuse, torch.ones(n, dtype=torch.float64)], dim=1)
    w, ones = torch.linalg.solve(system, right).unbind(1)
    return [float(weight) for weight in w + ones * (1 - w.sum()) / ones.sum()]


def _distance(gram: torch.Tensor, step: int, past: Past) -> float:
    """The mean squared difference of the residuals at `past` to that at `step`; 0 if nothing
    changed between these steps, to the precision of float32: reuse is exact.
    """
    mean = sum(squared_error(gram, step, (at,), (1.0,)) for at in past) / len(past)
    return mean if mean > 1e-13 * float(gram[step, step]) else 0.0


def search(
    cost: Callable[[Past, int], float],
    *,
    steps: int,
    ring: int,
    max_hits: int,
    most: int | None = None,
) -> dict[int, tuple[float, tuple[bool, ...]]]:
    """For every possible number of computed steps, up to `most`: the least total cost, and its mask
    (True: hit).

    Exact for a cost that is a sum over runs of hits of ``cost(past, following)``, with the last
    `ring` computed steps before the run (newest first) and the one that follows (`steps`: none
    does), and at most `max_hits` hits in a row.
    """
    # The first step is computed. layers[n]: by past, after n + 1 computed steps, the least cost and
    # the past before.
    layers: list[dict[Past, tuple[float, Past]]] = [{(0,): (0.0, ())}]
    best: dict[int, tuple[float, tuple[bool, ...]]] = {}
    while layers[-1] and len(layers) <= (most or steps):
        after: dict[Past, tuple[float, Past]] = {}
        final: tuple[float, Past] | None = None
        for past, (total, _) in layers[-1].items():
            for step in range(past[0] + 1, min(past[0] + 1 + max_hits, steps) + 1):
                reached = (total + cost(past, step), past)
                if step == steps:
                    final = min(final or reached, reached)
                else:
                    state = (step, *past)[:ring]
                    after[state] = min(after.get(state, reached), reached)
        if final is not None:
            best[len(layers)] = (final[0], _mask(layers, final[1], steps))
        layers.append(after)
    return best


def _mask(layers: list[dict[Past, tuple[float, Past]]], past: Past, steps: int) -> tuple[bool, ...]:
    """The mask of the path that ends in `past`."""
    mask = [True] * steps
    for layer in reversed(layers):
        mask[past[0]] = False
        past = layer[past][1]
    return tuple(mask)


def schedule_costs(
    gram: torch.Tensor, sensitivity: torch.Tensor, weights: Weights
) -> Callable[[Past, int], float]:
    """The cost of a run of hits for `search`: their squared errors, weighted by the steps'
    `sensitivity`. Where a computed step follows, later hits make good what it tells (see
    `fit_table`), and `LEFT` of it counts; in full what it does not tell: the error of the
    polynomial through it and the two steps before the run.
    """

    @functools.cache
    def squared(step: int, past: Past) -> float:
        return squared_error(gram, step, past, weights(step, past))

    @functools.cache
    def cost(past: Past, following: int) -> float:
        known = (following, *past[:2])
        is_told = following < len(gram) and len(known) == 3
        total = 0.0
        for step in range(past[0] + 1, following):
            error = squared(step, past)
            if is_told:
                untold = squared_error(gram, step, known, lagrange(step, known))
                error = LEFT * error + (1 - LEFT) * min(error, untold)
            total += float(sensitivity[step]) * error
        return total

    return cost


def fit_table(
    gram: torch.Tensor,
    sensitivity: torch.Tensor,
    mask: Sequence[bool],
    ring: int,
    *,
    alike: float = ALIKE,
    ridge: float = 1e-3,
) -> dict[Place, list[float]]:
    """The weights of every hit of `mask`, by step and past, fitted together.

    A sampler sums up what its steps lack, and neighbouring forecasts err alike; so the weights
    minimise ``sum_st alike^|s - t| <e_s, e_t>`` over the hits s and t, with the errors e times the
    steps' `sensitivity`: a hit makes good what those before it lacked. As in `fit_weights`, which
    is the same with `alike` 0, the weights of a hit have the sum 1 and are pulled towards reuse.
    """
    hits, past = list[Place](), Past()
    for step, is_hit in enumerate(mask):
        if is_hit:
            hits.append((step, past))
        else:
            past = (step, *past)[:ring]
    table = {(step, past): [1.0] + [0.0] * (len(past) - 1) for step, past in hits}
    moving = [place for place in hits if _distance(gram, *place)]
    owners = [(i, older) for i, (_, past) in enumerate(moving) for older in past[1:]]
    if not owners:
        return table
    # The errors of reuse, and what a unit of weight that goes to an older residual changes.
    residuals, of = torch.eye(len(gram), dtype=torch.float64), [i for i, _ in owners]
    scales = torch.stack([sensitivity[step] for step, _ in moving]).double()
    newest = torch.stack([residuals[past[0]] for _, past in moving])
    errors = (newest - residuals[[step for step, _ in moving]]) * scales[:, None]
    changes = (residuals[[older for _, older in owners]] - newest[of]) * scales[of, None]
    steps = torch.tensor([step for step, _ in moving])
    common = alike ** (steps[:, None] - steps).abs().double()
    distances = torch.tensor([_distance(gram, *place) for place in moving], dtype=torch.float64)
    own = torch.tensor(of)
    pull = (own[:, None] == own).double() + torch.eye(len(of), dtype=torch.float64)
    system = (changes @ gram @ changes.T) * common[of][:, of]
    system += ridge * (scales**2 * distances)[of] * pull
    right = (changes @ gram @ errors.T * common[of]).sum(1)
    for (i, older), weight in zip(owners, torch.linalg.solve(system, -right).tolist(), strict=True):
        weights = table[moving[i]]
        weights[moving[i][1].index(older)] += weight
        weights[0] -= weight
    return table


def interpolated_sensitivity(gram: torch.Tensor, errors: dict[int, float]) -> torch.Tensor:
    """The final error per residual error at every step, float64 [T].

    `errors` are final errors (root mean square) of trajectories in which only the step was a hit
    that reused the step before, for a few steps; in between it is interpolated in the logarithm.
    """
    logs: dict[int, float] = {}
    for step, error in sorted(errors.items()):
        residual = squared_error(gram, step, (step - 1,), (1.0,)) ** 0.5
        if 0 < error < math.inf and residual > 0:
            logs[step] = float(torch.log(torch.tensor(error / residual, dtype=torch.float64)))
    if not logs:
        return torch.ones(len(gram), dtype=torch.float64)
    steps = range(len(gram))
    return torch.tensor([_interpolated(at, logs) for at in steps], dtype=torch.float64).exp()


def _interpolated(at: int, known: dict[int, float]) -> float:
    """Linear between the known places, constant beyond them."""
    below = max((step for step in known if step <= at), default=None)
    above = min((step for step in known if step >= at), default=None)
    if below is None or above is None or below == above:
        nearest: Any = above if below is None else below
        return known[nearest]
    part = (at - below) / (above - below)
    return (1 - part) * known[below] + part * known[above]
