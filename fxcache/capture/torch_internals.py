"""What is private of torch and used by the capture, in one place.

Checked on torch 2.13 and 2.15: a new torch that moves one of these fails here first
(`tests/capture/test_functional.py`).
"""

import functools
import inspect
import logging
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import torch
from torch import fx
from torch._C import DispatchKey
from torch._decomp.decompositions import upsample_compute_output_size
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.exc import (
    BackendCompilerFailed,
    FailOnRecompileLimitHit,
    InternalTorchDynamoError,
    TorchRuntimeError,
    Unsupported,
    UserError,
)
from torch._dynamo.output_graph import OutputGraph
from torch._dynamo.symbolic_convert import InstructionTranslator
from torch._dynamo.variables.base import AttributeMutationExisting, ValueMutationExisting
from torch._functorch._aot_autograd.descriptors import (
    InputMutationAOTOutput,
    PlainAOTInput,
)
from torch._functorch._aot_autograd.utils import make_boxed_func
from torch._guards import TracingContext, tracing
from torch._ops import OpOverload
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

#: What is taken from here as it is.
__all__ = [
    "BackendCompilerFailed",
    "FailOnRecompileLimitHit",
    "TorchRuntimeError",
    "TracingContext",
    "tracing",
]

#: What Dynamo raises of a model that it does not follow (or that does not fit its arguments).
NOT_CAPTURED = (
    Unsupported,
    UserError,
    FailOnRecompileLimitHit,
    InternalTorchDynamoError,
    GuardOnDataDependentSymNode,
)

_TRACING = threading.RLock()

#: What torch.compile itself makes of `mode` and `options`.
InductorWrapper: Any = torch._TorchCompileInductorWrapper
CompilerWrapper: Any = torch._TorchCompileWrapper

#: Where torch has it, frames behind a graph break are counted a compiled function, too.
ISOLATED: dict[str, Any] = (
    {"isolate_recompiles": True}
    if "isolate_recompiles" in inspect.signature(torch.compile).parameters
    else {}
)

#: What logs and returns nothing, as far as it is there (some libraries add their own).
_LOGGING = (
    "debug",
    "info",
    "warning",
    "error",
    "critical",
    "log",
    "warning_once",
    "warning_advice",
)


def capturing(*, more: bool) -> AbstractContextManager[None]:
    """With `more`, Dynamo's switches that avoid graph breaks, for the calls inside only and as far
    as this torch has them. What a model warns of and logs is left out.
    """
    if not more:
        return nullcontext()
    own = {getattr(logging.Logger, name) for name in _LOGGING if hasattr(logging.Logger, name)}
    switches: dict[str, Any] = {
        "capture_scalar_outputs": True,
        "capture_dynamic_output_shape_ops": True,
        "ignore_logging_functions": {warnings.warn, *own},
    }
    known = {name: value for name, value in switches.items() if hasattr(torch._dynamo.config, name)}
    patched: AbstractContextManager[None] = torch._dynamo.config.patch(known)
    return patched


_PYTHON_KEYS = (DispatchKey.Autograd, DispatchKey.CompositeImplicitAutograd)


def _rewritten_at_trace() -> Iterator[OpOverload]:
    """Operations that a trace would replace by formulas in Python, which round otherwise than the
    operation itself, or leave its result in another memory format.
    """
    for name in dir(torch.ops.aten):
        if "upsample" in name or name == "matmul":
            packet = getattr(torch.ops.aten, name)
            yield from (getattr(packet, overload) for overload in packet.overloads())


def _upsampled(op: OpOverload, x: torch.Tensor, size: Any, *rest: Any) -> Any:
    """What `op` calls, with the size computed here: it would make numbers of symbolic sizes."""
    *flags, scales = rest
    size = upsample_compute_output_size(x.size(), size, scales)
    packet = getattr(torch.ops.aten, op._schema.name.split("::")[-1])
    return packet.default(x, size, *flags, *(scales or [None] * len(size)))


@contextmanager
def keeping_operations() -> Iterator[None]:
    """Inside, a trace records operations as the plain model calls them."""
    taken: list[tuple[OpOverload, DispatchKey, Any]] = []
    with _TRACING:
        for op in _rewritten_at_trace():
            for key in _PYTHON_KEYS:
                if key in op.py_kernels:
                    taken.append((op, key, op.py_kernels.pop(key)))
                    if op._overloadname == "vec":
                        op.py_kernels[key] = functools.partial(_upsampled, op)
                    op._dispatch_cache.clear()
        try:
            yield
        finally:
            for op, key, kernel in taken:
                op.py_kernels[key] = kernel
                op._dispatch_cache.clear()


def aot_inference(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    compiler: Callable[[fx.GraphModule, Sequence[Any]], Callable[..., Any]],
) -> Callable[..., Any]:
    """`gm` behind AOTAutograd's runtime wrapper, its functional graph run by what `compiler` makes
    of it. Without decompositions, and only without gradients.

    A view of an inference tensor wants no gradients, and on that depends which product is computed.
    """
    examples = list(example_inputs)
    for place, node in enumerate(gm.graph.find_nodes(op="placeholder")):
        example = examples[place]
        if isinstance(example, torch.Tensor) and example.is_inference() and example.requires_grad:
            examples[place] = node.meta["example_value"].requires_grad_(False)
    with ExitStack() as tracing_only:

        def traced(functional: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
            tracing_only.close()
            return make_boxed_func(compiler(functional, inputs))

        backend = aot_autograd(fw_compiler=traced, inference_compiler=traced)
        tracing_only.enter_context(keeping_operations())
        wrapped: Callable[..., Any] = backend(gm, examples)
    return wrapped


def place_of(placeholder: fx.Node) -> int | None:
    """Which input of Dynamo's graph a placeholder of the functional graph is, or is a part of."""
    descriptor = placeholder.meta.get("desc")
    while descriptor is not None and not isinstance(descriptor, PlainAOTInput):
        descriptor = getattr(descriptor, "base", None)
    return None if descriptor is None else int(descriptor.idx)


def written_place(descriptor: Any) -> int | None:
    """Which input of Dynamo's graph an output of the functional graph is the new value of."""
    if not isinstance(descriptor, InputMutationAOTOutput):
        return None
    written = descriptor.mutated_input
    return int(written.idx) if isinstance(written, PlainAOTInput) else None


def source_name(node: fx.Node) -> str:
    """Where Dynamo found what the placeholder `node` of its graph stands for ("": unknown)."""
    source = getattr(node.meta.get("grapharg"), "source", None)
    name = getattr(source, "name", "")
    return str(name() if callable(name) else name)  # a method in older torch


def guarded_numbers(
    is_wanted: Callable[[str], bool],
) -> Callable[[], dict[str, frozenset[str]]]:
    """Gives what the capture that is going on took for constant, by the name of where it stands.

    These are Dynamo's guards. What they compare with is written into them after the backend is
    done, so they are read later.
    """
    context = TracingContext.try_get()
    guards: list[Any] = [
        guard
        for guard in (context.guards_context.dynamo_guards if context else ())
        if guard.create_fn_name() in ("CONSTANT_MATCH", "EQUALS_MATCH")
    ]

    def numbers() -> dict[str, frozenset[str]]:
        # A guard's name is a method up to torch 2.11, then a property.
        named = {str(g.name() if callable(g.name) else g.name): g.code_list for g in guards}
        guards.clear()
        return {name: frozenset(code or ()) for name, code in named.items() if is_wanted(name)}

    return numbers


def output_graph() -> OutputGraph | None:
    """What is known of the capture that is going on (None: there is none)."""
    with suppress(AttributeError):
        return InstructionTranslator.current_tx().output
    return None


def is_part() -> bool:
    """Whether the graph that is being captured begins or ends at a graph break."""
    output = output_graph()
    return output is not None and (
        output.compile_subgraph_reason.graph_break
        or output.root_tx.f_code.co_name.startswith("torch_dynamo_resume_in")
    )


def changes_objects() -> bool:
    """Whether the capture that is going on sees the model change something of its own besides
    tensors (attributes, lists), or draw numbers of Python's. Compiled code replays that at each
    call, around the graph. Where it cannot be told: True.
    """
    output = output_graph()
    if output is None:
        return True
    kinds = (AttributeMutationExisting, ValueMutationExisting)
    changed = output.side_effects._get_modified_vars()
    return bool(output.random_calls) or any(isinstance(v.mutation_type, kinds) for v in changed)


def inductor_folder() -> Path:
    """Where Inductor keeps what it compiled."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    return Path(cache_dir())


def compiled_libraries(folder: Path) -> list[Path]:
    """The libraries below `folder` that this process has loaded (on Linux; elsewhere: all), and
    those by which Inductor finds out what the processor can do, which others load for it.
    """
    maps = Path("/proc/self/maps")
    if not maps.exists():
        return sorted(folder.rglob("*.so"))
    lines = (line.split(maxsplit=5) for line in maps.read_text().splitlines())
    loaded = {Path(line[5]) for line in lines if len(line) == 6 and line[5].endswith(".so")}
    checks = {path for path in folder.glob("??/*.so") if not path.name.endswith(".main.so")}
    return sorted(checks | {path for path in loaded if path.is_relative_to(folder.resolve())})


def write_package(path: Path, programs: Mapping[str, Any], metadata: Mapping[str, str]) -> None:
    """Compile exported programs with AOTInductor into one archive, by name."""
    from torch._inductor.package.package import package_aoti

    options: dict[str, Any] = {"aot_inductor.package": True, "aot_inductor.metadata": {**metadata}}
    files: dict[str, Any] = {}
    for name, program in programs.items():
        module = program.module(check_guards=False)
        files[name] = torch._inductor.aot_compile(module, *program.example_inputs, options=options)
    package_aoti(str(path), files)


def read_package(path: Path) -> tuple[dict[str, Any], Mapping[str, str]]:
    """The compiled programs of such an archive, and the metadata of the first."""
    from torch.export.pt2_archive._package import load_pt2

    programs = load_pt2(str(path)).aoti_runners
    first: Any = next(iter(programs.values()), None)
    return dict(programs), {} if first is None else first.loader.get_metadata()
