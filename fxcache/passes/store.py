"""Keep residuals in another dtype than they are computed in.

::

    miss:  slot <- saturated(after - before)                     rounded to the slot's dtype
    hit:   forecast(before, [residual.to(computed), ...])

What a miss returns does not go through it.
"""

import math
from typing import Any

import torch


def stored_dtype(computed: torch.dtype, cache_dtype: torch.dtype | None) -> torch.dtype:
    """The dtype that residuals of dtype `computed` are kept in. Complex ones stay what they are."""
    return cache_dtype if cache_dtype is not None and computed.is_floating_point else computed


def largest_kept(computed: torch.dtype, stored: torch.dtype) -> float | None:
    """The largest number of dtype `computed` that `stored` can hold, None if it holds them all."""
    if stored == computed or torch.finfo(computed).max <= torch.finfo(stored).max:
        return None
    largest = torch.finfo(stored).max
    limit = torch.tensor(largest, dtype=torch.float64).to(computed)
    if limit.item() > largest:  # bfloat16 has no 65504, and its next number is beyond float16
        limit = torch.nextafter(limit, torch.zeros_like(limit))
    return float(limit)


def saturated(residual: Any, limit: float, stored: torch.dtype) -> Any:
    """`residual` (a proxy or a tensor) with what is beyond ``+-limit`` at that limit.

    NaN stays, and so does Inf: as NaN in floats of 8 bits, of which some have no Inf and the others
    lose it on some devices.
    """
    infinite = math.nan if stored.itemsize == 1 else residual
    return torch.where(residual.isinf(), infinite, residual.clamp(-limit, limit))
