"""From Dynamo's graph to the functional ATen graph that the passes see.

AOTAutograd's inference path does the work, without decompositions. What runs in the place of the
graph lies inside its runtime wrapper, so inputs that the model writes, outputs that alias and
tensors that wrap others (quantized or distributed weights) are AOTAutograd's matter.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from fxcache.capture import torch_internals as internals
from fxcache.passes.graph import GraphInputs, is_of_model, is_tensor, outputs_of, value_of
from fxcache.passes.sizes import write_sizes_first
from fxcache.runtime.freshness import note_owners

#: Takes the functional graph and what its placeholders are, gives what runs in its place.
Compile = Callable[[fx.GraphModule, GraphInputs], Callable[..., Any]]


def functionalized(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    compile_graph: Compile,
    argument_names: tuple[str, ...] = (),
    found: "Sequence[Found] | None" = None,
) -> Callable[..., Any]:
    """`gm` as AOTAutograd's runtime calls it, with its functional graph compiled by
    `compile_graph`. `argument_names` are those of the model's positional arguments; `found` says
    what the inputs of `gm` are, if it is not Dynamo's.
    """
    if found is None:
        found = [Found.by_dynamo(n, argument_names) for n in gm.graph.find_nodes(op="placeholder")]

    def inference_compiler(functional: fx.GraphModule, _: Sequence[Any]) -> Callable[..., Any]:
        let_group_norms_be(functional)
        write_sizes_first(functional)
        return compile_graph(functional, graph_inputs(functional.graph, found))

    run = internals.aot_inference(gm, example_inputs, inference_compiler)
    wrappers = [at for at, x in enumerate(example_inputs) if is_traceable_wrapper_subclass(x)]
    if not wrappers:
        return run

    def noting(*inputs: Any) -> Any:
        note_owners(inputs[at] for at in wrappers)
        return run(*inputs)

    return noting


def native_group_norm(
    x: torch.Tensor, weight: Any, bias: Any, n: Any, c: Any, size: Any, groups: int, eps: float
) -> tuple[torch.Tensor]:
    """The first result of aten's operation of that name, on `x` of any strides."""
    return (torch.group_norm(x, groups, weight, bias, eps),)


def let_group_norms_be(gm: fx.GraphModule) -> None:
    """The copy that a group norm needs of some inputs is decided where it runs.

    ::

        aten.native_group_norm(x, ...)[0]  =>  native_group_norm(x, ...)[0]

    At the capture it is decided by the strides of fake tensors, whose dimensions of size 1 have
    others than those of real ones: so some models of batch 1 raise under any ATen backend.
    """
    changed = False
    for node in gm.graph.find_nodes(
        op="call_function", target=torch.ops.aten.native_group_norm.default
    ):
        if all(user.args[1] == 0 for user in node.users):
            node.target, changed = native_group_norm, True
    if changed:
        gm.recompile()


@dataclass(frozen=True)
class Found:
    """What is known of an input: where it comes from, whether it is the model's (and registered
    there), and the path of an argument.
    """

    source: str
    is_of_model: bool
    is_registered: bool
    path: list[str]

    @classmethod
    def by_dynamo(cls, node: fx.Node, argument_names: tuple[str, ...]) -> "Found":
        """What Dynamo says of an input of its graph."""
        source = internals.source_name(node)
        is_parameter = isinstance(node.meta.get("example_value"), torch.nn.Parameter)
        return cls(
            source,
            is_parameter or is_of_model(source),
            is_parameter or "_buffers" in source,
            _argument_path(source or node.name, argument_names),
        )


def graph_inputs(graph: fx.Graph, found: Sequence[Found]) -> GraphInputs:
    """Sort the placeholders of the functional `graph` by what was `found` of them."""
    data, paths, sources = {}, {}, {}
    weights, sizes, registered = [], [], set()
    by_place: dict[int, fx.Node] = {}
    for node in graph.find_nodes(op="placeholder"):
        place = internals.place_of(node)
        known = found[place] if place is not None and place < len(found) else None
        if place is not None:
            by_place[place] = node
        if not is_tensor(node):
            if isinstance(value_of(node), torch.SymInt | torch.SymFloat | int | float):
                sizes.append(node)
            continue
        if known is None or known.is_of_model:
            weights.append(node)
            sources[node] = "" if known is None else known.source
            if known is None or known.is_registered:
                registered.add(node)
        else:
            data[node], paths[node] = known.path[-1], ".".join(known.path)
    written: dict[fx.Node, fx.Node] = {}
    descriptors = graph.output_node().meta.get("desc") or ()
    for result, descriptor in zip(outputs_of(graph), descriptors, strict=False):
        place = internals.written_place(descriptor)
        if place in by_place and isinstance(result, fx.Node):
            written[by_place[place]] = result
    return GraphInputs(
        data, tuple(weights), tuple(sizes), paths, frozenset(registered), sources, written
    )


def _argument_path(source: str, argument_names: tuple[str, ...]) -> list[str]:
    """The argument that an input is given by, however it was passed, and its place in that."""
    keys: list[str] = re.findall(r"\['?(\w+)'?\]", source)
    kind, *path = keys or [source]
    if kind == "args" and path and path[0].isdigit() and int(path[0]) < len(argument_names):
        path[0] = argument_names[int(path[0])]
    return path if kind in ("args", "kwargs") and path else keys or [source]


def by_path(arguments: dict[str, Any]) -> dict[str, Any]:
    """`arguments` by the paths of `_argument_path`: what is in a dict, list or tuple by its own."""
    found: dict[str, Any] = {}
    for path, value in arguments.items():
        inside = dict(enumerate(value)) if isinstance(value, list | tuple) else value
        if isinstance(inside, dict):
            found |= by_path({f"{path}.{key}": inner for key, inner in inside.items()})
        else:
            found[path] = value
    return found
