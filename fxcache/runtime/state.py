"""What is kept between evaluations, and when it is forgotten.

A session has slots (requests); a slot has one trajectory at a time and one `BranchState` a branch.
Tensors are allocated once a layout and kept from trajectory to trajectory; whether they mean
anything is decided by `past` alone, which every new trajectory and every exception empties.
"""

import logging
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field

import torch

from fxcache.policy import History

log = logging.getLogger("fxcache")


@dataclass(eq=False)
class Buffers:
    """Tensors that fxcache owns: the reference probe and the scratch of the kernel that measures
    (None if nothing is measured), and for each stream its ring of residuals.
    """

    reference: torch.Tensor | None
    tickets: torch.Tensor | None
    rings: tuple[tuple[torch.Tensor, ...], ...]

    def tensors(self) -> list[torch.Tensor]:
        residuals = [slot for ring in self.rings for slot in ring]
        return residuals if self.reference is None else [self.reference, *residuals]

    @property
    def device(self) -> torch.device:
        return self.rings[0][0].device

    @property
    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self.tensors())


@dataclass
class BranchState:
    """The state of one branch in one slot.

    `past` holds (step, ring slot) of the residuals that are valid, newest first.
    """

    signature: Hashable = None
    buffers: Buffers | None = None
    past: list[tuple[int, int]] = field(default_factory=list)
    step: int = -1
    timestep: float | None = None
    accumulated: float = 0.0
    hits_in_a_row: int = 0
    constants: tuple[object, ...] = ()

    def forget(self) -> None:
        """Nothing cached means anything any more."""
        self.past.clear()
        self.accumulated, self.hits_in_a_row, self.constants = 0.0, 0, ()

    def begin(self) -> None:
        """Start a trajectory."""
        self.forget()
        self.step, self.timestep = -1, None

    def allocate(self, signature: Hashable, make: Callable[[], Buffers]) -> None:
        """Get buffers for a new layout. The old ones are freed first."""
        self.forget()
        self.signature = self.buffers = None
        self.buffers = make()
        self.signature = signature

    def advance(self, timestep: float | None) -> None:
        """Count a step: two evaluations at one timestep (Heun) belong to the same."""
        if timestep is None or timestep != self.timestep:
            self.step += 1
        self.timestep = timestep

    def history(self, num_steps: int | None) -> History:
        """The state as policies see it."""
        past = tuple(step for step, _ in self.past)
        return History(self.step, num_steps, self.accumulated, self.hits_in_a_row, past)

    @property
    def allocated(self) -> Buffers:
        """The buffers, which `allocate` has made."""
        assert self.buffers is not None
        return self.buffers

    @property
    def ring(self) -> int:
        """How many past residuals a stream may have (0: nothing is allocated)."""
        return len(self.buffers.rings[0]) if self.buffers is not None else 0

    def oldest_slot(self) -> int:
        """The ring slot that the next miss writes."""
        size = self.ring
        used = {slot for _, slot in self.past}
        free = [slot for slot in range(size) if slot not in used]
        return free[0] if free else self.past[-1][1]

    def refreshed(self, slot: int) -> None:
        """Note that a miss at the present step wrote ring slot `slot`."""
        kept = [entry for entry in self.past if entry[1] != slot]
        self.past = [(self.step, slot), *kept][: self.ring]
        self.accumulated, self.hits_in_a_row = 0.0, 0

    def reused(self, metric: float) -> None:
        """Note a hit."""
        self.accumulated += metric
        self.hits_in_a_row += 1


@dataclass
class Direction:
    """Which way timesteps move along a trajectory; a move the other way starts a new one.

    They fall in most samplers. Some models count up (t from 0 to 1): two "trajectories" of one
    step in a row that both ended by a rise show it, and from then on a fall starts a new one.
    """

    rising: bool = False
    single_steps: int = 0

    def turns_back(self, state: BranchState, timestep: float) -> bool:
        """Whether `timestep`, after the last one of `state`, lies in another trajectory."""
        if state.timestep is None or timestep == state.timestep:
            return False
        if (timestep > state.timestep) == self.rising:
            self.single_steps = 0
            return False
        self.single_steps = self.single_steps + 1 if state.step == 0 else 0
        if self.single_steps == 2:
            self.rising, self.single_steps = not self.rising, 0
            log.info("timesteps %s along a trajectory", "rise" if self.rising else "fall")
        return True


@dataclass(eq=False)
class Slot:
    """The state of one request: its trajectory and the branches in it."""

    branches: dict[Hashable, BranchState] = field(default_factory=dict)
    trajectory: int = 0
    is_announced: bool = False
    num_steps: int | None = None

    def branch(self, name: Hashable) -> BranchState:
        """The state of branch `name`."""
        if name not in self.branches:
            self.branches[name] = BranchState()
        return self.branches[name]

    def begin(self, *, announced: bool = False, num_steps: int | None = None) -> None:
        """Start a new trajectory: every branch forgets, so that none meets an old residual."""
        for state in self.branches.values():
            state.begin()
        self.trajectory += 1
        self.is_announced, self.num_steps = announced, num_steps

    @property
    def nbytes(self) -> int:
        return sum(s.buffers.nbytes for s in self.branches.values() if s.buffers is not None)
