"""What the passes know of a graph: what depends on the sample, what costs how much, what is alive.

Sets of nodes are bit masks over positions: one integer each, so that "all ancestors of" is one
number a node and costs one `or` an edge.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property, reduce
from itertools import accumulate
from operator import or_
from typing import Any

import torch
from torch import fx
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from fxcache.errors import StackNotFoundError
from fxcache.passes.graph import (
    GraphInputs,
    bytes_of,
    hint,
    is_numeric,
    is_tensor,
    is_view,
    numel_of,
    op_name,
    outputs_of,
    shape_of,
    value_of,
)

#: Names that denoisers give to their noisy input, most common first.
SAMPLE_NAMES = ("hidden_states", "sample", "latent", "latents", "x", "x_t", "img", "z", "noisy")

_HEAVY = re.compile(
    r"(^|_)(mm|bmm|addmm|baddbmm|matmul|linear|conv(olution)?[123]?d?|attention|attn|rnn|lstm|gru)"
    r"(_|$)|scaled_dot_product|multi_head|transformer_encoder|int8pack|fast_path"
)

#: A tensor with less than this of the largest one's bytes does not tell what a cut is worth.
MAIN = 0.2

Mask = int


def is_heavy(node: fx.Node) -> bool:
    """Whether `node` is a matrix product, a convolution or an attention."""
    return node.op == "call_function" and bool(_HEAVY.search(op_name(node)))


def word_of(node: fx.Node) -> tuple[Any, ...]:
    """What a heavy node does: its name and the shapes of its operands."""
    return (op_name(node), *(shape_of(operand) for operand in node.all_input_nodes))


def positions(mask: Mask) -> Iterator[int]:
    """The positions in `mask`, falling."""
    bits = bin(mask)[:1:-1]
    p = bits.rfind("1")
    while p >= 0:
        yield p
        p = bits.rfind("1", 0, p)


@dataclass(frozen=True)
class Facts:
    """A graph and what was found out about it.

    `samples` are the noisy inputs. `position` is a node's place in the graph, `operands[p]` are the
    places of what the node at p reads, `ancestors[p]` the
    mask of what the node at p needs, itself included. `dependent` is the mask of what depends on
    the sample. `base` collapses views, `last_read` is where a tensor or a view of it is read last.
    `cost[p]` are the FLOPs of the node at p, 0 for what does
    not depend on the sample; `work[p]` their sum up to and with p. `width[p]` are the bytes of the
    sample-dependent tensors that were computed at or before p and are used later.
    """

    graph: fx.Graph
    inputs: GraphInputs
    nodes: tuple[fx.Node, ...]
    position: dict[fx.Node, int]
    samples: tuple[fx.Node, ...]
    outputs: tuple[fx.Node, ...]
    operands: tuple[tuple[int, ...], ...]
    ancestors: tuple[Mask, ...]
    dependent: Mask
    base: dict[fx.Node, fx.Node]
    last_read: dict[fx.Node, int]
    last_use: tuple[int, ...]
    cost: tuple[int, ...]
    work: tuple[int, ...]
    width: tuple[int, ...]
    heavy: tuple[int, ...]

    @property
    def total(self) -> int:
        """The graph's sample-dependent FLOPs."""
        return self.work[-1]

    @cached_property
    def costly(self) -> Mask:
        """The nodes with a cost."""
        return mask_of(p for p in self.heavy if self.cost[p])

    @cached_property
    def main_outputs(self) -> tuple[fx.Node, ...]:
        """The outputs that follow the sample and have its layout, or not much less memory than the
        largest. (Features may be returned, too, which have more of it than what is predicted.)
        """
        given = [node for node in self.outputs if self.depends(node)]
        shapes = [shape_of(node) or () for node in self.samples]
        least = MAIN * max(map(bytes_of, given), default=0)
        return tuple(
            node for node in given
            if bytes_of(node) >= least or any(_is_near(shape_of(node) or (), s) for s in shapes)
        )  # fmt: skip

    def depends(self, node: fx.Node) -> bool:
        """Whether `node` depends on the sample."""
        return bool(self.dependent >> self.position[node] & 1)

    def needs(self, node: fx.Node) -> Mask:
        """All that `node` needs, itself included."""
        return self.ancestors[self.position[node]]

    def flops(self, mask: Mask) -> int:
        """The sample-dependent FLOPs of the nodes in `mask`."""
        return sum(self.cost[p] for p in positions(mask & self.costly))

    def mask(self, nodes: Iterable[fx.Node]) -> Mask:
        return mask_of(self.position[node] for node in nodes)

    def closure(self, mask: Mask) -> Mask:
        """All that the nodes of `mask` need, themselves included."""
        return union(self.ancestors[p] for p in positions(mask))

    def descendants(self, mask: Mask) -> Mask:
        """The nodes that need one of `mask`, without those of `mask` that do not need another."""
        return mask_of(p for p in range(len(self.nodes)) if self.ancestors[p] & ~(1 << p) & mask)

    def crossing(self, p: int) -> list[fx.Node]:
        """What depends on the sample, was computed at or before `p` and is read after it."""
        return [
            node
            for q, node in enumerate(self.nodes[: p + 1])
            if self.last_use[q] > p and self.dependent >> q & 1 and node.op != "placeholder"
        ]

    def in_order(self, mask: Mask) -> list[fx.Node]:
        """The nodes of `mask` that compute, in recorded order."""
        return [
            node
            for p, node in enumerate(self.nodes)
            if mask >> p & 1 and node.op not in ("placeholder", "output", "get_attr")
        ]


def union(masks: Iterable[Mask]) -> Mask:
    return reduce(or_, masks, 0)


def mask_of(places: Iterable[int]) -> Mask:
    chosen = sorted(places)
    data = bytearray(chosen[-1] // 8 + 1 if chosen else 0)
    for p in chosen:
        data[p >> 3] |= 1 << (p & 7)
    return int.from_bytes(data, "little")


def analyse(graph: fx.Graph, inputs: GraphInputs) -> Facts:
    """Find out about `graph`.

    Raises StackNotFoundError if no input looks like a noisy sample, or nothing that depends on one
    is worth skipping.
    """
    nodes = tuple(graph.nodes)
    position = {node: p for p, node in enumerate(nodes)}
    outputs = _outputs(graph, inputs)
    samples = find_samples(outputs, inputs)
    dependent = mask_of(position[sample] for sample in samples)
    operands = tuple(tuple(position[n] for n in node.all_input_nodes) for node in nodes)
    ancestors: list[Mask] = []
    last_use = [-1] * len(nodes)
    for p, read in enumerate(operands):
        mask = 1 << p
        for operand in read:
            mask |= ancestors[operand]
            last_use[operand] = p
        ancestors.append(mask)
        # A size is no matter of what the sample holds.
        if not isinstance(value_of(nodes[p]), torch.SymInt | int) and any(
            dependent >> operand & 1 for operand in read
        ):
            dependent |= 1 << p
    base: dict[fx.Node, fx.Node] = {}
    last_read: dict[fx.Node, int] = {}
    for p, node in enumerate(nodes):
        base[node] = base[node.all_input_nodes[0]] if is_view(node) else node
        last_read |= {base[operand]: p for operand in node.all_input_nodes}
    cost = _costs(nodes, dependent)
    work = tuple(accumulate(cost))
    if not work[-1]:
        raise StackNotFoundError(
            f"nothing in this graph of {len(nodes)} nodes that depends on "
            f"{' or '.join(inputs.paths.get(s, s.name) for s in samples)} is a matrix product, a "
            f"convolution or an attention"
        )
    return Facts(
        graph,
        inputs,
        nodes,
        position,
        samples,
        outputs,
        operands,
        tuple(ancestors),
        dependent,
        base,
        last_read,
        tuple(last_use),
        cost,
        work,
        _widths(position, last_read, dependent),
        tuple(p for p, node in enumerate(nodes) if is_heavy(node)),
    )


def _outputs(graph: fx.Graph, inputs: GraphInputs) -> tuple[fx.Node, ...]:
    """What the caller gets: numeric tensors that the graph computes and returns."""
    written = set(inputs.written.values())
    given = (node for node in outputs_of(graph) if is_numeric(node) and node.op != "placeholder")
    return tuple(dict.fromkeys(node for node in given if node not in written))


def find_samples(outputs: Iterable[fx.Node], inputs: GraphInputs) -> tuple[fx.Node, ...]:
    """The noisy inputs: for each output the input of its layout, else the input most like it.

    Of several, the one with the most usual name; a list of tensors counts as one input. A sample
    that was joined with a condition has more channels than the output, but its usual name.

    Raises StackNotFoundError if no input is one.
    """
    given = [node for node in inputs.data if is_numeric(node)]
    # Noisy tokens are whole numbers, and the only input with a sequence.
    tokens = [n for n in inputs.data if is_tensor(n) and tensor_rank(n) >= 2]
    tensors = [node for node in given if tensor_rank(node) >= 2] or tokens or given
    if not tensors:
        raise StackNotFoundError(
            f"no input looks like a noisy sample: the inputs are {list(inputs.data.values())}"
        )

    def preference(node: fx.Node) -> int:
        root = inputs.paths.get(node, node.name).partition(".")[0]
        for rank, name in enumerate(SAMPLE_NAMES):
            if root == name or root.startswith(f"{name}_"):
                return rank
        return len(SAMPLE_NAMES)

    found: dict[fx.Node, None] = {}
    for output in outputs:
        shape = shape_of(output)
        alike = [n for n in tensors if shape_of(n) == shape]
        if alike and min(map(preference, alike)) == len(SAMPLE_NAMES):
            near = [n for n in tensors if _is_near(shape_of(n) or (), shape or ())]
            alike = [n for n in near if preference(n) < len(SAMPLE_NAMES)] or alike
        if alike:
            found[min(alike, key=preference)] = None
    if not found:
        shapes = [shape_of(output) or () for output in outputs]
        near = [n for n in tensors if any(_is_near(shape_of(n) or (), s) for s in shapes)]
        pool = near or [n for n in tensors if preference(n) < len(SAMPLE_NAMES)] or tensors
        found[min(pool, key=lambda n: (preference(n), -numel_of(n)))] = None
    roots = {inputs.paths[n].partition(".")[0] for n in found if "." in inputs.paths.get(n, "")}
    for node in tensors:  # the other elements of a list
        root, _, rest = inputs.paths.get(node, "").partition(".")
        if root in roots and rest.isdigit():
            found[node] = None
    return tuple(found)


def tensor_rank(node: fx.Node) -> int:
    return len(shape_of(node) or ())


def _is_near(shape: tuple[int, ...], output: tuple[int, ...]) -> bool:
    """Whether the two differ in one dimension at most: channels that were added or doubled."""
    differing = sum(m != n for m, n in zip(shape, output, strict=False))
    return len(shape) == len(output) >= 3 and differing <= 1


def _costs(nodes: tuple[fx.Node, ...], dependent: Mask) -> tuple[int, ...]:
    """FLOPs by position. Equal words cost the same, so each is counted once."""
    known: dict[Any, int] = {}
    costs = [0] * len(nodes)
    for p, node in enumerate(nodes):
        if dependent >> p & 1 and is_heavy(node):
            word = word_of(node)
            if word not in known:
                known[word] = node_flops(node)
            costs[p] = known[word]
    return tuple(costs)


def node_flops(node: fx.Node) -> int:
    """FLOPs of a heavy node, as torch counts them; about, where it does not know the operation."""

    def meta(argument: fx.Node) -> Any:
        value = value_of(argument)
        if is_tensor(argument):
            return torch.empty(shape_of(argument) or (), dtype=value.dtype, device="meta")
        return hint(value) if isinstance(value, torch.SymInt) else value

    args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), meta)
    call: Any = node.target
    try:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            call(*args, **kwargs)
        if total := counter.get_total_flops():
            return int(total)
    except Exception:  # noqa: BLE001 - what cannot run by itself is estimated
        pass
    results = [leaf for leaf in tree_leaves(value_of(node)) if isinstance(leaf, torch.Tensor)]
    size = max((torch.Size(map(hint, leaf.shape)).numel() for leaf in results), default=0)
    shapes = (shape_of(operand) or () for operand in node.all_input_nodes)
    inner = next((shape[-1] for shape in shapes if len(shape) >= 2), 1)
    return 2 * size * inner


def _widths(
    position: dict[fx.Node, int], last_read: dict[fx.Node, int], dependent: Mask
) -> tuple[int, ...]:
    """Bytes alive behind each position. Inputs of the graph cost nothing to keep. A whole number
    counts as the float that it was: where a tensor was quantized for a product is no narrow place.
    """
    change = [0] * len(position)
    for node, end in last_read.items():
        if node.op != "placeholder" and dependent >> position[node] & 1:
            size = bytes_of(node) if is_numeric(node) else 4 * numel_of(node)
            change[position[node]] += size
            change[end] -= size
    return tuple(accumulate(change))
