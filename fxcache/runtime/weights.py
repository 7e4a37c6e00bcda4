"""No residual outlives the weights that it was computed with.

Training steps, adapters and moving averages write weights between two evaluations, and nobody tells
the cache. So a branch keeps a stamp of the weights that its graph read when a residual was stored,
and the next evaluations compare it. What shows that a weight is another:

* an optimizer of torch stepped on it;
* it is gone, and another stands in its place (adapters, ``load_state_dict(assign=True)``);
* it is another tensor, torch counted a write into it (``copy_``, ``load_state_dict``), or its first
  elements are others (writes through ``.data``, which nobody counts: moving averages of diffusers,
  merged adapters; this is looked at in host memory only);
* a number of the model is another: an adapter's scale, constant or not in the graph.

All weights are asked at every evaluation: a merged adapter may have written one of a thousand
(``examples/benchmark_overhead.py`` shows what it costs). That a weight lies elsewhere is no sign:
modules are moved off a device and back. Off the host a weight whose memory is the same counts as
unchanged, so there a write through ``.data`` amid a trajectory is not seen.
"""

import functools
import threading
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from ctypes import c_uint8, c_uint16, c_uint32, c_uint64
from itertools import compress
from operator import attrgetter, itemgetter
from typing import Any
from weakref import WeakSet, ref

import torch
from torch import fx
from torch._guards import TracingContext
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from fxcache.passes.graph import GraphInputs, is_of_model, tensor_of

#: So many elements are copied of weights that do not lie in host memory.
MAX_COPIED = 16

Tensors = Sequence[torch.Tensor]
_CELLS = {1: c_uint8, 2: c_uint16, 4: c_uint32}
_SIMPLE = (torch.nn.Parameter, torch.Tensor)
_version, _value = attrgetter("_version"), attrgetter("value")


class Weights:
    """The weights that one captured graph reads, and the numbers of the model in it.

    Args:
        tensors: places of parameters, buffers and other tensors of the model among the graph's
            inputs; not of those that the graph writes itself.
        registered: which of them are parameters and buffers.
        numbers: places of numbers that are inputs, by name.
        constants: gives the numbers that are constant in the graph, by name.
    """

    def __init__(
        self,
        tensors: Sequence[int],
        registered: Sequence[bool],
        numbers: Mapping[str, int],
        constants: Callable[[], Mapping[str, Hashable]],
    ) -> None:
        self.pick = _picker(tensors)
        self.registered, self.numbers = tuple(registered), dict(numbers)
        self.constants = functools.cache(constants)

    def stamp(self, inputs: Sequence[Any]) -> "Stamp":
        """What the weights among `inputs` are now."""
        self.constants()  # what they are read from need not be kept
        _watch_optimizers()
        stamp = Stamp(self, self.pick(inputs), self.values(inputs))
        with _lock:
            _stamps.add(stamp)
        return stamp

    def values(self, inputs: Sequence[Any]) -> dict[str, Any]:
        """The numbers of the model among `inputs`."""
        return {name: inputs[place].item() for name, place in self.numbers.items()}

    def unchanged(self, stamp: "Stamp | None", inputs: Sequence[Any]) -> "Stamp | None":
        """`stamp` if the weights are as it says, None if not.

        A graph that was recompiled for other arguments or modes makes a stamp of its own of it.
        """
        if stamp is None or stamp.is_void:
            return None
        if stamp.weights is self:
            holds = stamp.holds(self.pick(inputs)) and stamp.values == self.values(inputs)
            return stamp if holds else None
        then = stamp.tensors()
        if then is None or not stamp.holds(then):
            return None
        if not self._is_like(stamp, then, self.pick(inputs)):
            return None
        known = stamp.weights.named(stamp.values)
        own = self.named(self.values(inputs))
        if any(known[name] != own[name] for name in known.keys() & own.keys()):
            return None
        return self.stamp(inputs)

    def named(self, values: Mapping[str, Any]) -> dict[str, Hashable]:
        """Numbers of the model, `values` being those of them that are inputs.

        Whether a constant is equal to an input cannot be told. It has changed once: this is why it
        is an input.
        """
        return {**self.constants(), **{name: ("input", value) for name, value in values.items()}}

    def _is_like(self, stamp: "Stamp", then: Tensors, now: Tensors) -> bool:
        """Whether another graph's weights are these: parameters and buffers are the same ones.

        Other tensors need not be: models compute tables at the first call, and read them later.
        """
        return set(map(id, compress(then, stamp.weights.registered))) == set(
            map(id, compress(now, self.registered))
        )


class Stamp:
    """What the weights of a graph were when a residual was stored. Keeps none of them alive."""

    def __init__(self, weights: Weights, tensors: Tensors, values: dict[str, Any]) -> None:
        self.weights, self.values = weights, values
        #: An optimizer stepped on one of them since, or one is gone.
        self.is_void = False
        voids = _voids(self)
        self.references = [ref(tensor, voids) for tensor in tensors]
        #: While none is gone, no other tensor has one of these.
        self.ids = list(map(id, tensors))
        #: Which of them torch counts writes of; None: all. (Of inference tensors it does not.)
        counted = [not tensor.is_inference() for tensor in tensors]
        self.counted = None if all(counted) else counted
        self.versions = self._versions(tensors)
        self.memory = _Memory(tensors)

    def holds(self, tensors: Tensors) -> bool:
        """Whether `tensors` are those of the stamp, and unchanged."""
        if list(map(id, tensors)) != self.ids or self._versions(tensors) != self.versions:
            return False
        if not self.memory.lies_as(tensors):
            moved = _Memory(tensors)
            if not moved.holds_what(self.memory):
                return False
            self.memory = moved
        return self.memory.is_unwritten()

    def tensors(self) -> Tensors | None:
        """The weights, None if one of them is gone."""
        tensors = [tensor for reference in self.references if (tensor := reference()) is not None]
        return tensors if len(tensors) == len(self.references) else None

    def note_step(self, stepped: set[int]) -> None:
        """An optimizer stepped on the parameters with these identities."""
        self.is_void |= not stepped.isdisjoint(self.ids)

    def _versions(self, tensors: Tensors) -> list[int]:
        counted = tensors if self.counted is None else compress(tensors, self.counted)
        return list(map(_version, counted))


def _voids(stamp: Stamp) -> Callable[[Any], None]:
    """Called when a weight is gone: `stamp` is void."""
    its = ref(stamp)

    def gone(_: Any) -> None:
        if (alive := its()) is not None:
            alive.is_void = True

    return gone


class _Memory:
    """Where tensors lie, and the first elements of each (off the host: the first of some)."""

    def __init__(self, tensors: Tensors) -> None:
        #: None of them wraps others or has a layout of its own.
        self.is_simple = all(type(t) in _SIMPLE and t.layout is torch.strided for t in tensors)
        self.pointers = self._pointers(tensors)
        self.cells: list[Any] = []
        away: list[tuple[int, torch.Tensor]] = []
        for tensor, pointer in zip(self._parts(tensors), self.pointers, strict=True):
            if pointer and _is_on_host(tensor):
                self.cells.append(_cell(tensor).from_address(pointer))
            elif pointer:
                away.append((pointer, tensor))
        self.elements = list(map(_value, self.cells))
        self.away = {pointer for pointer, _ in away}
        stride = max(1, len(away) // MAX_COPIED)
        self.copies = [t.detach().as_strided((), ()).clone() for _, t in away[::stride]]

    def lies_as(self, tensors: Tensors) -> bool:
        """Whether `tensors` lie where they lay."""
        return self._pointers(tensors) == self.pointers

    def is_unwritten(self) -> bool:
        """Whether the elements are what they were. Read where they lie: ask `lies_as` before."""
        return list(map(_value, self.cells)) == self.elements

    def holds_what(self, before: "_Memory") -> bool:
        """Whether this is what `before` was, elsewhere.

        Off the host few elements are known, so there all must have moved: what was replaced in part
        is something else.
        """
        if self.elements != before.elements or len(self.copies) != len(before.copies):
            return False
        if self.away == before.away:
            return True
        has_moved = self.away.isdisjoint(before.away)
        return has_moved and all(map(torch.equal, self.copies, before.copies))

    def _pointers(self, tensors: Tensors) -> list[int]:
        if self.is_simple:
            return list(map(torch.Tensor.data_ptr, tensors))
        return [t.data_ptr() if t.layout is torch.strided else 0 for t in self._parts(tensors)]

    def _parts(self, tensors: Tensors) -> Tensors:
        return tensors if self.is_simple else [part for t in tensors for part in _parts(t)]


def _parts(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """`tensor`, or the tensors inside it if it only wraps others (quantized weights)."""
    if not is_traceable_wrapper_subclass(tensor):
        yield tensor
        return
    names, _ = tensor.__tensor_flatten__()
    for name in names:
        yield from _parts(getattr(tensor, name))


def _is_on_host(tensor: torch.Tensor) -> bool:
    return tensor.device.type == "cpu"


def _cell(tensor: torch.Tensor) -> Any:
    """The type of an integer over the first eight bytes of `tensor`, or over an element.

    Several elements, since a small change rounds to none in some of low precision.
    """
    if tensor.nbytes >= 8 and tensor.is_contiguous():
        return c_uint64
    return _CELLS.get(tensor.element_size(), c_uint64)


def _picker(places: Sequence[int]) -> Callable[[Sequence[Any]], Tensors]:
    if len(places) == 1:
        (place,) = places
        return lambda values: (values[place],)
    return itemgetter(*places) if places else lambda values: ()


# --- optimizers ---

_stamps: WeakSet[Stamp] = WeakSet()
_lock = threading.Lock()


@functools.cache
def _watch_optimizers() -> None:
    register_optimizer_step_post_hook(_note_step)


def _note_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    """Tell all stamps what `optimizer` stepped on: its fused kernels write uncounted."""
    if torch.compiler.is_compiling():  # torch counts what compiled code writes
        return
    with _lock:
        stamps = [stamp for stamp in _stamps if not stamp.is_void]
    if stamps:
        groups = optimizer.param_groups
        stepped = {id(parameter) for group in groups for parameter in group["params"]}
        for stamp in stamps:
            stamp.note_step(stepped)


# --- reading the capture ---


def weights_of(inputs: GraphInputs, place: Mapping[fx.Node, int]) -> Weights:
    """The weights of a graph that is being captured, at their `place` among its inputs."""
    tensors, registered, numbers = [], [], {}
    for node in inputs.weights:
        if node in inputs.written:  # a counter: the graph writes it itself
            continue
        if is_number(node):
            numbers[inputs.sources[node]] = place[node]
        else:
            tensors.append(place[node])
            registered.append(node in inputs.registered)
    return Weights(tensors, registered, numbers, _constants_of_model())


def is_number(node: fx.Node) -> bool:
    """Whether an input holds one number in host memory: Dynamo makes floats of the model such
    tensors when they change, anew at each call.
    """
    value = tensor_of(node)
    return value.ndim == 0 and value.device.type == "cpu"


def _constants_of_model() -> Callable[[], Mapping[str, Hashable]]:
    """Gives what the capture that is going on took for constant about the model, by name.

    These are Dynamo's guards. What they compare with is written into them after the backend is
    done, so they are read later.
    """
    context = TracingContext.try_get()
    guards: list[Any] = []
    for guard in context.guards_context.dynamo_guards if context else ():
        if guard.create_fn_name() in ("CONSTANT_MATCH", "EQUALS_MATCH"):
            guards.append(guard)

    def constants() -> dict[str, Hashable]:
        # A guard's name is a method up to torch 2.11, then a property.
        named = {str(g.name() if callable(g.name) else g.name): g.code_list for g in guards}
        guards.clear()
        return {name: frozenset(code or ()) for name, code in named.items() if is_of_model(name)}

    return constants
