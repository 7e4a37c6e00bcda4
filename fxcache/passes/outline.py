"""Outline the blocks of a piece: equal ones are compiled once and called with their own weights.

::

    miss(x, w0, w1, w2)                      body(x, w): a = linear(x, w); return (gelu(a),)
      a0 = linear(x, w0);  b0 = gelu(a0)
      a1 = linear(b0, w1); b1 = gelu(a1)  =>   x -> body(x, w0) -> body(., w1) -> body(., w2)
      a2 = linear(b1, w2); b2 = gelu(a2)
      return b2

Two segments are equal if they do the same operations on the same arguments and their inputs agree
in shape, stride, dtype, device and in who shares memory with whom. A value that leaves a segment as
a view (Flux's single blocks return two slices of one tensor) is copied out by the segment itself,
where the compiler fuses it: so edges never alias, and the first block looks like the others.
"""

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from fxcache.capture import same_size
from fxcache.dataflow import writes_in_place
from fxcache.passes.divide import (
    Nodes,
    NotOutlinedError,
    Segment,
    body_key,
    divide,
    inputs_of,
    needed_for,
    num_heavy,
    operations,
)


@dataclass(frozen=True)
class Kind:
    """Segments that are equal: what is compiled once, and the fake values to compile it for."""

    key: Hashable
    module: fx.GraphModule
    fakes: tuple[Any, ...]


@dataclass(frozen=True)
class Call:
    """One call of a kind: from which places its arguments come, and to which its results go."""

    kind: Kind
    reads: tuple[int, ...]
    writes: tuple[int, ...]


@dataclass(frozen=True)
class Outline:
    """A piece as a sequence of calls over numbered places; the first places are its arguments.

    `results` are places, or constants that are returned as they are.
    """

    calls: tuple[Call, ...]
    num_places: int
    results: tuple["Place | Any", ...]


@dataclass(frozen=True)
class Place:
    """A place whose value is returned."""

    index: int


def outline(module: fx.GraphModule, fakes: Sequence[Any]) -> Outline | str:
    """Divide `module`, whose placeholders hold `fakes`, into calls; or say why it stays whole."""
    try:
        return _Outliner(module, fakes).run(divide(module.graph))
    except NotOutlinedError as reason:
        return str(reason)


class _Outliner:
    """Walks over the segments in order and makes a call of each."""

    def __init__(self, module: fx.GraphModule, fakes: Sequence[Any]) -> None:
        self.module = module
        self.values: dict[fx.Node, Any] = {}
        self.places: dict[fx.Node, int] = {}
        self.num_places = 0
        self.kinds: dict[Hashable, tuple[Kind, tuple[Any, ...]]] = {}
        placeholders = module.graph.find_nodes(op="placeholder")
        for node, fake in zip(placeholders, fakes, strict=True):
            self._define(node, fake)

    def _define(self, node: fx.Node | None, value: Any) -> None:
        """Give the next place to `node` (None: to something that nobody reads)."""
        if node is not None:
            self.values[node], self.places[node] = value, self.num_places
        self.num_places += 1

    def run(self, segments: list[Segment]) -> Outline:
        wanted = _outputs_by_code(segments)
        calls = [
            self._call(segment, outputs)
            for segment, outputs in zip(segments, wanted, strict=True)
            if outputs or any(map(writes_in_place, segment.nodes))
        ]
        (results,) = self.module.graph.output_node().args
        assert isinstance(results, tuple)
        places = tuple(Place(self.places[r]) if isinstance(r, fx.Node) else r for r in results)
        return Outline(tuple(calls), self.num_places, places)

    def _call(self, segment: Segment, outputs: list[int]) -> Call:
        inputs = inputs_of(segment.nodes)
        given = [self.values[node] for node in inputs]
        code_inputs = inputs_of(segment.code)
        numbers = {node: number for number, node in enumerate(code_inputs)}
        key = (_layouts(given), operations(segment.code, numbers), tuple(outputs))
        if key not in self.kinds:
            leaving = [segment.code[at] for at in outputs]
            module, results = _extract(self.module, segment.code, code_inputs, leaving, given)
            self.kinds[key] = Kind(key, module, tuple(given)), results
        kind, results = self.kinds[key]
        reads = tuple(self.places[node] for node in inputs)
        first = self.num_places
        for at, result in zip(outputs, results, strict=True):
            self._define(segment.node(at), _alike(result))
        return Call(kind, reads, tuple(range(first, self.num_places)))


def _outputs_by_code(segments: list[Segment]) -> list[list[int]]:
    """What each segment gives, as places in its code: also what only its equals need, if that
    costs no product.
    """
    keys = [body_key(segment.code) for segment in segments]
    union: dict[Hashable, set[int]] = {}
    for key, segment in zip(keys, segments, strict=True):
        union[key] = union.get(key, set()) | segment.outputs
    wanted = []
    for key, segment in zip(keys, segments, strict=True):
        own, every = segment.outputs, union[key]
        needed = (
            needed_for(segment.code, (segment.code[at] for at in which)) for which in (own, every)
        )
        saves = len({num_heavy(nodes) for nodes in needed}) > 1
        wanted.append(sorted(own if saves or not own else every))
    return wanted


def _layouts(values: Iterable[Any]) -> Hashable:
    """All that a compiled segment assumes of its inputs."""
    first_of: dict[int, int] = {}
    layouts: list[Hashable] = []
    for number, value in enumerate(values):
        if not isinstance(value, torch.Tensor):
            layouts.append(repr(value))
            continue
        shared = first_of.setdefault(value.untyped_storage()._cdata, number)
        offset = str(value.storage_offset())
        shape, stride = str(tuple(value.shape)), str(value.stride())
        grad = value.requires_grad, isinstance(value, torch.nn.Parameter)
        layouts.append((shape, stride, offset, value.dtype, value.device, grad, shared))
    return tuple(layouts)


def _extract(
    module: fx.GraphModule,
    segment: Nodes,
    inputs: list[fx.Node],
    outputs: list[fx.Node],
    given: list[Any],
) -> tuple[fx.GraphModule, tuple[Any, ...]]:
    """`segment` as a module of its own, and the fake values that it gives."""
    graph = fx.Graph()
    copies = {node: graph.placeholder(node.name) for node in inputs}
    for node, value in zip(inputs, given, strict=True):
        copies[node].meta = {**node.meta, "example_value": value}

    def read(node: fx.Node) -> fx.Node:
        if node not in copies:  # an attribute of the module
            copies[node] = graph.node_copy(node)
        return copies[node]

    for node in segment:
        copies[node] = graph.node_copy(node, read)
    results = [copies[node] for node in outputs]
    graph.output(tuple(results))
    part = fx.GraphModule(module, graph)
    values = _propagate(part, given)
    taken = {v.untyped_storage()._cdata for v in given if isinstance(v, torch.Tensor)}
    for index, value in enumerate(values):
        if not isinstance(value, torch.Tensor):
            if not isinstance(value, torch.SymInt | int | float | torch.SymFloat):
                raise NotOutlinedError(f"{outputs[index]} is a {type(value).__name__}")
            continue
        storage = value.untyped_storage()._cdata
        shared = sum(
            storage == other.untyped_storage()._cdata
            for other in values
            if isinstance(other, torch.Tensor)
        )
        if storage in taken or shared > 1 or not _is_dense(value):
            with graph.inserting_before(graph.output_node()):
                results[index] = graph.call_method(
                    "clone", (results[index],), {"memory_format": torch.contiguous_format}
                )
    graph.output_node().args = (tuple(results),)
    graph.lint()
    part.recompile()
    return part, tuple(_propagate(part, given))


def _is_dense(value: torch.Tensor) -> bool:
    """Whether `value` is all of its memory, each element once."""
    return same_size(value.untyped_storage().nbytes(), value.numel() * value.element_size())


def _propagate(part: fx.GraphModule, given: list[Any]) -> Sequence[Any]:
    mode = next((v.fake_mode for v in given if isinstance(v, torch._subclasses.FakeTensor)), None)
    if mode is None:
        raise NotOutlinedError("a part of it reads no tensor")
    with mode:
        results: Sequence[Any] = part(*given)
    return results


def _alike(value: Any) -> Any:
    """A fake tensor of the layout of `value` with memory of its own."""
    if not isinstance(value, torch._subclasses.FakeTensor):
        return value
    with value.fake_mode:
        return torch.empty_strided(
            value.shape, value.stride(), dtype=value.dtype, device=value.device
        )
