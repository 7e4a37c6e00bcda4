"""What a policy with error control learns at a miss: how far off the forecast would have been."""

import math
import threading
from collections.abc import Callable, Sequence

import torch

from fxcache.passes.measure import shared
from fxcache.policy.base import ForecastError
from fxcache.policy.forecast import Corrected
from fxcache.runtime.device import begin_read
from fxcache.runtime.state import BranchState

#: Waits for the error.
Error = Callable[[], ForecastError]
#: Steps and entries of the residuals that a forecast is made of, newest first.
Nodes = list[tuple[int, int]]


def compared_with(
    state: BranchState, forecast: Corrected | None, written: int
) -> tuple[Nodes, list[float]]:
    """The entries that the forecast of the present step is made of, none of them the one that the
    miss writes (none at all where there are too few), and their weights by entry, without that one.
    """
    if forecast is None:
        return [], []
    nodes = [(step, at) for step, at in state.past if step < state.step and at != written]
    wanted = forecast.inner.ring
    nodes = nodes[:wanted] if len(nodes) >= wanted else []
    weights = forecast.inner.weights(state.step, [step for step, _ in nodes]) if nodes else []
    entries = by_entry(nodes, weights, forecast.ring)
    return nodes, entries[:written] + entries[written + 1 :]


def by_entry(nodes: Nodes, weights: Sequence[float], ring: int) -> list[float]:
    """The weights of `nodes` in the order of a ring; 0 for an entry that is none of them."""
    ordered = [0.0] * ring
    for (_, at), weight in zip(nodes, weights, strict=True):
        ordered[at] = weight
    return ordered


def begin_error(
    step: int, nodes: Nodes, sums: torch.Tensor | None, groups: Sequence[str]
) -> Error | None:
    """Begin to read the error at the miss of `step`, of its two `sums`, which ranks of the process
    `groups`, who compute the graph together, share. None if nothing was compared.
    """
    if sums is None or sums.device.type == "meta":
        return None
    if not nodes:
        if groups:  # ranks that vote may be at other steps: one that compared waits for this one
            shared(torch.zeros_like(sums), groups)
        return None
    steps, unread = (step, *(at for at, _ in nodes)), [begin_read(shared(sums, groups))]
    known: list[ForecastError] = []
    lock = threading.Lock()  # a report may ask in another thread, and what is read is read once

    def error() -> ForecastError:
        with lock:
            if not known:
                off, size = unread.pop()()  # records keep no tensor
                relative = off / size if size else (math.inf if off else 0.0)
                known.append(ForecastError(steps, relative))
            return known[0]

    return error
