"""Write a piece of a captured graph: nodes copied in any order, each on its own stage.

A piece takes what it reads and does not compute as arguments, by key.
"""

from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import fx

from fxcache.capture import fake_value
from fxcache.dataflow import is_context, op_name

#: The meta key of nodes that were not captured.
WRITTEN = "fxcache_written"


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
class Stage:
    """The global state that a node was recorded in.

    `entered` are the contexts that are open (autocast), outermost first; `settings` the setters in
    force (attention backend), by name.
    """

    entered: tuple[fx.Node, ...] = ()
    settings: tuple[tuple[str, fx.Node], ...] = ()


def stages(graph: fx.Graph) -> tuple[dict[fx.Node, Stage], Stage]:
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
        stages[node] = Stage(entered, tuple(settings.items()))
    return stages, Stage((), tuple(settings.items()))


class _Tracer(fx.proxy.GraphAppendingTracer):
    """Marks the nodes that the pass itself writes."""

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        node = super().create_node(*args, **kwargs)
        node.meta[WRITTEN] = True
        return node


class PieceGraph:
    """A graph under construction: copies nodes of `gm`, adds what they read as arguments."""

    def __init__(
        self,
        gm: fx.GraphModule,
        stages: tuple[dict[fx.Node, Stage], Stage],
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
        self._switch(self.last_stage if self.settings else Stage(), {})

    def _snapshot(self, done: fx.Node) -> None:
        """Copy what `done`, just emitted, has made complete."""
        for node, complete in self.snapshots.items():
            if complete is done:
                self.copies[node] = self.graph.call_method("clone", (self.read(node),))

    def _switch(self, stage: Stage, meta: dict[str, Any]) -> None:
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
