"""Regions through CUDA graphs: a step is two replays (one if nothing is measured).

Head, hit and miss are captured when they run for the second time; the first time warms them up.
Graphs read the caller's data from static tensors and weights where these lie; residuals and
reference are the buffers that fxcache owns. So a graph belongs to the buffers of one branch, to one
layout of the inputs and to one set of weights: weights that moved or were replaced cause a new
capture. With gradients enabled nothing is replayed: a replay leaves no trace for autograd.
"""

import logging
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from fxcache.passes.graph import GraphInputs, tensor_of
from fxcache.runtime.device import GraphDevice, Reading, Replay
from fxcache.runtime.regions import Missed, Values, Wiring
from fxcache.runtime.state import Buffers

log = logging.getLogger("fxcache")

#: So many new captures are a model's life (adapters, sizes); more look like a mistake.
MAX_QUIET_RESTARTS = 8


@dataclass(eq=False, repr=False)
class GraphedRegions:
    """The compiled pieces, replayed.

    Args:
        device: captures and reads.
        weights: places of parameters and buffers among the inputs.
        data: places of the caller's tensors. All other inputs are numbers (of the model: tensors in
            host memory that hold one).
        uncaptured: pieces ("head", "hit", "miss") that run as they are.
    """

    wiring: Wiring
    device: GraphDevice
    weights: Sequence[int]
    data: Sequence[int]
    uncaptured: frozenset[str] = frozenset()
    #: How often something was captured, and how often all of it had to be forgotten.
    captures: int = 0
    restarts: int = 0
    graphs: dict[Any, tuple[Replay, Any] | None] = field(default_factory=dict)
    static: Values = ()
    #: The memory of the static tensors, one a place of the data.
    memory: list[torch.Tensor] = field(default_factory=list)
    fixed: tuple[Any, ...] = ()
    #: By piece, the vector of weights that its graphs read, and what is in it.
    vectors: dict[str, tuple[torch.Tensor, list[float]]] = field(default_factory=dict)

    def begin(self, inputs: Values, buffers: Buffers) -> "_Replayed":
        """Stage the inputs and replay the head."""
        self._stage(inputs)
        head, static = self.wiring.head, self.static
        if self.wiring.compiled.head is None:  # an empty graph would be replayed, too
            return _Replayed(self, buffers, static, None)
        crossing, measured = self.run("head", lambda given: head(static, given), buffers)
        reading = None if measured is None else self.device.read(measured)
        return _Replayed(self, buffers, (*static, *crossing), reading)

    def run(self, key: Any, work: Callable[[Buffers], Any], buffers: Buffers) -> Any:
        """Run `work` (the first time), capture it (the second time), and replay its graph."""
        if (key if isinstance(key, str) else key[0]) in self.uncaptured:
            return work(buffers)
        if key not in self.graphs:
            self.graphs[key] = None
            return work(buffers)
        graph = self.graphs[key]
        if graph is None:
            graph = self.graphs[key] = self.device.capture(_bound_weakly(work, buffers))
            self.captures += 1
        replay, results = graph
        replay()
        return results

    def _stage(self, inputs: Values) -> None:
        """Put the caller's data where the graphs read it; forget graphs that do not fit."""
        data = [inputs[place] for place in self.data]
        fixed = self._fixed(inputs, data)
        if fixed == self.fixed:
            if data:
                torch._foreach_copy_(self.memory, [_memory(value) for value in data])
            return
        if self.graphs:
            self._restarted()
        self.graphs.clear()
        self.fixed = ()  # in case memory runs out below
        static = list(inputs)
        # Plain tensors even under inference_mode, so that later calls outside may write them.
        with torch.inference_mode(False), torch.no_grad():
            self.memory = [_memory(value).clone() for value in data]
            for place, value, memory in zip(self.data, data, self.memory, strict=True):
                # The compiled pieces assume the strides; a clone has them if all is dense.
                static[place] = memory.as_strided(value.shape, value.stride())
        self.static, self.fixed = tuple(static), fixed

    def _fixed(self, inputs: Values, data: list[torch.Tensor]) -> tuple[Any, ...]:
        """What is part of a graph: where the weights lie, numbers, and the layouts of the data."""
        own = {*self.weights, *self.data}
        others = (value for place, value in enumerate(inputs) if place not in own)
        return (
            [inputs[place].data_ptr() or _address(inputs[place]) for place in self.weights],
            [value.item() if isinstance(value, torch.Tensor) else value for value in others],
            [(value.shape, value.stride(), value.dtype) for value in data],
        )

    def _restarted(self) -> None:
        self.restarts += 1
        log.info("weights, numbers or layouts are others: graphs are captured anew")
        if self.restarts == MAX_QUIET_RESTARTS:
            log.warning(
                "CUDA graphs were captured anew %d times: if an input is a number that changes at "
                "every call, pass it as a tensor",
                self.restarts,
            )

    def vector(self, piece: str, weights: Sequence[float], buffers: Buffers) -> torch.Tensor:
        """The vector that the graphs of `piece` read, with these `weights` in it."""
        if piece not in self.vectors:
            with torch.inference_mode(False):
                self.vectors[piece] = torch.zeros(len(weights), device=buffers.device), []
        vector, held = self.vectors[piece]
        if held != list(weights):
            held[:] = weights
            # Not blocking: a copy that waited would wait for all that is queued.
            vector.copy_(torch.tensor(weights), non_blocking=True)
        return vector


@dataclass(eq=False)
class _Replayed:
    """An evaluation by replays. See `Evaluation`."""

    regions: GraphedRegions
    buffers: Buffers
    values: Values
    reading: Reading | None

    def read(self) -> list[float]:
        return [] if self.reading is None else self.reading()

    def hit(self, weights: Sequence[float]) -> Sequence[Any]:
        regions, values, wiring = self.regions, self.values, self.regions.wiring
        vector = regions.vector("hit", weights, self.buffers) if wiring.ring > 1 else None
        work = regions.run("hit", lambda given: wiring.hit(values, given, vector), self.buffers)
        return _owned(work)

    def miss(self, slot: int, weights: Sequence[float] = ()) -> Missed:
        regions, values, wiring = self.regions, self.values, self.regions.wiring
        vector = None
        if wiring.others:
            vector = regions.vector("miss", weights or [0.0] * wiring.others, self.buffers)
        outputs, sums = regions.run(
            ("miss", slot), lambda given: wiring.miss(values, given, slot, vector), self.buffers
        )
        return _owned(outputs), None if sums is None else sums.clone()


def _bound_weakly(work: Callable[[Buffers], Any], buffers: Buffers) -> Callable[[], Any]:
    """`work` on `buffers`, which it does not keep alive: graphs go when their buffers go."""
    alive = weakref.ref(buffers)

    def bound() -> Any:
        given = alive()
        assert given is not None
        return work(given)

    return bound


def _address(weight: torch.Tensor) -> Any:
    """Where `weight` lies; of a subclass without memory of its own (quantized weights), where the
    tensors inside it lie.
    """
    if not is_traceable_wrapper_subclass(weight):
        return weight.data_ptr()
    names, _ = weight.__tensor_flatten__()
    return tuple(_address(getattr(weight, name)) for name in names)


def _memory(value: torch.Tensor) -> torch.Tensor:
    """`value`, or as a vector the memory it spans, if its elements are not all of that once
    (slices, expanded dimensions).
    """
    if value.is_contiguous() or torch.ops.aten.is_non_overlapping_and_dense(value):
        return value
    last = sum(
        (size - 1) * stride for size, stride in zip(value.shape, value.stride(), strict=True)
    )
    return value.as_strided((last + 1,), (1,))


def _owned(outputs: Sequence[Any]) -> list[Any]:
    """`outputs` as tensors that no later replay writes."""
    return [out.clone() if isinstance(out, torch.Tensor) else out for out in outputs]


def not_graphable(inputs: GraphInputs, device: torch.device) -> str | None:
    """Why the pieces cannot be captured, None if they can."""
    for node, name in inputs.data.items():
        if tensor_of(node).device != device:
            return f"the input {name} is on {tensor_of(node).device}, the model on {device}"
    away = [node for node in inputs.weights if tensor_of(node).device != device]
    if any(tensor_of(node).ndim > 0 for node in away):
        return f"{len(away)} weights are on {tensor_of(away[0]).device}, and offloaded there"
    return None
