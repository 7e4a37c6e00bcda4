"""The rows of a batch in the tensors of a graph: those of some requests, out of those of many."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

import torch

Values = Sequence[Any]
Numbers = tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Layout:
    """How the rows lie in what the pieces take and give.

    `sizes` are formulas by the places of the numbers among the `inputs`, `symbol` the number of
    rows in them. `held` are the inputs (and, behind them, what crosses from the head) that hold
    rows: by place, along which dimension, and their shape and strides by formulas. `kept` and
    `outputs` say along which dimension the rows of what is measured and returned lie (None: it
    holds none), `streams` that of the residuals, with dtype and device where they are computed.
    """

    per_request: int
    symbol: Any
    inputs: int
    sizes: Mapping[int, Any]
    held: Mapping[int, tuple[int, tuple[Any, ...], tuple[Any, ...]]]
    kept: Mapping[str, int | None]
    streams: tuple[tuple[int, torch.dtype, torch.device], ...]
    outputs: tuple[int | None, ...]

    def number(self, inputs: Values) -> int:
        """How many requests `inputs` are of."""
        rows = next(inputs[at] for at, size in self.sizes.items() if size == self.symbol)
        return int(rows // self.per_request)

    def split(self, inputs: Values) -> list[list[Any]]:
        """Each request's own inputs."""
        number = self.number(inputs)
        return [self.take(inputs, [i], number) for i in range(number)]

    def take(self, values: Values, ids: Sequence[int], number: int) -> list[Any]:
        """`values` (inputs and, where it is there, what crosses) of `number` requests, for some."""
        taken = list(values)
        if list(ids) == list(range(number)):
            return taken
        sizes = tuple(values[place] for place in self.sizes)
        numbers, layouts = _laid_out_for(self, sizes, len(ids) * self.per_request)
        for place, size in zip(self.sizes, numbers, strict=True):
            taken[place] = size
        for place, (dimension, _, _) in self.held.items():
            if place < len(values):
                own = _of_requests(values[place], dimension, ids, number)
                taken[place] = _with_strides(own, *layouts[place])
        return taken


@lru_cache(maxsize=256)
def _laid_out_for(
    layout: Layout, sizes: Numbers, rows: int
) -> tuple[Numbers, dict[int, tuple[Numbers, Numbers]]]:
    """With so many rows in the place of those in `sizes`: these, and shape and strides of what
    holds rows, by place.
    """
    known = dict(zip(layout.sizes.values(), sizes, strict=True)) | {layout.symbol: rows}

    @cache
    def evaluated(formula: Any) -> int:
        return formula if isinstance(formula, int) else int(formula.subs(known))

    numbers = tuple(map(evaluated, layout.sizes.values()))
    return numbers, {
        place: (tuple(map(evaluated, shape)), tuple(map(evaluated, strides)))
        for place, (_, shape, strides) in layout.held.items()
    }


def _of_requests(
    tensor: torch.Tensor, dimension: int, ids: Sequence[int], number: int
) -> torch.Tensor:
    """The rows of some of `number` requests; a view where they are neighbours."""
    each: torch.Tensor = tensor.unflatten(dimension, (number, -1))
    if list(ids) == list(range(ids[0], ids[0] + len(ids))):
        own = each.narrow(dimension, ids[0], len(ids))
    else:
        places = torch.tensor(list(ids)).to(tensor.device, non_blocking=True)
        own = each.index_select(dimension, places)
    return own.flatten(dimension, dimension + 1)


def _with_strides(
    tensor: torch.Tensor, shape: tuple[int, ...], strides: tuple[int, ...]
) -> torch.Tensor:
    """`tensor` with these strides, which the compiled pieces assume."""
    pairs = zip(shape, strides, tensor.stride(), strict=True)
    if all(size == 1 or wanted == own for size, wanted, own in pairs):
        return tensor
    laid_out = torch.empty_strided(shape, strides, dtype=tensor.dtype, device=tensor.device)
    target = laid_out
    for dimension, stride in enumerate(strides):
        if stride == 0:  # all elements along it are one
            target, tensor = target.narrow(dimension, 0, 1), tensor.narrow(dimension, 0, 1)
    target.copy_(tensor)
    return laid_out
