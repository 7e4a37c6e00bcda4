"""What is kept between evaluations, and when it is forgotten.

A session has slots (requests); a slot has one trajectory at a time and one `BranchState` a branch.
Tensors are allocated once a layout and kept from trajectory to trajectory; whether they mean
anything is decided by `past` alone, which every new trajectory and every exception empties.
"""

import logging
from collections import Counter
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field

import torch

from fxcache.policy import History
from fxcache.runtime.clock import Timeline
from fxcache.runtime.noise import Exam
from fxcache.runtime.watch import Watch
from fxcache.runtime.weights import Stamp

log = logging.getLogger("fxcache")


@dataclass(eq=False)
class Buffers:
    """Tensors that fxcache owns: by key what the measurement keeps (nothing if there is none), and
    for each stream its ring of residuals.
    """

    kept: dict[str, torch.Tensor]
    rings: tuple[tuple[torch.Tensor, ...], ...]
    #: Of a policy that looks at it: the conditioning of the last computed step, by name.
    conditions: dict[str, torch.Tensor] = field(default_factory=dict)

    def tensors(self) -> list[torch.Tensor]:
        """All that is cached; a kernel's scratch, whole numbers, is not."""
        kept = [tensor for tensor in self.kept.values() if tensor.is_floating_point()]
        rings = (slot for ring in self.rings for slot in ring)
        return [*kept, *rings, *self.conditions.values()]

    @property
    def device(self) -> torch.device:
        return self.rings[0][0].device

    @property
    def bytes_by_device(self) -> Counter[str]:
        held: Counter[str] = Counter()
        for tensor in self.tensors():
            held[str(tensor.device)] += tensor.numel() * tensor.element_size()
        return held


@dataclass(frozen=True)
class Signature:
    """What a state belongs to: the inputs' layouts by name, the span and what is kept."""

    inputs: tuple[tuple[str, Hashable], ...]
    kept: Hashable

    def is_same_solve(self, other: "Signature") -> bool:
        """Whether only other inputs are given: a control's residuals, say, came or went."""
        own, others = dict(self.inputs), dict(other.inputs)
        if self.kept != other.kept or own.keys() == others.keys():
            return False
        return all(own[name] == others[name] for name in own.keys() & others.keys())


@dataclass
class BranchState:
    """The state of one branch in one slot.

    `past` holds (step, ring slot) of the residuals that are valid, newest first.
    """

    signature: Signature | None = None
    buffers: Buffers | None = None
    past: list[tuple[int, int]] = field(default_factory=list)
    step: int = -1
    timestep: float | None = None
    accumulated: float = 0.0
    hits_in_a_row: int = 0
    computed: int = 0
    watch: Watch = field(default_factory=Watch)
    #: Why nothing is cached, if it is not that nothing was computed yet.
    lost: str | None = None
    #: The weights that the residuals were computed with.
    stamp: Stamp | None = None

    def forget(self) -> None:
        """Nothing cached means anything any more."""
        self.past.clear()
        self.accumulated, self.hits_in_a_row = 0.0, 0
        self.computed = 0

    def lose(self, reason: str) -> None:
        """Forget, and have the next miss say why."""
        self.forget()
        self.lost = reason

    def begin(self, first_step: int = 0) -> None:
        """Start a trajectory at `first_step`."""
        self.forget()
        self.step, self.timestep, self.watch = first_step - 1, None, Watch(first_step)
        self.lost = None

    def allocate(self, signature: Signature, make: Callable[[], Buffers]) -> None:
        """Get buffers for a new layout. The old ones are freed first."""
        self.forget()
        self.signature = self.buffers = None
        self.buffers = make()
        self.signature = signature

    def history(self, num_steps: int | None, branch: Hashable) -> History:
        """The state as policies see it."""
        past = tuple(step for step, _ in self.past)
        return History(
            self.step,
            num_steps,
            self.accumulated,
            self.hits_in_a_row,
            past,
            branch,
            self.computed,
        )

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
        """The ring slot that the next miss writes: of this step, if it is held (Heun)."""
        if self.past and self.past[0][0] == self.step:
            return self.past[0][1]
        size = self.ring
        used = {slot for _, slot in self.past}
        free = [slot for slot in range(size) if slot not in used]
        return free[0] if free else self.past[-1][1]

    def refreshed(self, slot: int) -> None:
        """Note that a miss at the present step wrote ring slot `slot`."""
        kept = [entry for entry in self.past if entry[1] != slot]
        self.past = [(self.step, slot), *kept][: self.ring]
        self.accumulated, self.hits_in_a_row = 0.0, 0
        self.computed += 1
        self.lost = None

    def reused(self, score: float) -> None:
        """Note a hit."""
        self.accumulated += score
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


@dataclass(frozen=True)
class Verdict:
    """What the first branch of a step decided for the others."""

    branch: Hashable
    step: int
    is_hit: bool


@dataclass(eq=False)
class Slot:
    """The state of one request: its trajectory and the branches in it."""

    branches: dict[Hashable, BranchState] = field(default_factory=dict)
    trajectory: int = 0
    is_announced: bool = False
    num_steps: int | None = None
    first_step: int = 0
    #: Which step each timestep of the trajectory is.
    steps: dict[float, int] = field(default_factory=dict)
    verdict: Verdict | None = None
    #: Looks for the reason why nothing hits.
    exam: Exam | None = None
    #: What the sampler's scheduler says of this trajectory, where there is one.
    timeline: Timeline | None = None

    @property
    def is_known(self) -> bool:
        """Whether somebody says when the trajectory ends: the caller, or the scheduler."""
        return self.is_announced or (self.timeline is not None and not self.timeline.has_stopped)

    def branch(self, name: Hashable) -> BranchState:
        """The state of branch `name`."""
        if name not in self.branches:
            self.branches[name] = BranchState()
            self.branches[name].begin(self.first_step)
        return self.branches[name]

    def begin(
        self, *, announced: bool = False, num_steps: int | None = None, first_step: int = 0
    ) -> None:
        """Start a new trajectory: every branch forgets, so that none meets an old residual."""
        for state in self.branches.values():
            state.begin(first_step)
        self.trajectory += 1
        self.is_announced, self.num_steps, self.first_step = announced, num_steps, first_step
        self.steps.clear()
        self.verdict = self.exam = None

    def advance(self, state: BranchState, timestep: float | None, rising: bool) -> None:
        """Count a step of `state`, one of the branches.

        Two evaluations at one timestep (Heun) belong to the same step; a branch that was not
        called at every step (guidance within an interval) takes its step from the others.
        """
        if timestep is None:
            state.step += 1
        elif timestep != state.timestep:
            state.step = max(state.step + 1, self._step_of(timestep, rising))
            self.steps[timestep] = state.step
        state.timestep = timestep

    def count(self, branch: Hashable, timestep: float | None, rising: bool) -> bool:
        """Count an evaluation of `branch` around the cache as a step, if it may be one of this
        trajectory; whether it is.
        """
        if self.timeline is not None:  # which says each step's number itself
            return True
        if not self.is_announced and (timestep is None or branch not in self.branches):
            return False
        state = self.branch(branch)
        last = state.timestep
        if last is None and not self.is_announced:
            return False
        if timestep is not None and last not in (None, timestep) and (timestep > last) != rising:
            return False
        self.advance(state, timestep, rising)
        return True

    def _step_of(self, timestep: float, rising: bool) -> int:
        """The step of `timestep`, by what other branches have seen."""
        if timestep in self.steps:
            return self.steps[timestep]
        seen = [step for t, step in self.steps.items() if (t < timestep) == rising]
        return max(seen, default=self.first_step - 1) + 1

    @property
    def bytes_by_device(self) -> Counter[str]:
        buffers = (s.buffers for s in self.branches.values() if s.buffers is not None)
        return sum((own.bytes_by_device for own in buffers), Counter[str]())
