"""The kernels written with plain tensor operations.

They are what the other implementations are tested against, and on the CPU they are the fastest:
Inductor fuses them with their neighbours. Tensors and fx proxies both pass through.
"""

from collections.abc import Sequence

import torch


def residual_diff(
    h_out: torch.Tensor, h_in: torch.Tensor | None, reference: torch.Tensor
) -> torch.Tensor:
    """How far the residual `h_out - h_in` is from `reference`, as sums a sample.

    Args:
        h_out, h_in: [B, ...], any floating dtype; with ``h_in=None``, `h_out` itself is measured.
        reference: [B, ...], in the dtype of the residual.

    Returns:
        float32 [B, 2]: sum |r - reference| and sum |reference|. NaN and Inf propagate.

    The residual is rounded to its own dtype before it is compared, as the stored reference was, so
    an unchanged input measures exactly 0. Source: First Block Cache (ParaAttention, WaveSpeed).
    """
    residual = h_out if h_in is None else h_out - h_in
    change = (residual.float() - reference.float()).abs().flatten(1).sum(1)
    scale = reference.float().abs().flatten(1).sum(1)
    return torch.stack([change, scale], dim=1)


def forecast(
    before: torch.Tensor | None, ring: Sequence[torch.Tensor], weights: torch.Tensor | None
) -> torch.Tensor:
    """Predict the stream after the span: ``before + sum_j weights[j] * ring[j]``.

    Args:
        before: the stream before the span, or None for a stream that is cached as it is.
        ring: past residuals (or past values), each of the shape of the result.
        weights: float32 [len(ring)], or None to add the only residual unweighted. A residual of
            weight 0 counts for nothing, whatever it holds.

    Returns:
        A new tensor in the dtype of `before` (of the ring where there is none); never a view.
    """
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
    """Store the residual of a computed span: ``slot.copy_(after - before)``.

    Args:
        after, before: the stream after and before the span; with ``before=None`` the stream is
            cached as it is.
        slot: the buffer that is overwritten, of the same shape.
    """
    slot.copy_(after if before is None else after - before)


def refresh_error(
    after: torch.Tensor,
    before: torch.Tensor | None,
    slot: torch.Tensor,
    ring: Sequence[torch.Tensor],
    weights: torch.Tensor,
) -> torch.Tensor:
    """`refresh`, and how far off a forecast of the residual would have been.

    Args:
        after, before, slot: as for `refresh`.
        ring: the residuals that the forecast is made of, of the shape of `slot`, which is not among
            them.
        weights: float32 [len(ring)]; see `forecast`.

    Returns:
        float32 [2]: sum |r - sum_j weights[j] * ring[j]| and sum |r| of the residual r.
    """
    residual = after if before is None else after - before
    slot.copy_(residual)
    size = off = residual.float()
    for index, past in enumerate(ring):
        off = off - _weighted(weights[index], past)
    return torch.stack([off.abs().sum(), size.abs().sum()])
