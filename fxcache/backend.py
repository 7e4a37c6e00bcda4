"""The compiler backend: a captured graph in, a step executor out.

`rewrite` is the whole pass: find the stack, cut, write the pieces, compile them. It serves
`fxcache.transform` (which brings its own session) and ``torch.compile(backend="fxcache")``.
"""

import logging
from collections.abc import Callable, Hashable, Sequence
from typing import Any, cast

import torch
from torch import fx
from torch._guards import TracingContext, tracing
from torch._subclasses import FakeTensor

from fxcache.capture import GraphInputs, fake_value, graph_inputs, is_unbacked, tensor_of
from fxcache.dataflow import data_flow, op_name
from fxcache.errors import CaptureError, OptionError, StackNotFoundError
from fxcache.passes.branch import (
    REFERENCE,
    WEIGHTS,
    Piece,
    Pieces,
    build_pieces,
    ring_key,
    slot_key,
    state_fakes,
)
from fxcache.passes.cut import Cut, cut
from fxcache.policy import FirstBlockCache
from fxcache.runtime.executor import Compiled, StepExecutor
from fxcache.runtime.session import Session
from fxcache.runtime.state import Buffers
from fxcache.stack import Stack, find_stack

log = logging.getLogger("fxcache")

# What torch.compile itself makes of `mode` and `options`.
_inductor: Any = torch._TorchCompileInductorWrapper
_other: Any = torch._TorchCompileWrapper

#: Takes a graph module and example inputs, gives a function of the same inputs.
Compiler = Callable[[fx.GraphModule, Sequence[Any]], Callable[..., Sequence[Any]]]


def resolve_compiler(
    backend: str | Callable[..., Any], mode: str | None, options: Any, dynamic: bool | None
) -> Compiler:
    """The compiler that `backend`, `mode` and `options` mean to torch.compile.

    Raises OptionError for an unknown backend, mode or option, and for mode with options.
    """
    if mode is not None and options:
        raise OptionError(
            f"either mode or options can be given, not both: mode={mode!r}, options={options!r}"
        )
    try:
        if backend == "inductor":
            return cast(Compiler, _inductor(mode, options, dynamic))
        if isinstance(backend, str):
            if backend == "fxcache":
                raise OptionError("backend='fxcache' cannot compile its own pieces; try 'inductor'")
            known = torch._dynamo.list_backends(exclude_tags=())
            if backend not in known:
                raise OptionError(f"unknown backend {backend!r}; torch.compile knows {known}")
        elif not callable(backend):
            raise OptionError(f"backend must be a name or a callable, got {backend!r}")
        return cast(Compiler, _other(backend, mode, options, dynamic))
    except (RuntimeError, AttributeError) as error:
        if isinstance(error, OptionError):
            raise
        raise OptionError(f"mode={mode!r}, options={options!r}: {error}") from error


class Backend:
    """What is handed to torch.compile: one a denoiser, with its session.

    Args:
        session: where state and records are kept.
        compiler: compiles the pieces.
        argument_names: the names of the model's positional arguments.
        list_weights: how many elements the parameters of the model's heaviest list have. In a model
            captured in pieces, a stack with at most half of them lies beside the real one. None:
            the model is not known.
    """

    def __init__(
        self,
        session: Session,
        compiler: Compiler,
        *,
        argument_names: tuple[str, ...] = (),
        list_weights: int | None = None,
    ) -> None:
        self.session, self.compiler = session, compiler
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
        self.session.graphs += 1
        self.session.recompiles += self.session.evaluations > 0
        if self.list_weights is None and (torch.is_grad_enabled() or _has_dropout(gm.graph)):
            log.warning("gradients are enabled, or dropout is on: this graph is not cached")
            return self.compiler(gm, example_inputs)
        inputs = graph_inputs(gm.graph, self.argument_names)
        try:
            found = self.analyse(gm, inputs)
        except StackNotFoundError as error:
            if self.fullgraph:
                raise
            self.refused.append((len(gm.graph.nodes), str(error)))
            return self.compiler(gm, example_inputs)
        return rewrite(gm, found, inputs, self.session, self.compiler)

    def analyse(self, gm: fx.GraphModule, inputs: GraphInputs) -> Cut:
        """Find the model's stack in `gm` and cut it as the policy asks."""
        policy = self.session.policy
        flow = data_flow(gm.graph)
        stack = find_stack(gm.graph, flow)
        weights = _num_weights(stack)
        if not self.fullgraph and 2 * weights <= (self.list_weights or 0):
            raise StackNotFoundError(
                f"{stack} has {weights} weights, the model's heaviest list {self.list_weights}: "
                f"it lies beside the block stack, or is a part of it"
            )
        return cut(
            gm.graph,
            stack,
            flow,
            inputs,
            head_blocks=policy.head_blocks,
            tail_blocks=policy.tail_blocks,
        )


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
    gm: fx.GraphModule, found: Cut, inputs: GraphInputs, session: Session, compiler: Compiler
) -> StepExecutor:
    """`gm`, which is not changed, becomes a step executor that runs it as `found` cuts it."""
    ring = session.policy.forecast.ring
    log.info("stack %s; %d of %d blocks in the span", found.stack,
             len(found.span_blocks), len(found.stack.blocks))  # fmt: skip
    pieces = build_pieces(gm, found, data_flow(gm.graph), ring=ring)
    reference, residuals = state_fakes(found)
    placeholders = gm.graph.find_nodes(op="placeholder")
    return StepExecutor(
        session,
        pieces,
        _compile_pieces(pieces, reference, residuals, ring, compiler),
        inputs=placeholders,
        streams=len(residuals),
        ring=ring,
        signature=_signature(placeholders, inputs, (reference, *residuals)),
        allocate=_allocator(placeholders, inputs, reference, residuals, ring),
    )


def _compile_pieces(
    pieces: Pieces,
    reference: FakeTensor,
    residuals: list[FakeTensor],
    ring: int,
    compiler: Compiler,
) -> Compiled:
    mode = reference.fake_mode
    with mode:
        fakes: dict[Hashable, Any] = {
            REFERENCE: reference,
            WEIGHTS: torch.empty(ring, device=reference.device),
        }
    for stream, residual in enumerate(residuals):
        fakes[slot_key(stream)] = residual
        fakes |= {ring_key(stream, j): residual for j in range(ring)}

    def fake_of(key: Any) -> Any:
        if key in fakes:
            return fakes[key]
        return fake_value(key[1] if isinstance(key, tuple) else key)

    def compiled(piece: Piece) -> Callable[..., Sequence[Any]]:
        given = [fake_of(key) for key in piece.arguments]
        try:
            # A context of its own: the one that is open belongs to the whole graph.
            with tracing(TracingContext(mode)):
                return compiler(piece.module, given)
        except Exception as error:
            if not any(_depends_on_data(value) for value in given):
                raise
            raise CaptureError(
                "the compiler fails on tensors whose sizes depend on data, and such tensors cross "
                f'the cut of this model; backend="eager" runs it. The compiler says: {error}'
            ) from error

    return Compiled(*map(compiled, (pieces.head, pieces.hit, pieces.miss)))


def _depends_on_data(value: Any) -> bool:
    return _is_tensor(value) and any(is_unbacked(size) for size in value.shape)


def _signature(
    placeholders: list[fx.Node], inputs: GraphInputs, state: tuple[FakeTensor, ...]
) -> Callable[[Sequence[Any]], Hashable]:
    """The layout of a call's inputs: constant where shapes are static, else read from the call."""
    places = [placeholders.index(node) for node in inputs.data]
    fakes = [fake_value(node) for node in inputs.data]
    kept = tuple((str(tuple(t.shape)), t.dtype, t.device) for t in state)
    static = tuple((str(tuple(t.shape)), t.dtype, t.device) for t in fakes if _is_tensor(t))
    if not any(isinstance(size, torch.SymInt) for t in fakes if _is_tensor(t) for size in t.shape):
        constant = (static, kept)
        return lambda values: constant

    def layout(values: Sequence[Any]) -> Hashable:
        given = [values[place] for place in places]
        return tuple((str(tuple(v.shape)), v.dtype, v.device) for v in given if _is_tensor(v))

    return layout


def _is_tensor(value: Any) -> bool:
    return isinstance(value, torch.Tensor)


def _allocator(
    placeholders: list[fx.Node],
    inputs: GraphInputs,
    reference: FakeTensor,
    residuals: list[FakeTensor],
    ring: int,
) -> Callable[[Sequence[Any]], Buffers]:
    """Makes buffers like the fakes, symbolic sizes taken from the inputs of a call."""
    places = {placeholders.index(node): fake_value(node) for node in inputs.sizes}

    def allocate(values: Sequence[Any]) -> Buffers:
        sizes = {
            fake.node.expr: values[place]
            for place, fake in places.items()
            if isinstance(fake, torch.SymInt)
        }

        def make(fake: torch.Tensor) -> torch.Tensor:
            shape = [_concrete(size, sizes) for size in fake.shape]
            return torch.zeros(shape, dtype=fake.dtype, device=fake.device)

        # Plain tensors even under inference_mode, so that later calls outside may write them.
        with torch.inference_mode(False), torch.no_grad():
            rings = tuple(tuple(make(r) for _ in range(ring)) for r in residuals)
            return Buffers(make(reference), rings)

    return allocate


def _concrete(size: int | torch.SymInt, known: dict[Any, int]) -> int:
    if isinstance(size, int):
        return size
    number = size.node.expr.subs(known)
    if number.free_symbols:
        raise CaptureError(f"a stream of the block stack has a size that depends on data: {size}")
    return int(number)


def fxcache_backend(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: dict[str, Any] | None = None,
) -> Callable[..., Any]:
    """``torch.compile(model, backend="fxcache", options={"policy": FirstBlockCache(...)})``.

    `options` may hold ``policy`` (default ``FirstBlockCache()``), ``backend`` (which compiles the
    pieces, default "inductor") and that backend's own options. Each compiled graph keeps its own
    state; trajectories are recognised by their timesteps. A graph without a block stack raises.
    """
    rest = dict(options or {})
    policy = rest.pop("policy", None) or FirstBlockCache()
    compiler = resolve_compiler(rest.pop("backend", "inductor"), mode, rest or None, None)
    return Backend(Session(policy), compiler)(gm, example_inputs)
