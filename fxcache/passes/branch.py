"""Write the pieces of a cut graph: head, hit and miss.

::

    head(inputs, reference)          -> crossing values, [metric, timestep]
    hit(crossing, inputs, residuals) -> outputs                         predictor + tail
    miss(crossing, inputs, residual slots, reference) -> outputs, constants  span + refresh + tail

Which of hit and miss follows head is decided between them; how, is the runtime's choice. Where
nothing is measured there is no head: hit and miss hold all of it, and a step is one region. The
pieces write nothing but the miss its residual slots and its reference.
"""

from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import fx
from torch._subclasses import FakeTensor

from fxcache.capture import fake_tensor, fake_value, tensor_of
from fxcache.dataflow import DataFlow, is_context, op_name
from fxcache.kernels import reference
from fxcache.passes.cut import Cut

REFERENCE, WEIGHTS = "fxcache_reference", "fxcache_weights"
#: Scratch of the kernel that measures.
TICKETS = "fxcache_tickets"
#: The meta key of nodes that were not captured.
WRITTEN = "fxcache_written"


def slot_key(stream: int) -> str:
    """The key of the slot that a miss of `stream` writes."""
    return f"fxcache_slot_{stream}"


def ring_key(stream: int, index: int) -> str:
    """The key of one past residual of `stream`."""
    return f"fxcache_ring_{stream}_{index}"


@dataclass(frozen=True)
class Piece:
    """A graph module and what it takes and gives.

    `arguments` are keys, one a placeholder: nodes of the captured graph (an input, or a value that
    head computed), ``("snapshot", node)``, or names of state tensors. `results` are the keys of
    what head returns first, and of the constants that a miss returns last.
    """

    module: fx.GraphModule
    arguments: tuple[Hashable, ...]
    results: tuple[Hashable, ...] = ()


@dataclass(frozen=True)
class Pieces:
    """The rewritten graph."""

    head: Piece | None
    hit: Piece
    miss: Piece


def build_pieces(
    gm: fx.GraphModule, cut: Cut, flow: DataFlow, *, ring: int, kernels: Any = reference
) -> Pieces:
    """Write the pieces of `gm` as `cut` divides it, with `ring` past residuals a stream.

    With ``ring=1`` the residual is added as it is; with more, a weight vector is one more input.
    `kernels` measures, predicts and refreshes: `fxcache.kernels.reference` or
    `fxcache.kernels.ops`. `gm` is not changed.
    """
    writer = _Writer(gm, cut, flow, kernels)
    return Pieces(writer.head() if cut.probe is not None else None, writer.hit(ring), writer.miss())


class _Writer:
    """What writing the three pieces shares: the cut, what crosses, and the open contexts."""

    def __init__(self, gm: fx.GraphModule, cut: Cut, flow: DataFlow, kernels: Any) -> None:
        self.gm, self.cut, self.flow, self.kernels = gm, cut, flow, kernels
        self.stages = _stages(gm.graph)
        self.measured = cut.probe.nodes if cut.probe is not None else []
        befores = [stream.before for stream in cut.streams if stream.before is not None]
        kept = [*befores, *self.measured]
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
        graph = _PieceGraph(self.gm, self.stages, self.snapshots)
        graph.emit(self.cut.head)
        timestep = self.cut.timestep
        probe = [graph.read(node, snapshot=True) for node in self.measured]
        # Without gradients: those of an unused ratio to an all-zero reference would be 0 * inf.
        after, *before = (graph.proxy(node).detach() for node in probe)
        operands = [after, before[0] if before else None, graph.proxy(graph.argument(REFERENCE))]
        if self.kernels is not reference:
            operands.append(graph.proxy(graph.argument(TICKETS)))
        change = self.kernels.residual_diff(*operands)
        time = None if timestep is None else graph.proxy(graph.read(timestep))
        measured = _decision_inputs(change, time)
        crossing = [graph.read(node) for node in self.crossing]
        copied = sorted(self.snapshots, key=self.flow.position.__getitem__)
        copies = [graph.read(node, snapshot=True) for node in copied]
        results = (*self.crossing, *(("snapshot", node) for node in copied))
        return graph.finish([*crossing, *copies, measured.node], results)

    def _after_head(self) -> "_PieceGraph":
        """A graph that goes on behind the head, or that begins with it if it is no piece."""
        if self.cut.probe is not None:
            return _PieceGraph(self.gm, self.stages, {}, self.same)
        graph = _PieceGraph(self.gm, self.stages, self.snapshots, self.same)
        graph.emit(self.cut.head)
        return graph

    def hit(self, ring: int) -> Piece:
        graph = self._after_head()
        weights = graph.argument(WEIGHTS) if ring > 1 else None
        for index, stream in enumerate(self.cut.streams):
            before = None if stream.before is None else self._kept(graph, stream.before)
            residuals = [graph.argument(ring_key(index, j)) for j in range(ring)]
            predicted = self.kernels.forecast(
                None if before is None else graph.proxy(before),
                [graph.proxy(residual) for residual in residuals],
                None if weights is None else graph.proxy(weights),
            )
            graph.define(stream.after, _laid_out_like(stream.after, predicted).node)
        for node in self.cut.constants:
            if fake_tensor(node) is not None:  # the tail may write into it, or return it
                graph.define(node, graph.proxy(graph.read(node)).clone().node)
        graph.emit(self.cut.tail)
        return graph.finish(graph.outputs())

    def miss(self) -> Piece:
        graph = self._after_head()
        graph.emit(self.cut.span)
        for index, stream in enumerate(self.cut.streams):
            after = graph.proxy(graph.read(stream.after))
            before = None if stream.before is None else self._kept(graph, stream.before)
            self._refresh(graph, after, before, slot_key(index))
        if self.cut.probe is not None:
            after, *before_probe = (self._kept(graph, node) for node in self.measured)
            before = before_probe[0] if before_probe else None
            self._refresh(graph, graph.proxy(after), before, REFERENCE)
        constants = [graph.read(node) for node in self.cut.constants]
        kept = [
            value if fake_tensor(node) is None else graph.proxy(value).clone().node
            for node, value in zip(self.cut.constants, constants, strict=True)
        ]
        graph.emit(self.cut.tail)
        return graph.finish([*graph.outputs(), *kept], self.cut.constants)

    def _refresh(self, graph: "_PieceGraph", after: Any, before: fx.Node | None, key: str) -> None:
        """Store the residual ``after - before``, without its gradients."""
        slot = graph.proxy(graph.argument(key))
        base = None if before is None else graph.proxy(before).detach()
        self.kernels.refresh(after.detach(), base, slot)

    def _kept(self, graph: "_PieceGraph", node: fx.Node) -> fx.Node:
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


def _decision_inputs(change: Any, timestep: Any) -> Any:
    """float32 [2]: residual diff (NaN and Inf stay) and timestep; one read-back serves both."""
    total, scale = change.sum(0).unbind(0)
    # 0 / 0 of two equal all-zero residuals (zero-initialised gates) is no difference; NaN / NaN is.
    diff = torch.where(total == 0, total, total / scale)
    if timestep is None:
        return torch.stack([diff])
    time = timestep.reshape(-1).amax().to(device=diff.device, dtype=torch.float32)
    return torch.stack([diff, time])


@dataclass(frozen=True)
class _Stage:
    """The global state that a node was recorded in.

    `entered` are the contexts that are open (autocast), outermost first; `settings` the setters in
    force (attention backend), by name.
    """

    entered: tuple[fx.Node, ...] = ()
    settings: tuple[tuple[str, fx.Node], ...] = ()


def _stages(graph: fx.Graph) -> tuple[dict[fx.Node, _Stage], _Stage]:
    """The stage of each node, and the one that the graph leaves behind."""
    entered: tuple[fx.Node, ...] = ()
    settings: dict[str, fx.Node] = {}
    stages = {}
    for node in graph.nodes:
        if is_context(node):
            name = op_name(node)
            if name.startswith("_enter_"):
                entered = (*entered, node)
            elif name.startswith("_exit_"):
                entered = tuple(n for n in entered if n is not node.args[0])
            else:
                settings[name] = node
        stages[node] = _Stage(entered, tuple(settings.items()))
    return stages, _Stage((), tuple(settings.items()))


class _Tracer(fx.proxy.GraphAppendingTracer):
    """Marks the nodes that the pass itself writes."""

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        node = super().create_node(*args, **kwargs)
        node.meta[WRITTEN] = True
        return node


class _PieceGraph:
    """A graph under construction: copies nodes of `gm`, adds what they read as arguments."""

    def __init__(
        self,
        gm: fx.GraphModule,
        stages: tuple[dict[fx.Node, _Stage], _Stage],
        snapshots: dict[fx.Node, fx.Node],
        same: dict[fx.Node, fx.Node] | None = None,
    ) -> None:
        self.gm, self.snapshots, self.same = gm, snapshots, same or {}
        self.stages, self.last_stage = stages
        self.graph = fx.Graph()
        self.tracer = _Tracer(self.graph)
        self.defined: dict[fx.Node, fx.Node] = {}
        self.copies: dict[fx.Node, fx.Node] = {}
        self.arguments: dict[Hashable, fx.Node] = {}
        self.open: list[tuple[fx.Node, fx.Node]] = []
        self.settings: dict[str, fx.Node] = {}

    def proxy(self, node: fx.Node) -> Any:
        return fx.Proxy(node, self.tracer)

    def argument(self, key: str | tuple[str, fx.Node]) -> fx.Node:
        """The placeholder for `key`, made at its first use."""
        if key not in self.arguments:
            name = key if isinstance(key, str) else "_".join(str(part) for part in key)
            self.arguments[key] = self._placeholder(name)
        return self.arguments[key]

    def _placeholder(self, name: str) -> fx.Node:
        first_other = next((n for n in self.graph.nodes if n.op != "placeholder"), None)
        if first_other is None:
            return self.graph.placeholder(name)
        with self.graph.inserting_before(first_other):
            return self.graph.placeholder(name)

    def define(self, node: fx.Node, value: fx.Node) -> None:
        self.defined[node] = value

    def read(self, node: fx.Node, *, snapshot: bool = False) -> fx.Node:
        """The node of this graph that holds `node`: computed here, or an argument."""
        if node not in self.defined and node in self.same:
            self.defined[node] = self.read(self.same[node])
        if node not in self.defined:
            if node.op == "get_attr":
                self.defined[node] = self.graph.node_copy(node)
            else:
                if node not in self.arguments:
                    self.arguments[node] = self._placeholder(node.name)
                    self.arguments[node].meta = dict(node.meta)
                self.defined[node] = self.arguments[node]
            self._snapshot(node)
        return self.copies.get(node, self.defined[node]) if snapshot else self.defined[node]

    def emit(self, nodes: Iterable[fx.Node]) -> None:
        """Copy `nodes`, in their order, each on the stage that it was recorded on."""
        for node in nodes:
            self._switch(self.stages[node], node.meta)
            for operand in node.all_input_nodes:
                self.read(operand)
            self.defined[node] = self.graph.node_copy(node, self.read)
            self._snapshot(node)
        self._switch(self.last_stage if self.settings else _Stage(), {})

    def _snapshot(self, done: fx.Node) -> None:
        """Copy what `done`, just emitted, has made complete."""
        for node, complete in self.snapshots.items():
            if complete is done:
                self.copies[node] = self.graph.call_method("clone", (self.read(node),))

    def _switch(self, stage: _Stage, meta: dict[str, Any]) -> None:
        """Set the stage for a node with `meta`; what opens a context gets its module stack."""
        for name, setter in stage.settings:
            if self.settings.get(name) is not setter:
                self.settings[name] = setter
                self.graph.node_copy(setter, self._constant)
        contexts = stage.entered
        while self.open and [n for n, _ in self.open] != list(contexts[: len(self.open)]):
            entered, copy = self.open.pop()
            exits = next(user for user in entered.users if op_name(user).startswith("_exit_"))
            leave = self.graph.call_function(cast(Callable[..., Any], exits.target), (copy,))
            leave.meta = dict(copy.meta)
        for entered in contexts[len(self.open) :]:
            copy = self.graph.node_copy(entered, self.read)
            copy.meta["nn_module_stack"] = meta.get("nn_module_stack")
            self.open.append((entered, copy))

    def _constant(self, node: fx.Node) -> fx.Node:
        """A copy of `node`, an argument of a setter, and of what it is made of."""
        return self.graph.node_copy(node, self._constant)

    def outputs(self) -> list[Any]:
        """What the captured graph returns, flat: Dynamo returns one flat tuple."""
        (results,) = self.gm.graph.output_node().args
        flat = results if isinstance(results, list | tuple) else (results,)
        return [self.read(r) if isinstance(r, fx.Node) else r for r in flat]

    def finish(self, outputs: list[Any], results: tuple[Hashable, ...] = ()) -> Piece:
        for node in self.gm.graph.find_nodes(op="placeholder"):
            if isinstance(fake_value(node), torch.SymInt):
                self.read(node)  # shapes of arguments may be formulas of it
        self.graph.output(tuple(outputs))
        module = fx.GraphModule(self.gm, self.graph)
        module.graph.lint()
        return Piece(module, tuple(self.arguments), results)


def state_fakes(cut: Cut) -> tuple[FakeTensor | None, list[FakeTensor]]:
    """Fake tensors like the reference (None if nothing is measured), and like each stream's
    residual (contiguous).
    """

    def like(after: fx.Node, before: fx.Node | None) -> Any:
        value = tensor_of(after)
        if before is None:
            return value.new_empty(value.shape)
        base = tensor_of(before)
        return value.new_empty(base.shape, dtype=torch.promote_types(value.dtype, base.dtype))

    probe = cut.probe
    with tensor_of(cut.streams[0].after).fake_mode, torch.no_grad():
        reference = None if probe is None else like(probe.after, probe.before)
        return reference, [like(stream.after, stream.before) for stream in cut.streams]
