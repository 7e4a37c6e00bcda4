"""Which branch does a call continue that has no name?

A sampler calls the model several times a step (guidance, tiles) and passes the same conditioning
tensors to the same branch at each step. So a branch remembers what its last call was given:
layouts, and which tensor each was (memory and count of writes, no contents). A call belongs to the
branch whose layout it has and whose tensors it shares; calls that share all of them (tiles) are
told apart by their order. Where several branches would do, nobody knows: a miss.
"""

from collections.abc import Callable, Collection, Hashable, Iterator, Mapping
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from fxcache.policy.reasons import Reason
from fxcache.runtime.state import BranchState, Slot


@dataclass(frozen=True, slots=True)
class Seen:
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
    """What one call was given, by the names of its inputs: the layouts of tensors and what is a
    word or a switch, and which tensors they are (but for `samples`, which always are others).
    """

    def __init__(self, inputs: Mapping[str, Any], samples: Collection[str] = ()) -> None:
        self.tensors: dict[str, Seen] = {}
        self.layouts: dict[str, Hashable] = {}
        for name, value in _leaves(inputs):
            if isinstance(value, torch.Tensor):
                self.layouts[name] = value.shape, value.dtype, value.device
                if name not in samples:
                    self.tensors[name] = Seen.of(value)
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


def _leaves(inputs: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in inputs.items():
        if isinstance(value, dict):
            yield from _leaves({f"{name}.{key}": inner for key, inner in value.items()})
        elif isinstance(value, list | tuple):
            yield from _leaves({f"{name}.{place}": inner for place, inner in enumerate(value)})
        else:
            yield name, value


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
        own = [s for s in self.slot.branches.values() if s.is_running and s.name == self.name]
        like = [s for s in own if s.given is not None and s.given.fits(self.given)]
        if self.name is None and self.looks:
            like = [s for s in like if not self._contradicts(s)]
        if not like:
            return None
        missing = {id(s): len(self._changed(s)) for s in like}
        best = [s for s in like if missing[id(s)] == min(missing.values())]
        free = [s for s in best if not self.was_called(s)]
        if self.looks and any(
            a.given.changed(b.given) - a.varying for a, b in combinations(best, 2)
        ):
            if not free:
                return None
            free[0].lose(Reason.UNKNOWN_BRANCH)
        if free:
            return free[0]
        return None if self.is_exact or (self.looks and missing[id(best[0])]) else best[0]

    def has_layout(self) -> bool:
        """Whether some branch of this name was given tensors of these layouts."""
        own = (s.given for s in self.slot.branches.values() if s.is_running and s.name == self.name)
        return any(given is not None and given.fits(self.given) for given in own)

    def _changed(self, state: BranchState) -> set[str]:
        """What is another tensor than at the last call of `state`, and not so at every call."""
        changed: set[str] = state.given.changed(self.given)
        return changed - state.varying

    def _contradicts(self, state: BranchState) -> bool:
        """Whether something is another tensor that was the same at all calls of `state`."""
        return state.calls > 1 and bool(self._changed(state))

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
