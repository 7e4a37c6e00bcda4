"""A piece of a captured graph under construction: nodes copied, and what the pass writes itself.

A piece takes what it reads and does not compute as arguments, by key.
"""

from bisect import bisect_left
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from fxcache.errors import CaptureError
from fxcache.passes.cut import Cut
from fxcache.passes.facts import Mask
from fxcache.passes.graph import outputs_of, tensor_of, value_of
from fxcache.passes.sizes import Sizes
from fxcache.passes.skeleton import Skeleton

#: The meta keys of nodes that were not captured, and of the unit that others are part of.
WRITTEN, UNIT = "fxcache_written", "fxcache_unit"


@dataclass(frozen=True)
class Piece:
    """A graph module and what it takes and gives.

    `arguments` are keys, one a placeholder: nodes of the captured graph (an input, or a value that
    head computed), or names of state tensors. `results` are the keys of what head returns first.
    """

    module: fx.GraphModule
    arguments: tuple[Hashable, ...]
    results: tuple[Hashable, ...] = ()


class _Tracer(fx.proxy.GraphAppendingTracer):
    """Marks the nodes that the pass itself writes."""

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        node = super().create_node(*args, **kwargs)
        node.meta[WRITTEN] = True
        return node


class PieceGraph:
    """A graph under construction: copies nodes of `gm`, adds what they read as arguments."""

    def __init__(self, gm: fx.GraphModule, cut: Cut) -> None:
        self.gm, self.facts = gm, cut.facts
        self.ends = [unit.end for unit in cut.repeated]
        self.starts = [unit.start for unit in cut.repeated]
        self.graph = fx.Graph()
        self.tracer = _Tracer(self.graph)
        self.defined: dict[fx.Node, fx.Node] = {}
        self.arguments: dict[Hashable, fx.Node] = {}
        #: By the skeletons themselves: two may be of one node.
        self.skeletons: dict[Skeleton, fx.Node] = {}
        self.sizes = Sizes(gm.graph.find_nodes(op="placeholder"), self.read, self.tracer)

    def proxy(self, node: fx.Node) -> Any:
        return fx.Proxy(node, self.tracer)

    def call_function(self, target: Any, args: Any, kwargs: Any = None) -> fx.Node:
        """A node that the pass writes."""
        return self.tracer.create_node("call_function", target, tuple(args), dict(kwargs or {}))

    def argument(self, key: str) -> Any:
        """A proxy of the placeholder for `key`, which is made at its first use."""
        if key not in self.arguments:
            self.arguments[key] = self._placeholder(key)
        return self.proxy(self.arguments[key])

    def _placeholder(self, name: str) -> fx.Node:
        first_other = next((n for n in self.graph.nodes if n.op != "placeholder"), None)
        if first_other is None:
            return self.graph.placeholder(name)
        with self.graph.inserting_before(first_other):
            return self.graph.placeholder(name)

    def read(self, node: fx.Node) -> fx.Node:
        """The node of this graph that holds `node`: computed here, or an argument."""
        if node not in self.defined:
            if node.op == "get_attr":
                self.defined[node] = self.graph.node_copy(node)
            else:
                self.defined[node] = self.arguments[node] = self._placeholder(node.name)
                self.defined[node].meta = dict(node.meta)
        return self.defined[node]

    def emit(self, mask: Mask) -> None:
        """Copy the nodes of `mask`, in recorded order, but for what is defined."""
        for node in self.facts.in_order(mask):
            if node not in self.defined:
                for operand in node.all_input_nodes:
                    self.read(operand)
                copy = self.defined[node] = self.graph.node_copy(node, self.read)
                unit = bisect_left(self.ends, self.facts.position[node])
                if unit < len(self.ends) and self.starts[unit] < self.facts.position[node]:
                    copy.meta[UNIT] = unit

    def zeros(self, node: fx.Node, *, is_broadcast: bool) -> fx.Node:
        """Zeros like `node`, which is not computed here: all of them, or one for all."""
        value = tensor_of(node)
        sizes = [1 if is_broadcast else self._size(size) for size in value.shape]
        options = {"dtype": value.dtype, "device": value.device}
        return self.call_function(torch.ops.aten.full.default, (sizes, 0), options)

    def _size(self, size: int | torch.SymInt) -> Any:
        """A size as a number, or as a node that holds it."""
        written = self.sizes.write(size)
        if written is None:
            raise CaptureError(f"no input shows the size {size} of a tensor that crosses the cut")
        return written

    def outputs(self) -> list[Any]:
        """What the captured graph returns, flat."""
        results = outputs_of(self.gm.graph)
        return [self.read(r) if isinstance(r, fx.Node) else r for r in results]

    def finish(self, outputs: list[Any], results: tuple[Hashable, ...] = ()) -> Piece:
        for node in self.gm.graph.find_nodes(op="placeholder"):
            if isinstance(value_of(node), torch.SymInt):
                self.read(node)  # shapes of arguments may be formulas of it
        self.graph.output(tuple(outputs))
        module = fx.GraphModule(self.gm, self.graph)
        module.graph.lint()
        return Piece(module, tuple(self.arguments), results)
