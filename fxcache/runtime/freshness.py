"""No residual outlives the weights that it was computed with.

Training, adapters and moving averages change weights between two evaluations. A branch keeps a
stamp: which tensors the weights were, how often torch had counted a write into each, and the
numbers of the model (an adapter's scale). The fused kernels of optimizers write uncounted, so their
steps are counted here. Writes through ``.data`` amid a trajectory go unseen: whoever does that says
so, by `denoiser.reset()`.
"""

import functools
import weakref
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from itertools import compress
from operator import attrgetter
from typing import Any

import torch
from torch.autograd.graph import increment_version
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils.weak import WeakIdKeyDictionary

from fxcache.policy.reasons import Reason
from fxcache.runtime.regions import picker

#: The wrapper that a tensor is in.
_owners: "WeakIdKeyDictionary" = WeakIdKeyDictionary()
#: The places of weights that are in a wrapper, and it.
_Owners = Sequence[tuple[int, "weakref.ref[torch.Tensor]"]]


class Stamp:
    """What the weights among `inputs` are now. None of them is kept alive."""

    def __init__(self, weights: "Weights", inputs: Sequence[Any]) -> None:
        _count_steps()
        tensors = weights.pick(inputs)
        self.weights, self.references = weights, list(map(weakref.ref, tensors))
        self.owners = [(i, _owners[t]) for i, t in enumerate(tensors) if _owners and t in _owners]
        self.versions = _versions(tensors, self.owners)
        #: A constant that became an input has changed: this is why it is one.
        numbers = {name: ("input", inputs[at].item()) for name, at in weights.numbers.items()}
        self.values = {**weights.constants(), **numbers}

    def held(self) -> list[tuple[int, int]]:
        """Which tensors the weights were (one that is gone is like no other), and their counts."""
        return list(zip((id(ref()) for ref in self.references), self.versions, strict=True))

    def shared(self) -> set[tuple[int, int]]:
        """That of those which other graphs of the model have, too, where their places differ."""
        return set(compress(self.held(), self.weights.registered))


class Weights:
    """The weights of one captured graph.

    Args:
        tensors: their places among the graph's inputs (not of those that the graph writes itself).
        registered: which of them are parameters and buffers; other graphs of the model share those.
        numbers: places of numbers of the model, by name.
        constants: gives the model's numbers that are constant in the graph, by name.
        read_by_hits: those of `tensors` that a hit reads.
    """

    def __init__(self, tensors: Sequence[int], registered: Sequence[bool],
                 numbers: Mapping[str, int], constants: Callable[[], Mapping[str, Hashable]],
                 read_by_hits: Sequence[int] = ()) -> None:  # fmt: skip
        self.pick_for_hits = picker(read_by_hits)
        self.pick, self.registered, self.numbers = picker(tensors), tuple(registered), dict(numbers)
        self.constants = functools.cache(constants)  # what they are read from need not be kept

    def now(self, inputs: Sequence[Any]) -> Callable[[], Stamp]:
        """What gives the stamp of the weights among `inputs`, made when it is first asked."""
        return functools.cache(lambda: Stamp(self, inputs))

    def check(
        self,
        then: Stamp,
        inputs: Sequence[Any],
        current: Callable[[], Stamp],
        *,
        are_same: bool = False,
    ) -> tuple[Stamp, Reason | None]:
        """Why what is of the stamp `then` must be forgotten (None: nothing changed), and a stamp
        for next time. `current` gives that of now (see `now`); with `are_same`, it is known that
        the weights are the same tensors.
        """
        is_own = then.weights is self
        if are_same and is_own and _versions(self.pick(inputs), then.owners) == then.versions:
            return then, None
        now = current()
        if (then.held() != now.held()) if is_own else (then.shared() != now.shared()):
            return now, Reason.WEIGHTS_CHANGED
        if any(then.values[name] != now.values[name] for name in then.values.keys() & now.values):
            return now, Reason.NUMBER_CHANGED
        return (then if is_own else now), None


def note_owners(wrappers: Iterable[Any]) -> None:
    """Remember of the tensors inside `wrappers` (distributed or quantized weights) whose they are:
    what writes into a wrapper is counted there alone.
    """
    for wrapper in wrappers:
        for name in wrapper.__tensor_flatten__()[0]:
            inner = getattr(wrapper, name)
            _owners[inner] = weakref.ref(wrapper)
            if is_traceable_wrapper_subclass(inner):
                note_owners([inner])


def _versions(tensors: Sequence[torch.Tensor], owners: _Owners) -> list[int]:
    try:
        versions = list(map(attrgetter("_version"), tensors))
    except RuntimeError:  # of inference tensors no writes are counted
        versions = [0 if tensor.is_inference() else tensor._version for tensor in tensors]
    for place, owner in owners:
        if (alive := owner()) is not None and not alive.is_inference():
            versions[place] += alive._version
    return versions


@functools.cache
def _count_steps() -> None:
    def count(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if not torch.compiler.is_compiling():  # torch counts what compiled code writes
            increment_version([p for group in optimizer.param_groups for p in group["params"]])

    register_optimizer_step_post_hook(count)
