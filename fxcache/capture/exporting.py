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
    gm, found = _tensors_alone(program)
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
    places = dict(zip(graph.graph.find_nodes(op="placeholder"), found, strict=True))
    weights = {node: one.target for node, one in places.items() if one.is_weight}
    constants = {
        node: program.constants[one.target]
        for node, one in places.items()
        if one.leaf is None and not one.is_weight
    }
    return Captured(
        pieces,
        cut,
        {key: fake for key, fake in kept.items() if key != TICKETS},
        residuals,
        weights,
        constants,
        {node: one.leaf for node, one in places.items() if one.leaf is not None},
        program.call_spec.out_spec,
    )


@dataclass(frozen=True)
class _Input:
    """What a placeholder is: a weight or a constant by its name, or a leaf of the inputs."""

    target: str
    is_weight: bool
    leaf: int | None
    path: list[str]

    def source(self) -> str:
        return "" if self.leaf is not None else _OWN + self.target


def _tensors_alone(program: ExportedProgram) -> tuple[fx.GraphModule, list[_Input]]:
    """The program's graph without inputs that are no tensors, and what is left of them."""
    gm = program.graph_module
    leaves, _ = pytree.tree_flatten_with_path(program.example_inputs[1])
    paths = [[str(getattr(key, "key", getattr(key, "idx", key))) for key in at] for at, _ in leaves]
    found, leaf = [], 0
    nodes = {node.name: node for node in gm.graph.find_nodes(op="placeholder")}
    for spec in program.graph_signature.input_specs:
        node = nodes[spec.arg.name]
        if spec.kind == InputKind.USER_INPUT:
            one = _Input("", False, leaf, paths[leaf])
            leaf += 1
        else:
            one = _Input(str(spec.target), spec.kind != InputKind.CONSTANT_TENSOR, None, [])
        if isinstance(node.meta.get("val"), torch.Tensor):
            found.append(one)
            node.meta["example_value"] = node.meta["val"]
        else:
            gm.graph.erase_node(node)
    gm.recompile()
    return gm, found


def _functional(gm: fx.GraphModule, found: list[_Input]) -> tuple[fx.GraphModule, GraphInputs]:
    """`gm` as AOTAutograd traces it, and its inputs."""
    fakes = [node.meta["val"] for node in gm.graph.find_nodes(op="placeholder")]
    captured: list[tuple[fx.GraphModule, GraphInputs]] = []

    def keep(functional: fx.GraphModule, inputs: GraphInputs) -> Any:
        captured.append((functional, inputs))
        return functional

    mode = next(fake.fake_mode for fake in fakes)
    known = [Found(one.source(), one.leaf is None, one.is_weight, one.path) for one in found]
    with torch.no_grad(), internals.tracing(internals.TracingContext(mode)):
        functionalized(gm, fakes, keep, found=known)
    return captured[0]
