"""The rest of the pass behind the cut: pieces, compiled, in an executor that runs them."""

import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import fx

from fxcache.capture import batch_layout, torch_distributed
from fxcache.capture import torch_internals as internals
from fxcache.capture.compile import Compilers, compile_pieces
from fxcache.capture.layout import allocator, signature_of
from fxcache.kernels import reference, residual_diff
from fxcache.options import Options
from fxcache.passes.cut import Cut
from fxcache.passes.facts import SAMPLE_NAMES, Facts
from fxcache.passes.graph import (
    GraphInputs,
    is_number,
    is_of_model,
    outputs_of,
    process_groups,
    tensor_of,
)
from fxcache.passes.pieces import Pieces, build_pieces, is_random, state_fakes
from fxcache.passes.probe import Probe
from fxcache.passes.rows import Rows
from fxcache.policy import Policy
from fxcache.policy.base import as_float32
from fxcache.policy.forecast import checked
from fxcache.runtime.audit import Audit
from fxcache.runtime.batch import Batch, BatchExecutor
from fxcache.runtime.conditions import Conditions, conditioning
from fxcache.runtime.device import GraphDevice, graph_device
from fxcache.runtime.executor import StepExecutor
from fxcache.runtime.freshness import Weights
from fxcache.runtime.graphs import GraphedRegions, not_graphable
from fxcache.runtime.host import HostedRegions, is_away
from fxcache.runtime.ranks import Ranks
from fxcache.runtime.regions import Begins, Compiled, Wiring
from fxcache.runtime.session import Session
from fxcache.runtime.state import Slot

log = logging.getLogger("fxcache")


def rewrite(
    gm: fx.GraphModule,
    cut: Cut,
    probe: Probe | None,
    session: Session,
    compilers: Compilers,
    *,
    rows: Rows | None = None,
) -> Callable[..., Any]:
    """`gm`, which is not changed, becomes an executor that runs it as `cut` says, for one request
    or, with `rows`, for a batch of them.
    """
    options = compilers.options
    facts, inputs, ring = cut.facts, cut.facts.inputs, session.policy.forecast.ring
    log.info("%s", cut)
    for note in cut.notes:
        log.info("%s", note)
    session.skipped_share = cut.skipped_share
    kept, residuals = state_fakes(cut, probe, options.cache_dtype)
    device = residuals[0].device
    on_host = is_away(options.host, device)
    in_graph = torch_distributed.largest_groups(process_groups(gm.graph))
    groups = () if options.sync is None else in_graph
    placeholders = gm.graph.find_nodes(op="placeholder")
    place = {node: index for index, node in enumerate(placeholders)}
    draws = any(map(is_random, gm.graph.nodes))
    has_graphs = compilers.graphs and graph_device(device) is not None
    if has_graphs and (why := not_graphable(inputs, device)):
        log.warning("no CUDA graphs: %s", why)
        has_graphs = False
    kernels = compilers.kernels(device)
    make_regions: Callable[[Slot], Begins]
    begin: Any
    if rows is None:
        how: dict[str, Any] = {"ring": ring, "others": ring - 1 if checked(session.policy) else 0}
        dtype = options.cache_dtype
        pieces = build_pieces(
            gm, cut, probe, **how, kernels=kernels, cache_dtype=dtype, groups=groups
        )
        compiled = compile_pieces(pieces, kept, residuals, ring, compilers)
        streams = len(residuals)
        wiring = Wiring(
            pieces, compiled, inputs=placeholders, kept=tuple(kept), streams=streams, **how
        )
        begin = wiring.begin
        graphed = partial(_graphed, inputs, place, pieces) if has_graphs else None
        make_regions = _by_slot(wiring, device, graphed, is_hosted=on_host)
    else:
        batch = _batch(gm, cut, probe, rows, compilers, groups, session if has_graphs else None)
        begin, make_regions = batch.begin, lambda slot: batch
    steps = session.steps
    # In a part of a broken model the sample goes by another name: the usual ones stand for it.
    is_part, named = internals.is_part(), {inputs.paths[node] for node in facts.samples}
    steps.samples |= set(SAMPLE_NAMES) if is_part else named
    if inputs.timestep is not None:
        steps.time_name = inputs.paths[inputs.timestep]
    steps.knows_time = True
    session.keeps_buffers = has_graphs
    samples = [place[node] for node in facts.samples]
    outputs = [i for i, n in enumerate(outputs_of(gm.graph)) if n in facts.outputs]
    audit = Audit(begin, samples, outputs, str(cut), device, draws=draws, groups=in_graph)
    executor = StepExecutor(
        session,
        make_regions,
        data={place[node]: inputs.paths[node] for node in inputs.data},
        has_numbers=bool(inputs.sizes),
        timestep=None if inputs.timestep is None else place[inputs.timestep],
        ring=ring,
        signature=signature_of(placeholders, inputs, cut, [*kept.values(), *residuals]),
        allocate=allocator(placeholders, inputs, kept, residuals, ring, on_host=on_host),
        weights=_weights(inputs, place, None if rows is not None else pieces),
        conditions=_conditions(facts, place, session.policy, options, groups, device),
        # With the whole model as the span, nothing was found that could be wrong.
        audit=audit if options.audit and cut.span_units else None,
        groups=groups,
        ranks=Ranks(map(torch_distributed.process_group, in_graph), options.vote, device),
    )
    executor.is_all = not internals.changes_objects()
    return executor if rows is None else BatchExecutor(executor, batch)


def _by_slot(
    wiring: Wiring,
    device: torch.device,
    graphed: Callable[[GraphDevice, Wiring], Begins] | None,
    *,
    is_hosted: bool,
) -> Callable[[Slot], Begins]:
    """Makes what runs the pieces for a slot."""
    # One a slot, for its pool: branches of a slot take turns, but another slot's graphs, replayed
    # by another thread amid an evaluation, must not share memory with it.
    devices: WeakKeyDictionary[Slot, Any] = WeakKeyDictionary()

    def make_regions(slot: Slot) -> Begins:
        if is_hosted:
            return HostedRegions(wiring, device)
        if graphed is None:
            return wiring
        return graphed(devices.setdefault(slot, graph_device(device)), wiring)

    return make_regions


def _graphed(
    inputs: GraphInputs,
    place: dict[fx.Node, int],
    pieces: Pieces,
    graphs: GraphDevice,
    wiring: Wiring,
) -> Begins:
    """The pieces of `wiring` as CUDA graphs."""
    weights = [place[node] for node in inputs.weights if not is_number(node)]
    data = [*(place[node] for node in inputs.data), *range(len(place), wiring.given)]
    return GraphedRegions(wiring, graphs, weights, data, torch_distributed.uncapturable(pieces))


def _batch(
    gm: fx.GraphModule,
    cut: Cut,
    probe: Probe | None,
    rows: Rows,
    compilers: Compilers,
    groups: Sequence[str],
    graphs_of: Session | None,
) -> Batch:
    """The pieces of `gm` for batches: they take one residual a stream, a request's own forecast."""
    kept, residuals = state_fakes(cut, probe)
    layout_kept, kept = kept, batch_layout.merged(kept, rows)
    device, placeholders = residuals[0].device, gm.graph.find_nodes(op="placeholder")
    kernels = compilers.kernels(device)
    pieces = build_pieces(gm, cut, probe, ring=1, kernels=kernels, groups=groups, rows=rows)
    compiled = compile_pieces(pieces, kept, residuals, 1, compilers)
    wire = partial(Wiring, kept=tuple(kept), streams=len(residuals), ring=1, others=0)
    head = wire(pieces, compiled, inputs=placeholders)
    crossing = () if pieces.head is None else pieces.head.results
    body = wire(
        Pieces(None, pieces.hit, pieces.miss),
        Compiled(None, compiled.hit, compiled.miss),
        inputs=[*placeholders, *crossing],
    )
    inputs = cut.facts.inputs
    how: dict[str, Any] = {}
    graphs = graph_device(device)
    if graphs_of is not None and graphs is not None:
        place = {node: index for index, node in enumerate(placeholders)}
        how["make_regions"] = partial(_graphed, inputs, place, pieces, graphs)
        how["buckets"] = graphs_of.buckets
    return Batch(
        head,
        body,
        batch_layout.layout_of(gm, inputs, pieces, layout_kept, residuals, rows),
        writes_on_hit=probe is not None and probe.kind.reference == "previous",
        is_checked=any(map(is_random, gm.graph.nodes)),
        **how,
    )


def _weights(inputs: GraphInputs, place: dict[fx.Node, int], pieces: Pieces | None) -> Weights:
    """The weights of a graph that is being captured, at their `place` among its inputs, and which
    of them a hit reads (without `pieces`: all).
    """
    own = [node for node in inputs.weights if node not in inputs.written]  # that is a counter
    tensors = [node for node in own if not is_number(node)]
    read = [*tensors]
    if pieces is not None:
        on_hit = {*pieces.hit.arguments, *(pieces.head.arguments if pieces.head else ())}
        read = [node for node in tensors if node in on_hit]
    return Weights(
        [place[node] for node in tensors],
        [node in inputs.registered for node in tensors],
        {inputs.sources[node]: place[node] for node in own if is_number(node)},
        internals.guarded_numbers(is_of_model),
        [place[node] for node in read],
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
    return Conditions(as_float32(threshold), places, measure, device, groups)
