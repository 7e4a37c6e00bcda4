"""The kernels written with plain tensor operations; what each takes and gives says `api`.

They are what the other implementations are tested against, and on the CPU they are the fastest:
Inductor fuses them with their neighbours. Tensors and fx proxies both pass through.
"""

from collections.abc import Sequence

import torch


def residual_diff(
    h_out: torch.Tensor, h_in: torch.Tensor | None, reference: torch.Tensor
) -> torch.Tensor:
    """See `fxcache.kernels.residual_diff`."""
    residual = h_out if h_in is None else h_out - h_in
    change = (residual.float() - reference.float()).abs().flatten(1).sum(1)
    scale = reference.float().abs().flatten(1).sum(1)
    return torch.stack([change, scale], dim=1)


def forecast(
    before: torch.Tensor | None, ring: Sequence[torch.Tensor], weights: torch.Tensor | None
) -> torch.Tensor:
    """See `fxcache.kernels.forecast`."""
    if weights is None:
        (residual,) = ring
        return residual.clone() if before is None else before + residual
    total = _weighted(weights[0], ring[0])
    for index, residual in enumerate(ring[1:], start=1):
        total = total + _weighted(weights[index], residual)
    if before is None:
        return total.to(ring[0].dtype)
    return (before.float() + total).to(before.dtype)


def _weighted(weight: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
    """Their product in float32; a ring slot without a weight may hold anything, even NaN."""
    return torch.where(weight == 0, 0.0, weight * residual.float())


def refresh(after: torch.Tensor, before: torch.Tensor | None, slot: torch.Tensor) -> None:
    """See `fxcache.kernels.refresh`."""
    slot.copy_(after if before is None else after - before)


def refresh_error(
    after: torch.Tensor,
    before: torch.Tensor | None,
    slot: torch.Tensor,
    ring: Sequence[torch.Tensor],
    weights: torch.Tensor,
) -> torch.Tensor:
    """See `fxcache.kernels.refresh_error`."""
    residual = after if before is None else after - before
    slot.copy_(residual)
    size = off = residual.float()
    for index, past in enumerate(ring):
        off = off - _weighted(weights[index], past)
    return torch.stack([off.abs().sum(), size.abs().sum()])
