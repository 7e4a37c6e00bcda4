"""Where to divide a piece: units that have an equal, and what lies between them.

A *segment* is a run of nodes that becomes one call. Units that do the same operations on inputs of
the same shapes are segments of their own; all else is joined into segments as long as possible.
"""

from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations, groupby
from typing import Any

import torch
from torch import fx

from fxcache.passes.facts import is_heavy
from fxcache.passes.graph import depends_on_data, op_name, value_of
from fxcache.passes.piece_graph import UNIT

#: A segment with fewer matrix products and attentions than this is not worth a call of its own.
MIN_HEAVY = 3
_READ_STRIDES = {"as_strided", "as_strided_copy", "as_strided_scatter"}
#: With more outputs than this, subsets of them are not tried.
MAX_OUTPUTS = 4


class NotOutlinedError(Exception):
    """Why a piece stays whole."""


Nodes = tuple[fx.Node, ...]


@dataclass(frozen=True)
class Segment:
    """Nodes that run together, and the code that is compiled for them.

    `code` are the nodes themselves, or those of a fuller equal: then `at` says where in `code` each
    node stands (the last block of a stack lacks what only a next block would need).
    """

    nodes: Nodes
    code: Nodes
    at: tuple[int, ...]

    @staticmethod
    def of(nodes: Sequence[fx.Node]) -> "Segment":
        return Segment(tuple(nodes), tuple(nodes), tuple(range(len(nodes))))

    @property
    def outputs(self) -> set[int]:
        """Where in `code` the values stand that others read."""
        read = set(outputs_of(self.nodes))
        return {at for node, at in zip(self.nodes, self.at, strict=True) if node in read}

    def node(self, at: int) -> fx.Node | None:
        """The node that stands at `at` in `code`, None if this segment lacks it."""
        return self.nodes[self.at.index(at)] if at in self.at else None


def divide(graph: fx.Graph) -> list[Segment]:
    """The segments of `graph` in order: units, and what lies between them.

    Raises NotOutlinedError if no unit has an equal, or if `graph` must not be divided.
    """
    nodes = _computing_nodes(graph)
    labels = {node: _label(node) for node in nodes}
    runs = [tuple(run) for _, run in groupby(nodes, labels.__getitem__)]
    keys = [
        body_key(run) if labels[run[0]] is not None and num_heavy(run) >= MIN_HEAVY else None
        for run in runs
    ]
    counts = Counter(keys)
    repeated = {key: run for run, key in zip(runs, keys, strict=True) if key and counts[key] > 1}
    segments: list[Segment] = []
    loose: list[fx.Node] = []  # neighbours that have no equal are one segment
    for run, key in zip(runs, keys, strict=True):
        if key in repeated:
            part: Segment | None = Segment.of(run)
        else:
            part = _shorter_equal(run, repeated.values()) if key else None
        if part is None:
            loose.extend(run)
            continue
        segments += [Segment.of(loose), part] if loose else [part]
        loose = []
    if not segments:
        raise NotOutlinedError("no two units are equal")
    return [*segments, Segment.of(loose)] if loose else segments


def _computing_nodes(graph: fx.Graph) -> list[fx.Node]:
    """What computes, elements of tuples right behind their tuple: only tensors cross edges."""
    ordered: dict[fx.Node, None] = {}
    for node in graph.nodes:
        if node.op in ("placeholder", "output", "get_attr"):
            continue
        ordered[node] = None
        ordered.update(dict.fromkeys(_elements(node)))
        if depends_on_data(node):
            raise NotOutlinedError(f"the size of {node} depends on data")
        if op_name(node) in _READ_STRIDES:
            raise NotOutlinedError(f"{node} reads strides, which change at the edges of units")
    return list(ordered)


def _elements(node: fx.Node) -> list[fx.Node]:
    if not isinstance(value_of(node), tuple | list):
        return []
    taken = [user for user in node.users if op_name(user) == "getitem"]
    return [each for element in taken for each in (element, *_elements(element))]


def _shorter_equal(run: Nodes, codes: Iterable[Nodes]) -> Segment | None:
    """`run` as one of `codes` without some of its results, if leaving them out saves no product."""
    key = body_key(run)
    for code in codes:
        outputs = outputs_of(code)
        if len(outputs) > MAX_OUTPUTS or any(map(writes_in_place, code)):
            continue
        for count in range(1, len(outputs)):
            for kept in combinations(outputs, count):
                needed = needed_for(code, kept)
                live = tuple(node for node in code if node in needed)
                same_inputs = inputs_of(live) == inputs_of(code)
                if same_inputs and num_heavy(live) == num_heavy(code) and body_key(live) == key:
                    return Segment(run, code, tuple(map(code.index, live)))
    return None


def needed_for(segment: Nodes, outputs: Iterable[fx.Node]) -> set[fx.Node]:
    """The nodes of `segment` that `outputs` need."""
    inside, needed, todo = set(segment), set[fx.Node](), list(outputs)
    while todo:
        node = todo.pop()
        if node in inside and node not in needed:
            needed.add(node)
            todo.extend(node.all_input_nodes)
    return needed


def num_heavy(nodes: Iterable[fx.Node]) -> int:
    return sum(map(is_heavy, nodes))


def _label(node: fx.Node) -> int | None:
    """The unit that `node` is part of, if any."""
    while op_name(node) == "getitem" and isinstance(value_of(node.args[0]), tuple | list):
        node = node.args[0]  # type: ignore[assignment]
    unit: int | None = node.meta.get(UNIT)
    return unit


def inputs_of(segment: Nodes) -> list[fx.Node]:
    inside = set(segment)
    read = dict.fromkeys(operand for node in segment for operand in node.all_input_nodes)
    return [node for node in read if node not in inside and node.op != "get_attr"]


def outputs_of(segment: Nodes) -> list[fx.Node]:
    """The values that other segments read."""
    inside = set(segment)

    def is_read(node: fx.Node) -> bool:
        return any(user not in inside and user.op != "output" for user in node.users)

    return [node for node in segment if is_read(node)]


def body_key(segment: Nodes) -> Hashable:
    """What a segment does, its inputs known by shape and dtype only."""
    inputs = inputs_of(segment)
    values = map(value_of, inputs)
    known = [(str(getattr(v, "shape", v)), getattr(v, "dtype", None)) for v in values]
    return tuple(known), operations(segment, inputs)


def operations(segment: Nodes, inputs: Sequence[fx.Node]) -> tuple[Hashable, ...]:
    """The operations of `segment`, nodes told by their places among `inputs` and each other."""
    numbers = {node: number for number, node in enumerate((*inputs, *segment))}

    def name(node: fx.Node) -> Any:
        return f"%{node.target if node.op == 'get_attr' else numbers[node]}"

    written: list[Hashable] = []
    for node in segment:
        args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), name)
        target = node.target if isinstance(node.target, str) else id(node.target)
        written.append((node.op, target, repr(args), repr(kwargs)))
    return tuple(written)


def writes_in_place(node: fx.Node) -> bool:
    """Whether `node`, written by the pass, stores into a buffer."""
    if node.op == "call_method":
        return node.target == "copy_"
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable
