"""What a policy with error control learns at a miss: how far off the forecast would have been."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from fxcache.policy.base import ForecastError
from fxcache.policy.forecast import Within
from fxcache.runtime.audit import shared
from fxcache.runtime.device import begin_read
from fxcache.runtime.state import BranchState

Nodes = list[tuple[int, int]]


def nodes_of(state: BranchState, forecast: Within, written: int) -> Nodes:
    """The entries that the forecast of the present step is made of, none of them the one that the
    miss writes; empty where there are too few.
    """
    before = [(step, at) for step, at in state.past if step < state.step and at != written]
    wanted = forecast.inner.ring
    return before[:wanted] if len(before) >= wanted else []


@torch.no_grad()
def compare(
    state: BranchState,
    forecast: Within,
    nodes: Nodes,
    written: int,
    outputs: Sequence[Any],
    groups: Sequence[str],
) -> Callable[[], ForecastError] | None:
    """Compare the forecast from `nodes` with what a miss that gave `outputs` wrote into entry
    `written`; ranks of the process `groups`, which compute the graph together, share the sums.
    Gives a function that waits for the error; None if there is nothing to compare.
    """
    device = next(value.device for value in outputs if isinstance(value, torch.Tensor))
    if not nodes or device.type == "meta":
        return None
    past = [step for step, _ in nodes]
    coefficients = forecast.inner.weights(state.step, past)
    sums = []
    for ring in state.allocated.rings:
        fresh = _wide(ring[written], device)
        off = fresh.clone()
        for (_, at), coefficient in zip(nodes, coefficients, strict=True):
            off.sub_(_wide(ring[at], device), alpha=coefficient)
        sums.append(torch.stack([off.abs().sum(), fresh.abs().sum()]))
    steps, read = (state.step, *past), begin_read(shared(torch.stack(sums).sum(0), groups))

    @functools.cache
    def error() -> ForecastError:
        off, size = read()
        return ForecastError(steps, off / size if size else (math.inf if off else 0.0))

    return error


def _wide(residual: torch.Tensor, device: torch.device) -> torch.Tensor:
    """On the device that computes: behind the transfer that may still put it into host memory."""
    near = residual.to(device, non_blocking=True)
    return near if near.is_complex() else near.float()
