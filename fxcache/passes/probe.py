"""Find what is measured: the residual of the head blocks, on the stream that carries the sample."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import fx

from fxcache.capture import (
    GraphInputs,
    fake_tensor,
    is_stream_like,
    same_layout,
    same_size,
    tensor_of,
)
from fxcache.dataflow import DataFlow, residual_path
from fxcache.errors import StackNotFoundError
from fxcache.stack import Stack, block_inputs


@dataclass(frozen=True)
class Probe:
    """What is measured: the residual `after - before`, or `after` alone if `before` is None."""

    after: fx.Node
    before: fx.Node | None

    @property
    def nodes(self) -> list[fx.Node]:
        return [self.after] if self.before is None else [self.after, self.before]


def find_probe(
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
    sample = _sample_input(graph, inputs)
    noisy = flow.descendants([sample]) | {sample} if sample is not None else set()
    for starts in ([node for node in entering if node in noisy], entering):
        found = [_head_residual(stack, e, starts, span | tail, flow, head_blocks) for e in ends]
        if pairs := [pair for pair in found if pair is not None]:
            break
    else:
        pairs = [Probe(end, None) for end in ends]
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
            return Probe(candidate, max(joined, key=flow.position.__getitem__))
    like = [start for start in entering if start is not end and same_layout(start, end)]
    return Probe(end, like[0]) if like else None


def _numel(node: fx.Node) -> int:
    """The size of the tensor, symbolic dimensions at their hints (1 where there is none)."""
    sizes = (
        size if isinstance(size, int) else size.node.hint or 1 for size in tensor_of(node).shape
    )
    return math.prod(sizes)


def _sample_input(graph: fx.Graph, inputs: GraphInputs) -> fx.Node | None:
    """The noisy sample among the inputs: the one shaped like the output, else the first tensor."""
    candidates = [node for node in inputs.data if is_stream_like(node)]
    outputs = [tensor_of(n) for n in graph.output_node().all_input_nodes if is_stream_like(n)]
    for output in outputs:
        for node in candidates:
            shape = tensor_of(node).shape
            if len(shape) == output.ndim and all(map(same_size, shape, output.shape)):
                return node
    return candidates[0] if candidates else None
