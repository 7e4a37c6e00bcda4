"""Write the pieces of a cut graph: head, hit and miss.

::

    head(inputs, reference)          -> crossing values, [metric, timestep]
    hit(crossing, inputs, residuals) -> outputs                 skeleton + forecast, then the tail
    miss(crossing, inputs, residual slots, reference) -> outputs          span, refresh and tail
    miss(..., other residuals, their coefficients) -> outputs, sums    where the error is measured

Which of hit and miss follows head is decided between them; how, is the runtime's choice. Where
nothing is measured there is no head: hit and miss hold all of it, and a step is one region. The
pieces write nothing but the miss its residual slots, and hit and miss what the next measurement is
compared with.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import fx
from torch._subclasses import FakeTensor

from fxcache.kernels import reference
from fxcache.passes.cut import Cut, Stream
from fxcache.passes.facts import Mask
from fxcache.passes.graph import tensor_of, value_of
from fxcache.passes.measure import Measurement, as_real, kept_fakes
from fxcache.passes.piece_graph import Piece, PieceGraph
from fxcache.passes.probe import Probe
from fxcache.passes.renew import renewed
from fxcache.passes.rows import Rows
from fxcache.passes.store import largest_kept, saturated, stored_dtype

WEIGHTS = "fxcache_weights"
#: The forecast's weights of what a miss compares its residual with.
ERROR_WEIGHTS = "fxcache_error_weights"


def slot_key(stream: int) -> str:
    """The key of the slot that a miss of `stream` writes."""
    return f"fxcache_slot_{stream}"


def ring_key(stream: int, index: int) -> str:
    """The key of one past residual of `stream`."""
    return f"fxcache_ring_{stream}_{index}"


def other_key(stream: int, index: int) -> str:
    """The key of a past residual that a miss of `stream` does not write."""
    return f"fxcache_other_{stream}_{index}"


@dataclass(frozen=True)
class Pieces:
    """The rewritten graph."""

    head: Piece | None
    hit: Piece
    miss: Piece


def build_pieces(
    gm: fx.GraphModule,
    cut: Cut,
    probe: Probe | None,
    *,
    ring: int,
    others: int = 0,
    kernels: Any = reference,
    cache_dtype: torch.dtype | None = None,
    groups: Sequence[str] = (),
    rows: Rows | None = None,
) -> Pieces:
    """Write the pieces of `gm` as `cut` divides it, with `ring` past residuals a stream.

    With ``ring=1`` the residual is added as it is; with more, a weight vector is one more input.
    With `others`, a miss takes so many past residuals and gives one more output: float32 [2], the
    sums of how far its residuals are from a forecast of these, and of their size.
    `kernels` measures, predicts and refreshes: `fxcache.kernels.reference` or
    `fxcache.kernels.ops`. Residuals are kept in `cache_dtype` (None: as they are computed). Ranks
    of the process `groups` measure the same, requests of a batch with `rows` each by itself. `gm`
    is not changed.
    """
    measurement = None
    if probe is not None:
        timestep = cut.facts.inputs.timestep
        measurement = Measurement(probe, cut.streams[0].after, timestep, kernels, groups, rows)
    writer = _PiecesWriter(gm, cut, measurement, kernels, cache_dtype)
    head = None if probe is None else writer.head()
    return Pieces(head, writer.hit(ring), writer.miss(others))


class _PiecesWriter:
    """What writing the three pieces shares: the cut, and what crosses from the head."""

    def __init__(
        self,
        gm: fx.GraphModule,
        cut: Cut,
        measurement: Measurement | None,
        kernels: Any,
        cache_dtype: torch.dtype | None,
    ) -> None:
        self.gm, self.cut, self.kernels, self.cache_dtype = gm, cut, kernels, cache_dtype
        self.facts = cut.facts
        self.measurement = measurement
        #: What runs before the decision, and what of it others read.
        self.in_head: Mask = 0
        self.crossing: list[fx.Node] = []
        if measurement is not None:
            needed = [*measurement.probe.reads, *cut.renewing]
            self.in_head = self._in_head(needed)
            self.crossing = self._crossing(needed)

    def _in_head(self, needed: Sequence[fx.Node]) -> Mask:
        """What is measured or renewed, and what both ways out need."""
        facts, hit = self.facts, self.cut.hit
        afters = facts.mask(stream.after for stream in self.cut.streams)
        early = facts.in_order(hit & ~facts.descendants(afters) & ~afters)
        both = [node for node in early if facts.mask(node.users) & ~hit]
        mask = facts.closure(facts.mask([*needed, *both]))
        for node in facts.in_order(mask):  # only tensors can cross: elements, not tuples
            if isinstance(value_of(node), tuple | list):
                mask |= facts.closure(facts.mask(node.users))
        # Random numbers are drawn in the recorded order.
        draws = facts.mask(filter(is_random, facts.nodes))
        return mask | facts.closure(draws & ((1 << (draws & mask).bit_length()) - 1))

    def _crossing(self, needed: Sequence[fx.Node]) -> list[fx.Node]:
        """What of the head's is `needed` or read by others."""
        inside, kept = self.facts.in_order(self.in_head), set(needed)
        for node in reversed(inside):
            if self.facts.mask(node.users) & ~self.in_head:
                kept.add(node)
            if node in kept and not isinstance(value_of(node), torch.Tensor):
                kept.update(node.all_input_nodes)  # a number is computed again
        return [node for node in inside if node in kept]

    def head(self) -> Piece:
        assert self.measurement is not None
        graph = PieceGraph(self.gm, self.cut)
        graph.emit(self.in_head)
        measured, own = self.measurement.measure(graph)
        crossing = [node for node in self.crossing if isinstance(value_of(node), torch.Tensor)]
        results = (*crossing, *own)
        values = [*map(graph.read, crossing), *own.values(), measured.node]
        return graph.finish(values, results)

    def hit(self, ring: int) -> Piece:
        graph = PieceGraph(self.gm, self.cut)
        self._define_scalars(graph)
        renewing = self.facts.closure(self.facts.mask(self.cut.renewing))
        graph.emit(renewing & ~self.in_head)
        weights = graph.argument(WEIGHTS) if ring > 1 else None
        for index, stream in enumerate(self.cut.streams):
            before = self._before(graph, stream)
            past = [self._past(graph, stream, ring_key(index, j)) for j in range(ring)]
            predicted = self._forecast(stream, before, past, weights)
            graph.defined[stream.after] = _laid_out_like(stream.after, predicted).node
        if self.measurement is not None:
            self.measurement.on_hit(graph)
        graph.emit(self.cut.hit & ~self.in_head)
        return graph.finish(graph.outputs())

    def miss(self, others: int) -> Piece:
        graph = PieceGraph(self.gm, self.cut)
        self._define_scalars(graph)
        graph.emit(((1 << len(self.facts.nodes)) - 1) & ~self.in_head)
        sums = [self._refresh(graph, i, others) for i in range(len(self.cut.streams))]
        if self.measurement is not None:
            self.measurement.on_miss(graph)
        error = [sum(sums[1:], sums[0]).node] if others else []
        return graph.finish([*graph.outputs(), *error])

    def _define_scalars(self, graph: PieceGraph) -> None:
        """Numbers that the head computes are computed again: only tensors cross."""
        scalars = (n for n in self.crossing if not isinstance(value_of(n), torch.Tensor))
        graph.emit(self.facts.mask(scalars))

    def _forecast(self, stream: Stream, before: Any, past: list[Any], weights: Any) -> Any:
        """What the kernel predicts; of a complex stream, of both parts."""
        dtype = stream.after_dtype
        if weights is None or not dtype.is_complex:
            return self.kernels.forecast(before, past, weights)
        before, *past = (as_real(each, dtype) for each in (before, *past))
        return torch.view_as_complex(self.kernels.forecast(before, past, weights))

    def _before(self, graph: PieceGraph, stream: Stream) -> Any:
        """What of `stream` is renewed, a proxy (None: nothing is): of it, the cut's share."""
        if stream.skeleton is None:
            return None
        before, share = renewed(graph, stream.skeleton, stream.after_dtype), self.cut.input_share
        return before if share == 1 else before * share

    def _past(self, graph: PieceGraph, stream: Stream, key: str) -> Any:
        """A past residual of `stream`, in the dtype that it was computed in."""
        residual, computed = graph.argument(key), stream.after_dtype
        is_as_computed = stored_dtype(computed, self.cache_dtype) == computed
        return residual if is_as_computed else residual.to(computed)

    def _refresh(self, graph: PieceGraph, index: int, others: int) -> Any:
        """Store the residual of a stream; compared with `others`, if there are any, the sums."""
        stream = self.cut.streams[index]
        value, base = graph.proxy(graph.read(stream.after)), self._before(graph, stream)
        computed = stream.after_dtype
        stored = stored_dtype(computed, self.cache_dtype)
        limit = largest_kept(computed, stored)
        if limit is not None:
            residual = value if base is None else value - base
            value, base = saturated(residual, limit, stored), None
        slot = graph.argument(slot_key(index))
        if not others:
            return self.kernels.refresh(value, base, slot)
        past = [self._past(graph, stream, other_key(index, j)) for j in range(others)]
        value, base, slot, *past = (as_real(each, computed) for each in (value, base, slot, *past))
        return self.kernels.refresh_error(value, base, slot, past, graph.argument(ERROR_WEIGHTS))


def is_random(node: fx.Node) -> bool:
    """Whether `node` draws random numbers."""
    target = node.target
    return (
        isinstance(target, torch._ops.OpOverload)
        and torch.Tag.nondeterministic_seeded in target.tags
    )


def _laid_out_like(after: fx.Node, predicted: Any) -> Any:
    """`predicted` with its dimensions in the order in which those of `after` lie in memory.

    What reads the stream may rely on it (``view``). Nothing is copied where it is so already.
    """
    value = tensor_of(after)
    if not all(isinstance(number, int) for number in (*value.shape, *value.stride())):
        return predicted
    order = sorted(range(value.ndim), key=value.stride().__getitem__, reverse=True)
    if order == list(range(value.ndim)):
        return predicted.contiguous()
    inverse = sorted(range(value.ndim), key=order.__getitem__)
    return predicted.permute(order).contiguous().permute(inverse)


def state_fakes(
    cut: Cut, probe: Probe | None, cache_dtype: torch.dtype | None = None
) -> tuple[dict[str, FakeTensor], list[FakeTensor]]:
    """Fake tensors like what the measurement keeps, by key, and like each stream's residual
    (contiguous, in `cache_dtype`; None: as they are computed).
    """
    residuals = []
    for stream in cut.streams:
        value, dtype = tensor_of(stream.like), stored_dtype(stream.after_dtype, cache_dtype)
        with value.fake_mode, torch.no_grad():
            residuals.append(cast(FakeTensor, value.new_empty(value.shape, dtype=dtype)))
    return {} if probe is None else kept_fakes(probe, cut.streams[0].after), residuals
