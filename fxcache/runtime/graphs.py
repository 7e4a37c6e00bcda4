"""Regions through CUDA graphs: a step is two replays (one if nothing is measured).

Head, hit and miss are captured when they run for the second time; the first time warms them up.
Graphs read the caller's data from static tensors and weights where these lie; residuals and
reference are the buffers that fxcache owns. So a graph belongs to the buffers of one branch, to one
layout of the inputs and to one set of weights: weights that moved or were replaced cause a new
capture.
"""

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch

from fxcache.runtime.device import GraphDevice, Reading, Replay
from fxcache.runtime.regions import Evaluation, Regions, Values, Wiring
from fxcache.runtime.state import Buffers

log = logging.getLogger("fxcache")

#: So many new captures are a model's life (adapters, sizes); more look like a mistake.
MAX_QUIET_RESTARTS = 8


class GraphedRegions(Regions):
    """The compiled pieces, replayed.

    Args:
        device: captures and reads.
        weights: places of parameters and buffers among the inputs.
        data: places of the caller's tensors. All other inputs are numbers.
    """

    def __init__(
        self, wiring: Wiring, device: GraphDevice, weights: Sequence[int], data: Sequence[int]
    ) -> None:
        super().__init__(wiring)
        self.device, self.weights, self.data = device, tuple(weights), tuple(data)
        #: How often something was captured, and how often all of it had to be forgotten.
        self.captures = self.restarts = 0
        self.graphs: dict[Any, tuple[Replay, Any] | None] = {}
        self.static: Values = ()
        self.fixed: tuple[Any, ...] = ()
        self.vector: torch.Tensor | None = None
        self.vector_values: list[float] = []

    def begin(self, inputs: Values, buffers: Buffers) -> Evaluation:
        """Stage the inputs and replay the head."""
        self._stage(inputs)
        crossing, measured = self.run("head", lambda: self.wiring.head(self.static, buffers))
        reading = None if measured is None else self.device.read(measured)
        return _Replayed(self, buffers, (*self.static, *crossing), reading)

    def run(self, key: Any, work: Callable[[], Any]) -> Any:
        """Run `work` (the first time), capture it (the second time), and replay its graph."""
        if key not in self.graphs:
            self.graphs[key] = None
            return work()
        graph = self.graphs[key]
        if graph is None:
            self.captures += 1
            graph = self.graphs[key] = self.device.capture(work)
        replay, results = graph
        replay()
        return results

    def _stage(self, inputs: Values) -> None:
        """Put the caller's data where the graphs read it; forget graphs that do not fit."""
        data = [inputs[place] for place in self.data]
        fixed = self._fixed(inputs, data)
        if fixed == self.fixed:
            if data:
                torch._foreach_copy_([self.static[place] for place in self.data], data)
            return
        if self.graphs:
            self._restarted()
        self.graphs.clear()
        self.fixed = fixed
        static = list(inputs)
        for place, value in zip(self.data, data, strict=True):
            static[place] = value.clone()  # keeps the strides, which the compiled pieces assume
        self.static = tuple(static)

    def _fixed(self, inputs: Values, data: list[torch.Tensor]) -> tuple[Any, ...]:
        """What is part of a graph: where the weights lie, numbers, and the layouts of the data."""
        own = {*self.weights, *self.data}
        return (
            [inputs[place].data_ptr() for place in self.weights],
            [value for place, value in enumerate(inputs) if place not in own],
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

    def weights_vector(self, weights: Sequence[float], buffers: Buffers) -> torch.Tensor | None:
        """The vector that graphs of hits read, with these `weights` in it."""
        if self.wiring.ring == 1:
            return None
        if self.vector is None:
            self.vector = torch.zeros(self.wiring.ring, device=buffers.device)
        if list(weights) != self.vector_values:
            self.vector_values = list(weights)
            self.vector.copy_(torch.tensor(weights))
        return self.vector


class _Replayed:
    """An evaluation by replays. See `Evaluation`."""

    def __init__(
        self, regions: GraphedRegions, buffers: Buffers, values: Values, reading: Reading | None
    ) -> None:
        self.regions, self.buffers, self.values = regions, buffers, values
        self.reading = reading

    def read(self) -> list[float]:
        return [] if self.reading is None else self.reading()

    def hit(self, constants: Values, weights: Sequence[float]) -> Sequence[Any]:
        regions, buffers = self.regions, self.buffers
        vector = regions.weights_vector(weights, buffers)
        work = regions.wiring.hit
        return _owned(regions.run("hit", lambda: work(self.values, buffers, constants, vector)))

    def miss(self, slot: int) -> tuple[Sequence[Any], Values]:
        work = self.regions.wiring.miss
        outputs, constants = self.regions.run(
            ("miss", slot), lambda: work(self.values, self.buffers, slot)
        )
        return _owned(outputs), constants


def _owned(outputs: Sequence[Any]) -> list[Any]:
    """`outputs` as tensors that no later replay writes."""
    return [out.clone() if isinstance(out, torch.Tensor) else out for out in outputs]
