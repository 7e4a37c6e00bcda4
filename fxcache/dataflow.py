"""Data flow in a captured graph: who depends on whom, who writes in place, who carries a stream.

Torch-level graphs are not functional, so an edge is more than "is an argument of": a reader of a
storage depends on the write before it, and a write depends on the readers before it. With those
edges added, any topological order of the nodes computes the same values.
"""

import inspect
import operator
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any, cast

import torch
from torch import fx
from torch._C._functorch import is_functorch_wrapped_tensor

from fxcache.capture import fake_tensor, fake_value

_INPLACE_OPERATORS = {
    operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.ifloordiv,
    operator.imod, operator.ipow, operator.imatmul, operator.iand, operator.ior, operator.ixor,
    operator.ilshift, operator.irshift, operator.setitem,
}  # fmt: skip


@cache
def _inplace_position(function: Callable[..., Any]) -> int | None:
    """Where `function` takes its `inplace` argument (torch.nn.functional), None if nowhere."""
    try:
        names = list(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        return None
    return names.index("inplace") if "inplace" in names else None


def written_operands(node: fx.Node) -> list[fx.Node]:
    """The operands that `node` writes into."""
    written: list[Any] = [node.kwargs.get("out")]
    first = node.args[0] if node.args else node.kwargs.get("input")
    if node.op == "call_method":
        name = str(node.target)
        if (name.endswith("_") and not name.endswith("__")) or name == "__setitem__":
            written.append(first)
    elif node.op == "call_function":
        target: Any = node.target
        name = op_name(node)
        if isinstance(target, torch._ops.OpOverload | torch._ops.OpOverloadPacket):
            written += _written_by_schema(node, target)
        elif name.startswith("triton_kernel_wrapper_mutation"):
            written.append(node.kwargs.get("kwargs"))  # which of them, only the kernel knows
        elif (
            target in _INPLACE_OPERATORS
            or _is_asked_to(node, "inplace")
            or (name.endswith("_") and not name.endswith("__") and _has_public_twin(name))
        ):
            written.append(first)
    found: list[fx.Node] = []
    fx.map_arg(written, found.append)
    return found


def _has_public_twin(name: str) -> bool:
    """Whether a name that ends in an underscore is an operation's: of tensors or of lists of
    them, not a private function's.
    """
    return not name.startswith("_") or name.startswith("_foreach_")


def _is_asked_to(node: fx.Node, option: str) -> bool:
    if node.kwargs.get(option) is True:
        return True
    position = _inplace_position(cast(Any, node.target)) if True in node.args else None
    return position is not None and len(node.args) > position and node.args[position] is True


def _written_by_schema(node: fx.Node, target: Any) -> list[Any]:
    """The arguments that an operator's schema marks as written."""
    overloads = [target]
    if isinstance(target, torch._ops.OpOverloadPacket):
        overloads = [getattr(target, name) for name in target.overloads()]
    written = []
    for overload in overloads:
        for place, argument in enumerate(overload._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                positional = node.args[place] if place < len(node.args) else None
                written.append(node.kwargs.get(argument.name, positional))
    return written


def writes_in_place(node: fx.Node) -> bool:
    """Whether `node` writes into a tensor argument."""
    return bool(written_operands(node))


#: Calls that set a global state for what follows: the last one before a node is in force there.
SETTERS = ("_sdpa_kernel", "_set_grad_enabled")


def is_context(node: fx.Node) -> bool:
    """Whether `node` sets the stage for others (autocast, attention backend), not a value."""
    name = op_name(node)
    if node.op != "call_function":
        return False
    return name.startswith(("_enter_", "_exit_")) or name in SETTERS


def storages(node: fx.Node) -> set[int]:
    """Identities of the storages behind the tensors that `node` holds."""
    value = fake_value(node)
    tensors = [value] if isinstance(value, torch.Tensor) else value
    if not isinstance(tensors, tuple | list):
        return set()
    return {
        tensor.untyped_storage()._cdata
        for tensor in tensors
        if isinstance(tensor, torch.Tensor)
        and not is_functorch_wrapped_tensor(tensor)
        and tensor.layout == torch.strided
    }


def written_storages(node: fx.Node) -> set[int]:
    """Storages that `node` writes into."""
    return set().union(*map(storages, written_operands(node)))


_RANDOM = {
    "rand", "randn", "randint", "randperm", "rand_like", "randn_like", "randint_like", "normal",
    "bernoulli", "multinomial", "poisson", "dropout", "alpha_dropout", "feature_dropout", "normal_",
    "uniform_", "bernoulli_", "exponential_", "random_", "cauchy_", "geometric_", "log_normal_",
}  # fmt: skip


def is_random(node: fx.Node) -> bool:
    """Whether `node` draws random numbers, so that its place among others that do matters."""
    return node.op in ("call_function", "call_method") and op_name(node) in _RANDOM


@dataclass(frozen=True)
class DataFlow:
    """The edges of a graph, in-place writes included.

    `sources[n]` are the nodes that must run before `n`, `sinks[n]` those that must run after it,
    `position[n]` is its place in the recorded order, `writers[s]` the nodes that write storage s.
    """

    position: dict[fx.Node, int]
    sources: dict[fx.Node, tuple[fx.Node, ...]]
    sinks: dict[fx.Node, tuple[fx.Node, ...]]
    writers: dict[int, tuple[fx.Node, ...]]

    def ancestors(self, nodes: Iterable[fx.Node]) -> set[fx.Node]:
        """All that `nodes` depend on, without `nodes` themselves (unless one needs another)."""
        return _closure(nodes, self.sources)

    def descendants(self, nodes: Iterable[fx.Node]) -> set[fx.Node]:
        """All that depends on `nodes`, without `nodes` themselves (unless one needs another)."""
        return _closure(nodes, self.sinks)

    def writers_of(self, node: fx.Node) -> list[fx.Node]:
        """Who writes into the storage of `node`, after `node` itself, in recorded order."""
        found = {w for storage in storages(node) for w in self.writers.get(storage, ())}
        later = (writer for writer in found if self.position[writer] > self.position[node])
        return sorted(later, key=self.position.__getitem__)


def split_writes(
    flow: DataFlow, node: fx.Node, readers: set[fx.Node]
) -> tuple[list[fx.Node], list[fx.Node]]:
    """The writes into `node` that complete it before the first of `readers` reads it, and those
    that overwrite it afterwards.
    """
    reads = [flow.position[user] for user in node.users if user in readers]
    first = min(reads, default=flow.position[node])
    writers = flow.writers_of(node)
    return (
        [writer for writer in writers if flow.position[writer] < first],
        [writer for writer in writers if flow.position[writer] >= first],
    )


def data_flow(graph: fx.Graph) -> DataFlow:
    """Compute the edges of `graph` in one walk."""
    position: dict[fx.Node, int] = {}
    sources: dict[fx.Node, tuple[fx.Node, ...]] = {}
    writers: dict[int, tuple[fx.Node, ...]] = {}
    last_write: dict[int, fx.Node] = {}
    readers: dict[int, list[fx.Node]] = {}
    vmaps = _vmap_regions(graph)
    last_random: list[fx.Node] = []
    for index, node in enumerate(graph.nodes):
        position[node] = index
        before = dict.fromkeys(node.all_input_nodes)
        written = written_storages(node)
        touched = set().union(*map(storages, node.all_input_nodes)) if before else set()
        for storage in touched:
            if storage in last_write:
                before[last_write[storage]] = None
            if storage in written:
                before.update(dict.fromkeys(readers.get(storage, ())))
                last_write[storage], readers[storage] = node, []
                writers[storage] = (*writers.get(storage, ()), node)
            else:
                readers.setdefault(storage, []).append(node)
        before.update(dict.fromkeys(_vmap_edges(node, vmaps)))
        if is_random(node):  # drawn in the recorded order
            before.update(dict.fromkeys(last_random))
            last_random = [node]
        sources[node] = tuple(before)
    sinks: dict[fx.Node, list[fx.Node]] = {node: [] for node in position}
    for node, direct in sources.items():
        for source in direct:
            sinks[source].append(node)
    return DataFlow(position, sources, {n: tuple(s) for n, s in sinks.items()}, writers)


def _vmap_regions(graph: fx.Graph) -> dict[fx.Node, list[fx.Node]]:
    """The nodes of each torch.vmap region, from its opening to its closing node, by node."""
    regions: dict[fx.Node, list[fx.Node]] = {}
    region: list[fx.Node] = []
    depth = 0
    for node in graph.nodes:
        depth += op_name(node) == "_vmap_increment_nesting"
        if depth:
            region.append(node)
            regions[node] = region
        if op_name(node) == "_vmap_decrement_nesting":
            depth -= 1
            region = region if depth else []
    return regions


def _vmap_edges(node: fx.Node, regions: dict[fx.Node, list[fx.Node]]) -> list[fx.Node]:
    """Edges that keep a vmap region in one piece: who reads of it, waits for all of it."""
    own = regions.get(node)
    if own is not None:
        return own[:-1] if node is own[-1] else own[: node is not own[0]]
    return [regions[operand][-1] for operand in node.all_input_nodes if operand in regions]


def _closure(nodes: Iterable[fx.Node], edges: dict[fx.Node, tuple[fx.Node, ...]]) -> set[fx.Node]:
    seen: set[fx.Node] = set()
    todo = [after for node in nodes for after in edges[node]]
    while todo:
        node = todo.pop()
        if node not in seen:
            seen.add(node)
            todo.extend(edges[node])
    return seen


# --- the residual path ---------------------------------------------------------------------------

_SAME_PLACE = {"to", "type_as", "float", "half", "bfloat16", "double", "type", "clone", "clip",
               "contiguous", "detach", "clamp", "dropout", "nan_to_num", "alias", "cuda",
               "cpu"}  # fmt: skip
_REARRANGE = {"reshape", "view", "permute", "transpose", "flatten", "unflatten", "unsqueeze",
              "squeeze", "expand", "movedim", "swapaxes", "swapdims", "t", "view_as", "roll",
              "chunk", "split", "unbind", "tensor_split", "narrow", "select", "expand_as",
              "repeat", "stack", "slice", "index_select", "pad", "repeat_interleave"}  # fmt: skip
_ADD = {"add", "iadd", "add_"}
_SUBTRACT = {"sub", "isub", "sub_"}

Window = tuple[int, int, int]  # dimension, start, stop: the part of a tensor that is followed


def op_name(node: fx.Node) -> str:
    """The bare name of what `node` calls: ``add`` for operator.add, torch.add and Tensor.add."""
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target._schema.name.split("::")[-1]
    return str(getattr(node.target, "__name__", node.target))


def residual_path(node: fx.Node, until: set[fx.Node]) -> set[fx.Node]:
    """Walk back from `node` through additions and views; returns where in `until` it arrives.

    A value of `until` on this path is what `node` carries on unchanged but for what was added: the
    skip connection of a residual block. Slices of concatenations are followed exactly (in joint
    blocks, text and image tokens are slices of one tensor). The walk stops at `until`.
    """
    arrived: set[fx.Node] = set()
    seen: set[tuple[fx.Node, Window | None]] = set()
    todo: list[tuple[Any, Window | None]] = [(node, None)]
    while todo:
        current, window = todo.pop()
        if not isinstance(current, fx.Node) or (current, window) in seen:
            continue
        seen.add((current, window))
        if current in until and current is not node:
            arrived.add(current)
            continue
        todo.extend(_carried(current, window))
    return arrived


def _carried(node: fx.Node, window: Window | None) -> list[tuple[Any, Window | None]]:
    """The operands that `node` passes on, each with the part of it that `window` corresponds to."""
    if node.op not in ("call_function", "call_method") or not node.args:
        return []
    name, first = op_name(node), node.args[0]
    if name in _ADD:
        return [(a, _fit(a, window)) for a in node.args[:2]]
    if name in _SUBTRACT or name in _SAME_PLACE:
        return [(first, window)]
    if name in ("truediv", "div", "mul") and node.args[1] == 1:
        return [(first, window)]
    if name in ("cat", "concat", "concatenate"):
        return _concatenated(node, window)
    if name == "getitem":
        return [(first, _sliced(node, window))]
    if name in _REARRANGE:
        operands = first if isinstance(first, list | tuple) else [first]
        return [(a, None) for a in operands]
    return []


def _fit(operand: Any, window: Window | None) -> Window | None:
    """A window is lost where broadcasting makes the dimension mean something else."""
    value = fake_tensor(operand)
    if window is None or value is None or value.ndim <= window[0]:
        return None
    size = value.shape[window[0]]
    return window if isinstance(size, int) and size >= window[2] else None


def _concatenated(node: fx.Node, window: Window | None) -> list[tuple[Any, Window | None]]:
    operands = node.args[0]
    if not isinstance(operands, list | tuple):
        return [(operands, None)]
    dim = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else 0)
    values = [value for operand in operands if (value := fake_tensor(operand)) is not None]
    if window is None or len(values) < len(operands) or not isinstance(dim, int):
        return [(operand, None) for operand in operands]
    if dim % values[0].ndim != window[0]:
        return [(operand, window) for operand in operands]
    followed, offset = [], 0
    for operand, value in zip(operands, values, strict=True):
        size = value.shape[window[0]]
        if not isinstance(size, int):
            return [(operand, None) for operand in operands]
        start, stop = max(window[1] - offset, 0), min(window[2] - offset, size)
        if start < stop:
            whole = (start, stop) == (0, size)
            followed.append((operand, None if whole else (window[0], start, stop)))
        offset += size
    return followed


def _sliced(node: fx.Node, window: Window | None) -> Window | None:
    """The window of x that x[...] stands for, where one dimension is cut by plain numbers."""
    value, index = fake_tensor(node.args[0]), node.args[1]
    if value is None or window is not None:
        return None
    cuts = [
        (dim, part)
        for dim, part in enumerate(index if isinstance(index, tuple) else (index,))
        if part != slice(None)
    ]
    if len(cuts) != 1 or not isinstance(cuts[0][1], slice):
        return None
    dim, part = cuts[0]
    size = value.shape[dim] if dim < value.ndim else None
    bounds = (part.start, part.stop, size)
    if not all(b is None or isinstance(b, int) for b in bounds) or size is None:
        return None
    start, stop, stride = part.indices(size)
    return (dim, start, stop) if stride == 1 else None
