"""The way past Dynamo for the evaluations of a trajectory after its first.

Dynamo checks its guards and loads every weight of the model at each call, which costs more than a
small model's hit. Inside a trajectory the same things are called again and again, so after a
complete first evaluation of a branch the others go straight to its step executor, as long as their
arguments have the same structure, layouts and constants.
"""

import weakref
from collections.abc import Hashable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import _pytree as pytree

from fxcache.runtime.session import LastCall, NewTrajectory, Session
from fxcache.runtime.state import Slot

#: What `Shortcut.evaluate` gives where the complete way must be taken.
NOT_TAKEN = object()

_CONSTANTS = (int, float, str, bool, type(None), torch.dtype, torch.device)
_FIXED_RESULTS = (str, bool, type(None), torch.dtype, torch.device)
_MAX_PATHS = 64


@dataclass(frozen=True)
class _Path:
    """How a call of the model becomes a call of an executor.

    `values` are the executor's inputs, with None at the places of the caller's tensors; `places`
    maps leaves of the arguments to such places; `results` are the leaves of what the model returns:
    a place among the executor's outputs, or a constant. Each output is one of them.
    """

    executor: Any
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
        slot = self.slot()
        return slot is not None and slot.trajectory == self.trajectory


class Shortcut:
    """Learns paths from complete evaluations and takes them; one path a slot and branch."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.paths: dict[Hashable, _Path] = {}
        session.keeps_calls = True

    def evaluate(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What the model returns, or NOT_TAKEN if this call needs all checks."""
        path = self.paths.get(self._key())
        if path is None or not path.is_current or path.ambient != _ambient():
            return NOT_TAKEN
        leaves, spec = pytree.tree_flatten((args, kwargs))
        if spec != path.spec or any(
            not _same(leaf, layout) for leaf, layout in zip(leaves, path.layouts, strict=True)
        ):
            return NOT_TAKEN
        values = list(path.values)
        for leaf, place in path.places:
            values[place] = leaves[leaf]
        token = self.session.trusts_trajectory.set(True)
        try:
            with _without_autocast():  # which is in the graph, as casts
                outputs = path.executor(*values)
        except NewTrajectory:
            return NOT_TAKEN
        finally:
            self.session.trusts_trajectory.reset(token)
        results = [outputs[value] if computed else value for computed, value in path.results]
        return pytree.tree_unflatten(results, path.result_spec)

    def learn(self, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        """Remember how the evaluation that just went the complete way can be repeated."""
        call, where = self.session.last_call.get(), self._key()
        self.paths.pop(where, None)
        path = None if call is None else _path(call, args, kwargs, result)
        if path is not None:
            if len(self.paths) >= _MAX_PATHS:
                self.paths = {at: old for at, old in self.paths.items() if old.is_current}
            if len(self.paths) >= _MAX_PATHS:
                self.paths.clear()
            self.paths[where] = path

    def _key(self) -> Hashable:
        call = self.session.call.get()
        return None if call is None else (call.where.slot, call.state.label)

    def forget(self) -> None:
        """Every next call goes the complete way."""
        self.paths.clear()


def _path(
    call: LastCall, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any
) -> _Path | None:
    """The path of `call`, None if its inputs or results are not simply the caller's."""
    executor, slot, inputs, outputs = call
    leaves, spec = pytree.tree_flatten((args, kwargs))
    if _shares(leaves):
        return None  # the next call may not
    values = list(inputs)
    places = []
    for place in executor.data:
        found = [i for i, leaf in enumerate(leaves) if leaf is inputs[place]]
        if not found:
            return None
        places.append((found[0], place))
        values[place] = None
    if executor.has_numbers or len({leaf for leaf, _ in places}) < len(places):
        return None
    layouts = tuple(map(_layout, leaves))
    returned, result_spec = pytree.tree_flatten(result)
    results = [_result(leaf, outputs) for leaf in returned]
    if None in layouts or None in results:
        return None
    known = tuple(result for result in results if result is not None)
    if {place for computed, place in known if computed} != set(range(len(outputs))):
        return None  # an output that is not returned becomes something else after the graph
    return _Path(
        executor,
        weakref.ref(slot),
        slot.trajectory,
        _ambient(),
        spec,
        layouts,
        tuple(values),
        tuple(places),
        result_spec,
        known,
    )


def _shares(leaves: list[Any]) -> bool:
    """Whether a tensor stands at two places of the arguments."""
    tensors = [id(leaf) for leaf in leaves if isinstance(leaf, torch.Tensor)]
    return len(set(tensors)) < len(tensors)


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


def _same(leaf: Any, layout: tuple[Any, ...]) -> bool:
    return _layout(leaf) == layout


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
