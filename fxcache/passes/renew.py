"""Write skeletons into a graph: what of a stream a hit renews, and a miss takes away.

::

    s = add(cat(text, image), f(...)) * gate    =>    mul(cat(text, image), gate)
"""

from typing import Any

import torch
from torch import fx

from fxcache.passes.graph import op_name
from fxcache.passes.linear import passes_on
from fxcache.passes.piece_graph import PieceGraph
from fxcache.passes.skeleton import Skeleton, parts_in_order

aten = torch.ops.aten


def renewed(graph: PieceGraph, skeleton: Skeleton, dtype: torch.dtype) -> Any:
    """The value of `skeleton` in `graph`, in `dtype`, a proxy."""
    written = graph.skeletons
    for part in parts_in_order(skeleton, graph.facts):
        if part not in written:
            written[part] = graph.read(part.node) if part.is_leaf else _emit(graph, part)
    value = graph.proxy(written[skeleton])
    return value if skeleton.dtype == dtype else value.to(dtype)


def _emit(graph: PieceGraph, part: Skeleton) -> fx.Node:
    """The operation of `part` on the values of its parts, its other terms 0."""
    node, name = part.node, op_name(part.node)
    args: Any = node.args
    values = {operand: graph.skeletons[inner] for operand, inner in part.parts.items()}
    if passes_on(node) or (name in ("addmm", "baddbmm") and args[0] in values):
        return next(iter(values.values()))
    if name in ("add", "sub"):
        return _emit_sum(graph, node, values)
    if name == "addcmul":
        return _emit_addcmul(graph, node, values)
    if name == "copy":
        return graph.call_function(aten.copy.default, (graph.zeros(node), values[args[1]]))

    def argument(operand: fx.Node) -> fx.Node:
        if operand in values:
            return values[operand]
        return graph.zeros(operand) if graph.facts.depends(operand) else graph.read(operand)

    args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), argument)
    # The leaves may lie in memory otherwise than what the model took a view of.
    target: Any = aten.reshape.default if name in ("view", "_unsafe_view") else node.target
    return graph.call_function(target, args, kwargs)


def _emit_sum(graph: PieceGraph, node: fx.Node, values: dict[Any, fx.Node]) -> fx.Node:
    """``x + alpha * y``, of it the terms that are known."""
    first, second = map(values.get, node.args[:2])
    alpha: Any = node.kwargs.get("alpha", 1)
    scale = -alpha if op_name(node) == "sub" else alpha
    if second is not None and scale != 1:
        second = graph.call_function(aten.mul.Scalar, (second, scale))
    if first is None or second is None:
        return first or second  # type: ignore[return-value]
    return graph.call_function(aten.add.Tensor, (first, second))


def _emit_addcmul(graph: PieceGraph, node: fx.Node, values: dict[Any, fx.Node]) -> fx.Node:
    """``x + value * a * b``, of it the terms that are known."""
    operands: Any = node.args
    x, a, b = operands[:3]
    total, call = values.get(x), graph.call_function
    for factor, other in ((a, b), (b, a)):
        if factor in values:
            product = call(aten.mul.Tensor, (values[factor], graph.read(other)))
            if (scale := node.kwargs.get("value", 1)) != 1:
                product = call(aten.mul.Scalar, (product, scale))
            total = product if total is None else call(aten.add.Tensor, (total, product))
    assert total is not None
    return total
