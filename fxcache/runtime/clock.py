"""Place evaluations in their trajectory by what the sampler's scheduler says.

Without a scheduler steps are told apart by the timesteps that the model is given, and trajectories
by timesteps that go back. A scheduler knows more: where a solve begins (also amid its timesteps, as
in image-to-image), how many steps it has, and which calls belong to one step, so that a second,
unnamed call of a step (guidance) is a branch of its own.
"""

import itertools
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from fxcache.integrations.scheduler import Reading


class Clock(Protocol):
    """Says where the sampler is."""

    def read(self) -> Reading | None:
        """None if it does not know."""


@dataclass(frozen=True)
class Place:
    """Where an evaluation belongs: its step, counted from the start of the whole schedule, and its
    branch.
    """

    step: int
    branch: Hashable


class Timeline:
    """One solve of a scheduler, as seen by the denoiser's calls.

    Timesteps that are repeated (Heun evaluates twice at one) are one step.
    """

    def __init__(self, reading: Reading, timestep: Any) -> None:
        self.timesteps, self.counts = reading.timesteps, reading.counts
        values = [float(value) for value in reading.timesteps.tolist()]
        self.steps = [0]
        for before, value in itertools.pairwise(values):
            self.steps.append(self.steps[-1] + (value != before))
        self.index = _place_among(values, timestep) if reading.index is None else reading.index
        self._first = self.index
        #: It is another sampler that calls: the scheduler does not move, or not with the timesteps.
        self.has_stopped = not self.counts
        self._calls: dict[Hashable, int] = {}
        self._most_calls = 1
        self._time: Any = None
        self._last: tuple[int, float] | None = None
        self._rises: bool | None = None

    @property
    def num_steps(self) -> int:
        return self.steps[-1] + 1

    @property
    def first_step(self) -> int:
        return self.steps[self.index] if self.index < len(self.steps) else 0

    def goes_on(self, reading: Reading) -> bool:
        """Whether `reading` is of this solve: the same timesteps, and no step back."""
        index = self._first if reading.index is None else reading.index
        return reading.timesteps is self.timesteps and index >= self.index

    def place(self, reading: Reading, branch: Hashable, timestep: Any) -> Place | None:
        """Where a call belongs, None if the scheduler cannot tell."""
        index = self.index if reading.index is None else reading.index
        if self.has_stopped or index >= len(self.steps):
            self.has_stopped = True
            return None
        if index > self.index or not self._calls:
            self.index, self._time = index, timestep
            self._calls.clear()
        number = self._calls.get(branch, 0) + 1
        if number > self._most_calls:
            # The first step with so many calls in one branch: a branch without a name, or a sampler
            # that does not move this scheduler. The one goes on at the same timestep.
            if not _same(self._time, timestep):
                self.has_stopped = True
                return None
            self._most_calls = number
        name = branch if number == 1 else nth_call(branch, number)
        return Place(self.steps[index], name)

    def called(self, branch: Hashable) -> None:
        """Note that a call of `branch` (as the caller names it) is through."""
        self._calls[branch] = self._calls.get(branch, 0) + 1

    def agrees(self, timestep: float) -> bool:
        """Whether the model's timestep moved as it did along this solve so far."""
        last, self._last = self._last, (self.index, timestep)
        if last is None or last[0] == self.index or last[1] == timestep:
            return True
        rises = timestep > last[1]
        if self._rises is None:
            self._rises = rises
        return rises == self._rises


def nth_call(branch: Hashable, number: int) -> str:
    """The name of the branch of a step's `number`-th call under one name."""
    return f"call {number}" if branch is None else f"{branch} {number}"


def _place_among(values: list[float], timestep: Any) -> int:
    """Where the model's first timestep lies in the schedule: as it is, or as a fraction of 1000."""
    if isinstance(timestep, torch.Tensor):
        timestep = float(timestep.max()) if timestep.numel() else None
    if not isinstance(timestep, int | float):
        return 0
    for place, value in enumerate(values):
        if any(abs(timestep - seen) < 1e-4 * max(1, abs(seen)) for seen in (value, value / 1000)):
            return place
    return 0


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return a.shape == b.shape and bool((a == b).all())
    return type(a) is type(b) and bool(a == b)
