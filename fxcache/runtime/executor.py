"""The step executor: runs head, decides on one read-back, runs hit or miss.

This is the host lowering of the branch: an `if` between two compiled regions. A step reads back
once, the metric and the timestep together.
"""

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

import torch

from fxcache.passes.branch import REFERENCE, WEIGHTS, Piece, Pieces, ring_key, slot_key
from fxcache.policy import Decision
from fxcache.runtime.session import Session
from fxcache.runtime.state import BranchState, Buffers, Slot

Call = Callable[..., Sequence[Any]]


@dataclass(frozen=True)
class Compiled:
    """The compiled pieces, in the places of `Pieces`."""

    head: Call
    hit: Call
    miss: Call


class StepExecutor:
    """Callable in the place of a captured graph, with the graph's own inputs and outputs.

    Args:
        inputs: keys of the graph's placeholders, in order.
        streams: how many streams the state caches.
        ring: how many past residuals a stream.
        signature: says which layout the inputs have; another layout is another trajectory.
        allocate: makes buffers for the layout of the inputs.
    """

    def __init__(
        self,
        session: Session,
        pieces: Pieces,
        compiled: Compiled,
        *,
        inputs: Sequence[Hashable],
        streams: int,
        ring: int,
        signature: Callable[[Sequence[Any]], Hashable],
        allocate: Callable[[Sequence[Any]], Buffers],
    ) -> None:
        self.session, self.compiled = session, compiled
        self.signature, self.allocate = signature, allocate
        self.streams, self.ring = streams, ring
        given = {key: i for i, key in enumerate(inputs)}
        rings = [ring_key(s, j) for s in range(streams) for j in range(ring)]
        slots = [slot_key(s) for s in range(streams)]
        after_head = _extended(given, pieces.head.results)
        for_hit = _extended(after_head, (*pieces.miss.results, *rings, WEIGHTS))
        self.head_arguments = _picker(pieces.head, _extended(given, (REFERENCE,)))
        self.hit_arguments = _picker(pieces.hit, for_hit)
        self.miss_arguments = _picker(pieces.miss, _extended(after_head, (REFERENCE, *slots)))
        self.num_constants = len(pieces.miss.results)

    def __call__(self, *inputs: Any) -> Sequence[Any]:
        session = self.session
        slot, state = session.state()
        try:
            signature = self.signature(inputs)
            if state.signature != signature:
                if state.signature is not None and not slot.is_announced:
                    slot.begin()
                state.allocate(signature, lambda: self.allocate(inputs))
            buffers = state.allocated
            *crossing, measured = self.compiled.head(
                *self.head_arguments((*inputs, buffers.reference))
            )
            metric, timestep = _read_back(measured)
            decision = session.decide(slot, state, metric, timestep)
            values = (*inputs, *crossing)
            if decision.is_hit:
                outputs = self._hit(state, values)
            else:
                outputs = self._miss(state, values, metric)
        except BaseException:
            state.forget()  # whatever was half written is never read
            raise
        self._commit(slot, state, metric, decision)
        return outputs

    def _hit(self, state: BranchState, values: tuple[Any, ...]) -> Sequence[Any]:
        held = [slot for _, slot in state.past]
        # In the place of a slot that holds nothing yet: the newest residual, with weight 0.
        places = [slot if slot in held else held[0] for slot in range(self.ring)]
        rings = (ring[place] for ring in state.allocated.rings for place in places)
        weights = self._weights(state) if self.ring > 1 else None
        return self.compiled.hit(*self.hit_arguments((*values, *state.constants, *rings, weights)))

    def _miss(self, state: BranchState, values: tuple[Any, ...], metric: float) -> Sequence[Any]:
        if not math.isfinite(metric):
            # Either this evaluation or the last computed one is broken: no forecast from the two.
            state.forget()
        buffers, at = state.allocated, state.oldest_slot()
        slots = (ring[at] for ring in buffers.rings)
        # While the piece writes, the slot's old residual is no longer one.
        state.past = [entry for entry in state.past if entry[1] != at]
        outputs = self.compiled.miss(*self.miss_arguments((*values, buffers.reference, *slots)))
        if self.num_constants:
            state.constants = tuple(outputs[-self.num_constants :])
            outputs = outputs[: -self.num_constants]
        state.refreshed(at)
        return outputs

    def _weights(self, state: BranchState) -> torch.Tensor:
        """The forecast's weights by ring slot; 0 for a slot that holds nothing yet."""
        forecast = self.session.policy.forecast
        by_slot = [0.0] * self.ring
        weights = forecast.weights(state.step, [step for step, _ in state.past])
        for (_, slot), weight in zip(state.past, weights, strict=True):
            by_slot[slot] = weight
        return torch.tensor(by_slot, device=state.allocated.reference.device)

    def _commit(self, slot: Slot, state: BranchState, metric: float, decision: Decision) -> None:
        if decision.is_hit:
            state.reused(metric)
        # A first evaluation was compared with nothing: it has no metric.
        measured = None if decision.reason == "nothing cached" else metric
        self.session.record(slot, state, measured, decision)
        self.session.evaluations += 1


def _read_back(measured: torch.Tensor) -> tuple[float, float | None]:
    metric, *timestep = measured.tolist()
    return metric, timestep[0] if timestep else None


def _extended(given: Mapping[Hashable, int], keys: Sequence[Hashable]) -> dict[Hashable, int]:
    return {**given, **{key: len(given) + i for i, key in enumerate(keys)}}


def _picker(piece: Piece, places: Mapping[Hashable, int]) -> Callable[[tuple[Any, ...]], Any]:
    """A function that picks the arguments of `piece` out of all values, by their places."""
    indices = [places[key] for key in piece.arguments]
    if len(indices) == 1:
        (index,) = indices
        return lambda values: (values[index],)
    return itemgetter(*indices) if indices else lambda values: ()
