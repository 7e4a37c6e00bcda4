"""Write skeletons into a graph: what of a stream a hit renews, and a miss takes away.

::

    s = add(cat(text, image), f(...)) * gate    =>    mul(cat(text, image), gate)
"""

from typing import Any

import torch
from torch import fx

from fxcache.passes.graph import op_name, tensor_of
from fxcache.passes.linear import SUMS
from fxcache.passes.piece_graph import PieceGraph
from fxcache.passes.skeleton import Skeleton, parts_in_order


def renewed(graph: PieceGraph, skeleton: Skeleton, dtype: torch.dtype) -> Any:
    """The value of `skeleton` in `graph`, in `dtype`, a proxy."""
    written = graph.skeletons
    for part in parts_in_order(skeleton, graph.facts):
        if part not in written:
            written[part] = graph.read(part.node) if part.is_leaf else _emit(graph, part)
    value = graph.proxy(written[skeleton])
    return value if tensor_of(skeleton.node).dtype == dtype else value.to(dtype)


def _emit(graph: PieceGraph, part: Skeleton) -> fx.Node:
    """The operation of `part` on the values of its parts, its other terms 0."""
    node, name = part.node, op_name(part.node)
    values = {operand: graph.skeletons[inner] for operand, inner in part.parts.items()}

    def argument(operand: fx.Node) -> fx.Node:
        if operand in values:
            return values[operand]
        if graph.facts.depends(operand):
            return graph.zeros(operand, is_broadcast=name in SUMS)
        return graph.read(operand)

    args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), argument)
    # The leaves may lie in memory otherwise than what the model took a view of.
    is_view = name in ("view", "_unsafe_view")
    target: Any = torch.ops.aten.reshape.default if is_view else node.target
    return graph.call_function(target, args, kwargs)
