"""The way past Dynamo for calls like one that went the complete way.

Dynamo checks its guards and loads every weight of the model before a call starts, which costs more
than a small model's hit. So it is remembered how such a call became one of the step executor, and
the next of the same trajectory goes straight there, as long as its arguments have the same
structure, layouts and constants. Dynamo's guards are checked once the device is busy; if they fail,
what was queued is dropped and the complete way is taken. (With ``guards="trajectory"`` they are not
checked before the next trajectory begins.) Weights that are replaced are seen as modules register
them, and up to Python 3.12 wherever they stand; later, who writes into ``module._parameters`` by
hand, or gives an object another plain tensor, says so, by `denoiser.reset()`.
"""

import functools
import weakref
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import nn
from torch.nn.modules import module as modules
from torch.utils import _pytree as pytree

from fxcache.runtime.session import LastCall, Outdated, Session
from fxcache.runtime.state import Slot

#: What `Shortcut.evaluate` gives where the complete way must be taken.
NOT_TAKEN = object()

_CONSTANTS = int | float | str | bool | None | torch.dtype | torch.device
_FIXED_RESULTS = (str, bool, type(None), torch.dtype, torch.device)
_MAX_PATHS, _MAX_FAILURES = 64, 8


class Guards(Protocol):
    """Dynamo's guards of what it compiled."""

    def hold(self, given: Mapping[str, Any]) -> bool:
        """Whether it fits these arguments, by name, and the weights that hits read."""

    def fit(self) -> bool:
        """Whether it fits the weights that misses read."""


@dataclass(frozen=True)
class _Path:
    """How a call of the model becomes a call of an executor.

    `values` are the executor's inputs, with None at the places of the caller's tensors; `places`
    maps leaves of the arguments to such places; `results` are the leaves of what the model returns:
    a place among the executor's outputs, or a constant. Each output is one of them.
    """

    executor: Any
    #: Dynamo's guards. None: they are not checked.
    guards: Guards | None
    slot: weakref.ref[Slot]  # a finished request is not kept alive
    trajectory: int
    ambient: Hashable
    spec: Any
    layouts: tuple[Any, ...]
    values: tuple[Any, ...]
    places: tuple[tuple[int, int], ...]
    result_spec: Any
    results: tuple[tuple[bool, Any], ...]

    @property
    def is_current(self) -> bool:
        """Whether the trajectory is the one in which it was learned."""
        slot = self.slot()
        return slot is not None and slot.trajectory == self.trajectory


class Shortcut:
    """Learns paths from complete evaluations and takes them; one path a slot and branch.

    Args:
        checks: whether guards and weights are checked at each call.
    """

    def __init__(self, session: Session, *, checks: bool) -> None:
        self.session, self.checks = session, checks
        if checks:
            _learners.add(self)
            _watch_registrations()
        self.paths: dict[Hashable, _Path] = {}
        #: Those of a path that did not hold any more.
        self.dropped: Guards | None = None
        #: How often in a row nothing could be learned.
        self.failures = 0

    @property
    def learns(self) -> bool:
        """Whether there is a use in trying."""
        return self.failures < _MAX_FAILURES

    def evaluate(self, given: Mapping[str, Any]) -> Any:
        """What the model returns, or NOT_TAKEN if this call needs all checks."""
        key, call = self._key(), self.session.call.get()
        path = self.paths.get(key)
        if call is None or (call.is_repeat and not self.checks):  # it may begin a trajectory
            return NOT_TAKEN
        if path is None or not path.is_current or path.ambient != _ambient():
            return NOT_TAKEN
        leaves, spec = _flattened(given)
        if spec != path.spec or any(
            _layout(leaf) != layout for leaf, layout in zip(leaves, path.layouts, strict=True)
        ):
            return NOT_TAKEN
        values = list(path.values)
        for leaf, place in path.places:
            values[place] = leaves[leaf]
        trusts = self.session.trusts_trajectory.set(not self.checks)
        guards = path.guards
        holds = self.session.holds.set(None if guards is None else partial(_holds, guards, given))
        try:
            with _without_autocast():  # which is in the graph, as casts
                outputs = path.executor(*values)
        except Outdated:
            self.paths.pop(key, None)
            self.dropped = path.guards
            return NOT_TAKEN
        except Exception:
            if guards is None or guards.hold(given):
                raise
            del self.paths[key]  # what was queued did not fit the model any more
            return NOT_TAKEN
        finally:
            self.session.holds.reset(holds)
            self.session.trusts_trajectory.reset(trusts)
        results = [outputs[value] if computed else value for computed, value in path.results]
        if path.result_spec is tuple:
            return tuple(results)
        return pytree.tree_unflatten(results, path.result_spec)

    def learn(
        self,
        given: Mapping[str, Any],
        result: Any,
        find: Callable[[Sequence[Sequence[Any]], Sequence[Guards | None]], Guards | None],
    ) -> None:
        """Remember how the evaluation that just went the complete way can be repeated.

        `given` are the arguments of what Dynamo compiled, by name; `find` gives the guards that
        hold for it, from the weights that hits and misses read, and guards that it knows.
        """
        last, key = self.session.last_call.get(), self._key()
        known = [self.dropped, *(path.guards for path in self.paths.values())]
        self.dropped = None
        self.paths.pop(key, None)
        self.failures += 1
        if last is None:
            return
        executor, _, inputs, _ = last
        picked = executor.weights.pick_for_hits(inputs), executor.weights.pick(inputs)
        read = [[tensor for tensor in own if type(tensor) is nn.Parameter] for own in picked]
        guards = find(read, known) if self.checks else None
        if self.checks and guards is None:
            return
        path = _path(last, given, result, guards)
        if path is not None:
            self.failures = 0
            if len(self.paths) >= _MAX_PATHS:
                self.paths = {at: old for at, old in self.paths.items() if old.is_current}
            if len(self.paths) >= _MAX_PATHS:
                self.paths.clear()
            self.paths[key] = path

    def _key(self) -> Hashable:
        call = self.session.call.get()
        return None if call is None else (call.where.slot, call.state.label)

    def forget(self) -> None:
        """Every next call goes the complete way."""
        self.paths.clear()
        self.failures, self.dropped = 0, None


_learners: "weakref.WeakSet[Shortcut]" = weakref.WeakSet()


@functools.cache
def _watch_registrations() -> None:
    """Forget what was learned whenever some module is given a parameter, a buffer or a child: that
    may replace a weight, which Dynamo's guards do not see if the layout is the same.
    """

    def forget(*_: Any) -> None:
        if torch.compiler.is_compiling():  # a buffer that the model counts in; Dynamo traces this
            return
        for learner in list(_learners):
            learner.paths.clear()

    modules.register_module_parameter_registration_hook(forget)
    modules.register_module_buffer_registration_hook(forget)
    modules.register_module_module_registration_hook(forget)


def _holds(guards: Guards, given: Mapping[str, Any], is_miss: bool) -> bool:
    return guards.fit() if is_miss else guards.hold(given)


def _path(
    call: LastCall,
    given: Mapping[str, Any],
    result: Any,
    guards: Guards | None,
) -> _Path | None:
    """The path of `call`, None if its inputs or results are not simply the caller's."""
    executor, slot, inputs, outputs = call
    if guards is not None and (executor.weights.numbers or not executor.is_all):
        return None  # Dynamo reads numbers of the model anew, and replays what changes its objects
    leaves, spec = _flattened(given)
    tensors = [i for i, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)]
    at = {id(leaves[i]): i for i in tensors}
    if len(at) < len(tensors):
        return None  # one stands at two places; in the next call it may not
    values, places = list(inputs), []
    for place in executor.data:
        leaf = at.pop(id(inputs[place]), None)
        if leaf is None:  # or it is two inputs of the graph
            return None
        places.append((leaf, place))
        values[place] = None
    if executor.has_numbers:
        return None
    layouts = tuple(map(_layout, leaves))
    returned, result_spec = pytree.tree_flatten(result)
    is_tuple = type(result) is tuple and len(returned) == len(result)
    results = [_result(leaf, outputs) for leaf in returned]
    if None in layouts or None in results:
        return None
    known = tuple(result for result in results if result is not None)
    if {place for computed, place in known if computed} != set(range(len(outputs))):
        return None  # an output that is not returned becomes something else after the graph
    return _Path(
        executor,
        guards,
        weakref.ref(slot),
        slot.trajectory,
        _ambient(),
        spec,
        layouts,
        tuple(values),
        tuple(places),
        tuple if is_tuple else result_spec,
        known,
    )


def _flattened(given: Mapping[str, Any]) -> tuple[list[Any], Any]:
    """The leaves of the arguments, and what tells their structure."""
    args, kwargs = given["args"], given["kwargs"]
    leaves = [*args, *kwargs.values()]
    if all(isinstance(leaf, torch.Tensor | _CONSTANTS) for leaf in leaves):  # a shorter way
        return leaves, (len(args), *kwargs)
    return pytree.tree_flatten((args, kwargs))


def _result(leaf: Any, outputs: Any) -> tuple[bool, Any] | None:
    if not isinstance(leaf, torch.Tensor):
        # Numbers are refused: they may be counted or read from tensors at each call.
        return (False, leaf) if isinstance(leaf, _FIXED_RESULTS) else None
    found = [index for index, output in enumerate(outputs) if output is leaf]
    return (True, found[0]) if found else None


def _layout(leaf: Any) -> tuple[Any, ...] | None:
    """What must not change about an argument; None if that cannot be told."""
    if type(leaf) is torch.Tensor:
        return leaf.shape, leaf.dtype, leaf.device, leaf.stride(), leaf.requires_grad
    return (type(leaf), leaf) if isinstance(leaf, _CONSTANTS) else None


@contextmanager
def _without_autocast() -> Iterator[None]:
    with ExitStack() as stack:
        for device in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        yield


def _ambient() -> Hashable:
    """The global state that Dynamo guards and that samplers may change."""
    return (
        torch.is_inference_mode_enabled(),
        torch.is_grad_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.is_autocast_enabled("cuda"),
        torch.get_autocast_dtype("cpu"),
        torch.get_autocast_dtype("cuda"),
    )
