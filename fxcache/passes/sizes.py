"""Open sizes as formulas of the inputs' sizes, so that no tensor is computed for its shape alone.

The interpreter of formulas is private of torch; checked on torch 2.13 and 2.15
(`tests/passes/test_sizes.py`).
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import fx
from torch.utils._sympy.interp import sympy_interp
from torch.utils._sympy.reference import PythonReferenceAnalysis

from fxcache.passes.graph import is_tensor, op_name, same_sizes, value_of


class Sizes:
    """Writes sizes, each once. `inputs` are a graph's placeholders, `read` gives the node that
    holds one of them where a size is to be written, `tracer` creates nodes there.
    """

    def __init__(
        self, inputs: Iterable[fx.Node], read: Callable[[fx.Node], fx.Node], tracer: Any
    ) -> None:
        self.read, self.tracer = read, tracer
        self.written: dict[Any, Any] = {}
        #: Which input is, or has along which dimension, a size.
        self.shown: dict[Any, tuple[fx.Node, int | None]] = {}
        for node in inputs:
            value = value_of(node)
            if isinstance(value, torch.SymInt):
                self.shown[value.node.expr] = node, None
            for dim, size in enumerate(value.shape if isinstance(value, torch.Tensor) else ()):
                if isinstance(size, torch.SymInt):
                    self.shown.setdefault(size.node.expr, (node, dim))

    def write(self, size: int | torch.SymInt) -> Any:
        """`size` as a number or as the node that holds it, None if the inputs do not tell it."""
        if isinstance(size, int):
            return size
        formula = size.node.expr
        if formula not in self.written:
            if formula in self.shown:
                self.written[formula] = self._shown(*self.shown[formula])
            elif formula.free_symbols <= self.shown.keys():
                symbols = sorted(formula.free_symbols, key=str)
                parts = {symbol: self._shown(*self.shown[symbol]) for symbol in symbols}
                self.written[formula] = sympy_interp(PythonReferenceAnalysis, parts, formula)
            else:
                return None
        return getattr(self.written[formula], "node", self.written[formula])

    def _shown(self, source: fx.Node, dim: int | None) -> fx.Proxy:
        node = self.read(source)
        if dim is not None:
            target = torch.ops.aten.sym_size.int
            node = self.tracer.create_node("call_function", target, (node, dim), {})
        return fx.Proxy(node, self.tracer)


def write_sizes_first(gm: fx.GraphModule) -> None:
    """What the model reads of its tensors' shapes is computed from those of its inputs.

    ::

        m = sym_size(block(x), 1)   =>   n = sym_size(x, 1); m = (n - 1) // 2 + 1
        y = ones_like(block(x))     =>   n = sym_size(x, 1); y = full([n], 1)

    So what comes behind a span does not need the span's tensors for their shapes, and a constant
    does not count as what follows the sample.
    """
    graph = gm.graph
    placeholders, before = graph.find_nodes(op="placeholder"), list(graph.nodes)
    tracer = fx.proxy.GraphAppendingTracer(graph)
    sizes = Sizes(placeholders, lambda node: node, tracer)
    first = next(node for node in graph.nodes if node.op != "placeholder")
    found: dict[fx.Node, fx.Node] = {}
    only: dict[Any, fx.Node] = {}  # where a size that depends on data was read first
    with graph.inserting_before(first):
        for node in before:
            value = value_of(node)
            if node.op == "call_function" and isinstance(value, torch.SymInt):
                size = sizes.write(value) or only.setdefault(value.node.expr, node)
                if isinstance(size, fx.Node) and size is not node:
                    found[node] = size
            elif (fill := _fill(node)) is not None:
                shape, strides = (list(map(sizes.write, n)) for n in (value.shape, value.stride()))
                if None not in (*shape, *strides):
                    found[node] = _filled(tracer, value, fill, shape, strides)
    for node, new in found.items():
        node.replace_all_uses_with(new)
        graph.erase_node(node)
    for node in graph.nodes:
        if node.op == "call_function" and "val" not in node.meta:  # part of a formula
            node.meta["val"] = node.target(*fx.map_arg(node.args, value_of))
    if found:
        graph.lint()
        gm.recompile()


def _fill(node: fx.Node) -> int | float | None:
    """The number that fills `node`, which has but the shape of its operand (None: it has more)."""
    if node.op != "call_function" or not is_tensor(node):
        return None
    name = op_name(node)
    given = {"full_like": node.args[1:2], "new_full": node.args[2:3]}.get(name, ())
    numbers = {"zeros_like": 0, "new_zeros": 0, "ones_like": 1, "new_ones": 1}
    value: Any = given[0] if given else numbers.get(name)
    return value if isinstance(value, int | float) else None


def _filled(tracer: Any, value: torch.Tensor, fill: float, shape: Any, strides: Any) -> fx.Node:
    """A tensor laid out like `value`, of which `fill` is each element."""

    def call(target: Any, like: torch.Tensor, *args: Any, **options: Any) -> fx.Node:
        node: fx.Node = tracer.create_node("call_function", target, args, options)
        node.meta["val"] = like
        return node

    like = value.new_empty(value.shape)
    options = {"dtype": value.dtype, "device": value.device}
    filled = call(torch.ops.aten.full.default, like, shape, fill, **options)
    if same_sizes(like.stride(), value.stride()):
        return filled
    return call(torch.ops.aten.as_strided.default, value, filled, shape, strides)
