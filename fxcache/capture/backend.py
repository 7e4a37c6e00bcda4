"""The compiler backend: a captured graph in, a step executor out.

`rewrite` is the whole pass: facts, cut, probe, pieces, compile. It serves `fxcache.transform`
(which brings its own session) and ``torch.compile(backend="fxcache")``.
"""

import logging
import sys
import types
from collections.abc import Callable, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import fx

from fxcache.capture import torch_distributed
from fxcache.capture import torch_internals as internals
from fxcache.capture.compile import Compilers, compile_pieces
from fxcache.capture.functional import functionalized
from fxcache.capture.layout import allocator, signature_of
from fxcache.errors import StackNotFoundError
from fxcache.kernels import reference, residual_diff
from fxcache.options import Options
from fxcache.passes.choose import find_cut
from fxcache.passes.cut import Cut, check_writes
from fxcache.passes.facts import SAMPLE_NAMES, Facts, analyse
from fxcache.passes.graph import (
    GraphInputs,
    is_number,
    is_of_model,
    op_name,
    outputs_of,
    process_groups,
    tensor_of,
)
from fxcache.passes.pieces import build_pieces, is_random, state_fakes
from fxcache.passes.probe import Probe, find_probe
from fxcache.passes.whole import cut_whole
from fxcache.policy import AdaptiveCache, Policy, check_policy
from fxcache.policy.forecast import checked
from fxcache.runtime.audit import Audit
from fxcache.runtime.conditions import Conditions, conditioning
from fxcache.runtime.device import GraphDevice, graph_device
from fxcache.runtime.executor import StepExecutor
from fxcache.runtime.freshness import Weights
from fxcache.runtime.graphs import GraphedRegions, not_graphable
from fxcache.runtime.host import HostedRegions, is_away
from fxcache.runtime.ranks import Ranks
from fxcache.runtime.regions import Regions, Wiring
from fxcache.runtime.session import Session
from fxcache.runtime.state import Slot

log = logging.getLogger("fxcache")

# What the registered backend takes among its options, besides the policy.
_OWN_OPTIONS = ("backend", "outline", "kernel", "cache_dtype", "cache_device", "audit", "sync")
#: A graph of a broken model whose blocks hold less than this of the model's parameters is beside
#: its stack, or a part of it.
MIN_WEIGHTS = 0.4


class Backend:
    """What is handed to torch.compile: one a denoiser, with its session.

    Args:
        session: where state and records are kept.
        compilers: compile the pieces, and graphs without a stack.
        argument_names: the names of the model's positional arguments.
        num_weights: gives how many elements the model's parameters have. None: it is not known.
    """

    def __init__(
        self,
        session: Session,
        compilers: Compilers,
        *,
        argument_names: tuple[str, ...] = (),
        num_weights: Callable[[], int] | None = None,
    ) -> None:
        self.session, self.compilers = session, compilers
        self.argument_names, self.num_weights = argument_names, num_weights
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
        if torch.is_grad_enabled():
            log.warning("gradients are enabled: this graph is not cached")
            uncached: Callable[..., Any] = self.compilers.whole(gm, example_inputs)
            return uncached
        is_part, changes_objects = self._is_part(gm), internals.changes_objects()

        def compile_graph(functional: fx.GraphModule, inputs: GraphInputs) -> Callable[..., Any]:
            run = self.compile_graph(functional, inputs, is_part=is_part)
            if isinstance(run, StepExecutor):
                run.is_all = not changes_objects
            return run

        try:
            compiled = functionalized(gm, example_inputs, compile_graph, self.argument_names)
        except _Refused as refused:
            log.info("compiled as it is: %s", refused)
            self.refused.append((refused.nodes, str(refused)))
            compiled = self.compilers.whole(gm, example_inputs)
        # Counted when it is done: Dynamo may begin a graph anew.
        self.session.graphs += 1
        self.session.recompiles += self.session.evaluations > 0
        return compiled

    def compile_graph(
        self, gm: fx.GraphModule, inputs: GraphInputs, *, is_part: bool
    ) -> Callable[..., Any]:
        """What runs in the place of a functional graph."""
        try:
            cut, probe = self.analyse(gm, inputs, is_part=is_part)
        except StackNotFoundError as error:
            if self.fullgraph and not is_part and not isinstance(error, _DropoutError):
                raise
            raise _Refused(str(error), len(gm.graph.nodes)) from error
        return rewrite(gm, cut, probe, self.session, self.compilers, is_part=is_part)

    def analyse(
        self, gm: fx.GraphModule, inputs: GraphInputs, *, is_part: bool
    ) -> tuple[Cut, Probe | None]:
        """Cut `gm` as the policy asks, and find what it measures."""
        policy = self.session.policy
        if policy.span.whole_model and (not self.fullgraph or is_part):
            raise StackNotFoundError(
                "the model breaks into graphs, and the policy's span is the whole model"
            )
        facts = analyse(gm.graph, inputs)
        cut = cut_whole(facts) if policy.span.whole_model else find_cut(facts, policy.span)
        # What is dropped before the span, of a text or a lyric, is no hit's matter.
        inside = range(cut.start + 1, cut.end + 1)
        drops = filter(is_dropout, facts.nodes)
        if any(facts.depends(node) or facts.position[node] in inside for node in drops):
            log.warning("a dropout is on (call model.eval()): this graph is not cached")
            raise _DropoutError("a dropout is on in the blocks")
        if not self.fullgraph and self.num_weights is not None:
            held, whole = _num_weights(cut), self.num_weights()
            if held < MIN_WEIGHTS * whole:
                raise StackNotFoundError(
                    f"{cut.stack} has {held} weights, the model {whole}: it lies beside the block "
                    f"stack, or is a part of it"
                )
        check_writes(cut)
        return cut, None if policy.probe is None else find_probe(cut, policy.probe)

    def _is_part(self, gm: fx.GraphModule) -> bool:
        """Whether `gm` ends or begins at a graph break: then the stack may be in another graph."""
        if getattr(getattr(gm, "compile_subgraph_reason", None), "graph_break", False):
            return True
        frame: types.FrameType | None = sys._getframe()
        while frame := frame.f_back if frame else None:  # the code that Dynamo compiles, if known
            code = frame.f_locals.get("code")
            if isinstance(code, types.CodeType):
                return code.co_name.startswith("torch_dynamo_resume_in")
        return False


class _DropoutError(StackNotFoundError):
    """In training mode a graph is compiled as it is."""


class _Refused(Exception):  # noqa: N818 - a signal through AOTAutograd
    """This graph is compiled as it is."""

    def __init__(self, reason: str, nodes: int) -> None:
        super().__init__(reason)
        self.nodes = nodes


def _num_weights(cut: Cut) -> int:
    """How many elements the parameters of the stack's blocks have."""
    facts = cut.facts
    inside = facts.nodes[cut.start + 1 : max(cut.end, cut.blocks) + 1]
    read = {operand for node in inside for operand in node.all_input_nodes}
    return sum(tensor_of(node).numel() for node in read & set(facts.inputs.weights))


def is_dropout(node: fx.Node) -> bool:
    """Whether `node` drops at random, which says that the model is in training mode."""
    name = op_name(node)
    if "scaled_dot_product" in name:
        dropout = next((a for a in node.args[3:] if isinstance(a, float)), 0.0)
        return dropout > 0 and "for_cpu" not in name
    return name in ("native_dropout", "bernoulli") and is_random(node)


def rewrite(
    gm: fx.GraphModule,
    cut: Cut,
    probe: Probe | None,
    session: Session,
    compilers: Compilers,
    *,
    is_part: bool = False,
) -> StepExecutor:
    """`gm`, which is not changed, becomes a step executor that runs it as `cut` says."""
    options = compilers.options
    facts, inputs, ring = cut.facts, cut.facts.inputs, session.policy.forecast.ring
    log.info("%s", cut)
    for note in cut.notes:
        log.info("%s", note)
    session.skipped_share = cut.skipped_share
    kept, residuals = state_fakes(cut, probe, options.cache_dtype)
    device = residuals[0].device
    kernels = compilers.kernels(device)
    how: dict[str, Any] = {"ring": ring, "others": ring - 1 if checked(session.policy) else 0}
    dtype = options.cache_dtype
    in_graph = torch_distributed.largest_groups(process_groups(gm.graph))
    groups = () if options.sync is None else in_graph
    pieces = build_pieces(gm, cut, probe, **how, kernels=kernels, cache_dtype=dtype, groups=groups)
    placeholders = gm.graph.find_nodes(op="placeholder")
    place = {node: index for index, node in enumerate(placeholders)}
    wiring = Wiring(
        pieces,
        compile_pieces(pieces, kept, residuals, ring, compilers),
        inputs=placeholders,
        kept=tuple(kept),
        streams=len(residuals),
        **how,
    )
    has_graphs = compilers.graphs and graph_device(device) is not None
    if has_graphs and (why := not_graphable(inputs, device)):
        log.warning("no CUDA graphs: %s", why)
        has_graphs = False
    uncaptured = torch_distributed.uncapturable(pieces) if has_graphs else frozenset()
    # One a slot, for its pool: branches of a slot take turns, but another slot's graphs, replayed
    # by another thread amid an evaluation, must not share memory with it.
    devices: WeakKeyDictionary[Slot, GraphDevice | None] = WeakKeyDictionary()
    weights = [place[node] for node in inputs.weights if not is_number(node)]
    data = {place[node]: inputs.paths[node] for node in inputs.data}
    on_host = is_away(options.host, device)

    def make_regions(slot: Slot) -> Regions:
        if on_host:
            return HostedRegions(wiring, device)
        graphs = devices.setdefault(slot, graph_device(device)) if has_graphs else None
        if graphs is None:
            return Regions(wiring)
        return GraphedRegions(wiring, graphs, weights, list(data), uncaptured)

    steps = session.steps
    # In a part of a broken model the sample goes by another name: the usual ones stand for it.
    steps.samples |= set(SAMPLE_NAMES) if is_part else {inputs.paths[n] for n in facts.samples}
    if inputs.timestep is not None:
        steps.time_name = inputs.paths[inputs.timestep]
    steps.knows_time = True
    session.keeps_buffers = has_graphs
    samples = [place[node] for node in facts.samples]
    outputs = [i for i, n in enumerate(outputs_of(gm.graph)) if n in facts.outputs]
    draws = any(map(is_random, gm.graph.nodes))
    audit = Audit(wiring, samples, outputs, str(cut), device, draws=draws, groups=in_graph)
    return StepExecutor(
        session,
        make_regions,
        data=data,
        has_numbers=bool(inputs.sizes),
        timestep=None if inputs.timestep is None else place[inputs.timestep],
        ring=ring,
        signature=signature_of(placeholders, inputs, cut, [*kept.values(), *residuals]),
        allocate=allocator(placeholders, inputs, kept, residuals, ring, on_host=on_host),
        weights=_weights(inputs, place),
        conditions=_conditions(facts, place, session.policy, options, groups, device),
        # With the whole model as the span, nothing was found that could be wrong.
        audit=audit if options.audit and cut.span_units else None,
        groups=groups,
        ranks=Ranks(map(torch_distributed.process_group, in_graph), options.vote, device),
    )


def _weights(inputs: GraphInputs, place: dict[fx.Node, int]) -> Weights:
    """The weights of a graph that is being captured, at their `place` among its inputs."""
    own = [node for node in inputs.weights if node not in inputs.written]  # that is a counter
    tensors = [node for node in own if not is_number(node)]
    return Weights(
        [place[node] for node in tensors],
        [node in inputs.registered for node in tensors],
        {inputs.sources[node]: place[node] for node in own if is_number(node)},
        internals.guarded_numbers(is_of_model),
    )


def _conditions(
    facts: Facts,
    place: dict[fx.Node, int],
    policy: Policy,
    options: Options,
    groups: Sequence[str],
    device: torch.device,
) -> Conditions | None:
    """What compares the conditioning inputs, None if the policy does not look at them."""
    threshold = getattr(policy, "control_threshold", None)
    if threshold is None:
        return None
    places = {facts.inputs.paths[node]: place[node] for node in conditioning(facts)}
    on_gpu = any(tensor_of(node).device.type == "cuda" for node in facts.inputs.data)
    # Nothing compiles this: plain operations would make many passes over memory.
    plain = options.kernel == "aten" or not on_gpu
    measure = reference.residual_diff if plain else residual_diff
    return Conditions(threshold, places, measure, device, groups)


def fxcache_backend(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: dict[str, Any] | None = None,
) -> Callable[..., Any]:
    """``torch.compile(model, backend="fxcache", options={"policy": FirstBlockCache(...)})``.

    `options` may hold ``policy`` (default ``AdaptiveCache()``), ``backend`` (which compiles the
    pieces, default "inductor"), ``outline``, ``kernel``, ``cache_dtype``, ``cache_device``,
    ``audit`` and ``sync`` (as in `fxcache.transform`) and that backend's own options. Each compiled
    graph keeps its own state; trajectories are recognised by their timesteps. A graph without a
    block stack raises.
    """
    rest = dict(options or {})
    policy = rest.pop("policy", None) or AdaptiveCache()
    check_policy(policy)
    own = {name: rest.pop(name) for name in _OWN_OPTIONS if name in rest}
    compilers = Compilers(Options(mode=mode, options=rest or None, **own))
    return Backend(Session(policy), compilers)(gm, example_inputs)
