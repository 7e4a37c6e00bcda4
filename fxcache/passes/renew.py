"""Write skeletons into a graph: what of a stream a hit renews, and a miss takes away.

::

    s = add(cat(text, image), f(...)) * gate    =>    mul(cat(text, image), gate)
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from fxcache.passes.facts import Facts
from fxcache.passes.graph import op_name
from fxcache.passes.linear import passes_on
from fxcache.passes.skeleton import Skeleton, parts_in_order

aten = torch.ops.aten


class Writer:
    """Writes skeletons into a graph.

    `call` writes a call of a function, `read` gives the graph's own node for one of the captured
    graph, `zeros` one of zeros like it.
    """

    def __init__(
        self,
        facts: Facts,
        call: Callable[..., fx.Node],
        read: Callable[[fx.Node], fx.Node],
        zeros: Callable[[fx.Node], fx.Node],
    ) -> None:
        self.facts, self.call, self.read, self.zeros = facts, call, read, zeros
        #: By the skeletons themselves: two may be of one node.
        self.written: dict[Skeleton, fx.Node] = {}

    def write(self, skeleton: Skeleton) -> fx.Node:
        """The node that holds the value of `skeleton`."""
        for part in parts_in_order(skeleton, self.facts):
            if part not in self.written:
                self.written[part] = self.read(part.node) if part.is_leaf else self._emit(part)
        return self.written[skeleton]

    def _emit(self, part: Skeleton) -> fx.Node:
        """The operation of `part` on the values of its parts, its other terms 0."""
        node, name = part.node, op_name(part.node)
        args: Any = node.args
        values = {operand: self.written[inner] for operand, inner in part.parts.items()}
        if passes_on(node) or (name in ("addmm", "baddbmm") and args[0] in values):
            return next(iter(values.values()))
        if name in ("add", "sub"):
            return self._emit_sum(node, name, values)
        if name == "addcmul":
            return self._emit_addcmul(node, values)
        if name == "copy":
            return self.call(aten.copy.default, (self.zeros(node), values[args[1]]))

        def argument(operand: fx.Node) -> fx.Node:
            if operand in values:
                return values[operand]
            return self.zeros(operand) if self.facts.depends(operand) else self.read(operand)

        args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), argument)
        # The leaves may lie in memory otherwise than what the model took a view of.
        target: Any = aten.reshape.default if name in ("view", "_unsafe_view") else node.target
        return self.call(target, args, kwargs)

    def _emit_sum(self, node: fx.Node, name: str, values: dict[fx.Node, fx.Node]) -> fx.Node:
        first, second = (values.get(a) if isinstance(a, fx.Node) else None for a in node.args[:2])
        call = self.call
        alpha: Any = node.kwargs.get("alpha", 1)
        scale = alpha * (-1 if name == "sub" else 1)
        if second is not None and scale != 1:
            second = call(aten.mul.Scalar, (second, scale))
        if first is None or second is None:
            return first or second  # type: ignore[return-value]
        return call(aten.add.Tensor, (first, second))

    def _emit_addcmul(self, node: fx.Node, values: dict[fx.Node, fx.Node]) -> fx.Node:
        """``x + value * a * b``, of it the terms that are known."""
        operands: Any = node.args
        x, a, b = operands[:3]
        total, call = values.get(x), self.call
        for factor, other in ((a, b), (b, a)):
            if factor in values:
                product = call(aten.mul.Tensor, (values[factor], self.read(other)))
                if (scale := node.kwargs.get("value", 1)) != 1:
                    product = call(aten.mul.Scalar, (product, scale))
                total = product if total is None else call(aten.add.Tensor, (total, product))
        assert total is not None
        return total
