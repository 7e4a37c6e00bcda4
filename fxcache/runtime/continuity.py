"""Which branch does a call continue that has no name?

A sampler calls the model several times a step (guidance, tiles) and passes the same conditioning
tensors to the same branch at each step. So a branch remembers what its last call was given:
layouts, and which tensor each was (memory and count of writes, no contents). A call belongs to the
branch whose layout it has and whose tensors it shares; calls that share all of them (tiles) are
told apart by their order. Where several branches would do, nobody knows: a miss.
"""

from collections.abc import Callable, Collection, Hashable, Mapping
from dataclasses import dataclass
from itertools import combinations
from typing import Any, NamedTuple

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from fxcache.policy.reasons import Reason
from fxcache.runtime.state import BranchState, Slot


class Seen(NamedTuple):
    """A tensor that a call was given. It is not kept alive, and no other has this memory."""

    memory: Any
    where: Hashable
    version: int | None

    @classmethod
    def of(cls, tensor: torch.Tensor) -> "Seen":
        version = None if tensor.is_inference() else tensor._version
        try:
            where = tensor.storage_offset(), tensor.stride()
            return cls(StorageWeakRef(tensor.untyped_storage()), where, version)
        except (NotImplementedError, RuntimeError):  # it only wraps others
            return cls(id(tensor), None, version)


class Given:
    """What one call was given, by the paths of its inputs: the layouts of tensors and what is a
    word or a switch, and which tensors they are. `samples` are others at each step.
    """

    def __init__(self, inputs: Mapping[str, Any], samples: Collection[str] = ()) -> None:
        self.tensors: dict[str, Seen] = {}
        self.samples: dict[str, Seen] = {}
        self.layouts: dict[str, Hashable] = {}
        for name, value in inputs.items():
            if isinstance(value, torch.Tensor):
                self.layouts[name] = value.shape, value.dtype, value.device
                kept = self.samples if name in samples else self.tensors
                kept[name] = Seen.of(value)
            elif isinstance(value, str | bool):
                self.layouts[name] = value

    def fits(self, other: "Given") -> bool:
        """Whether the layouts of what both hold are the same; a control may come or go."""
        mine, others = self.layouts, other.layouts
        return all(mine[name] == others[name] for name in mine.keys() & others.keys())

    def changed(self, other: "Given") -> set[str]:
        """The names of the tensors that both hold and that are not the same."""
        mine, others = self.tensors, other.tensors
        return {name for name in mine.keys() & others.keys() if mine[name] != others[name]}

    def shares(self, other: "Given") -> bool:
        """Whether one tensor at least is the same."""
        mine, others = self.tensors | self.samples, other.tensors | other.samples
        return any(mine[name] == others[name] for name in mine.keys() & others.keys())


@dataclass
class Continuity:
    """Finds the branch of a call.

    Args:
        name: the caller's name for it (None: it has none).
        was_called: whether a branch was called at this very place of the sampler already.
        is_exact: whether two calls of one branch are never at one place.
        looks: whether the conditioning counts. Not where the policy judges its changes itself.
    """

    slot: Slot
    name: Hashable
    given: Given
    was_called: Callable[[BranchState], bool]
    is_exact: bool
    looks: bool = True

    def find(self) -> BranchState | None:
        """The branch that goes on; None: the call begins one of its own."""
        own = self._running()
        like = [state for state in own if state.given.fits(self.given)]
        # What is made anew for each call of one branch is no evidence for another, either.
        varying = set[str]().union(*(state.varying for state in own))
        changed = {id(state): state.given.changed(self.given) - varying for state in like}
        if self.name is None and self.looks:  # not where what was the same at all calls is another
            like = [state for state in like if state.calls == 1 or not changed[id(state)]]
        if not like:
            return None
        fewest = min(len(changed[id(state)]) for state in like)
        best = [state for state in like if len(changed[id(state)]) == fewest]
        free = [state for state in best if not self.was_called(state)]
        pairs = combinations(best, 2) if self.looks else ()
        if free and any(a.given.changed(b.given) - varying for a, b in pairs):
            free[0].lose(Reason.UNKNOWN_BRANCH)
        if free:
            return free[0]
        # What shares nothing at all is the same call anew; what shares a part, another branch's.
        is_other = self.looks and fewest > 0 and best[0].given.shares(self.given)
        return None if self.is_exact or is_other else best[0]

    def has_layout(self) -> bool:
        """Whether a branch of this name was given tensors of these layouts, if there is one."""
        own = self._running()
        return not own or any(state.given.fits(self.given) for state in own)

    def _running(self) -> list[BranchState]:
        states = self.slot.branches.values()
        return [state for state in states if state.is_running and state.name == self.name]

    def begin(self) -> BranchState:
        """A branch of its own. It takes the place of one that is not called any more, if it can."""
        own = [s for s in self.slot.branches.values() if s.name == self.name]
        idle = [s for s in own if not s.is_running or s.step < self.slot.step - 1]
        idle.sort(key=lambda s: s.given is None or not s.given.fits(self.given))
        if idle:
            idle[0].begin(self.slot.first_step)
            return idle[0]
        return self.slot.new_branch(self.name, len(own) + 1)

    def note(self, state: BranchState) -> None:
        """Remember what the call was given."""
        if state.given is not None and state.is_running:
            state.varying |= state.given.changed(self.given)
        state.given = self.given
        state.calls += 1
        state.is_running = True
