"""What a captured graph with a symbolic number of rows needs, to be run for a batch of requests."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx
from torch._subclasses import FakeTensor

from fxcache.capture.layout import sizes_of
from fxcache.errors import BatchError
from fxcache.passes.graph import (
    GraphInputs,
    is_tensor,
    numel_of,
    outputs_of,
    tensor_of,
    value_of,
)
from fxcache.passes.measure import REFERENCE
from fxcache.passes.pieces import Pieces
from fxcache.passes.rows import Rows
from fxcache.runtime.rows import Layout

Fakes = Mapping[str, FakeTensor]


def merged(kept: Fakes, rows: Rows) -> dict[str, FakeTensor]:
    """Fake tensors like what is measured of all rows: what has none is repeated for each."""
    result: dict[str, Any] = {}
    for key, fake in kept.items():
        result[key] = fake
        if rows.dimension(fake) is None:
            like = kept[REFERENCE]
            with fake.fake_mode, torch.no_grad():
                result[key] = fake.expand(like.shape[0], *fake.shape).clone()
    return result


def layout_of(
    gm: fx.GraphModule,
    inputs: GraphInputs,
    pieces: Pieces,
    kept: Fakes,
    residuals: Sequence[FakeTensor],
    rows: Rows,
) -> Layout:
    """Where the rows lie in what the pieces of `gm` take and give.

    Raises BatchError where that cannot be told.
    """
    time = inputs.timestep
    if time is not None and numel_of(time) > 1 and rows.dimension(tensor_of(time)) is None:
        raise BatchError(
            f"the model does not take {inputs.paths[time]} row by row, so requests at steps of "
            f"their own cannot be batched"
        )
    placeholders = gm.graph.find_nodes(op="placeholder")
    crossing = () if pieces.head is None else pieces.head.results
    held: dict[int, Any] = {}
    for place, key in enumerate([*placeholders, *crossing]):
        fake = value_of(key) if isinstance(key, fx.Node) else kept[REFERENCE]
        if isinstance(fake, torch.Tensor) and (dimension := rows.dimension(fake)) is not None:
            held[place] = dimension, *map(_formulas, (fake.shape, fake.stride()))
    streams = []
    for residual in residuals:
        dimension = rows.dimension(residual)
        if dimension is None:
            raise BatchError(
                f"what the blocks compute of the sizes {tuple(residual.shape)} is one for all of "
                f"the batch's rows: requests of this model cannot be batched"
            )
        streams.append((dimension, residual.dtype, residual.device))
    return Layout(
        rows.per_request,
        rows.symbol,
        len(placeholders),
        sizes_of(inputs),
        held,
        {key: rows.dimension(fake) for key, fake in kept.items()},
        tuple(streams),
        tuple(rows.dimension(tensor_of(n)) if is_tensor(n) else None for n in outputs_of(gm.graph)),
    )


def _formulas(numbers: Sequence[Any]) -> tuple[Any, ...]:
    return tuple(n if isinstance(n, int) else n.node.expr for n in numbers)
