"""Where to divide a piece: blocks that have an equal, and what lies between them.

A *segment* is a run of nodes that becomes one call. Elements of lists of modules that do the same
operations on inputs of the same shapes are segments of their own, outermost lists first; all else
is joined into segments as long as possible.
"""

from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations, groupby
from typing import Any

import torch
from torch import fx

from fxcache.capture import fake_value, is_unbacked, module_calls
from fxcache.dataflow import (
    SETTERS,
    is_context,
    op_name,
    storages,
    writes_in_place,
    written_storages,
)
from fxcache.stack import is_heavy

#: A segment with fewer matrix products and attentions than this is not worth a call of its own.
MIN_HEAVY = 3
_READ_STRIDES = {"as_strided", "as_strided_", "set_"}
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
    """The segments of `graph` in order.

    Raises NotOutlinedError if nothing in it repeats, or if it must not be divided.
    """
    segments = _repeated(_computing_nodes(graph), depth=0)
    if segments is None:
        raise NotOutlinedError("no two blocks are equal")
    _check_edges(segments)
    return segments


def _computing_nodes(graph: fx.Graph) -> list[fx.Node]:
    """What computes, elements of tuples right behind their tuple: only tensors cross edges."""
    ordered: dict[fx.Node, None] = {}
    for node in graph.nodes:
        if node.op in ("placeholder", "output", "get_attr"):
            continue
        ordered[node] = None
        ordered.update(dict.fromkeys(_elements(node)))
        value = fake_value(node)
        if isinstance(value, torch.Tensor) and any(map(is_unbacked, value.shape)):
            raise NotOutlinedError(f"the size of {node} depends on data")
    return list(ordered)


def _elements(node: fx.Node) -> list[fx.Node]:
    if not isinstance(fake_value(node), tuple | list):
        return []
    taken = [user for user in node.users if op_name(user) == "getitem"]
    return [each for element in taken for each in (element, *_elements(element))]


def _repeated(nodes: Sequence[fx.Node], depth: int) -> list[Segment] | None:
    """Divide `nodes` into list elements at `depth` of the module stack, None if none repeats."""
    labels = {node: _label(node, depth) for node in nodes}
    if not any(labels.values()):
        return None
    runs = _with_glue([tuple(run) for _, run in groupby(nodes, labels.__getitem__)], labels)
    keys = [body_key(run) if _is_worth_a_call(run) else None for run in runs]
    counts = Counter(keys)
    repeated = {key: run for run, key in zip(runs, keys, strict=True) if key and counts[key] > 1}
    segments: list[Segment] = []
    loose: list[fx.Node] = []  # neighbours that have no equal are one segment
    for run, key in zip(runs, keys, strict=True):
        if key in repeated:
            parts: list[Segment] | None = [Segment.of(run)]
        elif key and (shorter := _shorter_equal(run, repeated.values())):
            parts = [shorter]
        else:
            parts = _repeated(run, depth + 1)
        if parts is None:
            loose.extend(run)
            continue
        segments += [Segment.of(loose), *parts] if loose else parts
        loose = []
    if not segments:
        return None
    return [*segments, Segment.of(loose)] if loose else segments


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


def _label(node: fx.Node, depth: int) -> str | None:
    """Which element of which list of modules `node` belongs to, at `depth` of nested lists."""
    while op_name(node) == "getitem" and isinstance(fake_value(_operand(node)), tuple | list):
        node = _operand(node)
    calls = [call for call in module_calls(node) if call.list_path is not None]
    return f"{calls[depth].path}@{calls[depth].call}" if depth < len(calls) else None


def _operand(node: fx.Node) -> fx.Node:
    operand = node.args[0]
    assert isinstance(operand, fx.Node)
    return operand


def _with_glue(runs: list[Nodes], labels: dict[fx.Node, str | None]) -> list[Nodes]:
    """Join little things between two blocks of a list (control residuals) to the block before."""
    joined: list[Nodes] = []
    for index, run in enumerate(runs):
        between = joined and index + 1 < len(runs) and not labels[run[0]]
        if between and not any(is_heavy(node) or writes_in_place(node) for node in run):
            before, after = labels[joined[-1][0]], labels[runs[index + 1][0]]
            if before and after and _list_of(before) == _list_of(after):
                joined[-1] += run
                continue
        joined.append(run)
    return joined


def _list_of(label: str) -> str:
    return label.partition("@")[0].rpartition(".")[0]


def _is_worth_a_call(run: Nodes) -> bool:
    return num_heavy(run) >= MIN_HEAVY


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
    values = map(fake_value, inputs)
    known = [(str(getattr(v, "shape", v)), getattr(v, "dtype", None)) for v in values]
    return tuple(known), operations(segment, inputs)


class _Ref:
    """Stands for a node in the text of an operation's arguments."""

    def __init__(self, number: int | str) -> None:
        self.number = number

    def __repr__(self) -> str:
        return f"%{self.number}"


def operations(segment: Nodes, inputs: Sequence[fx.Node]) -> tuple[Hashable, ...]:
    """The operations of `segment`, nodes told by their places among `inputs` and each other."""
    numbers = {node: number for number, node in enumerate((*inputs, *segment))}

    def ref(node: fx.Node) -> Any:
        return _Ref(str(node.target)) if node.op == "get_attr" else _Ref(numbers[node])

    written: list[Hashable] = []
    for node in segment:
        args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), ref)
        target = node.target if isinstance(node.target, str) else id(node.target)
        written.append((node.op, target, repr(args), repr(kwargs)))
    return tuple(written)


def _check_edges(segments: list[Segment]) -> None:
    """Refuse to divide what several segments share: memory that is written, and contexts."""
    home = {node: index for index, segment in enumerate(segments) for node in segment.nodes}
    touched: dict[int, set[int]] = {}
    writers: dict[int, set[int]] = {}
    for node, index in home.items():
        if op_name(node) in SETTERS or op_name(node).startswith("_vmap_"):
            raise NotOutlinedError(f"{node} holds for what follows")
        if op_name(node) in _READ_STRIDES:
            raise NotOutlinedError(f"{node} reads strides, which change at the edges of blocks")
        if is_context(node) and any(home.get(user) != index for user in node.users):
            raise NotOutlinedError(f"the context {node} spans several blocks")
        for storage in set().union(*map(storages, (node, *node.all_input_nodes))):
            touched.setdefault(storage, set()).add(index)
        for storage in written_storages(node):
            writers.setdefault(storage, set()).add(index)
    given = [n for n in segments[0].nodes[0].graph.nodes if n.op in ("placeholder", "get_attr")]
    outside = set().union(*map(storages, given))
    for storage, writing in writers.items():
        # Who makes a tensor may write into it; others then read what was written.
        is_own = storage not in outside and writing == {min(touched[storage])}
        if len(touched[storage]) > 1 and not is_own:
            writer = next(node for node in home if storage in written_storages(node))
            raise NotOutlinedError(f"{writer} writes in place into what several blocks hold")
