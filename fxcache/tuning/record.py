"""Record uncached trajectories: how residuals relate to each other, and what a probe measured."""

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any
from weakref import ref

import torch

from fxcache.runtime.state import BranchState, Slot

#: So many elements of a residual are kept (drawn once, at random): enough for its inner products.
SAMPLED = 2**19

#: A slot (and nothing of it is kept alive), its trajectory's number, and the branch.
Key = tuple[ref[Slot], int, Hashable]


@dataclass
class Trajectory:
    """What was recorded of one trajectory of one branch, one entry a step.

    `steps` are the steps' numbers, `residuals` float32 vectors on the CPU (elements drawn at random
    of large ones), scaled so that their inner products are means over the residual's elements;
    `norms` the norms of the residual's tokens, `metrics` what the probe measured (NaN: nothing),
    `changes` the relative change of the output, sum |o_t - o_(t-1)| / sum |o_(t-1)| (NaN at the
    first step).
    """

    steps: list[int] = field(default_factory=list)
    residuals: list[torch.Tensor] = field(default_factory=list)
    norms: list[torch.Tensor] = field(default_factory=list)
    metrics: list[float] = field(default_factory=list)
    changes: list[float] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.residuals)

    def gram(self) -> torch.Tensor:
        """Inner products of the residuals, mean over elements, float64 [T, T]."""
        rows = torch.stack(self.residuals).double()
        return rows @ rows.T

    def ratios(self) -> list[float]:
        """Mean over tokens of ``|r_t| / |r_(t-1)|``; 1.0 at the first step. Source: MagCache."""
        pairs = pairwise(self.norms)
        return [1.0, *(float((now / (before + 1e-8)).mean()) for before, now in pairs)]


class Counter:
    """Is told of every evaluation (`Session.observe`) and notes which of them were hits."""

    def __init__(self) -> None:
        #: By trajectory of a branch: which steps were hits alone.
        self._steps: dict[Key, dict[int, bool]] = {}
        self.evaluations = self.hits = 0

    def __call__(
        self, slot: Slot, state: BranchState, metric: float, outputs: Sequence[Any]
    ) -> None:
        is_hit = state.hits_in_a_row > 0
        steps = self._steps.setdefault((ref(slot), slot.trajectory, state.label), {})
        steps[state.step] = steps.get(state.step, True) and is_hit
        self.evaluations, self.hits = self.evaluations + 1, self.hits + is_hit

    @property
    def mask(self) -> tuple[bool, ...]:
        """Which steps were hits where a branch computed the most steps in a trajectory."""
        masks = [tuple(steps.values()) for steps in self._steps.values()]
        return max(masks, key=lambda mask: mask.count(False), default=())

    @property
    def most(self) -> int:
        """The most steps that a branch computed in a trajectory (0: there was none)."""
        return self.mask.count(False)


class Recorder:
    """Is told of every evaluation (`Session.observe`) and keeps what it needs of it.

    A second evaluation of a step (Heun) replaces the first.
    """

    def __init__(self) -> None:
        self.trajectories: dict[Key, Trajectory] = {}
        self._outputs: dict[Key, torch.Tensor] = {}
        self._chosen: dict[int, torch.Tensor] = {}

    def __call__(
        self, slot: Slot, state: BranchState, metric: float, outputs: Sequence[Any]
    ) -> None:
        key = ref(slot), slot.trajectory, state.label
        found = self.trajectories.setdefault(key, Trajectory())
        at = state.past[0][1]
        residuals = [ring[at].detach() for ring in state.allocated.rings]
        output = next(o.detach() for o in outputs if isinstance(o, torch.Tensor))
        if residuals[0].is_cpu and not output.is_cpu:  # copies to the host may be under way
            torch.accelerator.synchronize(output.device)
        if found.steps and found.steps[-1] == state.step:
            for kept in vars(found).values():
                kept.pop()
        found.steps.append(state.step)
        total = sum(residual.numel() for residual in residuals)
        found.residuals.append(torch.cat([self._drawn(r) / total**0.5 for r in residuals]))
        found.norms.append(_token_norms(max(residuals, key=torch.numel)))
        found.metrics.append(metric)
        found.changes.append(_relative_change(output, self._outputs.get(key)))
        self._outputs[key] = output.clone()

    def _drawn(self, residual: torch.Tensor) -> torch.Tensor:
        """The elements of `residual` that are kept: of one size always the same. They are scaled to
        the norm, about, of the whole.
        """
        flat, number = residual.flatten(), residual.numel()
        if number <= SAMPLED:
            return flat.to("cpu", torch.float32, copy=True)
        if number not in self._chosen:
            generator = torch.Generator().manual_seed(0)
            chosen = torch.randint(number, (SAMPLED,), generator=generator)
            self._chosen[number] = chosen.to(residual.device)
        drawn: torch.Tensor = flat[self._chosen[number]].to("cpu", torch.float32)
        return drawn.mul_((number / SAMPLED) ** 0.5)


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
