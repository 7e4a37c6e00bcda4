"""Find what is measured: a tensor of the graph, by what it is and not by its name."""

from dataclasses import dataclass

from torch import fx

from fxcache.errors import CaptureError
from fxcache.passes.cut import Cut, heavy_between
from fxcache.passes.facts import Facts
from fxcache.passes.graph import is_numeric, numel_of, op_name, shape_of, tensor_of
from fxcache.passes.skeleton import Skeleton, Skeletons, reads
from fxcache.policy.probe import (
    FilteredInput,
    HeadResidual,
    ModulatedInput,
    ProbeKind,
    TimeEmbedding,
)


@dataclass(frozen=True)
class Probe:
    """What is measured: the residual of `node` to its `skeleton`, or `node` alone if that is None.

    `reads` are the nodes whose values that takes; `axes` are those along which a `FilteredInput`
    is filtered.
    """

    kind: ProbeKind
    node: fx.Node
    skeleton: Skeleton | None = None
    reads: tuple[fx.Node, ...] = ()
    axes: tuple[int, ...] = ()


def find_probe(cut: Cut, kind: ProbeKind) -> Probe:
    """The probe of a `kind` in the head of `cut`.

    Raises CaptureError if the graph has none.
    """
    facts = cut.facts
    if isinstance(kind, HeadResidual):
        return _head_residual(cut)
    axes: tuple[int, ...] = ()
    if isinstance(kind, TimeEmbedding):
        node = _time_layer(cut, kind.layer)
    elif isinstance(kind, ModulatedInput):
        node = _modulated_input(cut)
    else:
        node = facts.samples[0]
        if isinstance(kind, FilteredInput):
            if facts.inputs.timestep is None:
                raise CaptureError(
                    f"{kind} needs the noise level, and the model shows no time input"
                )
            axes = _frequency_axes(facts, node)
    return Probe(kind, node, reads=(node,), axes=axes)


def _head_residual(cut: Cut) -> Probe:
    """The residual of the head's units on the largest stream that depends on the sample there."""
    facts = cut.facts
    own = heavy_between(facts, cut.start, cut.head) & facts.costly
    alive = [node for node in facts.crossing(cut.head) if is_numeric(node)]
    behind = [node for node in alive if facts.needs(node) & own] or alive
    if not behind:
        raise CaptureError(f"no stream leaves the head of {cut.stack}")
    skeletons = Skeletons(facts, cut.start)
    found = [(node, skeletons.of(node)) for node in behind if not skeletons.is_available(node)]
    residuals: list[tuple[fx.Node, Skeleton | None]] = [
        (node, s) for node, s in found if s is not None and s.share > 0.5
    ]
    node, skeleton = max(
        residuals or [(node, None) for node in behind],
        key=lambda pair: (numel_of(pair[0]), facts.position[pair[0]]),
    )
    parts = () if skeleton is None else reads(skeleton, facts)
    return Probe(HeadResidual(), node, skeleton, (node, *parts))


def _modulated_input(cut: Cut) -> fx.Node:
    """What the first heavy node of the first unit reads of the image stream."""
    facts = cut.facts
    entering = [n for n in facts.crossing(cut.start) if is_numeric(n)] or list(facts.samples)
    stream = max(entering, key=lambda node: (numel_of(node), facts.position[node]))
    reached = {node for node in entering if facts.base[node] is facts.base[stream]}
    for p in range(cut.start + 1, cut.first + 1):
        node = facts.nodes[p]
        read = [operand for operand in node.all_input_nodes if operand in reached]
        if read and facts.cost[p]:
            while facts.base[read[0]] is not read[0] and facts.base[read[0]] in reached:
                read = [facts.base[read[0]]]  # not as the product wants it, but as it was made
            return read[0]
        if read:
            reached.add(node)
    raise CaptureError(f"no layer of the first block of {cut.stack} reads the image stream")


def _time_layer(cut: Cut, layer: int) -> fx.Node:
    """The result of layer `layer` (from 0) of those outside the blocks that read the time only."""
    facts, time = cut.facts, cut.facts.inputs.timestep
    data, wanted = facts.mask(facts.inputs.data), facts.mask([] if time is None else [time])
    layers = [
        facts.nodes[p]
        for p in facts.heavy
        if not cut.start < p <= cut.blocks and wanted and facts.ancestors[p] & data == wanted
    ]
    if layer >= len(layers):
        raise CaptureError(
            f"the model has {len(layers)} layer(s) that depend on the time input alone, so there "
            f"is no layer {layer} of them to measure"
        )
    return layers[layer]


def _frequency_axes(facts: Facts, sample: fx.Node) -> tuple[int, ...]:
    """Height, width and frames of pictures and videos; of tokens or sound, the sequence: all axes
    but the samples' and the channels'.
    """
    axes = tensor_of(sample).ndim
    channels = _channel_axis(facts, sample)
    return tuple(axis for axis in range(1, axes) if axis != channels) or (axes - 1,)


def _channel_axis(facts: Facts, sample: fx.Node) -> int:
    """The axis whose elements the first layer takes together: as many as it has inputs, or (of
    patches) a divisor of them.
    """
    shape = shape_of(sample) or ()
    layer = next(facts.nodes[p] for p in facts.heavy if facts.cost[p])
    if len(shape) == 3:
        return 1 if "conv" in op_name(layer) else 2
    others = (shape_of(facts.base[n]) or () for n in layer.all_input_nodes if not facts.depends(n))
    taken = next((weight[1] for weight in others if len(weight) >= 2), None)
    axes = [axis for axis in (1, 2) if axis < len(shape)]
    fitting = [axis for axis in axes if shape[axis] == taken]
    parts = [axis for axis in axes if taken and taken % shape[axis] == 0]
    return (*fitting, *parts, 1)[0]
