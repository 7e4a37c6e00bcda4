"""Cut a graph around the whole model: from its inputs to its outputs, all is the span."""

from torch import fx

from fxcache.errors import StackNotFoundError
from fxcache.passes.cut import Cut, Stream
from fxcache.passes.facts import Facts
from fxcache.passes.graph import is_numeric, outputs_of, shape_of
from fxcache.passes.skeleton import Skeleton
from fxcache.passes.units import find_runs


def cut_whole(facts: Facts) -> Cut:
    """Divide a graph so that all of it is the span, whatever it is made of.

    An output is kept as its difference to the noisy input, which one of them must have the shape
    of: else no hit would follow the sample. Others are kept as they are.

    Raises StackNotFoundError if the graph returns no numeric tensor, or none of its input's shape,
    or if it writes into its inputs.
    """
    if facts.inputs.written:
        names = [facts.inputs.paths.get(node, node.name) for node in facts.inputs.written]
        raise StackNotFoundError(
            f"the model writes in place into {', '.join(names)}: with the whole model as the span, "
            f"a hit would skip the write"
        )
    results = [n for n in outputs_of(facts.graph) if isinstance(n, fx.Node)]
    results = [n for n in dict.fromkeys(results) if n.op != "placeholder"]
    if not results or not all(map(is_numeric, results)):
        raise StackNotFoundError(
            "the model must return floating tensors that it computed, to skip all"
        )
    streams = tuple(Stream(node, _input_like(facts, node)) for node in results)
    if all(stream.skeleton is None for stream in streams):
        sample = facts.samples[0]
        raise StackNotFoundError(
            f"the output has the shape {shape_of(results[0])} and the noisy input "
            f"{facts.inputs.paths.get(sample, sample.name)} {shape_of(sample)}: with the whole "
            f"model as the span, their difference is what is kept, and they must have one shape"
        )
    end = len(facts.nodes) - 2
    units = tuple(unit for run in find_runs(facts) for unit in run.units)
    stack = "the whole model"
    return Cut(facts, -1, -1, -1, end, end, streams, stack=stack, repeated=units)


def _input_like(facts: Facts, node: fx.Node) -> Skeleton | None:
    for sample in facts.samples:
        if shape_of(sample) == shape_of(node):
            return Skeleton(sample, 1 << facts.position[sample], share=1.0)
    return None
