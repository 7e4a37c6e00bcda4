"""Read what Dynamo and torch.export write on the nodes of a captured graph.

The rest of the library asks these functions and never looks into `node.meta` itself, so both
dialects (Dynamo's ``example_value`` and ``L['self']._modules['blocks']`` paths, export's ``val``
and dotted paths) look the same to the passes.
"""

import re
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import fx
from torch._C._functorch import is_functorch_wrapped_tensor
from torch._subclasses import FakeTensor

#: Names under which denoisers take their time input, most common first.
TIMESTEP_NAMES = ("timestep", "timesteps", "t", "time", "sigma", "sigmas", "noise_level")

_OF_MODEL = re.compile(r"^L\['(model|self)'\]|\._(parameters|buffers)\[|_modules")
_LOCAL = re.compile(r"^L\['\w+'\]")
_SUBSCRIPT = re.compile(r"\[['\"]?(\w+)['\"]?\]")
_PRIVATE = re.compile(r"\.(__dict__|_modules)(?=\.|$)")


def fake_value(node: fx.Node) -> Any:
    """The fake value that the capture recorded for `node` (None where it recorded none)."""
    meta = node.meta
    return meta.get("example_value", meta.get("val"))


def fake_tensor(node: Any) -> FakeTensor | None:
    """The fake tensor of `node`, or None if `node` is no node or holds something else."""
    value = fake_value(node) if isinstance(node, fx.Node) else None
    if not isinstance(value, torch.Tensor) or is_functorch_wrapped_tensor(value):
        return None  # a tensor inside torch.vmap cannot be asked for anything any more
    return cast(FakeTensor, value)


def tensor_of(node: fx.Node) -> FakeTensor:
    """The fake tensor of a node that is known to hold one."""
    value = fake_tensor(node)
    assert value is not None, f"{node} holds no tensor"
    return value


def is_stream_like(node: Any) -> bool:
    """Whether `node` could be a stream: a floating tensor with at least two dimensions."""
    value = fake_tensor(node)
    return value is not None and value.is_floating_point() and value.ndim >= 2


def same_layout(a: fx.Node, b: fx.Node, *, unbacked: bool = False) -> bool:
    """Whether two nodes hold tensors of the same shape, dtype and device.

    With `unbacked`, a size that depends on data may be any size.
    """
    left, right = fake_tensor(a), fake_tensor(b)
    if left is None or right is None or left.ndim != right.ndim:
        return False
    if left.dtype != right.dtype or left.device != right.device:
        return False
    return all(
        same_size(m, n) or (unbacked and (is_unbacked(m) or is_unbacked(n)))
        for m, n in zip(left.shape, right.shape, strict=True)
    )


def same_size(m: int | torch.SymInt, n: int | torch.SymInt) -> bool:
    """Equality of two sizes that adds no guard: symbolic ones are equal if their formulas are."""
    if isinstance(m, int) and isinstance(n, int):
        return m == n
    return str(m) == str(n)


def is_unbacked(size: int | torch.SymInt) -> bool:
    """Whether `size` depends on data, so that no number is known for it."""
    return not isinstance(size, int) and size.node.hint is None


def dotted_path(path: str) -> str:
    """``L['self']._modules['blocks'].0.attn`` as ``blocks.0.attn``."""
    path = _SUBSCRIPT.sub(r".\1", _LOCAL.sub("", path))
    while (shorter := _PRIVATE.sub("", path)) != path:
        path = shorter
    return path.strip(".")


@dataclass(frozen=True)
class ModuleCall:
    """One entry of a node's module stack: the module's path, its class, and which call of it."""

    path: str
    call: str
    cls: Any

    @property
    def list_path(self) -> str | None:
        """The path of the list that the module stands in, None if it stands in none."""
        parent, _, last = self.path.rpartition(".")
        return parent if last.isdigit() else None


def module_calls(node: fx.Node) -> list[ModuleCall]:
    """The modules inside whose forward `node` was recorded, outermost first."""
    stack = node.meta.get("nn_module_stack") or {}
    return [ModuleCall(dotted_path(path), key, cls) for key, (path, cls) in stack.items()]


def source_name(node: fx.Node) -> str:
    """Where Dynamo found what the placeholder `node` stands for ("" if it does not say)."""
    source = getattr(node.meta.get("grapharg"), "source", None)
    name = getattr(source, "name", "")
    return str(name() if callable(name) else name)  # a method up to torch 2.11, then a property


def is_of_model(source: str) -> bool:
    """Whether what Dynamo found at `source` belongs to the model, and not to its arguments."""
    return bool(_OF_MODEL.search(source))


@dataclass(frozen=True)
class GraphInputs:
    """The placeholders of a captured graph, sorted by what they are.

    `data` maps the caller's tensors to the names of their arguments; weights are parameters,
    buffers and other tensors of the model (floats among them, where they are inputs); `sizes` are
    symbolic integers.
    """

    data: dict[fx.Node, str]
    weights: tuple[fx.Node, ...]
    sizes: tuple[fx.Node, ...]
    paths: dict[fx.Node, str] = field(default_factory=dict)

    @property
    def timestep(self) -> fx.Node | None:
        """The time input, by name, else the only input that holds one number a sample."""
        numeric = {
            name: node
            for node, name in self.data.items()
            if (value := fake_tensor(node)) is not None and not value.is_complex()
        }
        for name in TIMESTEP_NAMES:
            if name in numeric:
                return numeric[name]
        scalars = [node for node in numeric.values() if tensor_of(node).ndim <= 1]
        floating = [node for node in scalars if tensor_of(node).is_floating_point()]
        whole = [node for node in scalars if tensor_of(node).dtype in (torch.int64, torch.int32)]
        for candidates in (floating, whole):
            if candidates:
                return candidates[0] if len(candidates) == 1 else None
        return None


def graph_inputs(graph: fx.Graph, argument_names: tuple[str, ...] = ()) -> GraphInputs:
    """Sort the placeholders of `graph`; `argument_names` are those of positional arguments."""
    data, paths, weights, sizes = {}, {}, [], []
    for node in graph.find_nodes(op="placeholder"):
        value, source = fake_value(node), source_name(node)
        if isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool | int | float):
            sizes.append(node)
        elif isinstance(value, torch.nn.Parameter) or is_of_model(source):
            weights.append(node)
        else:
            path = _argument_path(source or node.name, argument_names)
            data[node], paths[node] = path[-1], ".".join(path)
    return GraphInputs(data, tuple(weights), tuple(sizes), paths)


def _argument_path(source: str, argument_names: tuple[str, ...]) -> list[str]:
    """The argument that an input is given by, however it was passed, and its place in that."""
    keys: list[str] = re.findall(r"\['?(\w+)'?\]", source)
    kind, *path = keys or [source]
    if kind == "args" and path and path[0].isdigit() and int(path[0]) < len(argument_names):
        path[0] = argument_names[int(path[0])]
    return path if kind in ("args", "kwargs") and path else keys or [source]
