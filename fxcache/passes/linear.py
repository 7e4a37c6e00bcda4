"""In which operands an operation is linear, the others held fixed."""

from collections.abc import Callable
from typing import Any, cast

from torch import fx

from fxcache.passes.graph import op_name, same_sizes, tensor_of, value_of

#: Linear in the first operand, besides views.
LINEAR = {
    "clone", "_to_copy", "roll", "flip", "index", "index_select", "repeat", "neg", "gather",
    "pixel_shuffle", "pixel_unshuffle", "im2col", "col2im", "sum", "mean", "_fft_c2c", "_fft_r2c",
    "_fft_c2r", "_conj_physical", "upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d",
    "avg_pool1d", "avg_pool2d", "avg_pool3d", "_adaptive_avg_pool2d",
}  # fmt: skip
SUMS = {"add", "sub", "addcmul", "lerp"}
#: Linear in the stream where the weight does not depend on the sample. (Their bias cancels.)
LAYERS = {"mm", "addmm", "bmm", "convolution"}
#: Each element is that of one of the terms.
CHOICES = {"where", "slice_scatter", "select_scatter", "index_put"}
#: What keeps numbers within what a dtype holds.
LIMITS = {"clamp", "nan_to_num"}


def passes_on(node: fx.Node) -> bool:
    """Whether the result of `node` is its first operand, but for what it adds or limits."""
    name = op_name(node)
    if name == "_transformer_encoder_layer_fwd":  # a whole layer: its norms come first, or last
        return bool(node.args[8])
    if name == "clamp":
        return len(node.args) > 2 and None not in node.args[1:3]
    return name in LIMITS


def terms_of(node: fx.Node, depends: Callable[[Any], bool]) -> list[fx.Node]:
    """The terms of the sum `node`, of which `depends` says whether they follow the sample."""
    name, args = op_name(node), node.args
    if name in ("addmm", "baddbmm"):
        terms = args[:1]
    elif name in ("add", "sub", "lerp"):
        if name == "lerp" and depends(args[2]):
            return []
        terms = args[:2]
    else:  # addcmul: x + value * a * b
        one, other = args[1], args[2]
        terms = (
            args[0],
            *(() if depends(other) else (one,)),
            *(() if depends(one) else (other,)),
        )
    return [term for term in terms if isinstance(term, fx.Node)]


def is_as_it_is(node: fx.Node, term: fx.Node) -> bool:
    """Whether `term` is all that is left of the sum `node` where its other terms are 0."""
    name, args, alpha = op_name(node), node.args, node.kwargs.get("alpha", 1)
    if name == "lerp" or args.count(term) > 1:
        return False
    return term is args[0] or (name == "add" and bool(alpha == 1))


def part_taken(cut: fx.Node, joined: fx.Node) -> fx.Node | None:
    """The operand of the concatenation `joined` that the slice `cut` takes, None if it is none."""
    rank, (operands, *axis) = tensor_of(joined).ndim, cast(Any, joined.args)
    given: Any = (*cut.args, *(0, 0, 2**63 - 1, 1)[len(cut.args) - 1 :])
    _, dim, start, end, step = given
    if (axis or [0])[0] % rank != dim % rank or step != 1:
        return None
    begin, stop = 0 if start is None else value_of(start), value_of(end)
    sizes = [tensor_of(operand).shape[dim] for operand in operands]
    for number, operand in enumerate(operands):
        before, rest = sum(sizes[:number]), sum(sizes[number + 1 :])
        starts = str(begin) in (str(before), str(-(sizes[number] + rest)))
        ends = number + 1 < len(operands) and str(stop) == str(-rest)
        if starts and (ends or same_sizes(tensor_of(cut).shape, tensor_of(operand).shape)):
            return cast(fx.Node, operand)
    return None
