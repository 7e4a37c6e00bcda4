"""Record uncached trajectories: how residuals relate to each other, and what a probe measured."""

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch

from fxcache.runtime.state import BranchState, Slot

#: So many elements of a residual are kept (drawn once, at random): enough for its inner products.
SAMPLED = 2**19


@dataclass
class Trajectory:
    """What was recorded of one trajectory of one branch, one entry a step.

    `residuals` are float32 vectors on the CPU (elements drawn at random of large ones), `norms` the
    norms of the residual's tokens, `metrics` what the probe measured (NaN: nothing), `changes` the
    relative change of the output, sum |o_t - o_(t-1)| / sum |o_(t-1)| (NaN at the first step).
    """

    residuals: list[torch.Tensor] = field(default_factory=list)
    norms: list[torch.Tensor] = field(default_factory=list)
    metrics: list[float] = field(default_factory=list)
    changes: list[float] = field(default_factory=list)
    timesteps: list[float | None] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.residuals)

    def gram(self) -> torch.Tensor:
        """Inner products of the residuals, mean over elements, float64 [T, T]."""
        rows = torch.stack(self.residuals).double()
        return rows @ rows.T / rows.shape[1]

    def ratios(self) -> list[float]:
        """Mean over tokens of ``|r_t| / |r_(t-1)|``; 1.0 at the first step. Source: MagCache."""
        pairs = pairwise(self.norms)
        return [1.0, *(float((now / (before + 1e-8)).mean()) for before, now in pairs)]


class Recorder:
    """Is told of every evaluation (`Session.observe`) and keeps what it needs of it.

    A second evaluation of a step (Heun) replaces the first.
    """

    def __init__(self) -> None:
        self.trajectories: dict[tuple[Hashable, int, Hashable], Trajectory] = {}
        self._steps: dict[tuple[Hashable, int, Hashable], int] = {}
        self._outputs: dict[tuple[Hashable, int, Hashable], torch.Tensor] = {}
        self._chosen: dict[int, torch.Tensor] = {}

    def __call__(
        self, slot: Slot, state: BranchState, metric: float, outputs: Sequence[Any]
    ) -> None:
        branch = next(name for name, own in slot.branches.items() if own is state)
        key = (id(slot), slot.trajectory, branch)
        found = self.trajectories.setdefault(key, Trajectory())
        at = state.past[0][1]
        residuals = [ring[at].detach() for ring in state.allocated.rings]
        output = next(o.detach() for o in outputs if isinstance(o, torch.Tensor))
        if self._steps.get(key) == state.step:
            for kept in vars(found).values():
                kept.pop()
        else:
            self._steps[key] = state.step
        found.residuals.append(torch.cat([self._drawn(residual) for residual in residuals]))
        found.norms.append(_token_norms(max(residuals, key=torch.numel)))
        found.metrics.append(metric)
        found.changes.append(_relative_change(output, self._outputs.get(key)))
        found.timesteps.append(state.timestep)
        self._outputs[key] = output.clone()

    def by_branch(self) -> dict[Hashable, list[Trajectory]]:
        """The trajectories of each branch."""
        branches: dict[Hashable, list[Trajectory]] = {}
        for (_, _, branch), found in self.trajectories.items():
            branches.setdefault(branch, []).append(found)
        return branches

    def _drawn(self, residual: torch.Tensor) -> torch.Tensor:
        """The elements of `residual` that are kept: of one size always the same."""
        flat, number = residual.flatten(), residual.numel()
        if number <= SAMPLED:
            return flat.to("cpu", torch.float32, copy=True)
        if number not in self._chosen:
            generator = torch.Generator().manual_seed(0)
            chosen = torch.randint(number, (SAMPLED,), generator=generator)
            self._chosen[number] = chosen.to(residual.device)
        return flat[self._chosen[number]].to("cpu", torch.float32)


def _token_norms(residual: torch.Tensor) -> torch.Tensor:
    """Norms over the channels, float32 on the CPU: of tokens [B, N, C], or of features [B, C, ...]
    with two or more dimensions of space.
    """
    channels = 1 if residual.ndim >= 4 else -1
    norms: torch.Tensor = torch.linalg.vector_norm(residual.float(), dim=channels)
    return norms.cpu()


def _relative_change(output: torch.Tensor, before: torch.Tensor | None) -> float:
    if before is None or before.shape != output.shape:
        return math.nan
    change = (output.float() - before.float()).abs().sum()
    return float(change / before.float().abs().sum())
