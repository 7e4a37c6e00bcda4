"""One solve of a sampler, as its scheduler lists it: which evaluation is at which place?"""

import itertools
from typing import Any

import torch

from fxcache.pipelines.scheduler import Reading

#: Models take the list's times as they are, as fractions of 1000, or as those that rise.
_UNITS = ((0.0, 1.0), (0.0, 1e-3), (1.0, -1e-3))


class Timeline:
    """One solve of a scheduler: its timesteps, one an evaluation.

    Of a scheduler whose list is longer than its steps (Heun's), equal neighbours are one step.
    """

    def __init__(self, reading: Reading, unit: tuple[float, float] | None = None) -> None:
        #: How the model's time follows from the list's: offset and factor.
        self.unit = unit
        self.timesteps = reading.timesteps
        self.values = [float(value) for value in reading.timesteps.tolist()]
        self.steps = [0]
        for before, value in itertools.pairwise(self.values):
            self.steps.append(self.steps[-1] + (not reading.repeats or value != before))
        #: The place of the last evaluation, and of the first.
        self.index = self.first = -1
        #: It is another sampler that calls: the scheduler does not move with the timesteps.
        self.has_stopped = False
        self._time: float | None = None
        self._rises: bool | None = None

    @property
    def num_steps(self) -> int:
        return self.steps[-1] + 1

    def is_of(self, reading: Reading) -> bool:
        """Whether `reading` has the same list, whichever object holds it."""
        own, other = self.timesteps, reading.timesteps
        return own is other or (own.shape == other.shape and torch.equal(own, other.to(own)))

    def begins_anew(self, reading: Reading, index: int | None) -> bool:
        """Whether the sampler went back: to an earlier place, or to the first with a list anew."""
        if index is None or self.index < 0:
            return False
        is_new = reading.timesteps is not self.timesteps and index <= self.first
        self.timesteps = reading.timesteps
        was_stepped = reading.index is not None and reading.index > index  # but not by this sampler
        return is_new or index < self.index or (index == self.index and was_stepped)

    def find(self, reading: Reading, time: float | None, timestep: Any = None) -> int | None:
        """The place in the list of an evaluation at `time` (the model's own, None: not read), which
        was given as `timestep`: an element of the list itself, often.
        """
        index = reading.index
        if index is None and time is None and isinstance(timestep, torch.Tensor):
            listed = reading.timesteps
            if timestep.untyped_storage().data_ptr() == listed.untyped_storage().data_ptr():
                return int(timestep.storage_offset() - listed.storage_offset())
        if index is None and reading.counts:
            index = 0  # it counts from its first step on
        places = [] if time is None else self._places(time)
        if index is not None and (index in places or not places):
            return index if index < len(self.steps) else None
        later = [place for place in places if place >= self.index]
        found = later or places
        return found[0] if found else None

    def _places(self, time: float) -> list[int]:
        """Where the list holds `time`, in one of the model's units. Of several, the unit is right
        that makes it the earliest place: a solve begins at its start.
        """
        found = {}
        for unit in _UNITS if self.unit is None else (self.unit,):
            off = (abs(unit[0] + unit[1] * value - time) for value in self.values)
            places = [place for place, by in enumerate(off) if by < 1e-4 * max(1, abs(time))]
            if places:
                found[unit] = places
        if not found:
            return []
        self.unit = min(found, key=lambda unit: found[unit][0])
        return found[self.unit]

    def note(self, reading: Reading, index: int | None, time: float | None) -> None:
        """Note an evaluation at `index`; see whether list and timesteps move together."""
        if index is None:
            return
        last, before = self.index, self._time
        self.index, self._time = index, time
        if last < 0:
            self.first = index
        if time is None or before is None or self._places(time):
            return
        if index == last:
            self.has_stopped |= time != before
        elif time != before:
            rises = time > before
            self._rises = rises if self._rises is None else self._rises
            self.has_stopped |= rises != self._rises
