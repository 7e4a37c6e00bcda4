"""Outline the blocks of a piece: equal ones are compiled once and called with their own weights.

::

    miss(x, w0, w1, w2)                      body(x, w): a = linear(x, w); return (gelu(a),)
      a0 = linear(x, w0);  b0 = gelu(a0)
      a1 = linear(b0, w1); b1 = gelu(a1)  =>   x -> body(x, w0) -> body(., w1) -> body(., w2)
      a2 = linear(b1, w2); b2 = gelu(a2)
      return b2

Two segments are equal if they do the same operations on the same arguments and their inputs agree
in layout, type and in who shares memory with whom. A value that crosses an edge as a view (blocks
that return two slices of one tensor) is copied out by the segment itself, where the
compiler fuses it: so edges never alias, and the first block looks like the others. The price is
that strides change at edges, so what reads strides (``as_strided``) is not divided.
"""

from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

import torch
from torch import fx
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

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
    writes_in_place,
)
from fxcache.passes.graph import same_sizes


@dataclass(frozen=True)
class Kind:
    """Segments that are equal: what is compiled once, the fake values to compile it for and those
    that it gives, and which of its nodes leave it as copies.
    """

    key: Hashable
    module: fx.GraphModule
    fakes: tuple[Any, ...]
    results: tuple[Any, ...]
    copied: frozenset[int]


@dataclass(frozen=True)
class Call:
    """One call of a kind: from which places its arguments come, and to which its results go."""

    kind: Kind
    reads: tuple[int, ...]
    writes: tuple[int, ...]


@dataclass(frozen=True)
class Outline:
    """A piece as a sequence of calls over numbered places: first come its arguments, then what the
    calls give, `num_places` in all, and behind them `constants`. `results` are places.
    """

    calls: tuple[Call, ...]
    num_places: int
    constants: tuple[Any, ...]
    results: tuple[int, ...]


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
        #: Where values are that the piece returns: as they are, and not as they cross edges.
        self.returned: dict[fx.Node, int] = {}
        self.num_places = 0
        self.kinds: dict[Hashable, Kind] = {}
        placeholders = module.graph.find_nodes(op="placeholder")
        for node, fake in zip(placeholders, fakes, strict=True):
            self._define(node, fake)
        self.sizes = [node for node in placeholders if isinstance(self.values[node], torch.SymInt)]

    def _define(self, node: fx.Node | None, value: Any) -> None:
        """Give the next place to `node` (None: to something that nobody reads)."""
        if node is not None:
            self.values[node], self.places[node] = value, self.num_places
        self.num_places += 1

    def run(self, segments: list[Segment]) -> Outline:
        calls = []
        for segment, outputs in zip(segments, _outputs_by_code(segments), strict=True):
            returned = [n for n in segment.nodes if any(user.op == "output" for user in n.users)]
            has_effect = any(writes_in_place(node) or node.is_impure() for node in segment.nodes)
            if outputs or returned or has_effect:
                calls.append(self._call(segment, outputs, returned))
        (results,) = self.module.graph.output_node().args
        assert isinstance(results, tuple)
        constants = tuple(r for r in results if not isinstance(r, fx.Node))
        places, behind = self.places | self.returned, count(self.num_places)
        given = tuple(places[r] if isinstance(r, fx.Node) else next(behind) for r in results)
        return Outline(tuple(calls), self.num_places, constants, given)

    def _call(self, segment: Segment, outputs: list[int], returned: list[fx.Node]) -> Call:
        inputs, code_inputs = inputs_of(segment.nodes), inputs_of(segment.code)
        assert len(inputs) == len(code_inputs), "code takes what the segment takes"
        # Shapes may be formulas of sizes: a compiler must find each symbol by itself somewhere.
        sizes = [size for size in self.sizes if size not in inputs]
        inputs, code_inputs = [*inputs, *sizes], [*code_inputs, *sizes]
        given = [self.values[node] for node in inputs]
        leaving = [segment.at[segment.nodes.index(node)] for node in returned]
        crossing, alone = sorted({*outputs, *leaving}), list[int]()
        kind = self._kind(segment.code, code_inputs, given, crossing, alone)
        if not kind.copied.isdisjoint(leaving):  # what is returned must be as it is
            crossing, alone = outputs, leaving
            kind = self._kind(segment.code, code_inputs, given, crossing, alone)
        first = self.num_places
        for at, result in zip(crossing, kind.results, strict=False):
            self._define(segment.node(at), _alike(result))
        self.num_places += len(alone)
        places = {at: place for place, at in enumerate([*crossing, *alone], first)}
        self.returned |= {node: places[at] for node, at in zip(returned, leaving, strict=True)}
        reads = tuple(self.places[node] for node in inputs)
        return Call(kind, reads, tuple(range(first, self.num_places)))

    def _kind(
        self,
        code: Nodes,
        inputs: list[fx.Node],
        given: list[Any],
        crossing: list[int],
        alone: list[int],
    ) -> Kind:
        """`code` for inputs like `given`: its results are those at `crossing`, copied out where
        they are views, then those at `alone`, as they are.
        """
        key = (_layouts(given), operations(code, inputs), tuple(crossing), tuple(alone))
        if key not in self.kinds:
            made = _extract(self.module, code, inputs, given, crossing, alone)
            self.kinds[key] = Kind(key, *made)
        return self.kinds[key]


def _outputs_by_code(segments: list[Segment]) -> list[list[int]]:
    """What others read of each segment, as places in its code: also what only its equals need, if
    that costs no product.
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
    """What a compiled segment assumes of its inputs: each one's layout, and who shares memory."""
    first_of: dict[int, int] = {}
    return tuple(
        (_layout(value), first_of.setdefault(_storage(value), number))
        if isinstance(value, torch.Tensor)
        else repr(value)
        for number, value in enumerate(values)
    )


def _layout(value: torch.Tensor) -> Hashable:
    """Type, shape, strides, dtype, device and flags; of a wrapper (quantized weights), those of the
    tensors inside it too.
    """
    if value.layout != torch.strided:
        raise NotOutlinedError(f"a block takes a tensor of layout {value.layout}")
    shape, stride = str(tuple(value.shape)), str(value.stride())
    flags = value.requires_grad, value.is_conj(), value.is_neg()
    own = (type(value), shape, stride, value.dtype, value.device, flags)
    if not is_traceable_wrapper_subclass(value):
        return (*own, str(value.storage_offset()))
    names, context = value.__tensor_flatten__()
    return (*own, repr(context), *(_layout(getattr(value, name)) for name in names))


def _storage(value: torch.Tensor) -> int:
    """What tells the memory of `value` from others'."""
    if is_traceable_wrapper_subclass(value):
        return id(value)
    return int(value.untyped_storage()._cdata)


def _extract(
    module: fx.GraphModule,
    code: Nodes,
    inputs: list[fx.Node],
    given: list[Any],
    crossing: list[int],
    alone: list[int],
) -> tuple[fx.GraphModule, tuple[Any, ...], tuple[Any, ...], frozenset[int]]:
    """What a `Kind` says of `code`: a module of its own, the fake values that it takes and gives,
    and which of `crossing` are copies.
    """
    graph = fx.Graph()
    copies = {node: graph.placeholder(node.name) for node in inputs}
    for node, value in zip(inputs, given, strict=True):
        copies[node].meta = {**node.meta, "val": value}

    def read(node: fx.Node) -> fx.Node:
        if node not in copies:  # an attribute of the module
            copies[node] = graph.node_copy(node)
        return copies[node]

    for node in code:
        copies[node] = graph.node_copy(node, read)
    results = [copies[code[at]] for at in (*crossing, *alone)]
    graph.output(tuple(results))
    part = fx.GraphModule(module, graph)
    values = _propagate(part, given)
    memory = Counter(_storage(v) for v in (*given, *values) if isinstance(v, torch.Tensor))
    copied = set()
    for index, at in enumerate(crossing):
        value = values[index]
        if not isinstance(value, torch.Tensor):
            if not isinstance(value, torch.SymInt | int | float | torch.SymFloat):
                raise NotOutlinedError(f"{code[at]} is a {type(value).__name__}")
            continue
        if is_traceable_wrapper_subclass(value) or value.is_conj() or value.is_neg():
            raise NotOutlinedError(f"{code[at]} is no plain tensor")
        own = value.numel() * value.element_size()
        is_dense = same_sizes([value.untyped_storage().nbytes()], [own])
        if memory[_storage(value)] > 1 or not is_dense:
            copied.add(at)
            contiguous: Any = {"memory_format": torch.contiguous_format}
            with graph.inserting_before(graph.output_node()):
                results[index] = graph.call_method("clone", (results[index],), contiguous)
            values[index] = value.clone(**contiguous)
    graph.output_node().args = (tuple(results),)
    graph.lint()
    part.recompile()
    return part, tuple(given), tuple(values), frozenset(copied)


def _propagate(part: fx.GraphModule, given: list[Any]) -> list[Any]:
    mode = next((v.fake_mode for v in given if isinstance(v, torch._subclasses.FakeTensor)), None)
    if mode is None:
        raise NotOutlinedError("a part of it reads no tensor")
    try:
        with mode:
            return list(part(*given))
    except Exception as error:
        raise NotOutlinedError(f"a part of it does not run by itself: {error}") from error


def _alike(value: Any) -> Any:
    """A fake tensor of the shape and strides of `value`, with memory of its own."""
    if not isinstance(value, torch._subclasses.FakeTensor):
        return value
    with value.fake_mode:
        return torch.empty_strided(
            value.shape, value.stride(), dtype=value.dtype, device=value.device
        )
