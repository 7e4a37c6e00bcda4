"""What a policy with error control learns at a miss: how far off the forecast would have been."""

import math
from dataclasses import dataclass
from typing import Any

import torch

from fxcache.policy.base import ForecastError
from fxcache.policy.forecast import Within
from fxcache.runtime.state import BranchState

Nodes = list[tuple[int, int]]


@dataclass(frozen=True)
class Pending:
    """An error that the device may still compute. `sums`: of |forecast - fresh| and of |fresh|."""

    steps: tuple[int, ...]
    sums: torch.Tensor
    #: Set once the sums have arrived in host memory (None: they are read as any tensor).
    arrived: Any

    def read(self) -> ForecastError:
        """The error as a number; only the next decision waits for it."""
        if self.arrived is not None:
            self.arrived.synchronize()
        off, size = self.sums.tolist()
        return ForecastError(self.steps, off / size if size else (math.inf if off else 0.0))


def nodes_of(state: BranchState, forecast: Within, written: int) -> Nodes:
    """The entries that the forecast of the present step is made of, none of them the one that the
    miss writes; empty where there are too few.
    """
    before = [(step, at) for step, at in state.past if step < state.step and at != written]
    wanted = forecast.inner.ring
    return before[:wanted] if len(before) >= wanted else []


@torch.no_grad()
def compare(state: BranchState, forecast: Within, nodes: Nodes, written: int) -> Pending | None:
    """Compare the forecast from `nodes` with what a miss wrote into entry `written`."""
    rings = state.allocated.rings
    if not nodes or state.allocated.device.type == "meta":
        return None
    past = [step for step, _ in nodes]
    coefficients = forecast.inner.weights(state.step, past)
    sums = []
    for ring in rings:
        fresh = _wide(ring[written])
        off = fresh.clone()
        for (_, at), coefficient in zip(nodes, coefficients, strict=True):
            off.sub_(_wide(ring[at]), alpha=coefficient)
        sums.append(torch.stack([off.abs().sum(), fresh.abs().sum()]))
    total = torch.stack([each.to(sums[0].device) for each in sums]).sum(0)
    arrived = None
    if total.is_cuda:
        host = torch.empty(2, pin_memory=True)
        total = host.copy_(total, non_blocking=True)
        arrived = torch.cuda.Event()
        arrived.record()
    return Pending((state.step, *past), total, arrived)


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.is_complex() else tensor.float()
