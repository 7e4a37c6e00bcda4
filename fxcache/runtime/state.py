"""What is kept between evaluations, and when it is forgotten.

A session has slots (requests); a slot has one trajectory at a time and one `BranchState` a branch.
Tensors are allocated once a layout and kept from trajectory to trajectory; whether they mean
anything is decided by `past` alone, which every new trajectory and every exception empties.
"""

import itertools
import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Collection, Hashable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from fxcache.policy import History
from fxcache.policy.base import ForecastError


@dataclass(eq=False)
class Buffers:
    """Tensors that fxcache owns: by key what the measurement keeps (nothing if there is none), and
    for each stream its ring of residuals.
    """

    kept: dict[str, torch.Tensor]
    rings: tuple[tuple[torch.Tensor, ...], ...]
    #: Of a policy that looks at it: the conditioning of the last computed step, by name.
    conditions: dict[str, torch.Tensor] = field(default_factory=dict)

    def all(self) -> list[torch.Tensor]:
        """What the pieces read and write."""
        return [*self.kept.values(), *(entry for ring in self.rings for entry in ring)]

    @property
    def device(self) -> torch.device:
        return self.rings[0][0].device

    @property
    def bytes_by_device(self) -> Counter[str]:
        """Of all that is cached; a kernel's scratch, whole numbers, is not."""
        held: Counter[str] = Counter()
        for tensor in (*self.all(), *self.conditions.values()):
            if tensor.is_floating_point() or tensor.is_complex():
                held[str(tensor.device)] += tensor.nbytes
        return held


@dataclass(frozen=True)
class Signature:
    """What a state belongs to: the inputs' layouts by name, the span and what is kept."""

    inputs: tuple[tuple[str, Hashable], ...]
    kept: Hashable


@dataclass
class Pairs:
    """Whether the timesteps of an announced trajectory come as those of Heun's method do: the first
    once and every other twice, the second time amid the same step. Timesteps that are equal since
    they were rounded (or always) are steps.
    """

    holds: bool = True
    distinct: int = 0
    evaluations: int = 0
    merged: int = 0

    def moves(self) -> int:
        """Note another timestep. By how many steps the count was too low."""
        is_single = self.distinct > 1 and self.evaluations == 1
        self.distinct, self.evaluations = self.distinct + 1, 1
        return self._break() if is_single and self.holds else 0

    def repeats(self) -> int:
        """Note the same timestep. How many steps that is."""
        self.evaluations += 1
        if self.holds and self.distinct > 1 and self.evaluations == 2:
            self.merged += 1
            return 0
        return 1 + self._break()

    def _break(self) -> int:
        merged, self.merged, self.holds = self.merged, 0, False
        return merged


@dataclass(eq=False)
class BranchState:
    """The state of one branch in one slot.

    `past` holds (step, ring slot) of the residuals that are valid, newest first.
    """

    #: The caller's name for it, and the name in reports.
    name: Hashable = None
    label: Hashable = None
    signature: Signature | None = None
    buffers: Buffers | None = None
    past: list[tuple[int, int]] = field(default_factory=list)
    accumulated: float = 0.0
    hits_in_a_row: int = 0
    #: The steps of those since the oldest residual.
    hits: list[int] = field(default_factory=list)
    computed: int = 0
    #: Why nothing is cached, if it is not that nothing was computed yet.
    lost: str | None = None
    #: How far off the forecast would have been at the last miss (`fxcache.runtime.forecast_error`).
    error: Callable[[], ForecastError] | None = None
    #: The weights that the residuals were computed with (see `fxcache.runtime.freshness`).
    stamp: Any = None

    #: It was called in this trajectory, so often, at last at this place of the sampler's list.
    is_running: bool = False
    calls: int = 0
    place: int | None = None
    step: int = -1
    timestep: float | None = None
    time_seen: Any = None
    pairs: Pairs = field(default_factory=Pairs)
    #: What its last call was given, and which of that is another tensor from call to call.
    given: Any = None
    varying: set[str] = field(default_factory=set)

    def forget(self) -> None:
        """Nothing cached means anything any more."""
        self.past.clear()
        self.hits.clear()
        self.accumulated, self.hits_in_a_row = 0.0, 0
        self.computed, self.error = 0, None

    def lose(self, reason: str) -> None:
        """Forget, and have the next miss say why."""
        self.forget()
        self.lost = reason

    def lose_to(self, reason: str) -> None:
        """Forget what is cached, if anything is."""
        if self.past:
            self.lose(reason)

    def undo(self, step: int | None) -> None:
        """Be as before the evaluation of `step`, which failed; what was cached is lost."""
        self.begin(self.step if step is None else step)

    def begin(self, first_step: int = 0) -> None:
        """Start a trajectory at `first_step`."""
        self.forget()
        self.is_running, self.calls, self.place = False, 0, None
        self.step, self.timestep, self.pairs = first_step - 1, None, Pairs()
        self.lost, self.varying = None, set()

    def release(self) -> None:
        """Free the memory."""
        self.forget()
        self.signature = self.buffers = None

    def history(self, num_steps: int | None) -> History:
        """The state as policies see it."""
        past = tuple(step for step, _ in self.past)
        return History(
            self.step,
            num_steps,
            self.accumulated,
            self.hits_in_a_row,
            past,
            self.label,
            self.computed,
            None if self.error is None else self.error(),
        )

    @property
    def allocated(self) -> Buffers:
        """The buffers, where there are some."""
        assert self.buffers is not None
        return self.buffers

    def oldest_slot(self) -> int:
        """The ring slot that the next miss writes: of this step, if it is held (Heun)."""
        if self.past and self.past[0][0] == self.step:
            return self.past[0][1]
        used = {slot for _, slot in self.past}
        free = [slot for slot in range(len(self.allocated.rings[0])) if slot not in used]
        return free[0] if free else self.past[-1][1]

    def refreshed(self, slot: int) -> None:
        """Note that a miss at the present step wrote ring slot `slot`, of no entry in `past`."""
        self.past.insert(0, (self.step, slot))
        self.hits = [step for step in self.hits if step > self.past[-1][0]]
        self.accumulated, self.hits_in_a_row = 0.0, 0
        self.computed += 1
        self.lost = None

    def reused(self, score: float) -> None:
        """Note a hit."""
        self.accumulated += score
        self.hits_in_a_row += 1
        self.hits.append(self.step)


@dataclass(frozen=True)
class Verdict:
    """What the first branch of a step decided for the others."""

    branch: Hashable = None
    step: int = -1
    is_hit: bool = False


@dataclass(eq=False)
class Slot:
    """The state of one request: its trajectory, and its branches by their names in reports."""

    #: Numbers of trajectories; the slots of a session share them.
    numbers: Iterator[int] = field(default_factory=itertools.count)
    branches: dict[Hashable, BranchState] = field(default_factory=dict)
    trajectory: int = field(init=False)
    is_announced: bool = False
    num_steps: int | None = None
    first_step: int = 0
    #: The last step, place in the sampler's list, and timestep.
    step: int = -1
    place: int = -1
    timestep: float | None = None
    #: Which step each timestep of the trajectory is.
    steps: dict[float, int] = field(default_factory=dict)
    verdict: Verdict = Verdict()
    #: Calls of several branches were taken for one.
    is_mixed: bool = False
    #: Which thread evaluates.
    thread: int | None = None
    #: What the sampler's scheduler says, where there is one.
    timeline: Any = None

    def __post_init__(self) -> None:
        self.trajectory = next(self.numbers)

    @property
    def is_running(self) -> bool:
        """Whether an evaluation of this trajectory was seen."""
        return any(state.is_running for state in self.branches.values())

    @property
    def is_listed(self) -> bool:
        """Whether a scheduler's list tells the steps."""
        return not self.is_announced and self.timeline is not None and not self.timeline.has_stopped

    @property
    def is_over(self) -> bool:
        """Whether all branches that are still called had the last step, if it is known which."""
        if self.num_steps is None or self.step < self.num_steps - 1:
            return False
        before = self.num_steps - 2  # a branch that ended earlier (guidance) does not come again
        return not any(s.is_running and s.step == before for s in self.branches.values())

    def new_branch(self, name: Hashable, number: int) -> BranchState:
        """The `number`-th branch that goes by `name`."""
        label = name
        while number > 1 or label in self.branches:
            label = f"{'call' if name is None else name} {max(number, 2)}"
            if label not in self.branches:
                break
            number += 1
        state = self.branches[label] = BranchState(name, label)
        state.begin(self.first_step)
        return state

    def begin(
        self, *, announced: bool = False, num_steps: int | None = None, first_step: int = 0
    ) -> None:
        """Start a new trajectory: every branch forgets, so that none meets an old residual."""
        for state in self.branches.values():
            state.begin(first_step)
        self.trajectory = next(self.numbers)
        self.is_announced, self.num_steps, self.first_step = announced, num_steps, first_step
        self.step, self.place, self.timestep = first_step - 1, -1, None
        self.steps.clear()
        self.verdict, self.is_mixed = Verdict(), False

    def release(self) -> None:
        """Free the memory of all branches."""
        for state in self.branches.values():
            state.release()

    @property
    def bytes_by_device(self) -> Counter[str]:
        buffers = (s.buffers for s in self.branches.values() if s.buffers is not None)
        return sum((own.bytes_by_device for own in buffers), Counter[str]())


#: How many requests keep a state; of more, those that were not called for longest lose theirs.
MAX_SLOTS = 64


class Slots(OrderedDict[Hashable, Slot]):
    """The slots of a session, those that were called last at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = itertools.count()
        self._lock = threading.Lock()

    def of(self, key: Hashable, together: Collection[Hashable], num_steps: int | None) -> Slot:
        """The slot of request `key`. Others may be dropped, but for those called `together`."""
        with self._lock:
            slot = self.get(key)
            if slot is None:
                slot = self[key] = Slot(self.numbers, num_steps=num_steps)
            self.move_to_end(key)
            kept = {key, *together}
            idle = [k for k, held in self.items() if k not in kept and not held.is_announced]
            for old in idle[: max(0, len(self) - MAX_SLOTS)]:
                del self[old]
        return slot

    def release(self, key: Hashable) -> None:
        """Forget a request."""
        with self._lock:
            self.pop(key, None)
