"""A denoiser whose inside may be looked at, and a model that is captured in a moment."""

import gc
import threading
from collections.abc import Hashable
from contextlib import AbstractContextManager
from typing import Any

import torch
from helpers import sample, solve, times
from policies import ALWAYS
from torch import nn
from zoo import Denoiser

from fxcache.capture.runner import Runner
from fxcache.options import Options
from fxcache.report import Report
from fxcache.runtime.executor import StepExecutor
from fxcache.runtime.state import BranchState, Buffers


class SmallBlock(nn.Module):
    """A residual block without attention."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.proj = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        return h + self.proj(torch.tanh(self.up(self.norm(h))))


class Small(Denoiser):
    """A head block and one that is skipped: the fewest that there can be."""

    def __init__(self, depth: int = 2, width: int = 16) -> None:
        super().__init__(width)
        self.blocks = nn.Sequential(*(SmallBlock(width) for _ in range(depth)))

    def stack(self, h: torch.Tensor) -> torch.Tensor:
        return self.blocks(h)


class Opened(Runner):
    """What stands behind a denoiser, called as a denoiser is."""

    policy = property(lambda self: self.session.policy, lambda self, own: self.session.follow(own))

    def trajectory(
        self, num_steps: int | None = None, first_step: int = 0
    ) -> AbstractContextManager[None]:
        return self.session.trajectory(num_steps, first_step)

    def branch(self, name: Hashable) -> AbstractContextManager[None]:
        return self.session.at(branch=name)

    def slot(self, name: Hashable) -> AbstractContextManager[None]:
        return self.session.at(slot=name)

    def report(self) -> Report:
        return self.session.report()

    def states(self) -> list[BranchState]:
        """Of all slots and branches."""
        slots = self.session.slots.values()
        return [state for slot in slots for state in slot.branches.values()]

    def buffers(self) -> list[Buffers]:
        """What it holds memory with."""
        return [state.allocated for state in self.states() if state.buffers is not None]

    def residuals(self) -> list[torch.Tensor]:
        """All residuals that it has memory for."""
        return [slot for own in self.buffers() for ring in own.rings for slot in ring]

    def count_complete(self) -> list[int]:
        """A list that grows with each call that goes through Dynamo."""
        calls, original = [], self.cached

        def counted(*args: Any) -> Any:
            calls.append(len(self.session.records))
            return original(*args)

        self.cached = counted
        return calls

    def executors(self) -> list[StepExecutor]:
        """What runs its graphs, which live as long as compiled code does."""
        found = [thing for thing in gc.get_objects() if type(thing) is StepExecutor]
        return [executor for executor in found if executor.session is self.session]


def opened(model: nn.Module, policy: Any = ALWAYS, **options: Any) -> Opened:
    """A denoiser without compiler and graphs, and without the model's face."""
    return Opened(model, policy, Options(**{"backend": "eager", **options}))


def at(denoiser: Any, i: int, seed: int = 0) -> torch.Tensor:
    """Evaluation `i` of at most 40, on a slowly moving sample."""
    return denoiser(sample(seed=seed) + 0.02 * i, times(1 - i / 40))


def served_by_threads(denoiser: Any, seeds: range, steps: int = 8) -> dict[int, list[torch.Tensor]]:
    """What each of `seeds` is given, a request and a thread each, after the first of its solves."""
    served = {}

    def serve(seed: int) -> None:
        with torch.no_grad(), denoiser.slot(seed):
            served[seed] = [solve(denoiser, steps, seed) for _ in range(3)][-1]

    threads = [threading.Thread(target=serve, args=(seed,)) for seed in seeds]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return served
