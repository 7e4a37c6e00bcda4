"""Evaluate a rewritten graph: which compiled region takes which values.

`begin` runs what an evaluation needs before the decision and gives an `Evaluation`, which then runs
the hit or the miss.
"""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any, Protocol

import torch

from fxcache.passes.piece_graph import Piece
from fxcache.passes.pieces import ERROR_WEIGHTS, WEIGHTS, Pieces, other_key, ring_key, slot_key
from fxcache.runtime.state import Buffers

Call = Callable[..., Sequence[Any]]
Values = tuple[Any, ...]
#: What a miss gives: the outputs, and the sums of its forecast's error (None: not measured).
Missed = tuple[Sequence[Any], torch.Tensor | None]


@dataclass(frozen=True)
class Compiled:
    """The compiled pieces, in the places of `Pieces`."""

    head: Call | None
    hit: Call
    miss: Call


class Evaluation(Protocol):
    """One evaluation between its head and its decision: its inputs and what crosses, and what it
    reads and writes.
    """

    values: Values
    buffers: Buffers

    def read(self) -> list[float]:
        """What was measured: [residual diff], or [residual diff, timestep], of each request. The
        one read-back.
        """

    def hit(self, weights: Sequence[float]) -> Sequence[Any]:
        """Run the forecast and the tail; `weights` are the forecast's, by ring slot."""

    def miss(self, slot: int, weights: Sequence[float] = ()) -> Missed:
        """Run span, refresh (of ring slot `slot`) and tail; `weights` are those of the forecast
        that the residual is compared with, by ring slot without `slot` (none: all 0).
        """


class Begins(Protocol):
    """Begins an evaluation: runs its head."""

    def begin(self, inputs: Values, buffers: Buffers) -> Evaluation: ...


class Wiring:
    """The compiled pieces, called as they are, and where their arguments come from; the same for
    all buffers.

    Args:
        inputs: keys of the captured graph's placeholders, in order.
        kept: keys of what the measurement keeps, in order.
        streams: how many streams the state caches.
        ring: how many past residuals a stream.
        others: how many past residuals a miss compares its own with.
    """

    def __init__(
        self,
        pieces: Pieces,
        compiled: Compiled,
        *,
        inputs: Sequence[Hashable],
        kept: Sequence[Hashable],
        streams: int,
        ring: int,
        others: int,
    ) -> None:
        self.compiled, self.ring, self.others = compiled, ring, others
        #: How many values it is given.
        self.given = len(inputs)
        slots = [slot_key(s) for s in range(streams)]
        rings = [ring_key(s, j) for s in range(streams) for j in range(ring)]
        compared = [other_key(s, j) for s in range(streams) for j in range(others)]
        after_head = [*inputs, *kept]
        if pieces.head is not None:
            self.for_head = _picker(pieces.head, after_head)
            after_head = [*inputs, *pieces.head.results, *kept]
        self.for_hit = _picker(pieces.hit, [*after_head, *rings, WEIGHTS])
        self.for_miss = _picker(pieces.miss, [*after_head, *slots, *compared, ERROR_WEIGHTS])

    def begin(self, inputs: Values, buffers: Buffers) -> "Direct":
        """Run the head."""
        crossing, measured = self.head(inputs, buffers)
        return Direct(self, buffers, (*inputs, *crossing), measured)

    def head(self, inputs: Values, buffers: Buffers) -> tuple[Values, torch.Tensor | None]:
        """What crosses to hit and miss, and what was measured (None: nothing is)."""
        if self.compiled.head is None:
            return (), None
        values = (*inputs, *buffers.kept.values())
        *crossing, measured = self.compiled.head(*self.for_head(values))
        return tuple(crossing), measured

    def hit(self, values: Values, buffers: Buffers, weights: torch.Tensor | None) -> Sequence[Any]:
        rings = (residual for ring in buffers.rings for residual in ring)
        kept = buffers.kept.values()
        return self.compiled.hit(*self.for_hit((*values, *kept, *rings, weights)))

    def miss(
        self, values: Values, buffers: Buffers, slot: int, weights: torch.Tensor | None
    ) -> Missed:
        slots = (ring[slot] for ring in buffers.rings)
        others: list[torch.Tensor] = []
        if self.others:
            others = [r for ring in buffers.rings for at, r in enumerate(ring) if at != slot]
        kept = buffers.kept.values()
        results = self.compiled.miss(*self.for_miss((*values, *kept, *slots, *others, weights)))
        return (results[:-1], results[-1]) if self.others else (results, None)


@dataclass(eq=False)
class Direct:
    """An evaluation by direct calls. See `Evaluation`."""

    wiring: Wiring
    buffers: Buffers
    values: Values
    measured: torch.Tensor | None

    def read(self) -> list[float]:
        return [] if self.measured is None else self.measured.tolist()

    def hit(self, weights: Sequence[float]) -> Sequence[Any]:
        vector = self._vector(weights) if self.wiring.ring > 1 else None
        return self.wiring.hit(self.values, self.buffers, vector)

    def miss(self, slot: int, weights: Sequence[float] = ()) -> Missed:
        wiring = self.wiring
        vector = self._vector(weights or [0.0] * wiring.others) if wiring.others else None
        return wiring.miss(self.values, self.buffers, slot, vector)

    def _vector(self, weights: Sequence[float]) -> torch.Tensor:
        # Not blocking: a copy that waited would wait for all that is queued.
        return torch.tensor(weights).to(self.buffers.device, non_blocking=True)


def _picker(piece: Piece, keys: Sequence[Hashable]) -> Callable[[Sequence[Any]], Any]:
    """A function that picks the arguments of `piece` out of values that have these `keys`."""
    places = {key: place for place, key in enumerate(keys)}
    return picker([places[key] for key in piece.arguments])


def picker(indices: Sequence[int]) -> Callable[[Sequence[Any]], Any]:
    """A function that picks values by their places."""
    if len(indices) == 1:
        (index,) = indices
        return lambda values: (values[index],)
    return itemgetter(*indices) if indices else lambda values: ()
