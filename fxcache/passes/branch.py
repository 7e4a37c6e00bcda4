"""Write the pieces of a cut graph: head, hit and miss.

::

    head(inputs, reference)          -> crossing values, [metric, timestep]
    hit(crossing, inputs, residuals) -> outputs                         predictor + tail
    miss(crossing, inputs, residual slots, reference) -> outputs, constants  span + refresh + tail

Which of hit and miss follows head is decided between them; how, is the runtime's choice. Where
nothing is measured there is no head: hit and miss hold all of it, and a step is one region. The
pieces write nothing but the miss its residual slots, and hit and miss what the next measurement is
compared with.
"""

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import fx
from torch._subclasses import FakeTensor

from fxcache.capture import fake_tensor, tensor_of
from fxcache.dataflow import DataFlow
from fxcache.kernels import reference
from fxcache.passes.cut import Cut, Stream
from fxcache.passes.measure import Measurement, residual_like
from fxcache.passes.piece import Piece, PieceGraph, stages
from fxcache.passes.store import largest_kept, saturated, stored_dtype

WEIGHTS = "fxcache_weights"


def slot_key(stream: int) -> str:
    """The key of the slot that a miss of `stream` writes."""
    return f"fxcache_slot_{stream}"


def ring_key(stream: int, index: int) -> str:
    """The key of one past residual of `stream`."""
    return f"fxcache_ring_{stream}_{index}"


@dataclass(frozen=True)
class Pieces:
    """The rewritten graph."""

    head: Piece | None
    hit: Piece
    miss: Piece


def build_pieces(
    gm: fx.GraphModule,
    cut: Cut,
    flow: DataFlow,
    *,
    ring: int,
    kernels: Any = reference,
    cache_dtype: torch.dtype | None = None,
) -> Pieces:
    """Write the pieces of `gm` as `cut` divides it, with `ring` past residuals a stream.

    With ``ring=1`` the residual is added as it is; with more, a weight vector is one more input.
    `kernels` measures, predicts and refreshes: `fxcache.kernels.reference` or
    `fxcache.kernels.ops`. Residuals are kept in `cache_dtype` (None: as they are computed). `gm` is
    not changed.
    """
    writer = _Writer(gm, cut, flow, kernels, cache_dtype)
    return Pieces(writer.head() if cut.probe is not None else None, writer.hit(ring), writer.miss())


class _Writer:
    """What writing the three pieces shares: the cut, what crosses, and the open contexts."""

    def __init__(
        self,
        gm: fx.GraphModule,
        cut: Cut,
        flow: DataFlow,
        kernels: Any,
        cache_dtype: torch.dtype | None,
    ) -> None:
        self.gm, self.cut, self.flow, self.kernels = gm, cut, flow, kernels
        self.cache_dtype = cache_dtype
        self.stages = stages(gm.graph)
        self.measurement = measurement_of(cut, kernels)
        befores = [stream.before for stream in cut.streams if stream.before is not None]
        kept = [*befores, *(cut.probe.nodes if cut.probe is not None else [])]
        self.snapshots = cut.snapshots
        used = set(kept)
        for node in (*cut.span, *cut.tail, gm.graph.output_node()):
            used.update(node.all_input_nodes)
        self.crossing = tuple(node for node in cut.head if node in used)
        #: An in-place operation returns its operand: both nodes are one tensor, and cross as one.
        self.same: dict[fx.Node, fx.Node] = {}
        first_of: dict[int, fx.Node] = {}
        for node in (*gm.graph.find_nodes(op="placeholder"), *self.crossing):
            if fake_tensor(node) is not None:
                first = first_of.setdefault(id(fake_tensor(node)), node)
                self.same |= {node: first} if first is not node else {}
        self.crossing = tuple(node for node in self.crossing if node not in self.same)

    def head(self) -> Piece:
        assert self.measurement is not None
        graph = PieceGraph(self.gm, self.stages, self.snapshots)
        graph.emit(self.cut.head)
        measured, own = self.measurement.measure(graph)
        crossing = [graph.read(node) for node in self.crossing]
        copied = sorted(self.snapshots, key=self.flow.position.__getitem__)
        copies = [graph.read(node, snapshot=True) for node in copied]
        results = (*self.crossing, *(("snapshot", node) for node in copied), *own)
        return graph.finish([*crossing, *copies, *own.values(), measured.node], results)

    def _after_head(self) -> PieceGraph:
        """A graph that goes on behind the head, or that begins with it if it is no piece."""
        if self.cut.probe is not None:
            return PieceGraph(self.gm, self.stages, {}, self.same)
        graph = PieceGraph(self.gm, self.stages, self.snapshots, self.same)
        graph.emit(self.cut.head)
        return graph

    def hit(self, ring: int) -> Piece:
        graph = self._after_head()
        weights = graph.argument(WEIGHTS) if ring > 1 else None
        for index, stream in enumerate(self.cut.streams):
            before = None if stream.before is None else self._kept(graph, stream.before)
            predicted = self.kernels.forecast(
                None if before is None else graph.proxy(before),
                [self._past(graph, stream, ring_key(index, j)) for j in range(ring)],
                None if weights is None else graph.proxy(weights),
            )
            dtype = tensor_of(stream.after).dtype
            if stream.before is not None and tensor_of(stream.before).dtype != dtype:
                predicted = predicted.to(dtype)  # under autocast
            graph.define(stream.after, _laid_out_like(stream.after, predicted).node)
        for node in self.cut.constants:
            if fake_tensor(node) is not None:  # the tail may write into it, or return it
                graph.define(node, graph.proxy(graph.read(node)).clone().node)
        if self.measurement is not None:
            self.measurement.on_hit(graph, lambda node: self._kept(graph, node))
        graph.emit(self.cut.tail)
        return graph.finish(graph.outputs())

    def miss(self) -> Piece:
        graph = self._after_head()
        graph.emit(self.cut.span)
        for index, stream in enumerate(self.cut.streams):
            self._refresh(graph, stream, slot_key(index))
        if self.measurement is not None:
            self.measurement.on_miss(graph, lambda node: self._kept(graph, node))
        constants = [graph.read(node) for node in self.cut.constants]
        kept = [
            value if fake_tensor(node) is None else graph.proxy(value).clone().node
            for node, value in zip(self.cut.constants, constants, strict=True)
        ]
        graph.emit(self.cut.tail)
        return graph.finish([*graph.outputs(), *kept], self.cut.constants)

    def _past(self, graph: PieceGraph, stream: Stream, key: str) -> Any:
        """A past residual of `stream`, in the dtype that it was computed in."""
        residual = graph.proxy(graph.argument(key))
        computed = _residual_dtype(stream)
        is_as_computed = stored_dtype(computed, self.cache_dtype) == computed
        return residual if is_as_computed else residual.to(computed)

    def _refresh(self, graph: PieceGraph, stream: Stream, key: str) -> None:
        """Store the residual ``after - before`` of `stream`, without its gradients."""
        value, base = graph.proxy(graph.read(stream.after)).detach(), None
        if stream.before is not None:
            base = graph.proxy(self._kept(graph, stream.before)).detach()
        computed = _residual_dtype(stream)
        stored = stored_dtype(computed, self.cache_dtype)
        limit = largest_kept(computed, stored)
        if limit is not None:
            residual = value if base is None else value - base
            value, base = saturated(residual, limit, stored), None
        self.kernels.refresh(value, base, graph.proxy(graph.argument(key)))

    def _kept(self, graph: PieceGraph, node: fx.Node) -> fx.Node:
        """Read `node` as it was before anybody overwrote it."""
        if node not in self.snapshots:
            return graph.read(node)
        if self.cut.probe is None:
            return graph.read(node, snapshot=True)
        return graph.argument(("snapshot", node))


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


def measurement_of(cut: Cut, kernels: Any = reference) -> Measurement | None:
    """How the probe of `cut` is measured, None if nothing is."""
    if cut.probe is None:
        return None
    return Measurement(cut.probe, cut.streams[0].after, cut.timestep, kernels)


def state_fakes(
    cut: Cut, cache_dtype: torch.dtype | None = None
) -> tuple[dict[str, FakeTensor], list[FakeTensor]]:
    """Fake tensors like what the measurement keeps, by key, and like each stream's residual
    (contiguous, in `cache_dtype`; None: as they are computed).
    """
    measurement = measurement_of(cut)
    with tensor_of(cut.streams[0].after).fake_mode, torch.no_grad():
        residuals = [_stored_like(stream, cache_dtype) for stream in cut.streams]
    return {} if measurement is None else measurement.kept(), residuals


def _stored_like(stream: Stream, cache_dtype: torch.dtype | None) -> FakeTensor:
    residual = residual_like(stream.after, stream.before)
    stored = stored_dtype(residual.dtype, cache_dtype)
    return residual if stored == residual.dtype else cast(FakeTensor, residual.to(stored))


def _residual_dtype(stream: Stream) -> torch.dtype:
    """The dtype in which the residual of `stream` is computed."""
    dtype = tensor_of(stream.after).dtype
    if stream.before is None:
        return dtype
    return torch.promote_types(dtype, tensor_of(stream.before).dtype)
