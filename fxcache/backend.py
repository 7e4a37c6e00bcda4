"""The compiler backend: a captured graph in, a step executor out.

`rewrite` is the whole pass: find the stack, cut, write the pieces, compile them. It serves
`fxcache.transform` (which brings its own session) and ``torch.compile(backend="fxcache")``.
"""

import logging
import sys
import types
from collections.abc import Callable, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import fx

from fxcache.capture import GraphInputs, fake_value, graph_inputs, tensor_of
from fxcache.dataflow import DataFlow, data_flow, op_name, storages
from fxcache.errors import CaptureError, StackNotFoundError
from fxcache.kernels import reference, residual_diff
from fxcache.layout import allocator, signature_of
from fxcache.lower import Lowering, compile_pieces, resolve_lowering
from fxcache.passes.branch import (
    Pieces,
    build_pieces,
    state_fakes,
)
from fxcache.passes.cut import Cut, cut
from fxcache.passes.probe import sample_input
from fxcache.passes.whole import cut_whole
from fxcache.policy import FirstBlockCache, Policy, check_policy
from fxcache.runtime.conditions import Conditions, conditioning
from fxcache.runtime.device import GraphDevice, graph_device
from fxcache.runtime.executor import StepExecutor
from fxcache.runtime.graphs import GraphedRegions
from fxcache.runtime.host import HostedRegions, is_away
from fxcache.runtime.regions import Regions, Wiring
from fxcache.runtime.session import Session
from fxcache.runtime.state import Slot
from fxcache.runtime.weights import is_number, weights_of
from fxcache.stack import Stack, find_stack

log = logging.getLogger("fxcache")

# What the registered backend takes among its options, besides the policy and the backend.
_OWN_OPTIONS = ("outline", "kernel", "speculate", "cache_dtype", "cache_device")

_CHECKPOINTED = (
    "the blocks are checkpointed (torch.utils.checkpoint, enable_gradient_checkpointing), and "
    "nothing inside a checkpoint can be skipped: switch it off where a policy with "
    "in_training=True caches steps with gradients"
)


class Backend:
    """What is handed to torch.compile: one a denoiser, with its session.

    Args:
        session: where state and records are kept.
        lowering: compiles the pieces, and graphs without a stack.
        argument_names: the names of the model's positional arguments.
        list_weights: gives how many elements the parameters of the model's heaviest list have. In a
            model captured in pieces, a stack with at most half of them lies beside the real one.
            None: the model is not known.
    """

    def __init__(
        self,
        session: Session,
        lowering: Lowering,
        *,
        argument_names: tuple[str, ...] = (),
        list_weights: Callable[[], int] | None = None,
    ) -> None:
        self.session, self.lowering = session, lowering
        self.argument_names, self.list_weights = argument_names, list_weights
        #: The model is one graph. If it is not, graphs without the stack are compiled as they are.
        self.fullgraph = True
        #: Graphs without the stack: how many nodes they have, and why they were refused.
        self.refused: list[tuple[int, str]] = []

    def summary(self) -> str:
        """What the largest refused graph was refused for."""
        if not self.refused:
            return "None was captured."
        nodes, reason = max(self.refused)
        return f"The largest of them has {nodes} nodes: {reason}"

    def __call__(self, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        compiled = self._compiled(gm, example_inputs)
        # Counted when it is done: Dynamo may begin a graph anew.
        self.session.graphs += 1
        self.session.recompiles += self.session.evaluations > 0
        return compiled

    def _compiled(self, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        may_train = self.session.policy.in_training or self.list_weights is not None
        if not may_train and (torch.is_grad_enabled() or _has_dropout(gm.graph)):
            log.warning(
                "gradients are enabled, or dropout is on: this graph is not cached. A policy with "
                "in_training=True caches all the same"
            )
            return self.lowering.whole(gm, example_inputs)
        inputs = graph_inputs(gm.graph, self.argument_names)
        try:
            found = self.analyse(gm, inputs)
        except StackNotFoundError as error:
            if self.fullgraph and not _is_part(gm):
                if any("checkpoint" in op_name(n) for n in gm.graph.nodes if callable(n.target)):
                    raise StackNotFoundError(_CHECKPOINTED) from error
                raise
            log.info("compiled as it is: %s", error)
            self.refused.append((len(gm.graph.nodes), str(error)))
            return self.lowering.whole(gm, example_inputs)
        return rewrite(gm, found, inputs, self.session, self.lowering)

    def analyse(self, gm: fx.GraphModule, inputs: GraphInputs) -> Cut:
        """Find the model's stack in `gm` and cut it as the policy asks."""
        policy = self.session.policy
        flow = data_flow(gm.graph)
        if policy.span.whole_model:
            if not self.fullgraph or _is_part(gm):
                raise StackNotFoundError("the model breaks into graphs, and the policy's span is "
                                         "the whole model")  # fmt: skip
            return cut_whole(gm.graph, flow, inputs, probe=policy.probe)
        stack = find_stack(gm.graph, flow)
        if not self.fullgraph and self.list_weights is not None:
            weights, most = _num_weights(stack), self.list_weights()
            if 2 * weights <= most:
                raise StackNotFoundError(
                    f"{stack} has {weights} weights, the model's heaviest list {most}: it lies "
                    f"beside the block stack, or is a part of it"
                )
        return cut(gm.graph, stack, flow, inputs, span=policy.span, probe=policy.probe)


def _is_part(gm: fx.GraphModule) -> bool:
    """Whether `gm` ends or begins at a graph break: then the stack may be in another graph."""
    if getattr(getattr(gm, "compile_subgraph_reason", None), "graph_break", False):
        return True
    frame: types.FrameType | None = sys._getframe()
    while frame := frame.f_back if frame else None:  # the code that Dynamo is compiling, if it says
        code = frame.f_locals.get("code")
        if isinstance(code, types.CodeType):
            return code.co_name.startswith("torch_dynamo_resume_in")
    return False


def _num_weights(stack: Stack) -> int:
    weights = {
        operand
        for block in stack.blocks
        for node in block.nodes
        for operand in node.all_input_nodes
        if isinstance(fake_value(operand), torch.nn.Parameter)
    }
    return sum(tensor_of(weight).numel() for weight in weights)


def _has_dropout(graph: fx.Graph) -> bool:
    """Whether a dropout of `graph` is on, which says that the model is in training mode."""
    for node in graph.nodes:
        if "dropout" in op_name(node) and node.op == "call_function":
            training = node.kwargs.get("training", node.args[2] if len(node.args) > 2 else False)
            rate = node.kwargs.get("p", node.args[1] if len(node.args) > 1 else 0.5)
            if training and rate:
                return True
    return False


def rewrite(
    gm: fx.GraphModule, found: Cut, inputs: GraphInputs, session: Session, lowering: Lowering
) -> StepExecutor:
    """`gm`, which is not changed, becomes a step executor that runs it as `found` cuts it."""
    ring = session.policy.forecast.ring
    log.info("%s", found.describe())
    session.skipped_share = found.skipped_share
    flow = data_flow(gm.graph)
    kept, residuals = state_fakes(found, lowering.cache_dtype)
    device = residuals[0].device
    kernels = lowering.kernels(device)
    pieces = build_pieces(
        gm, found, flow, ring=ring, kernels=kernels, cache_dtype=lowering.cache_dtype
    )
    if not lowering.is_eager:
        _check_aliases(pieces, found, flow)
    placeholders = gm.graph.find_nodes(op="placeholder")
    place = {node: index for index, node in enumerate(placeholders)}
    wiring = Wiring(
        pieces,
        compile_pieces(pieces, kept, residuals, ring, lowering),
        inputs=placeholders,
        kept=tuple(kept),
        streams=len(residuals),
        ring=ring,
    )
    has_graphs = lowering.graphs and graph_device(device) is not None
    if has_graphs and (why := _not_graphable(pieces, inputs, device, flow)):
        log.warning("no CUDA graphs: %s", why)
        has_graphs = False
    # One a slot, for its pool: branches of a slot take turns, but another slot's graphs, replayed
    # by another thread amid an evaluation, must not share memory with it.
    devices: WeakKeyDictionary[Slot, GraphDevice | None] = WeakKeyDictionary()
    weights = [place[node] for node in inputs.weights if not is_number(node)]
    data = [place[node] for node in inputs.data]
    on_host = is_away(lowering.cache_device, device)

    def make_regions(slot: Slot) -> Regions:
        if on_host:
            return HostedRegions(wiring, device)
        graphs = devices.setdefault(slot, graph_device(device)) if has_graphs else None
        if graphs is None:
            return Regions(wiring)
        return GraphedRegions(wiring, graphs, weights, data)

    sample = sample_input(gm.graph, inputs)
    return StepExecutor(
        session,
        make_regions,
        data=data,
        has_numbers=bool(inputs.sizes),
        sample=None if sample is None or _is_part(gm) else place[sample],
        timestep=None if found.timestep is None else place[found.timestep],
        ring=ring,
        signature=signature_of(placeholders, inputs, found, [*kept.values(), *residuals]),
        allocate=allocator(placeholders, inputs, kept, residuals, ring, on_host=on_host),
        weights=weights_of(gm.graph, inputs, flow),
        conditions=_conditions(gm.graph, inputs, place, session.policy, lowering),
        speculate=lowering.speculate,
    )


def _conditions(
    graph: fx.Graph,
    inputs: GraphInputs,
    place: dict[fx.Node, int],
    policy: Policy,
    lowering: Lowering,
) -> Conditions | None:
    """What compares the conditioning inputs, None if the policy does not look at them."""
    threshold = getattr(policy, "control_threshold", None)
    if threshold is None:
        return None
    places = {inputs.paths[node]: place[node] for node in conditioning(graph, inputs)}
    on_gpu = any(tensor_of(node).device.type == "cuda" for node in inputs.data)
    # Nothing compiles this: plain operations would make many passes over memory.
    plain = lowering.kernel == "aten" or not on_gpu
    return Conditions(threshold, places, reference.residual_diff if plain else residual_diff)


def _not_graphable(
    pieces: Pieces, inputs: GraphInputs, device: torch.device, flow: DataFlow
) -> str | None:
    """Why the pieces cannot be captured, None if they can."""
    if pieces.miss.results:
        return f"{pieces.miss.results[0]} leaves the span and is no stream"
    for node, name in inputs.data.items():
        if tensor_of(node).device != device:
            return f"the input {name} is on {tensor_of(node).device}, the model on {device}"
        if not storages(node).isdisjoint(flow.writers):
            return f"the model writes into its input {name}"
    away = [node for node in inputs.weights if tensor_of(node).device != device]
    if any(tensor_of(node).ndim > 0 for node in away):
        return f"{len(away)} weights are on {tensor_of(away[0]).device}, and offloaded there"
    return None


def _check_aliases(pieces: Pieces, found: Cut, flow: DataFlow) -> None:
    """Refuse two views of one storage that cross the cut if somebody writes into it behind it.

    Compiled pieces return them as tensors of their own, and the write would reach only one.
    """
    behind = {*found.span, *found.tail}
    written = {s for s, nodes in flow.writers.items() if not behind.isdisjoint(nodes)}
    seen: dict[int, fx.Node] = {}
    arguments = dict.fromkeys((*pieces.hit.arguments, *pieces.miss.arguments))
    for node in (key for key in arguments if isinstance(key, fx.Node)):
        for storage in storages(node) & written:
            if storage in seen:
                raise CaptureError(
                    f"{seen[storage]} and {node} are views of one tensor that is written in place "
                    f'behind the cut; backend="eager" runs this model'
                )
            seen[storage] = node


def fxcache_backend(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: dict[str, Any] | None = None,
) -> Callable[..., Any]:
    """``torch.compile(model, backend="fxcache", options={"policy": FirstBlockCache(...)})``.

    `options` may hold ``policy`` (default ``FirstBlockCache()``), ``backend`` (which compiles the
    pieces, default "inductor"), ``outline``, ``kernel``, ``speculate``, ``cache_dtype`` and
    ``cache_device`` (as in `fxcache.transform`) and that backend's own options. Each compiled graph
    keeps its own state; trajectories are recognised by their timesteps. A graph without a block
    stack raises.
    """
    rest = dict(options or {})
    policy = rest.pop("policy", None) or FirstBlockCache()
    check_policy(policy)
    own = {name: rest.pop(name) for name in _OWN_OPTIONS if name in rest}
    backend = rest.pop("backend", "inductor")
    lowering = resolve_lowering(backend, mode, rest or None, None, **own)
    return Backend(Session(policy), lowering)(gm, example_inputs)
