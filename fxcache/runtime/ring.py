"""The ring of one request, read and written outside of the compiled pieces."""

from collections.abc import Sequence

import torch

from fxcache.kernels import reference
from fxcache.passes.store import largest_kept, saturated
from fxcache.runtime.executor import Miss
from fxcache.runtime.rows import Values
from fxcache.runtime.state import Buffers


def forecast(
    ring: Sequence[torch.Tensor],
    weights: Sequence[float],
    dtype: torch.dtype,
    device: torch.device,
) -> torch.Tensor:
    """What the weighted entries of a ring forecast, in the `dtype` that they were computed in."""
    used = [(weight, entry) for weight, entry in zip(weights, ring, strict=True) if weight != 0]
    if [weight for weight, _ in used] == [1.0]:
        return used[0][1].to(device, dtype)
    wide = torch.promote_types(dtype, torch.float32)
    terms = [weight * entry.to(device, wide) for weight, entry in used]
    return sum(terms[1:], terms[0]).to(dtype)


def store(work: Miss, fresh: Values, buffers: Buffers) -> torch.Tensor:
    """Put the fresh residuals of a request into its ring: the sums of the forecast's error, if
    there is one to compare with.
    """
    total = torch.zeros(2, device=fresh[0].device)
    for ring, residual in zip(buffers.rings, fresh, strict=True):
        slot = ring[work.slot]
        others = [entry for at, entry in enumerate(ring) if at != work.slot]
        limit = largest_kept(residual.dtype, slot.dtype)
        value = residual if limit is None else saturated(residual, limit, slot.dtype)
        if not any(work.weights):
            slot.copy_(value)
            continue
        past = [_real(entry.to(residual.device, residual.dtype)) for entry in others]
        weights = torch.tensor(work.weights).to(residual.device, non_blocking=True)
        total += reference.refresh_error(_real(value), None, _real(slot), past, weights)
    return total


def _real(value: torch.Tensor) -> torch.Tensor:
    """The parts of `value`, if it is complex."""
    return torch.view_as_real(value.resolve_conj()) if value.is_complex() else value
