"""No residual outlives the weights that it was computed with.

Training, adapters and moving averages change weights between two evaluations. A branch keeps a
stamp: which tensors the weights were, how often torch had counted a write into each, and the
numbers of the model (an adapter's scale). An optimizer's step, whose fused kernels write uncounted,
voids it, and so does the end of a weight. Writes through ``.data`` amid a trajectory go unseen:
whoever does that says so, by `denoiser.reset()`.
"""

import functools
import weakref
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from itertools import compress
from operator import attrgetter
from typing import Any

import torch
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils.weak import WeakIdKeyDictionary

from fxcache.policy.reasons import Reason
from fxcache.runtime.regions import picker

_stamps: "weakref.WeakSet[Stamp]" = weakref.WeakSet()
#: The wrapper that a tensor is in.
_owners: "WeakIdKeyDictionary" = WeakIdKeyDictionary()
#: The places of weights that are in a wrapper, and it.
_Owners = Sequence[tuple[int, "weakref.ref[torch.Tensor]"]]


class Stamp:
    """What the weights among `inputs` are now. None of them is kept alive."""

    def __init__(self, weights: "Weights", inputs: Sequence[Any]) -> None:
        tensors = weights.pick(inputs)
        self.owners = [(i, _owners[t]) for i, t in enumerate(tensors) if _owners and t in _owners]
        self.weights, self.is_void = weights, False
        self.versions = _versions(tensors, self.owners)
        self.ids = list(map(id, tensors))
        #: Of these, too, an optimizer's step counts.
        self.stepped = {*self.ids, *(id(owner()) for _, owner in self.owners)}
        #: The counts of those that other graphs of the model have, too, where their places differ.
        held = zip(self.ids, self.versions, strict=True)
        self.shared = dict(compress(held, weights.registered))
        #: A constant that became an input has changed: this is why it is one.
        numbers = {name: ("input", inputs[at].item()) for name, at in weights.numbers.items()}
        self.values = {**weights.constants(), **numbers}

    def keep(self, tensors: Sequence[torch.Tensor]) -> "Stamp":
        """This stamp, which is void once one of `tensors` is gone or stepped by an optimizer."""
        if self in _stamps:  # requests of a batch have one
            return self
        _watch_optimizers()
        void = functools.partial(_void, weakref.ref(self))
        self.references = [weakref.ref(tensor, void) for tensor in tensors]
        _stamps.add(self)
        return self


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
        is_own = then.weights is self and not then.is_void
        if are_same and is_own and _versions(self.pick(inputs), then.owners) == then.versions:
            return then, None
        now = current()
        is_same = then.shared == now.shared
        if is_own:
            is_same = (then.ids, then.versions) == (now.ids, now.versions)
        reason = None
        if then.is_void or not is_same:
            reason = Reason.WEIGHTS_CHANGED
        elif any(then.values[name] != now.values[name] for name in then.values.keys() & now.values):
            reason = Reason.NUMBER_CHANGED
        return (then if is_own and reason is None else now.keep(self.pick(inputs))), reason


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


def _void(stamp: "weakref.ref[Stamp]", _: Any) -> None:
    if (alive := stamp()) is not None:
        alive.is_void = True


@functools.cache
def _watch_optimizers() -> None:
    def note(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if not torch.compiler.is_compiling():  # torch counts what compiled code writes
            stepped = {id(p) for group in optimizer.param_groups for p in group["params"]}
            for stamp in list(_stamps):
                stamp.is_void |= not stepped.isdisjoint(stamp.stepped)

    register_optimizer_step_post_hook(note)
