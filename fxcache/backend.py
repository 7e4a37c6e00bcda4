"""The compiler backend: a captured graph in, a step executor out.

`rewrite` is the whole pass: find the stack, cut, write the pieces, compile them. It serves
`fxcache.transform` (which brings its own session) and ``torch.compile(backend="fxcache")``.
"""

import logging
import sys
import types
from collections.abc import Callable, Hashable, Sequence
from typing import Any, cast

import torch
from torch import fx
from torch._guards import TracingContext, tracing
from torch._subclasses import FakeTensor

from fxcache.capture import GraphInputs, fake_value, graph_inputs, is_unbacked, tensor_of
from fxcache.dataflow import DataFlow, data_flow, op_name, storages
from fxcache.errors import CaptureError, OptionError, PolicyError, StackNotFoundError
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
from fxcache.policy import FirstBlockCache, Policy
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
        compiled = self._compiled(gm, example_inputs)
        # Counted when it is done: Dynamo may begin a graph anew.
        self.session.graphs += 1
        self.session.recompiles += self.session.evaluations > 0
        return compiled

    def _compiled(self, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        if self.list_weights is None and (torch.is_grad_enabled() or _has_dropout(gm.graph)):
            log.warning("gradients are enabled, or dropout is on: this graph is not cached")
            return self.compiler(gm, example_inputs)
        inputs = graph_inputs(gm.graph, self.argument_names)
        try:
            found = self.analyse(gm, inputs)
        except StackNotFoundError as error:
            if self.fullgraph and not _is_part(gm):
                raise
            log.info("compiled as it is: %s", error)
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
    gm: fx.GraphModule, found: Cut, inputs: GraphInputs, session: Session, compiler: Compiler
) -> StepExecutor:
    """`gm`, which is not changed, becomes a step executor that runs it as `found` cuts it."""
    ring = session.policy.forecast.ring
    log.info("stack %s; %d of %d blocks in the span", found.stack,
             len(found.span_blocks), len(found.stack.blocks))  # fmt: skip
    flow = data_flow(gm.graph)
    pieces = build_pieces(gm, found, flow, ring=ring)
    if getattr(compiler, "compiler_name", None) != "eager":
        _check_aliases(pieces, found, flow)
    reference, residuals = state_fakes(found)
    placeholders = gm.graph.find_nodes(op="placeholder")
    return StepExecutor(
        session,
        pieces,
        _compile_pieces(pieces, reference, residuals, ring, compiler),
        inputs=placeholders,
        streams=len(residuals),
        ring=ring,
        signature=_signature(placeholders, inputs, found, (reference, *residuals)),
        allocate=_allocator(placeholders, inputs, reference, residuals, ring),
    )


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
        if isinstance(key, tuple) and key not in fakes:
            with mode:  # a snapshot is a tensor of its own
                fakes[key] = tensor_of(key[1]).clone()
        return fakes[key] if key in fakes else fake_value(key)

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
    placeholders: list[fx.Node], inputs: GraphInputs, found: Cut, state: tuple[FakeTensor, ...]
) -> Callable[[Sequence[Any]], Hashable]:
    """What a state belongs to: the span, the layouts of the inputs and of what is kept.

    Constant where all is static. Recompiled graphs of one span share a state, those of two parts of
    a broken stack never do.
    """
    places = [placeholders.index(node) for node in inputs.data]
    # Of the integers, those that the shapes are made of: others (a timestep) change every step.
    symbols = set().union(*(_symbols(size) for tensor in state for size in tensor.shape))
    sizes = [
        placeholders.index(node) for node in inputs.sizes if _symbols(fake_value(node)) & symbols
    ]
    span = tuple(block.path for block in found.span_blocks)
    kept = (span, *map(_layout, state))
    static = tuple(map(_layout, filter(_has_shape, map(fake_value, inputs.data))))
    if not inputs.sizes:
        constant = (static, (), kept)
        return lambda values: constant

    def layout(values: Sequence[Any]) -> Hashable:
        given = filter(_has_shape, (values[place] for place in places))
        numbers = tuple(values[place] for place in sizes)
        return tuple(map(_layout, given)), numbers, kept

    return layout


def _has_shape(value: Any) -> bool:
    """Whether `value` is a tensor with dimensions (Dynamo makes some numbers scalar tensors)."""
    return _is_tensor(value) and value.ndim > 0


def _symbols(size: Any) -> set[Any]:
    """The symbols that `size` is made of: none for a plain number."""
    return set(size.node.expr.free_symbols) if isinstance(size, torch.SymInt) else set()


def _layout(tensor: torch.Tensor) -> Hashable:
    return str(tuple(tensor.shape)), tensor.dtype, tensor.device


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
    if not isinstance(policy, Policy):
        raise PolicyError(f"policy must be a policy like FirstBlockCache(...), got {policy!r}")
    compiler = resolve_compiler(rest.pop("backend", "inductor"), mode, rest or None, None)
    return Backend(Session(policy), compiler)(gm, example_inputs)
