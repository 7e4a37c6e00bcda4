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
from typing import Any

import torch
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

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
        self.tensors, self.registered, self.numbers = (
            tuple(tensors),
            tuple(registered),
            dict(numbers),
        )
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

    def unchanged(self, stamp: Stamp | None, inputs: Sequence[Any]) -> Stamp | None:
        """`stamp` if the weights are as it says (or one of this graph), None if not."""
        if stamp is None or stamp.is_void:
            return None
        now = Stamp(self, *self._now(inputs))
        if stamp.weights is self:
            is_same = (stamp.ids, stamp.versions, stamp.values) == (
                now.ids,
                now.versions,
                now.values,
            )
            return stamp if is_same else None
        then, own = stamp.weights._named(stamp), self._named(now)
        is_same = all(then[name] == own[name] for name in then.keys() & own.keys())
        return (
            self.stamp(inputs)
            if is_same and stamp.weights._held(stamp) == self._held(now)
            else None
        )

    def _now(self, inputs: Sequence[Any]) -> tuple[list[int], list[int], dict[str, Any]]:
        tensors = [inputs[place] for place in self.tensors]
        versions = [0 if tensor.is_inference() else tensor._version for tensor in tensors]
        values = {name: inputs[place].item() for name, place in self.numbers.items()}
        return list(map(id, tensors)), versions, values

    def _held(self, stamp: Stamp) -> dict[int, int]:
        each = zip(stamp.ids, stamp.versions, self.registered, strict=True)
        return {identity: version for identity, version, is_registered in each if is_registered}

    def _named(self, stamp: Stamp) -> dict[str, Hashable]:
        """All numbers. A constant that became an input has changed: this is why it is one."""
        return {**self.constants(), **{name: ("input", v) for name, v in stamp.values.items()}}


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
