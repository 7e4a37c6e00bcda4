"""Make a piece that nothing compiles as quick to call as the model itself.

::

    v = aten.view(x, [16, 32]); w = aten.t(weight)
    a = aten.addmm(bias, v, w)                            =>   torch.nn.functional.linear(x, ...)
    y = aten.view(a, [2, 8, 64]); z = aten.mul(y, s)           z = torch.mul(y, s)

Both compute the same bits: a linear layer is what was taken apart, and torch's own bindings call
the same operations without the search for an overload.
"""

from types import BuiltinFunctionType
from typing import Any, cast

import torch
from torch import fx

from fxcache.passes.graph import same_sizes, tensor_of

aten = torch.ops.aten
_VIEWS = (aten.view.default, aten._unsafe_view.default, aten.expand.default)
_PRODUCTS = (aten.addmm.default, aten.mm.default, aten.bmm.default)
#: `reshape`, for a view of fake strides may be a copy of real ones.
_BINDINGS = {
    aten.view.default: torch.reshape,
    aten._unsafe_view.default: torch.reshape,
    aten.expand.default: torch.Tensor.expand,
}


def quicken(module: fx.GraphModule) -> fx.GraphModule:
    """`module` with linear layers as they were called, and torch's bindings for the rest."""
    graph = module.graph
    for node in graph.nodes:
        if node.target in _PRODUCTS:
            _join_linear(graph, node)
        elif node.target is aten.copy.default:
            _drop_copy(graph, node)
    for node in graph.nodes:
        binding = _binding(node.target)
        if binding is not None:
            node.target = binding
    module.recompile()
    return module


def _drop_copy(graph: fx.Graph, copy: fx.Node) -> None:
    """``slice_scatter(x, copy(slice(x), y))`` writes `y`, if that is like what it replaces."""
    written, given = cast(tuple[fx.Node, fx.Node], copy.args[:2])
    is_alike = _layout(written) == _layout(given)
    if is_alike and all(user.target is aten.slice_scatter.default for user in copy.users):
        copy.replace_all_uses_with(given)
        graph.erase_node(copy)
        if not written.users and written.op != "placeholder":  # an argument of the piece stays
            graph.erase_node(written)


def _layout(node: fx.Node) -> tuple[str, torch.dtype, torch.device]:
    value = tensor_of(node)
    return str(tuple(value.shape)), value.dtype, value.device


def _join_linear(graph: fx.Graph, product: fx.Node) -> None:
    """Replace `product` and the views around it by the linear layer that they came from, if so.

    Which product a layer becomes depends on strides, and those of fake tensors of size 1 are not
    always the real ones: so the layer decides again.
    """
    operands: Any = (None, *product.args)
    bias, given, weight = operands[-3:]
    *_, turned = _chain(weight)
    if turned.target is not aten.t.default:
        return
    if bias is not None and tensor_of(bias).ndim != 1:
        return
    matrix, result = cast(fx.Node, turned.args[0]), product
    users = list(product.users)
    if len(users) == 1 and users[0].target in _VIEWS:
        result = users[0]
    x = next((node for node in _chain(given) if _is_layer(node, matrix, result)), None)
    if x is None:
        return
    with graph.inserting_before(result):
        layer = graph.call_function(torch.nn.functional.linear, (x, matrix, bias))
    layer.meta = dict(result.meta)
    result.replace_all_uses_with(layer)
    for node in dict.fromkeys((result, product, *_chain(given), *_chain(weight))):
        if not node.users and node.op == "call_function":
            graph.erase_node(node)


def _chain(node: fx.Node) -> list[fx.Node]:
    """`node`, and what it is a view of, and so on."""
    chain = [node]
    while chain[-1].target in _VIEWS:
        chain.append(cast(fx.Node, chain[-1].args[0]))
    return chain


def _is_layer(given: fx.Node, matrix: fx.Node, result: fx.Node) -> bool:
    """Whether a layer of weight `matrix` takes `given` to the shape of `result`."""
    made, wide = tensor_of(matrix).shape
    expected = (*tensor_of(given).shape[:-1], made, wide)
    return same_sizes(expected, (*tensor_of(result).shape, tensor_of(given).shape[-1]))


def _binding(target: Any) -> Any:
    """torch's own name for an operation of aten, None if it has none with the same arguments."""
    if not isinstance(target, torch._ops.OpOverload) or target.namespace != "aten":
        return None
    if target in _BINDINGS:
        return _BINDINGS[target]
    if any("List[Optional[" in str(argument.type) for argument in target._schema.arguments):
        return None  # an index may be None here, and must be a tensor there
    name = target._schema.name.removeprefix("aten::")
    found = getattr(torch, name, None) or getattr(torch._C._nn, name, None)
    return found if isinstance(found, BuiltinFunctionType) else None
