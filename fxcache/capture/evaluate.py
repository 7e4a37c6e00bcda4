"""The function that Dynamo captures: one call of a model."""

import types
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree


def evaluate(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    forward: str | Callable[..., Any],
    of_rows: Sequence[int] = (),
) -> Any:
    """The model's own `forward`: that of its class, or an attribute of the instance.

    The leaves `of_rows` of the arguments are tensors with one number of rows: so Dynamo knows one
    symbol for all of them.

    It is not looked up here: Dynamo takes a class that was allowed in graphs, as diffusers allows
    whole transformers, for an operation without attributes.
    """
    if of_rows:
        leaves = pytree.tree_leaves((args, kwargs))
        for place in of_rows[1:]:
            torch._check(leaves[place].size(0) == leaves[of_rows[0]].size(0))
    if isinstance(forward, str):
        return getattr(model, forward)(*args, **kwargs)
    return forward(model, *args, **kwargs)


def own_evaluate(number: int, rows: int | None) -> types.FunctionType:
    """A copy of `evaluate` with a code object of its own, for the denoiser of this `number`, and
    for its batches of requests of so many `rows`.

    Dynamo keeps its compiled entries a code object and allows only so many: denoisers must not use
    up each other's. What it has learned of sizes it keeps by the code's name: those of one model
    say nothing of another's.
    """
    name = f"{evaluate.__name__}_denoiser_{number}" + (f"_rows_{rows}" if rows else "")
    code = evaluate.__code__.replace(co_name=name)
    return types.FunctionType(code, evaluate.__globals__, name, evaluate.__defaults__)
