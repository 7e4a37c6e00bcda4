"""The skeleton of a tensor: the part of it that a hit can renew.

::

    s = cat(text + f(text, image), image + g(text, image)) * gate      behind the span
    skeleton from the head:  cat(text, image) * gate
    residual                 r = s - cat(text, image) * gate           kept
    hit                      cat(text', image') * gate' + r

Walk from the head through what is linear in the stream: views, casts, sums, concatenations,
products with what does not depend on the sample. What arrives is a *leaf*: a value of the head, or
one that is nearly free to compute anew. Every other term counts as 0 and is left to the residual.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from torch import fx

from fxcache.passes import linear
from fxcache.passes.facts import Facts, Mask, mask_of, positions, union
from fxcache.passes.graph import (
    bytes_of,
    is_numeric,
    is_tensor,
    is_view,
    op_name,
    shape_of,
)

#: What of the graph's work a leaf may cost behind the head, a term beside the cheapest, and a layer
#: (a skip's projection, a resampling convolution) that a skeleton goes through.
CHEAP, BESIDE, LAYER = 0.03, 0.02, 0.05


@dataclass(frozen=True, eq=False)
class Skeleton:
    """What of a tensor a hit renews: `node` (a leaf: no `parts`), or what the operation of `node`
    makes of the skeletons of some operands. The skeleton of a sum of which one term is known is
    that of this term.

    `leaves` is the mask of the values of the head that its leaves are made of, `layers` that of the
    layers on the way, `share` the share of the tensor that is renewed by a sum (what is only handed
    through the tail could read by itself), `is_sum` whether there is one. `gain` is the factor of
    the leaves where it is a number (else NaN): what takes its own input away has none left.
    """

    node: fx.Node
    leaves: Mask
    parts: dict[fx.Node, "Skeleton"] = field(default_factory=dict)
    share: float = 0.0
    is_sum: bool = False
    layers: Mask = 0
    gain: float = 1.0

    @property
    def is_leaf(self) -> bool:
        return not self.parts


class Skeletons:
    """Skeletons of all that lies behind position `head`, worked out front to back."""

    def __init__(self, facts: Facts, head: int) -> None:
        self.facts, self.head = facts, head
        self.in_head = (1 << (head + 1)) - 1
        #: Heavy operations behind the head that depend on heavy ones in it: the stream's own.
        stream, behind = facts.costly & self.in_head, facts.costly & ~self.in_head
        self.own = mask_of(p for p in positions(behind) if facts.ancestors[p] & stream)
        alive = [node for node in facts.crossing(head) if is_numeric(node)]
        #: What the head computes anyway.
        self.trunk = facts.needs(alive[-1]) if alive else 0
        self.alive = {facts.position[self._root(node)] for node in alive}
        self.leaves: dict[fx.Node, Skeleton] = {}
        self.found: dict[fx.Node, Skeleton | None] = {}
        for node in facts.nodes[head + 1 : -1]:
            if facts.depends(node):
                self.found[node] = self._of(node)

    def of(self, node: fx.Node) -> Skeleton | None:
        """The skeleton of `node`, None if nothing of it can be renewed."""
        if self.facts.position[node] <= self.head:
            return self._leaf(node) if self.facts.depends(node) else None
        return self.found.get(node)

    def is_available(self, node: fx.Node) -> bool:
        """Whether a hit has `node`: it is of the head, or nearly free to compute from that."""
        behind = self.facts.needs(node) & self.facts.costly & ~self.in_head
        if not behind:
            return True
        return not behind & self.own and self.facts.flops(behind) <= CHEAP * self.facts.total

    def _leaf(self, node: fx.Node) -> Skeleton:
        if node not in self.leaves:
            # What no layer has embedded yet is no stream, if there is something that one has.
            costly = self.facts.costly
            embedded = self.facts.needs(node) & costly or not self.trunk & costly
            root = self.facts.position[self._root(node)]
            made_of = mask_of(p for p in self.alive if self.facts.ancestors[root] >> p & 1)
            leaves = made_of if root > self.head and made_of else 1 << root
            gain = 1.0 if root <= self.head else math.nan
            self.leaves[node] = Skeleton(node, leaves, share=float(bool(embedded)), gain=gain)
        return self.leaves[node]

    def _of(self, node: fx.Node) -> Skeleton | None:
        if not is_tensor(node):
            # A tuple of views is like its operand; of other tuples nothing is known.
            return self._through(node, node.all_input_nodes[0]) if is_view(node) else None
        if self.is_available(node):
            return self._leaf(node) if is_numeric(node) else None
        name = op_name(node)
        first: Any = node.args[0] if node.args else None
        if name == "copy":
            return self._through(node, node.args[1])
        if is_view(node) or name in linear.LINEAR:
            return self._simplified(node, first)
        if name == "constant_pad_nd" and (len(node.args) < 3 or not node.args[2]):
            return self._through(node, node.args[0])
        if name in linear.SUMS or (name in ("addmm", "baddbmm") and self._depends(first)):
            return self._sum(node, name)
        if name in linear.CHOICES:
            return self._choice(node, name)
        if name in ("mul", "div"):
            return self._product(node, name)
        if name in ("cat", "stack", "complex"):
            return self._joined(node)
        work = self.facts.cost[self.facts.position[node]]
        if name in linear.LAYERS and work <= LAYER * self.facts.total:
            return self._layer(node)
        if linear.passes_on(node):
            part = self._through(node, first) and self.of(first)
            return part and (part if name in linear.LIMITS else _as_sum(part))
        return None

    def _through(self, node: fx.Node, operand: Any) -> Skeleton | None:
        if not isinstance(operand, fx.Node):
            return None
        others = (n for n in node.all_input_nodes if n is not operand)
        if op_name(node) != "copy" and any(map(self.facts.depends, others)):
            return None  # an index, a factor
        part = self.of(operand)
        sign = -1.0 if op_name(node) == "neg" else 1.0
        return part and replace(part, node=node, parts={operand: part}, gain=sign * part.gain)

    def _layer(self, node: fx.Node) -> Skeleton | None:
        """A product or a convolution with a weight is linear, too."""
        factors = node.args[1:3] if op_name(node) == "addmm" else node.args[:2]
        part = next((self._through(node, f) for f in factors if self._depends(f)), None)
        own = 1 << self.facts.position[node]
        return part and replace(part, layers=part.layers | own, gain=math.nan)

    def _simplified(self, node: fx.Node, operand: Any) -> Skeleton | None:
        """The skeleton of a slice of a concatenation is that of the part that it takes."""
        inner = self._through(node, operand)
        if inner is None:
            return None
        joined = inner.parts[operand]
        if not joined.is_leaf and op_name(joined.node) in ("cat", "stack"):
            if op_name(node) in ("sum", "mean"):
                return replace(inner, share=1.0, is_sum=True)
            part = linear.part_taken(node, joined.node) if op_name(node) == "slice" else None
            if part is not None:
                return joined.parts.get(part)
        return inner

    def _sum(self, node: fx.Node, name: str) -> Skeleton | None:
        """Terms of the sum's own size. The leaves of one must feed the work that is added to it."""
        terms = linear.terms_of(node, self._depends)
        found = self._known(t for t in terms if shape_of(t) == shape_of(node))
        if name in ("add", "sub") and len(found) == 2:
            one, other = found.values()
            alpha: Any = node.kwargs.get("alpha", 1)
            gain = one.gain + (alpha if name == "add" else -alpha) * other.gain
            if one.leaves & other.leaves and gain == 0:
                return None  # what a block adds: its result without its input
        found = self._without_costly(found)
        if not any(self._feeds_work(part, node) for part in found.values()):
            return None
        if len(found) == 1 and linear.is_as_it_is(node, *found):
            return _as_sum(*found.values())
        return _as_sum(_made(node, found, max(part.share for part in found.values())))

    def _choice(self, node: fx.Node, name: str) -> Skeleton | None:
        """Term by term, each for its own elements."""
        places = {"where": (1, 2), "index_put": (0, 2)}.get(name, (0, 1))
        args: Any = node.args
        base, other = (args[place] for place in places)
        rest = [n for n in node.all_input_nodes if n is not base and n is not other]
        if any(map(self.facts.depends, rest)):
            return None  # which elements
        found = self._known((base, other))
        if not found:
            return None
        of_other = 0.5 if name == "where" else bytes_of(other) / max(1, bytes_of(node))
        shares = {base: 1 - of_other, other: of_other}
        share = sum(shares[t] * part.share for t, part in found.items())
        return replace(_made(node, found, share), gain=math.nan)

    def _without_costly(self, found: dict[fx.Node, Skeleton]) -> dict[fx.Node, Skeleton]:
        """`found` without terms that cost a branch of their own, and without layers of what another
        term brings as it is: these are left to the residual.
        """
        if len(found) < 2:
            return found
        direct = union(part.leaves for part in found.values() if not part.layers)
        found = {t: p for t, p in found.items() if not p.layers or p.leaves & ~direct}
        closure = self.facts.closure
        costs = {t: closure(part.leaves) & ~self.trunk for t, part in found.items()}
        cheapest = min(found, key=lambda t: self.facts.flops(costs[t]))
        limit = BESIDE * self.facts.total
        return {
            t: part
            for t, part in found.items()
            if t is cheapest or self.facts.flops(costs[t] & ~costs[cheapest]) <= limit
        }

    def _known(self, operands: Iterable[Any]) -> dict[fx.Node, Skeleton]:
        """Those of `operands` of which something can be renewed."""
        nodes = (n for n in operands if isinstance(n, fx.Node))
        return {node: part for node in nodes if (part := self.of(node)) is not None}

    def _depends(self, operand: Any) -> bool:
        return isinstance(operand, fx.Node) and self.facts.depends(operand)

    def _feeds_work(self, part: Skeleton, total: fx.Node) -> bool:
        """Whether a leaf of `part` is read by a heavy operation that `total` adds to it.

        A control's hint or a position table is added, and feeds nothing before: it is no stream.
        """
        facts = self.facts
        work = facts.needs(total) & facts.costly
        return any(facts.ancestors[p] & ~(1 << p) & part.leaves for p in positions(work))

    def _root(self, leaf: fx.Node) -> fx.Node:
        """The tensor that `leaf` is a slice, a view or a cast of. (Parts of an input are two.)"""
        while leaf.op == "call_function" and leaf.args and isinstance(leaf.args[0], fx.Node):
            if not (is_view(leaf) or op_name(leaf) in ("clone", "_to_copy")):
                break
            source = leaf.args[0]
            is_part = source.op == "placeholder" and shape_of(source) != shape_of(leaf)
            if is_part or not self.facts.depends(source):
                break
            leaf = source
        return leaf

    def _product(self, node: fx.Node, name: str) -> Skeleton | None:
        """With one factor that does not depend on the sample; or a quotient by such a one."""
        factors = [a for a in node.args[:2] if self._depends(a)]
        if len(factors) != 1 or shape_of(factors[0]) != shape_of(node):
            return None
        if name == "div" and factors[0] is not node.args[0]:
            return None
        part = self._through(node, factors[0])
        other = node.args[1] if factors[0] is node.args[0] else node.args[0]
        factor = float(other) if isinstance(other, int | float) else math.nan
        return part and replace(
            part, gain=part.gain * factor if name == "mul" else part.gain / factor
        )

    def _joined(self, node: fx.Node) -> Skeleton | None:
        """Part by part."""
        operands = [a for a in node.all_input_nodes if is_tensor(a)]
        found = self._known(operands)
        if not found:
            return None
        is_sum = any(part.is_sum for part in found.values())
        # Where nothing was added: for sums of stacks, and slices of them.
        renewed = sum(
            bytes_of(a) * part.share for a, part in found.items() if part.is_sum or not is_sum
        )
        return _made(node, found, renewed / max(1, sum(map(bytes_of, operands))))


def _as_sum(part: Skeleton) -> Skeleton:
    return part if part.is_sum else replace(part, is_sum=True)


def _made(node: fx.Node, found: dict[fx.Node, Skeleton], share: float) -> Skeleton:
    """The skeleton of what `node` makes of the operands `found`."""
    parts = list(found.values())
    return Skeleton(
        node,
        union(part.leaves for part in parts),
        found,
        share,
        any(part.is_sum for part in parts),
        union(part.layers for part in parts),
        parts[0].gain if len(parts) == 1 else math.nan,
    )


def reads(skeleton: Skeleton, facts: Facts) -> list[fx.Node]:
    """The nodes whose values the skeleton is made of."""
    found: dict[fx.Node, None] = {}
    for part in parts_in_order(skeleton, facts):
        others = (n for n in part.node.all_input_nodes if not facts.depends(n))
        found.update(dict.fromkeys([part.node] if part.is_leaf else others))
    return list(found)


def parts_in_order(skeleton: Skeleton, facts: Facts) -> list[Skeleton]:
    """All parts of `skeleton`, operands first. (Deep models have long ones: no recursion.)"""
    parts: dict[Skeleton, None] = {}
    todo = [skeleton]
    while todo:
        part = todo.pop()
        if part not in parts:
            parts[part] = None
            todo.extend(part.parts.values())
    return sorted(parts, key=lambda part: facts.position[part.node])
