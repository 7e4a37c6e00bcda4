"""Cut a captured graph at its block stack: head, span and tail, and the streams that cross.

::

    inputs -> [head: embeddings, head blocks] -> [span: blocks] -> [tail: tail blocks, projection]

The *head* is what both ways out need and what does not depend on the span. What only the span
needs is part of the span, wherever it was recorded (a text stream's last projection in a head
block, a control branch): a hit skips it too. The *tail* is what depends on the span, and what only
the tail needs.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import fx

from fxcache.capture import (
    GraphInputs,
    fake_tensor,
    fake_value,
    is_stream_like,
    is_unbacked,
    same_layout,
    tensor_of,
)
from fxcache.dataflow import (
    DataFlow,
    is_context,
    op_name,
    residual_path,
    split_writes,
    storages,
    writes_in_place,
    written_storages,
)
from fxcache.errors import CaptureError, PolicyError, StackNotFoundError
from fxcache.passes.probe import Probe, find_head_residual, find_input_probe
from fxcache.policy.base import Span
from fxcache.policy.probe import HeadResidual, ProbeKind
from fxcache.stack import Block, Stack

_SLICES = {"getitem", "narrow", "chunk", "split", "unbind", "tensor_split", "select", "slice"}


@dataclass(frozen=True)
class Stream:
    """A tensor that leaves the span (`after`) and the tensor that it continues (`before`).

    `before` is None for one that continues none: it is cached as it is, not as a residual.
    """

    after: fx.Node
    before: fx.Node | None


@dataclass(frozen=True)
class Cut:
    """Roles of a graph's nodes (each in recorded order) and what crosses between them.

    `constants` leave the span but are no streams: numbers, and tensors that are not floating. They
    are kept as they are. `stack` is None if the span is the whole model, whatever it is made of.
    `probe` is None if nothing is measured. `snapshots` are tensors of the
    head that are needed as they were before somebody overwrote them, each with the node after which
    it is complete.
    """

    stack: Stack | None
    span_blocks: tuple[Block, ...]
    head: tuple[fx.Node, ...]
    span: tuple[fx.Node, ...]
    tail: tuple[fx.Node, ...]
    streams: tuple[Stream, ...]
    constants: tuple[fx.Node, ...]
    probe: Probe | None
    snapshots: dict[fx.Node, fx.Node]
    timestep: fx.Node | None

    @property
    def skipped_share(self) -> float:
        """About which share of the graph's FLOPs a hit skips, 0 to 1."""
        if self.stack is None:
            return 1.0
        skipped = sum(block.flops for block in self.span_blocks)
        return skipped / self.stack.graph_flops if self.stack.graph_flops else 0.0

    def describe(self) -> str:
        """What the span is."""
        if self.stack is None:
            return "the span is the whole model"
        return (
            f"stack {self.stack}; {len(self.span_blocks)} of {len(self.stack.blocks)} blocks in "
            f"the span"
        )


def cut(
    graph: fx.Graph,
    stack: Stack,
    flow: DataFlow,
    inputs: GraphInputs,
    *,
    span: Span,
    probe: ProbeKind | None,
) -> Cut:
    """Divide `graph` at `stack`, with the head and tail blocks of `span` left outside of it.

    `probe` is what is measured; if nothing is, the head is only what the predictor and the tail
    need.

    Raises PolicyError if that leaves no span, CaptureError if the span writes in place into a
    tensor of the head that the tail reads, or if there is nothing like `probe`.
    """
    head_blocks, blocks = span.head_blocks, stack.blocks
    span_blocks = blocks[head_blocks : len(blocks) - span.tail_blocks]
    if not span_blocks:
        raise PolicyError(
            f"head_blocks={head_blocks} and tail_blocks={span.tail_blocks} leave no span: the "
            f"stack {stack} has {len(blocks)} blocks, so head_blocks + tail_blocks must be at most "
            f"{len(blocks) - 1}"
        )
    found = early_probe(graph, stack, flow, inputs, probe)
    early = flow.ancestors(found.nodes) | set(found.nodes) if found is not None else set()
    core = _core(span_blocks, early)
    # What is measured early belongs to its block all the same: no stream begins there.
    own = early.intersection(node for block in span_blocks for node in block.nodes)
    after_core = flow.descendants(core)
    inner = core | (after_core & flow.ancestors(core))
    first = set(span_blocks[0].nodes)
    moving = (
        flow.descendants(n for b in blocks[:head_blocks] for n in b.nodes) if head_blocks else None
    )

    def partner(node: fx.Node) -> fx.Node | None:
        return _partner(node, inner | own, after_core, first, moving, flow)

    inner |= _absorbed(inner, partner)
    leaving = [n for n in inner if any(user not in inner for user in n.users)]
    leaving.sort(key=flow.position.__getitem__)
    streams = tuple(Stream(node, partner(node)) for node in leaving if is_floating(node))
    tail = (after_core | flow.descendants(inner)) - inner
    _check_writes(flow, inner, tail)
    if not streams:
        raise StackNotFoundError(f"the stack {stack} was found, but nothing reads its result")
    befores = [stream.before for stream in streams if stream.before is not None]
    if isinstance(probe, HeadResidual):
        found = find_head_residual(graph, stack, befores, flow, inputs, head_blocks, inner, tail)
    starts = set(blocks[0].nodes)
    needed, snapshots = kept_nodes(starts, befores, found, flow, inner | tail)
    head, sunk, late = _place_rest(graph, flow, inner, tail, needed)
    return Cut(
        stack=stack,
        span_blocks=span_blocks,
        head=ordered(head, flow),
        span=ordered(inner | sunk, flow),
        tail=ordered(tail | late, flow),
        streams=streams,
        constants=tuple(node for node in leaving if not is_floating(node)),
        probe=found,
        snapshots=snapshots,
        timestep=inputs.timestep,
    )


def early_probe(
    graph: fx.Graph,
    stack: Stack | None,
    flow: DataFlow,
    inputs: GraphInputs,
    kind: ProbeKind | None,
) -> Probe | None:
    """The probe, where it does not depend on the span."""
    if kind is None or isinstance(kind, HeadResidual):
        return None
    return find_input_probe(graph, stack, flow, inputs, kind)


def is_floating(node: fx.Node) -> bool:
    value = fake_tensor(node)
    return value is not None and (value.is_floating_point() or value.is_complex())


def _core(blocks: tuple[Block, ...], early: set[fx.Node]) -> set[fx.Node]:
    """The nodes of `blocks` but for the `early` ones, which run before it is known whether the span
    does, and but for elements of tuples made outside: only tensors can cross.
    """
    core = {node for block in blocks for node in block.nodes} - early
    return {node for node in core if _tuple_source(node) in core | {None}}


def _tuple_source(node: fx.Node) -> fx.Node | None:
    """The node whose tuple value `node` takes an element of, None if it does not."""
    if op_name(node) != "getitem" or not isinstance(node.args[0], fx.Node):
        return None
    return node.args[0] if isinstance(fake_value(node.args[0]), tuple | list) else None


def ordered(nodes: Iterable[fx.Node], flow: DataFlow) -> tuple[fx.Node, ...]:
    computing = (
        node
        for node in nodes
        if node.op not in ("placeholder", "output", "get_attr") and not is_context(node)
    )
    return tuple(sorted(computing, key=flow.position.__getitem__))


def _partner(
    node: fx.Node,
    span: set[fx.Node],
    after_core: set[fx.Node],
    first: set[fx.Node],
    moving: set[fx.Node] | None,
    flow: DataFlow,
) -> fx.Node | None:
    """The tensor before the span that `node` continues.

    Same layout, and joined to it by the residual path; where no residual path leads out of the
    span (blocks that end with a norm), the newest stream that the span's first block reads.
    `moving` are the nodes that depend on the head blocks (None: there are none).
    """
    entering = {
        operand
        for inner in span
        for operand in inner.all_input_nodes
        if operand not in span
        and operand not in after_core
        and same_layout(operand, node, unbacked=True)
        and (moving is None or operand in moving)
        and not isinstance(fake_tensor(operand), torch.nn.Parameter)
    }
    joined = residual_path(node, entering)
    if not joined:
        joined = {
            operand
            for operand in entering
            if same_layout(operand, node) and any(user in first for user in operand.users)
        }

    def preference(operand: fx.Node) -> tuple[bool, bool, int]:
        is_static = not any(is_unbacked(size) for size in tensor_of(operand).shape)
        return same_layout(operand, node), is_static, flow.position[operand]

    return max(joined, key=preference, default=None)


def _absorbed(span: set[fx.Node], partner: Callable[[fx.Node], fx.Node | None]) -> set[fx.Node]:
    """Nodes right after the span that belong in it.

    Elements of a tuple that leaves the span, since only tensors can be cached; and slices of a
    tensor without a partner, if the slices have one (the image tokens of a joint sequence): so the
    text stream dies in the span and is not cached.
    """
    absorbed: set[fx.Node] = set()
    for node in list(span):
        outside = [user for user in node.users if user not in span]
        if not outside:
            continue
        if isinstance(fake_value(node), tuple | list):
            absorbed.update(outside)
        elif is_stream_like(node) and partner(node) is None:
            slices = _slices_of(node, span)
            if slices is not None and any(partner(piece) is not None for piece in slices):
                absorbed.update(slices)
    return absorbed


def _slices_of(node: fx.Node, span: set[fx.Node]) -> set[fx.Node] | None:
    """All that the rest of the graph makes of `node`, if it only slices it; None if it does not."""
    slices: set[fx.Node] = set()
    for user in node.users:
        if user in span:
            continue
        if user.op == "output" or op_name(user) not in _SLICES:
            return None
        slices.add(user)
        if not isinstance(fake_value(user), torch.Tensor):
            elements = set(user.users)
            if any(op_name(element) != "getitem" for element in elements):
                return None
            slices |= elements
    return slices


def _check_writes(flow: DataFlow, span: set[fx.Node], tail: set[fx.Node]) -> None:
    """Refuse a span that writes into a tensor from before it which the tail reads afterwards."""
    for writer in span:
        written = written_storages(writer)
        for reader in flow.sinks[writer] if written else ():
            for operand in reader.all_input_nodes:
                from_head = operand not in span and operand not in tail
                if reader in tail and from_head and storages(operand) & written:
                    raise CaptureError(
                        f"the block stack writes in place ({writer.format_node()}) into {operand}, "
                        f"which is read after the stack ({reader.format_node()}): a hit would skip "
                        f"the write. Let the block return a new tensor."
                    )


def kept_nodes(
    first: set[fx.Node],
    befores: list[fx.Node],
    probe: Probe | None,
    flow: DataFlow,
    behind: set[fx.Node],
) -> tuple[set[fx.Node], dict[fx.Node, fx.Node]]:
    """What is measured and added to: all that computes it, and what is overwritten later on.

    `first` are the nodes of the first block, `behind` those of span and tail.
    """
    kept = [*befores, *(probe.nodes if probe is not None else [])]
    needed, snapshots = set(kept), {}
    for node in kept:
        is_start = probe is not None and node is probe.before
        readers = behind | first if is_start else behind
        completing, overwriting = split_writes(flow, node, readers)
        needed.update(completing)
        if overwriting:
            snapshots[node] = completing[-1] if completing else node
    return needed, snapshots


def _place_rest(
    graph: fx.Graph,
    flow: DataFlow,
    span: set[fx.Node],
    tail: set[fx.Node],
    kept: set[fx.Node],
) -> tuple[set[fx.Node], set[fx.Node], set[fx.Node]]:
    """Sort the nodes that do not depend on the span: head, only for the span, only for the tail."""
    rest = set(graph.nodes) - span - tail
    needed = kept | {node for node in rest if _has_effect(node, flow)}

    def feeding(nodes: set[fx.Node]) -> set[fx.Node]:
        direct = {source for node in nodes for source in flow.sources[node] if source in rest}
        return direct | flow.ancestors(direct)

    wanted = {node for node in needed if node in rest}
    for_span, for_tail = feeding(span), feeding(tail)
    head = wanted | flow.ancestors(wanted) | (for_span & for_tail)
    head |= {node for node in rest if _tuple_source(node) in head}
    return head, for_span - head, for_tail - head


def _has_effect(node: fx.Node, flow: DataFlow) -> bool:
    """Whether running `node` is seen from outside the graph, also if nobody reads its result."""
    if node.op in ("placeholder", "output", "get_attr") or is_context(node):
        return False
    if not writes_in_place(node):
        return node.is_impure()
    given = {n for n in flow.position if n.op in ("placeholder", "get_attr")}
    return any(storages(n) & written_storages(node) for n in given)
