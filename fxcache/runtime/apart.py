"""Are the requests of a batch computed apart? Tried once a capture, before anything is kept.

Two requests are computed together and each by itself. The same numbers must come out at the end of
the head, of the span and of the model: else a row reads those of another, or the rows are not where
they seem to be. Their inputs are moved a bit first, since rows that are equal show nothing.
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from fxcache.errors import BatchError
from fxcache.runtime.audit import is_fixed, moved, squares
from fxcache.runtime.executor import Miss
from fxcache.runtime.rows import Layout, Values
from fxcache.runtime.state import Buffers

if TYPE_CHECKING:
    from fxcache.runtime.batch import Batch

#: By so much of its size may what is computed among others differ from what it is alone.
LIMIT, LIMITS = 0.003, {torch.float16: 0.05, torch.bfloat16: 0.05}


def check(batch: "Batch", inputs: Values, buffers: Sequence[Buffers]) -> bool:
    """Whether it is known now that the first and the last request are computed apart: not where NaN
    comes out. Writes into none of the buffers. One read-back.

    Raises BatchError if they are not.
    """
    layout, ends, differences = batch.layout, [0, len(buffers) - 1], []
    given = layout.take(inputs, ends, len(buffers))
    for place in layout.held:
        if place < layout.inputs:
            given[place] = _moved_apart(given[place], seed=place)
    among = _crossing_and_results(batch, given, [buffers[i] for i in ends])
    for i in range(2):
        (alone,) = _crossing_and_results(batch, layout.take(given, [i], 2), [buffers[ends[i]]])
        pairs = zip(among[i], alone, strict=True)
        differences += [_difference(a, b) for a, b in pairs if _is_number(a)]
    worst = float(torch.stack([each.to(differences[0].device) for each in differences]).amax())
    limit = LIMITS.get(layout.streams[0][1], LIMIT)
    if worst > limit:
        raise BatchError(
            f"requests of this model cannot be batched: computed by itself a request differs by "
            f"{worst:.2g} of its size from what it is among others (at most {limit:g} is "
            f"rounding), so its rows read those of others"
        )
    return not math.isnan(worst)


def _crossing_and_results(
    batch: "Batch", inputs: Values, buffers: Sequence[Buffers]
) -> list[list[Any]]:
    """Of each request, what crosses from the head, and what comes out of model and blocks."""
    layout, number = batch.layout, len(buffers)
    own = [_fresh(each, layout) for each in buffers]
    try:
        together = batch.begin_all(inputs, own)
        missed = together.miss({i: Miss(0) for i in range(number)})
        crossing = [
            layout.take(together.values, [i], together.padded)[layout.inputs :]
            for i in range(number)
        ]
    except (IndexError, ValueError, TypeError, RuntimeError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise BatchError(f"a part of a batch cannot be computed by itself: {error}") from error
    rings = [[ring[0] for ring in each.rings] for each in own]
    return [[*crossing[i], *missed[i][0], *rings[i]] for i in range(number)]


def _fresh(buffers: Buffers, layout: Layout) -> Buffers:
    """A copy of what is kept, and memory for residuals as they are computed."""
    kept = {key: tensor.clone() for key, tensor in buffers.kept.items()}
    streams = zip(buffers.rings, layout.streams, strict=True)
    return Buffers(
        kept,
        tuple((torch.empty(r[0].shape, dtype=d, device=where),) for r, (_, d, where) in streams),
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and (value.is_floating_point() or value.is_complex())


def _difference(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """How far `b` is from `a`, relative to its size."""
    off = squares([a - b]).sqrt()
    return torch.where(off == 0, off, off / squares([a]).sqrt())


def _moved_apart(value: Any, seed: int) -> Any:
    """`value` moved a bit, so that no two of its rows are equal; times only back, so that they stay
    in their range.
    """
    if not _is_number(value) or is_fixed(value) or not bool(value.isfinite().all()):
        return value
    if value.ndim > 1:
        return moved(value, seed)
    generator = torch.Generator(value.device).manual_seed(seed)
    share = torch.rand(value.shape, generator=generator, device=value.device)
    return (value * (1 - 0.2 * share)).to(value.dtype)
