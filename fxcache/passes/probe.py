"""Find what is measured: a tensor of the captured graph, by what it is and not by its name."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from fxcache.capture import (
    GraphInputs,
    fake_tensor,
    fake_value,
    is_stream_like,
    same_layout,
    same_size,
    tensor_of,
)
from fxcache.dataflow import DataFlow, op_name, residual_path
from fxcache.errors import CaptureError, StackNotFoundError
from fxcache.policy.probe import (
    FilteredInput,
    HeadResidual,
    ModulatedInput,
    ProbeKind,
    TimeEmbedding,
)
from fxcache.stack import Stack, block_inputs, is_heavy

#: Operations of whose operands all but the first say only what the result is like.
_LIKE = {"type_as", "to", "expand_as", "view_as", "reshape_as"}


@dataclass(frozen=True)
class Probe:
    """What is measured: the residual `after - before`, or `after` alone if `before` is None.

    `axes` are those along which a `FilteredInput` is filtered.
    """

    kind: ProbeKind
    after: fx.Node
    before: fx.Node | None = None
    axes: tuple[int, ...] = ()

    @property
    def nodes(self) -> list[fx.Node]:
        return [self.after] if self.before is None else [self.after, self.before]


def find_input_probe(
    graph: fx.Graph, stack: Stack | None, flow: DataFlow, inputs: GraphInputs, kind: ProbeKind
) -> Probe:
    """The probe of a `kind` that does not depend on the span.

    Raises CaptureError if the graph has none.
    """
    if isinstance(kind, TimeEmbedding):
        return Probe(kind, _time_layer(graph, stack, flow, inputs, kind.layer))
    sample = sample_input(graph, inputs)
    if sample is None:
        raise CaptureError(f"{kind} measures the model's noisy input, and no input looks like one")
    if isinstance(kind, ModulatedInput):
        if stack is None:
            raise CaptureError(f"{kind} is read by the first block, and there is no block stack")
        return Probe(kind, _modulated_input(stack, flow, sample))
    if isinstance(kind, FilteredInput):
        if inputs.timestep is None:
            raise CaptureError(f"{kind} needs the noise level, and the model shows no time input")
        return Probe(kind, sample, axes=_frequency_axes(sample, flow))
    return Probe(kind, sample)


def _modulated_input(stack: Stack, flow: DataFlow, sample: fx.Node) -> fx.Node:
    """What the first heavy node of the first block reads of the image stream."""
    block = stack.blocks[0]
    entering = block_inputs(block)
    noisy = flow.descendants([sample]) | {sample}
    streams = [node for node in entering if node in noisy] or entering
    reached = {max(streams, key=lambda node: (_numel(node), flow.position[node]))}
    for node in sorted(block.nodes, key=flow.position.__getitem__):
        read = [operand for operand in node.all_input_nodes if operand in reached]
        if read and is_heavy(node) and is_stream_like(read[0]):
            return read[0]
        if read:
            reached.add(node)
    raise CaptureError(f"no layer of the first block, {block.path}, reads the image stream")


def _time_layer(
    graph: fx.Graph, stack: Stack | None, flow: DataFlow, inputs: GraphInputs, layer: int
) -> fx.Node:
    """The result of layer `layer` (from 0) of those outside the blocks that read the time only."""
    inside = {node for block in stack.blocks for node in block.nodes} if stack else set()
    layers: list[fx.Node] = []
    for node in graph.nodes:
        if not is_heavy(node) or node in inside or not is_stream_like(node):
            continue
        if _given(node) & set(inputs.data) == {inputs.timestep}:
            layers.append(node)
    if layer >= len(layers):
        raise CaptureError(
            f"the model has {len(layers)} layer(s) that depend on the time input alone, so there "
            f"is no layer {layer} of them to measure"
        )
    return layers[layer]


def _given(node: fx.Node) -> set[fx.Node]:
    """The placeholders whose values `node` depends on: not those that only lend a dtype or size."""
    seen: set[fx.Node] = set()
    todo = [node]
    while todo:
        current = todo.pop()
        if current in seen or not isinstance(fake_value(current), torch.Tensor):
            continue
        seen.add(current)
        operands = current.all_input_nodes
        todo += operands[:1] if op_name(current) in _LIKE else operands
    return {found for found in seen if found.op == "placeholder"}


def _frequency_axes(sample: fx.Node, flow: DataFlow) -> tuple[int, ...]:
    """Height, width and frames of pictures and videos; of tokens or sound, the sequence: all axes
    but the samples' and the channels'.
    """
    axes = tensor_of(sample).ndim
    channels = _channel_axis(sample, _first_layer(sample, flow))
    return tuple(axis for axis in range(1, axes) if axis != channels) or (axes - 1,)


def _channel_axis(sample: fx.Node, layer: fx.Node | None) -> int:
    """The axis whose elements the first `layer` takes together: as many as it has inputs, or (of
    patches) a divisor of them.
    """
    shape, weights = tensor_of(sample).shape, [] if layer is None else layer.all_input_nodes[1:]
    if len(shape) == 3:
        return 1 if layer is not None and "conv" in op_name(layer) else 2
    taken = next((tensor_of(w).shape[1] for w in weights if is_stream_like(w)), None)
    fitting = [axis for axis in (1, 2) if axis < len(shape) and same_size(shape[axis], taken or 0)]
    parts = [axis for axis in (1, 2) if axis < len(shape) and _divides(shape[axis], taken)]
    return (*fitting, *parts, 1)[0]


def _divides(size: Any, number: Any) -> bool:
    return isinstance(size, int) and isinstance(number, int) and number % size == 0


def _first_layer(sample: fx.Node, flow: DataFlow) -> fx.Node | None:
    """The first heavy node that reads `sample`, or what was made of it without a layer."""
    reached = {sample}
    for node in sorted(flow.descendants([sample]), key=flow.position.__getitem__):
        if is_heavy(node) and any(operand in reached for operand in node.all_input_nodes):
            return node
        reached.add(node)
    return None


def find_head_residual(
    graph: fx.Graph,
    stack: Stack,
    ends: Sequence[fx.Node],
    flow: DataFlow,
    inputs: GraphInputs,
    head_blocks: int,
    span: set[fx.Node],
    tail: set[fx.Node],
) -> Probe:
    """The head residual of the image stream among `ends`, the streams that enter the span (of the
    newest that enters it if `ends` is empty: no residual is cached).
    """
    first = stack.blocks[0]
    entering = [
        n for n in block_inputs(first) if not isinstance(fake_tensor(n), torch.nn.Parameter)
    ]
    if not ends:
        inside = flow.descendants(n for b in stack.blocks[:head_blocks] for n in b.nodes)
        ends = [
            node
            for node in sorted(inside - span - tail, key=flow.position.__getitem__)
            if is_stream_like(node) and any(user in span for user in node.users)
        ]
    if not ends:
        raise StackNotFoundError(f"no stream enters the span of the stack {stack}")
    sample = sample_input(graph, inputs)
    noisy = flow.descendants([sample]) | {sample} if sample is not None else set()
    for starts in ([node for node in entering if node in noisy], entering):
        found = [_head_residual(stack, e, starts, span | tail, flow, head_blocks) for e in ends]
        if pairs := [pair for pair in found if pair is not None]:
            break
    else:
        pairs = [Probe(HeadResidual(), end) for end in ends]
    return max(pairs, key=lambda pair: (_numel(pair.after), flow.position[pair.after]))


def _head_residual(
    stack: Stack,
    end: fx.Node,
    entering: list[fx.Node],
    later: set[fx.Node],
    flow: DataFlow,
    head_blocks: int,
) -> Probe | None:
    """The residual that leads from one of `entering` to `end`, or None.

    To `end` itself, or, where `end` was rearranged, to the last value on its path that has the
    layout of the stream before the first block.
    """
    own = [
        node for block in stack.blocks[:head_blocks] for node in block.nodes if node not in later
    ]
    for candidate in (end, *sorted(own, key=flow.position.__getitem__, reverse=True)):
        starts = {start for start in entering if start is not end and same_layout(start, candidate)}
        if not starts or not (candidate is end or residual_path(end, {candidate})):
            continue
        if joined := residual_path(candidate, starts):
            return Probe(HeadResidual(), candidate, max(joined, key=flow.position.__getitem__))
    like = [start for start in entering if start is not end and same_layout(start, end)]
    return Probe(HeadResidual(), end, like[0]) if like else None


def _numel(node: fx.Node) -> int:
    """The size of the tensor, symbolic dimensions at their hints (1 where there is none)."""
    sizes = (
        size if isinstance(size, int) else size.node.hint or 1 for size in tensor_of(node).shape
    )
    return math.prod(sizes)


def sample_input(graph: fx.Graph, inputs: GraphInputs) -> fx.Node | None:
    """The noisy sample among the inputs: the one shaped like the output, else the first tensor."""
    candidates = [node for node in inputs.data if is_stream_like(node)]
    outputs = [tensor_of(n) for n in graph.output_node().all_input_nodes if is_stream_like(n)]
    for output in outputs:
        for node in candidates:
            shape = tensor_of(node).shape
            if len(shape) == output.ndim and all(map(same_size, shape, output.shape)):
                return node
    return candidates[0] if candidates else None
