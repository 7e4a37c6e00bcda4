"""Hand the pieces to a compiler: each as a whole, or its blocks one of a kind."""

import logging
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import fx
from torch._subclasses import FakeTensor, FakeTensorMode

from fxcache.capture import torch_internals as internals
from fxcache.capture.eager import quicken
from fxcache.errors import CaptureError, OptionError
from fxcache.kernels import reference
from fxcache.options import Options
from fxcache.passes.graph import is_unbacked, value_of
from fxcache.passes.measure import FILTERED, REFERENCE
from fxcache.passes.outline import Outline, outline
from fxcache.passes.piece_graph import WRITTEN, Piece
from fxcache.passes.pieces import ERROR_WEIGHTS, WEIGHTS, Pieces, other_key, ring_key, slot_key
from fxcache.runtime.calls import CallSequence, Function
from fxcache.runtime.regions import Compiled

log = logging.getLogger("fxcache")

#: Takes a graph module and example inputs, gives a function of the same inputs.
Compiler = Callable[[fx.GraphModule, Sequence[Any]], Callable[..., Sequence[Any]]]


class Compilers:
    """The compilers that `options` ask for: `piece` compiles a piece, `whole` a graph that is not
    cached. With `graphs`, what is compiled is captured into CUDA graphs where there is a GPU.

    Raises OptionError for an unknown backend, mode or option, and for residuals on a `cache_device`
    with CUDA graphs.
    """

    def __init__(self, options: Options) -> None:
        self.options = options
        self.piece, self.whole = (_resolve_compiler(options) for _ in range(2))
        self.graphs = False
        if options.backend == "inductor":
            # A piece's inputs have their layouts by the guards, or come from another piece. (What
            # goes, too: a custom operation whose fake lays its result out otherwise is not seen.)
            self.piece.config.setdefault("size_asserts", False)
        if options.backend == "inductor" and self.piece.config.get("triton.cudagraphs"):
            # The step executor captures the pieces itself: its buffers must lie outside of the
            # pool, and Inductor's own graphs would copy them.
            self.piece.config["triton.cudagraphs"] = False
            self.graphs = True
        if self.graphs and options.cache_device is not None:
            raise OptionError(
                f"cache_device={str(options.cache_device)!r} cannot be had with CUDA graphs "
                f"(mode={options.mode!r}, options={options.options!r}), which read residuals where "
                f"they lay at the capture: drop one of the two"
            )

    def kernels(self, device: torch.device) -> Any:
        """The module that measures, predicts and refreshes on `device`.

        "auto" leaves it to Inductor, which fuses plain operations with the blocks around them.
        Where nothing is compiled, plain operations would make many passes over memory, so on a GPU
        the kernels take over.
        """
        kernel = self.options.kernel
        on_its_own = self.options.is_eager and device.type == "cuda"
        if kernel == "aten" or (kernel == "auto" and not on_its_own):
            return reference
        from fxcache.kernels import ops  # imports triton, which takes a while

        return ops


def _resolve_compiler(options: Options) -> Any:
    """What torch.compile would make of the backend, its mode and its options."""
    backend, given = options.backend, (options.mode, options.for_compiler, options.dynamic)
    try:
        if backend == "inductor":
            return internals.InductorWrapper(*given)
        if isinstance(backend, str):
            if backend == "fxcache":
                raise OptionError("backend='fxcache' cannot compile its own pieces; try 'inductor'")
            known = torch._dynamo.list_backends(exclude_tags=())
            if backend not in known:
                raise OptionError(f"unknown backend {backend!r}; torch.compile knows {known}")
        elif not callable(backend):
            raise OptionError(f"backend must be a name or a callable, got {backend!r}")
        return internals.CompilerWrapper(backend, *given)
    except (RuntimeError, AttributeError) as error:
        if isinstance(error, OptionError):
            raise
        raise OptionError(f"mode={options.mode!r}, options={options.options!r}: {error}") from error


def compile_pieces(
    pieces: Pieces,
    kept: Mapping[str, torch.Tensor],
    residuals: list[FakeTensor],
    ring: int,
    compilers: Compilers,
) -> Compiled:
    """Compile the pieces for state tensors like `kept` (by key) and `residuals`."""
    mode, options = residuals[0].fake_mode, compilers.options
    fakes: dict[Hashable, Any] = dict(kept.items())
    with mode:
        fakes[WEIGHTS] = torch.empty(ring, device=residuals[0].device)
        fakes[ERROR_WEIGHTS] = torch.empty(ring - 1, device=residuals[0].device)
        if REFERENCE in kept:
            fakes[FILTERED] = kept[REFERENCE].clone()
        for stream, residual in enumerate(residuals):
            fakes[slot_key(stream)] = residual
            for key in (ring_key, other_key):
                fakes |= {key(stream, j): torch.empty_like(residual) for j in range(ring)}

    def fake_of(key: Any) -> Any:
        return fakes[key] if key in fakes else value_of(key)

    def compiled(module: fx.GraphModule, given: Sequence[Any]) -> Function:
        # AOTAutograd keeps a graph on disk only if this says that receivers are tensors.
        for node in module.graph.nodes:
            if node.op == "call_method":
                receiver = cast(fx.Node, node.args[0])
                receiver.meta.setdefault("example_value", receiver.meta.get("val"))
        try:
            # A context of its own: the one that is open belongs to the whole graph.
            with internals.tracing(internals.TracingContext(mode)):
                function: Function = compilers.piece(module, given)
                return function
        except Exception as error:
            tensors = [value for value in given if isinstance(value, torch.Tensor)]
            if not any(is_unbacked(size) for tensor in tensors for size in tensor.shape):
                raise
            raise CaptureError(
                "the compiler fails on tensors whose sizes depend on data, and such tensors cross "
                f'the cut of this model; backend="eager" runs it. The compiler says: {error}'
            ) from error

    kinds: dict[Hashable, Function] = {}

    def lowered(name: str, piece: Piece) -> Function:
        given = [fake_of(key) for key in piece.arguments]
        _annotate(piece.module.graph, given, mode)
        plan: Outline | str = "nothing is outlined"
        if options.outline and not options.is_eager:
            plan = outline(piece.module, given)
        if isinstance(plan, str):
            log.info("%s is one call: %s", name, plan)
            return quicken(piece.module) if options.is_eager else compiled(piece.module, given)
        for kind in (call.kind for call in plan.calls):
            if kind.key not in kinds:
                kinds[kind.key] = compiled(kind.module, kind.fakes)
        functions = [kinds[call.kind.key] for call in plan.calls]
        log.info("%d calls of %d kinds", len(functions), len(set(map(id, functions))))
        return CallSequence(plan, functions)

    head = None if pieces.head is None else lowered("head", pieces.head)
    return Compiled(head, lowered("hit", pieces.hit), lowered("miss", pieces.miss))


def _annotate(graph: fx.Graph, given: Sequence[Any], mode: FakeTensorMode) -> None:
    """Give a fake value to the nodes that the pass wrote itself, as the capture did to the others.

    Without them a compiled piece is not kept on disk (AOTAutograd asks for them).
    """
    placeholders = graph.find_nodes(op="placeholder")
    for node, fake in zip(placeholders, given, strict=True):
        node.meta.setdefault("val", fake)
    for node in graph.nodes:
        if not node.meta.get(WRITTEN):
            continue
        args, kwargs = fx.map_arg((node.args, node.kwargs), value_of)
        with mode, torch.no_grad():
            if node.op == "call_method":
                node.meta["val"] = getattr(args[0], str(node.target))(*args[1:], **kwargs)
            else:
                node.meta["val"] = cast(Any, node.target)(*args, **kwargs)
