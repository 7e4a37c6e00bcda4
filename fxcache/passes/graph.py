"""Read a functional ATen graph: what its nodes hold, what they are called, where inputs come from.

The passes ask these functions and never look into ``node.meta`` themselves.
"""

import math
import re
from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import fx
from torch._subclasses import FakeTensor

#: Names under which denoisers take their time input, most common first.
TIMESTEP_NAMES = ("timestep", "timesteps", "t", "time", "sigma", "sigmas", "noise_level")

#: What a size counts as that depends on data, so that no number is known for it.
UNBACKED_SIZE = 8

#: What symbols count as while a cut is sought, where they do not count as at the capture.
COUNTED_AS: ContextVar[Mapping[Any, int] | None] = ContextVar("fxcache_counted_as", default=None)

_OF_MODEL = re.compile(r"^L\['(model|self)'\]|\._(parameters|buffers)\[|_modules")
_LOCAL = re.compile(r"^L\['\w+'\]")
_SUBSCRIPT = re.compile(r"\[['\"]?([\w-]+)['\"]?\]")
_PRIVATE = re.compile(r"\.(__dict__|_modules|_orig_mod)(?=\.|$)")


def value_of(node: Any) -> Any:
    """The fake value of `node`; anything else than a node is its own."""
    return node.meta.get("val") if isinstance(node, fx.Node) else node


def tensor_of(node: fx.Node) -> FakeTensor:
    """The fake tensor of a node that is known to hold one."""
    value = value_of(node)
    assert isinstance(value, torch.Tensor), f"{node} holds no tensor"
    return cast(FakeTensor, value)


def is_tensor(node: Any) -> bool:
    return isinstance(node, fx.Node) and isinstance(value_of(node), torch.Tensor)


def is_numeric(node: Any) -> bool:
    """Whether `node` holds a floating or complex tensor."""
    value = value_of(node)
    return is_tensor(node) and (value.is_floating_point() or value.is_complex())


def hint(size: int | torch.SymInt) -> int:
    """`size` as a number, without a guard: a symbol counts as what it was at the capture, or as
    `COUNTED_AS` says.
    """
    if isinstance(size, int):
        return size
    if numbers := COUNTED_AS.get():
        counted = size.node.expr.xreplace(numbers)
        if not getattr(counted, "free_symbols", None):
            return int(counted)
    known = None if is_unbacked(size) else size.node.hint
    return UNBACKED_SIZE if known is None else int(known)


def is_unbacked(size: int | torch.SymInt) -> bool:
    """Whether `size` depends on data, so that no number is known for it."""
    return not isinstance(size, int) and not size.node.has_hint()


def depends_on_data(node: fx.Node) -> bool:
    """Whether a size of the tensor that `node` holds does."""
    return is_tensor(node) and any(map(is_unbacked, tensor_of(node).shape))


def shape_of(node: Any) -> tuple[int, ...] | None:
    """The shape of the tensor that `node` holds, symbols at their hints (None: it holds none)."""
    return tuple(map(hint, value_of(node).shape)) if is_tensor(node) else None


def numel_of(node: fx.Node) -> int:
    return math.prod(shape_of(node) or (0,))


def bytes_of(node: fx.Node) -> int:
    """The memory of the tensor that `node` holds (0: it holds none)."""
    return numel_of(node) * tensor_of(node).element_size() if is_tensor(node) else 0


def same_sizes(a: Sequence[Any], b: Sequence[Any]) -> bool:
    """Whether sizes are equal one by one, symbols by their formulas: no guard is added."""
    return list(map(str, a)) == list(map(str, b))


def op_name(node: fx.Node) -> str:
    """The bare name of what `node` calls: ``add`` for aten.add.Tensor."""
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target._schema.name.split("::")[-1]
    return str(getattr(node.target, "__name__", node.target))


def is_view(node: fx.Node) -> bool:
    """Whether `node` only looks at its first operand in another way (or at an element of it)."""
    if node.op != "call_function" or not node.all_input_nodes:
        return False
    if isinstance(node.target, torch._ops.OpOverload):
        returns = node.target._schema.returns
        return op_name(node) == "_unsafe_view" or any(r.alias_info for r in returns)
    return op_name(node) == "getitem" and is_view(node.all_input_nodes[0])


def process_groups(graph: fx.Graph) -> tuple[str, ...]:
    """The names of the process groups of the graph's collectives, each once."""
    found: dict[str, None] = {}
    for node in graph.nodes:
        if getattr(node.target, "namespace", "") == "_c10d_functional":
            for argument, value in zip(node.target._schema.arguments, node.args, strict=False):
                if argument.name == "group_name" and isinstance(value, str):
                    found[value] = None
    return tuple(found)


def outputs_of(graph: fx.Graph) -> list[Any]:
    """What the graph returns, flat."""
    (results,) = graph.output_node().args
    return list(results) if isinstance(results, list | tuple) else [results]


# --- modules ---


def dotted_path(path: str) -> str:
    """``L['self']._modules['blocks'].0.attn`` as ``blocks.0.attn``."""
    path = _SUBSCRIPT.sub(r".\1", _LOCAL.sub("", path))
    while (shorter := _PRIVATE.sub("", path)) != path:
        path = shorter
    return path.strip(".")


def module_calls(node: fx.Node) -> list[tuple[str, str]]:
    """Paths of the modules inside whose forward `node` was recorded, outermost first, each with
    what tells this call of it from others.
    """
    stack = node.meta.get("nn_module_stack") or {}
    return [(dotted_path(path), key) for key, (path, _) in stack.items()]


def place_of(node: fx.Node) -> str:
    """Where in the user's source `node` was recorded, as far as that is known."""
    lines = str(node.meta.get("stack_trace") or "").strip().splitlines()
    places = [k for k, line in enumerate(lines) if line.lstrip().startswith("File ")]
    if not places:
        return "at an unknown place"
    return " ".join(line.strip() for line in lines[places[-1] : places[-1] + 2])


# --- inputs ---


def is_of_model(source: str) -> bool:
    """Whether what Dynamo found at `source` belongs to the model, and not to its arguments."""
    return bool(_OF_MODEL.search(source))


@dataclass(frozen=True)
class GraphInputs:
    """The placeholders of a captured graph, sorted by what they are.

    `data` maps the caller's tensors to the names of their arguments, `paths` to the whole path
    (``added_cond_kwargs.time_ids``). `weights` are parameters, buffers and other tensors of the
    model (floats among them, where they are inputs), `registered` those of them that are parameters
    and buffers, `sources` says where each was found. `sizes` are symbolic integers. `written` are
    inputs that the model writes: to which node holds the new value.
    """

    data: dict[fx.Node, str]
    weights: tuple[fx.Node, ...] = ()
    sizes: tuple[fx.Node, ...] = ()
    paths: dict[fx.Node, str] = field(default_factory=dict)
    registered: frozenset[fx.Node] = frozenset()
    sources: dict[fx.Node, str] = field(default_factory=dict)
    written: dict[fx.Node, fx.Node] = field(default_factory=dict)

    @property
    def timestep(self) -> fx.Node | None:
        """The time input, by name, else the only input that holds one number a sample."""
        numeric = {n: name for n, name in self.data.items() if not tensor_of(n).is_complex()}
        named = [n for wanted in TIMESTEP_NAMES for n, name in numeric.items() if name == wanted]
        if named:
            return named[0]
        scalars = [node for node in numeric if tensor_of(node).ndim <= 1]
        floating = [node for node in scalars if tensor_of(node).is_floating_point()]
        whole = [node for node in scalars if tensor_of(node).dtype in (torch.int64, torch.int32)]
        candidates = floating or whole
        return candidates[0] if len(candidates) == 1 else None


def is_number(node: fx.Node) -> bool:
    """Whether an input holds one number in host memory: Dynamo makes floats of the model such
    tensors when they change, anew at each call.
    """
    value = tensor_of(node)
    return value.ndim == 0 and value.device.type == "cpu"
