"""Cut a captured graph around the whole model: from its inputs to its outputs, all is the span."""

from torch import fx

from fxcache.capture import GraphInputs, same_size, tensor_of
from fxcache.dataflow import DataFlow, storages, written_storages
from fxcache.errors import CaptureError
from fxcache.passes.cut import Cut, Stream, early_probe, is_floating, kept_nodes, ordered
from fxcache.passes.probe import sample_input
from fxcache.policy.probe import ProbeKind


def cut_whole(
    graph: fx.Graph, flow: DataFlow, inputs: GraphInputs, *, probe: ProbeKind | None
) -> Cut:
    """Divide `graph` so that all of it is the span, whatever it is made of.

    An output is cached as its difference to the noisy input where the two have one shape.

    Raises CaptureError if the graph returns no floating tensor or writes into its inputs, or if
    there is nothing like `probe` that does not depend on the span.
    """
    found = early_probe(graph, None, flow, inputs, probe)
    if probe is not None and found is None:
        raise CaptureError(f"{probe} lies within the span: with the whole model as the span, "
                           f"the probe must be an input")  # fmt: skip
    given = set(graph.find_nodes(op="placeholder"))
    results = [n for n in graph.output_node().all_input_nodes if n not in given]
    sample = sample_input(graph, inputs)
    streams = tuple(Stream(n, _same_shape(n, sample)) for n in results if is_floating(n))
    if not streams:
        raise CaptureError("the model returns no floating tensor that it computed")
    befores = [stream.before for stream in streams if stream.before is not None]
    own = found.nodes if found is not None else []
    head = (flow.ancestors(own) | set(own)) - given
    span = set(graph.nodes) - given - head
    _check_inputs_unwritten(inputs, span)
    needed, snapshots = kept_nodes(set(), befores, found, flow, span)
    head |= needed - given
    return Cut(
        stack=None,
        span_blocks=(),
        head=ordered(head, flow),
        span=ordered(span - head, flow),
        tail=(),
        streams=streams,
        constants=tuple(node for node in results if not is_floating(node)),
        probe=found,
        snapshots=snapshots,
        timestep=inputs.timestep,
    )


def _check_inputs_unwritten(inputs: GraphInputs, span: set[fx.Node]) -> None:
    """Refuse a model that writes into the caller's tensors: a hit would skip the write."""
    for writer in span:
        for node, name in inputs.data.items():
            if written_storages(writer) & storages(node):
                raise CaptureError(
                    f"the model writes in place into its input {name} ({writer.format_node()}): "
                    f"with the whole model as the span, a hit would skip the write"
                )


def _same_shape(node: fx.Node, sample: fx.Node | None) -> fx.Node | None:
    """`sample`, if `node` has its shape: they differ in dtype at most."""
    if sample is None or not is_floating(sample):
        return None
    shape, other = tensor_of(node).shape, tensor_of(sample).shape
    return sample if len(shape) == len(other) and all(map(same_size, shape, other)) else None
