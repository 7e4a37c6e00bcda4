"""No residual outlives the weights that it was computed with.

Training, adapters and moving averages change weights between two evaluations. A branch keeps a
stamp: which tensors the weights were, how often torch had counted a write into each, and the
numbers of the model (an adapter's scale). An optimizer's step, whose fused kernels write uncounted,
voids it, and so does the end of a weight. Writes through ``.data`` amid a trajectory go unseen:
whoever does that says so, by `denoiser.reset()`.
"""

import functools
import weakref
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any

import torch
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

from fxcache.policy.reasons import Reason
from fxcache.runtime.regions import picker

_version = attrgetter("_version")
_stamps: "weakref.WeakSet[Stamp]" = weakref.WeakSet()


@dataclass(eq=False)
class Stamp:
    """What the weights of a graph were. None of them is kept alive."""

    weights: "Weights"
    ids: list[int]
    versions: list[int]
    values: dict[str, Any]
    is_void: bool = False
    references: list[Any] = field(default_factory=list)


class Weights:
    """The weights of one captured graph.

    Args:
        tensors: their places among the graph's inputs (not of those that the graph writes itself).
        registered: which of them are parameters and buffers; other graphs of the model share those.
        numbers: places of numbers of the model, by name.
        constants: gives the model's numbers that are constant in the graph, by name.
    """

    def __init__(
        self,
        tensors: Sequence[int],
        registered: Sequence[bool],
        numbers: Mapping[str, int],
        constants: Callable[[], Mapping[str, Hashable]],
    ) -> None:
        self.tensors, self.registered = tuple(tensors), tuple(registered)
        self.numbers = dict(numbers)
        self.pick = picker(self.tensors)
        self.constants = functools.cache(constants)

    def stamp(self, inputs: Sequence[Any]) -> Stamp:
        """What the weights among `inputs` are now."""
        self.constants()  # what they are read from need not be kept
        _watch_optimizers()
        stamp = Stamp(self, *self._now(inputs))
        gone = functools.partial(_void, weakref.ref(stamp))
        stamp.references = [weakref.ref(inputs[place], gone) for place in self.tensors]
        _stamps.add(stamp)
        return stamp

    def check(
        self, stamp: Stamp, inputs: Sequence[Any], *, are_same: bool = False
    ) -> tuple[Stamp, Reason | None]:
        """Why what is of `stamp` must be forgotten (None: nothing changed), and a stamp for next
        time: this one, or if it is of another graph, one of this graph. With `are_same`, it is
        known that the weights are the same tensors.
        """
        is_own = stamp.weights is self and not stamp.is_void
        if are_same and is_own and _versions(self.pick(inputs)) == stamp.versions:
            return stamp, None
        ids, versions, values = self._now(inputs)
        if stamp.weights is self:
            is_same = (stamp.ids, stamp.versions) == (ids, versions)
            reason = None if stamp.values == values else Reason.NUMBER_CHANGED
        else:
            then = {**stamp.weights.constants(), **_tagged(stamp.values)}
            own = {**self.constants(), **_tagged(values)}
            is_same = stamp.weights._held(stamp.ids, stamp.versions) == self._held(ids, versions)
            changed = any(then[name] != own[name] for name in then.keys() & own.keys())
            reason = Reason.NUMBER_CHANGED if changed else None
        if stamp.is_void or not is_same:
            reason = Reason.WEIGHTS_CHANGED
        keeps = reason is None and stamp.weights is self
        return (stamp if keeps else self.stamp(inputs)), reason

    def _held(self, ids: list[int], versions: list[int]) -> dict[int, int]:
        each = zip(ids, versions, self.registered, strict=True)
        return {identity: version for identity, version, is_registered in each if is_registered}

    def _now(self, inputs: Sequence[Any]) -> tuple[list[int], list[int], dict[str, Any]]:
        tensors = self.pick(inputs)
        versions = _versions(tensors)
        values = {name: inputs[place].item() for name, place in self.numbers.items()}
        return list(map(id, tensors)), versions, values


def _versions(tensors: Sequence[torch.Tensor]) -> list[int]:
    try:
        return list(map(_version, tensors))
    except RuntimeError:  # of inference tensors no writes are counted
        return [0 if tensor.is_inference() else tensor._version for tensor in tensors]


def _tagged(values: Mapping[str, Any]) -> dict[str, Hashable]:
    """Numbers that are inputs. A constant that became one has changed: this is why it is one."""
    return {name: ("input", value) for name, value in values.items()}


def _void(stamp: "weakref.ref[Stamp]", _: Any) -> None:
    if (alive := stamp()) is not None:
        alive.is_void = True


@functools.cache
def _watch_optimizers() -> None:
    def note(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if not torch.compiler.is_compiling():  # torch counts what compiled code writes
            stepped = {id(p) for group in optimizer.param_groups for p in group["params"]}
            for stamp in list(_stamps):
                stamp.is_void |= not stepped.isdisjoint(stamp.ids)

    register_optimizer_step_post_hook(note)
