"""Hand the pieces to a compiler: each as a whole, or its blocks one of a kind."""

import logging
from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import fx
from torch._subclasses import FakeTensor, FakeTensorMode

from fxcache.capture import torch_internals as internals
from fxcache.capture.eager import quicken
from fxcache.errors import CaptureError, OptionError
from fxcache.kernels import reference
from fxcache.passes.graph import is_unbacked, value_of
from fxcache.passes.measure import FILTERED, REFERENCE
from fxcache.passes.outline import Outline, outline
from fxcache.passes.piece_graph import WRITTEN, Piece
from fxcache.passes.pieces import WEIGHTS, Pieces, ring_key, slot_key
from fxcache.runtime.calls import CallSequence, Function
from fxcache.runtime.regions import Compiled

log = logging.getLogger("fxcache")

#: What `kernel` may be; what "auto" means is said at `Lowering.kernels`.
KERNELS = ("auto", "triton", "aten")
#: What `cache_dtype` may be, besides None: as residuals are computed.
CACHE_DTYPES = (
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
)

#: Takes a graph module and example inputs, gives a function of the same inputs.
Compiler = Callable[[fx.GraphModule, Sequence[Any]], Callable[..., Sequence[Any]]]


@dataclass(frozen=True)
class Lowering:
    """How pieces become code.

    `compiler` compiles a piece, `whole` a graph that is not cached. With `outline`, equal blocks
    are compiled once. `kernel` says who measures. With `graphs`, what is compiled is captured into
    CUDA graphs where there is a GPU. Residuals are kept in `cache_dtype` and on `cache_device`
    (None: as and where they are computed). With `audit`, what is cached is tried before it is used.
    """

    compiler: Compiler
    whole: Compiler
    outline: bool = True
    kernel: str = "auto"
    graphs: bool = False
    cache_dtype: torch.dtype | None = None
    cache_device: torch.device | None = None
    audit: bool = True

    @property
    def is_eager(self) -> bool:
        """Whether nothing is compiled: pieces run as they were written."""
        return getattr(self.compiler, "compiler_name", None) == "eager"

    def kernels(self, device: torch.device) -> Any:
        """The module that measures, predicts and refreshes on `device`.

        "auto" leaves it to Inductor, which fuses plain operations with the blocks around them.
        Where nothing is compiled, plain operations would make many passes over memory, so on a GPU
        the kernels take over.
        """
        on_its_own = self.is_eager and device.type == "cuda"
        if self.kernel == "aten" or (self.kernel == "auto" and not on_its_own):
            return reference
        from fxcache.kernels import ops  # imports triton, which takes a while

        return ops


def resolve_lowering(
    backend: str | Callable[..., Any],
    mode: str | None,
    options: Any,
    dynamic: bool | None,
    *,
    outline: bool = True,
    kernel: str = "auto",
    cache_dtype: torch.dtype | None = None,
    cache_device: torch.device | str | None = None,
    audit: bool = True,
) -> Lowering:
    """What `backend`, `mode` and `options` mean to torch.compile, and our own options.

    Raises OptionError for an unknown backend, mode or option, for mode with options, and for
    residuals on a `cache_device` with CUDA graphs.
    """
    if kernel not in KERNELS:
        raise OptionError(f"kernel must be one of {KERNELS}, got {kernel!r}")
    for name, value in (("outline", outline), ("audit", audit)):
        if not isinstance(value, bool):
            raise OptionError(f"{name} must be True or False, got {value!r}")
    if cache_dtype is not None and cache_dtype not in CACHE_DTYPES:
        raise OptionError(f"cache_dtype must be None or one of {CACHE_DTYPES}, got {cache_dtype!r}")
    host = _host(cache_device)
    if mode is not None and options:
        raise OptionError(
            f"either mode or options can be given, not both: mode={mode!r}, options={options!r}"
        )
    compiler, whole = (_resolve_compiler(backend, mode, options, dynamic) for _ in range(2))
    graphs = False
    if backend == "inductor" and compiler.config.get("triton.cudagraphs"):
        # The step executor captures the pieces itself: its buffers must lie outside of the pool,
        # and Inductor's own graphs would copy them.
        compiler.config["triton.cudagraphs"] = False
        graphs = True
    if graphs and host is not None:
        raise OptionError(
            f"cache_device={cache_device!r} cannot be had with CUDA graphs (mode={mode!r}, "
            f"options={options!r}), which read residuals where they lay at the capture: drop one "
            f"of the two"
        )
    return Lowering(
        compiler,
        whole,
        outline and backend != "eager",
        kernel,
        graphs,
        cache_dtype,
        host,
        audit,
    )


def _host(cache_device: Any) -> torch.device | None:
    """The device that `cache_device` names: the host, or None."""
    if isinstance(cache_device, torch.device | str):
        with suppress(RuntimeError):  # no device goes by that name
            device = torch.device(cache_device)
            if device.type == "cpu":
                return device
    if cache_device is not None:
        raise OptionError(
            f'cache_device must be "cpu" (host memory) or None (where residuals are computed), '
            f"got {cache_device!r}"
        )
    return None


def _resolve_compiler(
    backend: str | Callable[..., Any], mode: str | None, options: Any, dynamic: bool | None
) -> Any:
    try:
        if backend == "inductor":
            return internals.InductorWrapper(mode, options, dynamic)
        if isinstance(backend, str):
            if backend == "fxcache":
                raise OptionError("backend='fxcache' cannot compile its own pieces; try 'inductor'")
            known = torch._dynamo.list_backends(exclude_tags=())
            if backend not in known:
                raise OptionError(f"unknown backend {backend!r}; torch.compile knows {known}")
        elif not callable(backend):
            raise OptionError(f"backend must be a name or a callable, got {backend!r}")
        return internals.CompilerWrapper(backend, mode, options, dynamic)
    except (RuntimeError, AttributeError) as error:
        if isinstance(error, OptionError):
            raise
        raise OptionError(f"mode={mode!r}, options={options!r}: {error}") from error


def compile_pieces(
    pieces: Pieces,
    kept: Mapping[str, torch.Tensor],
    residuals: list[FakeTensor],
    ring: int,
    lowering: Lowering,
) -> Compiled:
    """Compile the pieces for state tensors like `kept` (by key) and `residuals`."""
    mode = residuals[0].fake_mode
    fakes: dict[Hashable, Any] = dict(kept.items())
    with mode:
        fakes[WEIGHTS] = torch.empty(ring, device=residuals[0].device)
        if REFERENCE in kept:
            fakes[FILTERED] = kept[REFERENCE].clone()
        for stream, residual in enumerate(residuals):
            fakes[slot_key(stream)] = residual
            fakes |= {ring_key(stream, j): torch.empty_like(residual) for j in range(ring)}

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
                return lowering.compiler(module, given)
        except Exception as error:
            if not any(_depends_on_data(value) for value in given):
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
        if lowering.outline:
            plan = outline(piece.module, given)
        if isinstance(plan, str):
            log.info("%s is one call: %s", name, plan)
            return quicken(piece.module) if lowering.is_eager else compiled(piece.module, given)
        return _call_sequence(plan, kinds, compiled)

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


def _call_sequence(
    plan: Outline,
    kinds: dict[Hashable, Function],
    compiled: Callable[[fx.GraphModule, Sequence[Any]], Function],
) -> CallSequence:
    """`plan` with every kind compiled that is not in `kinds` yet."""
    functions = []
    for call in plan.calls:
        if call.kind.key not in kinds:
            kinds[call.kind.key] = compiled(call.kind.module, call.kind.fakes)
        functions.append(kinds[call.kind.key])
    log.info("%d calls of %d kinds", len(plan.calls), len(set(map(id, functions))))
    return CallSequence(plan, functions)


def _depends_on_data(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and any(is_unbacked(size) for size in value.shape)
