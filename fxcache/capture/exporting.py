"""Export a model, make its graph functional and cut it: what the exported programs are made of.

``torch.export`` gives the graph, AOTAutograd's inference path makes it functional as it does
Dynamo's, and the passes cut it as they cut any other.
"""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind
from torch.utils import _pytree as pytree

from fxcache.capture import torch_internals as internals
from fxcache.capture.backend import is_dropout
from fxcache.capture.functional import Found, functionalized
from fxcache.errors import CaptureError
from fxcache.kernels import reference
from fxcache.passes.choose import find_cut
from fxcache.passes.cut import Cut, check_writes
from fxcache.passes.facts import analyse
from fxcache.passes.graph import GraphInputs
from fxcache.passes.measure import TICKETS
from fxcache.passes.pieces import (
    Pieces,
    build_pieces,
    state_fakes,
)
from fxcache.passes.probe import find_probe
from fxcache.policy import Policy
from fxcache.policy.forecast import checked

#: What names of the model's tensors begin with, as in Dynamo's graphs.
_OWN = "L['self']."


@dataclass(frozen=True)
class Captured:
    """A model's functional graph, cut: its pieces, what is kept between steps as fake tensors, the
    weights by placeholder, the places of the caller's leaves, and how outputs are put together.
    """

    pieces: Pieces
    cut: Cut
    kept: dict[str, Any]
    residuals: list[Any]
    weights: dict[fx.Node, str]
    constants: dict[fx.Node, torch.Tensor]
    leaves: dict[fx.Node, int]
    out_spec: Any


def bound(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments by name, in the order of the forward's parameters."""
    return dict(inspect.signature(model.forward).bind(*args, **kwargs).arguments)


def capture(
    model: nn.Module, policy: Policy, inputs: dict[str, Any], dynamic_shapes: Any
) -> Captured:
    """Export `model` for `inputs` by name, and cut its graph as `policy` asks.

    Raises CaptureError if it cannot be exported, StackNotFoundError if nothing can be skipped.
    """
    try:
        with torch.no_grad():
            program = torch.export.export(
                model, (), inputs, dynamic_shapes=dynamic_shapes, strict=False
            )
    except Exception as error:
        raise CaptureError(
            f"torch.export could not capture {type(model).__name__}: {error}"
        ) from error
    gm, found, leaves = _tensors_alone(program)
    graph, given = _functional(gm, found)
    if given.written:
        names = [given.paths.get(n) or given.sources[n].removeprefix(_OWN) for n in given.written]
        raise CaptureError(
            f"{type(model).__name__} writes into {', '.join(names)}: an exported step has no other "
            f"state than its own. Take that out of the model"
        )
    facts = analyse(graph.graph, given)
    if any(map(is_dropout, facts.nodes)):
        raise CaptureError(f"a dropout of {type(model).__name__} is on: call model.eval()")
    cut = find_cut(facts, policy.span)
    check_writes(cut)
    probe = None if policy.probe is None else find_probe(cut, policy.probe)
    kept, residuals = state_fakes(cut, probe)
    ring, is_checked = policy.forecast.ring, checked(policy) is not None
    pieces = build_pieces(
        graph, cut, probe, ring=ring, others=ring if is_checked else 0, kernels=reference
    )
    weights, constants, data = {}, {}, []
    for node, one in zip(graph.graph.find_nodes(op="placeholder"), found, strict=True):
        name = one.source.removeprefix(_OWN)
        if one.is_registered:
            weights[node] = name
        elif one.is_of_model:
            constants[node] = program.constants[name]
        else:
            data.append(node)
    return Captured(
        pieces,
        cut,
        {key: fake for key, fake in kept.items() if key != TICKETS},
        residuals,
        weights,
        constants,
        dict(zip(data, leaves, strict=True)),
        program.call_spec.out_spec,
    )


def _tensors_alone(program: ExportedProgram) -> tuple[fx.GraphModule, list[Found], list[int]]:
    """The program's graph without inputs that are no tensors, what is left of them, and which
    leaves of the example those are that the caller gives.
    """
    gm = program.graph_module
    paths, _ = pytree.tree_flatten_with_path(program.example_inputs[1])
    given = iter(enumerate(paths))
    found, leaves = [], []
    placeholders = gm.graph.find_nodes(op="placeholder")
    for node, spec in zip(placeholders, program.graph_signature.input_specs, strict=True):
        is_tensor = isinstance(node.meta.get("val"), torch.Tensor)
        if spec.kind == InputKind.USER_INPUT:
            leaf, (keys, _) = next(given)
            path = [str(getattr(key, "key", getattr(key, "idx", key))) for key in keys]
            one = Found("", False, False, path)
            leaves += [leaf] if is_tensor else []
        else:
            one = Found(_OWN + str(spec.target), True, spec.kind != InputKind.CONSTANT_TENSOR, [])
        if is_tensor:
            found.append(one)
            node.meta["example_value"] = node.meta["val"]
        else:
            gm.graph.erase_node(node)
    gm.recompile()
    return gm, found, leaves


def _functional(gm: fx.GraphModule, found: list[Found]) -> tuple[fx.GraphModule, GraphInputs]:
    """`gm` as AOTAutograd traces it, and its inputs."""
    fakes = [node.meta["val"] for node in gm.graph.find_nodes(op="placeholder")]
    captured: list[tuple[fx.GraphModule, GraphInputs]] = []

    def keep(functional: fx.GraphModule, inputs: GraphInputs) -> Any:
        captured.append((functional, inputs))
        return functional

    mode = next(fake.fake_mode for fake in fakes)
    with torch.no_grad(), internals.tracing(internals.TracingContext(mode)):
        functionalized(gm, fakes, keep, found=found)
    return captured[0]
