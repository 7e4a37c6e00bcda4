"""What callers of `fxcache.kernels` use: operands checked, then the operators (`ops`)."""

from collections.abc import Sequence

import torch

from .layout import MAX_RING


def residual_diff(
    h_out: torch.Tensor,
    h_in: torch.Tensor | None,
    reference: torch.Tensor,
    *,
    tickets: torch.Tensor | None = None,
) -> torch.Tensor:
    """How far the residual ``h_out - h_in`` is from `reference`, as sums a sample.

    One launch that reads each tensor once and stores no residual; float32 accumulation; the same
    bits at every call.

    Args:
        h_out, h_in: [B, ...] of at least two dimensions, of any floating dtypes and strides;
            with ``h_in=None``, `h_out` itself is measured.
        reference: [B, ...] of the same shape: the residual (or `h_out`) of an earlier evaluation.
        tickets: int32 [B] zeros on the same device, left as zeros: scratch that a caller keeps to
            save allocating and zeroing it at each call. Never share it between CUDA streams.

    Returns:
        float32 [B, 2]: sum |r - reference| and sum |reference|, in the unit of the operands. The
        residual is rounded to its own dtype first, as the stored reference was, so an unchanged
        input measures exactly 0. NaN and Inf reach the sums of their own sample only; no elements
        give 0.

    Raises:
        TypeError: an operand that is no floating-point tensor.
        ValueError: shapes or devices that differ, fewer than two dimensions, or tickets that are
            not int32 [B].

    Source: First Block Cache (ParaAttention, WaveSpeed).
    """
    from . import ops

    _check_operands(h_out=h_out, h_in=h_in, reference=reference)
    if h_out.dim() < 2:
        raise ValueError(f"h_out must be [B, ...] of two or more dimensions, got {_shape(h_out)}")
    if tickets is not None:
        _check_scratch("tickets", tickets, torch.int32, h_out.shape[0], h_out.device)
    sums: torch.Tensor = ops.residual_diff(h_out, h_in, reference, tickets)
    return sums


def forecast(
    before: torch.Tensor | None, ring: Sequence[torch.Tensor], weights: torch.Tensor | None
) -> torch.Tensor:
    """Predict a stream after the span: ``before + sum_j weights[j] * ring[j]``, in one pass.

    Args:
        before: the stream before the span, of any floating dtype, shape and strides; None for a
            stream that is cached as it is.
        ring: one to five past residuals (or past values), each of the shape of `before`.
        weights: float32 [len(ring)] on the same device, read there, so that new weights need no
            new kernel; None to add the only residual unweighted, exactly as ``before + ring[0]``.

    Returns:
        A new tensor, never a view, in the dtype of `before` (of the ring where that is None;
        unweighted, in the dtype of the sum). Accumulated in float32, rounded once. A residual
        of weight 0 counts for nothing, whatever it holds.

    Raises:
        TypeError: an operand that is no floating-point tensor.
        ValueError: an empty ring or one of more than five, shapes or devices that differ, weights
            that are not float32 [len(ring)], or no weights for more than one residual.

    Source: reuse, Taylor, Hermite, Adams-Bashforth and Chebyshev forecasts (TaylorSeer, HiCache)
    are all linear in past residuals; only the weights differ.
    """
    from . import ops

    if not 1 <= len(ring) <= MAX_RING:
        raise ValueError(f"ring must hold 1 to {MAX_RING} residuals, got {len(ring)}")
    if weights is None and len(ring) != 1:
        raise ValueError(f"a ring of {len(ring)} residuals needs weights, one for each")
    _check_operands(before=before, **{f"ring[{j}]": residual for j, residual in enumerate(ring)})
    if weights is not None:
        _check_scratch("weights", weights, torch.float32, len(ring), ring[0].device)
    predicted: torch.Tensor = ops.forecast(before, list(ring), weights)
    return predicted


def refresh(after: torch.Tensor, before: torch.Tensor | None, slot: torch.Tensor) -> None:
    """Store the residual of a computed span: ``slot.copy_(after - before)``, in one pass.

    Args:
        after, before: the stream after and before the span, of any floating dtypes and strides;
            with ``before=None`` the stream is cached as it is.
        slot: the buffer that is overwritten, of the same shape. The residual is rounded to the
            dtype of ``after - before``, then to that of `slot`.

    Raises:
        TypeError: an operand that is no floating-point tensor.
        ValueError: shapes or devices that differ, or an expanded slot.
    """
    from . import ops

    _check_operands(after=after, before=before, slot=slot)
    _check_slot(slot)
    ops.refresh(after, before, slot)


def refresh_error(
    after: torch.Tensor,
    before: torch.Tensor | None,
    slot: torch.Tensor,
    ring: Sequence[torch.Tensor],
    weights: torch.Tensor,
) -> torch.Tensor:
    """`refresh`, and how far off a forecast of that residual would have been, in the same pass.

    Args:
        after, before, slot: as for `refresh`.
        ring: one to five past residuals of the shape of `slot`, which must not be among them.
        weights: float32 [len(ring)] on the same device; see `forecast`.

    Returns:
        float32 [2]: sum |r - sum_j weights[j] * ring[j]| and sum |r|, of the residual r before it
        is rounded to the dtype of `slot`; float32 accumulation, the same bits at every call.
        NaN and Inf reach the sums, but for a residual of weight 0.

    Raises:
        TypeError, ValueError: as for `refresh` and `forecast`.

    Source: error control by local extrapolation (see `fxcache.AdaptiveCache`).
    """
    from . import ops

    if not 1 <= len(ring) <= MAX_RING:
        raise ValueError(f"ring must hold 1 to {MAX_RING} residuals, got {len(ring)}")
    rest = {f"ring[{j}]": residual for j, residual in enumerate(ring)}
    _check_operands(after=after, before=before, slot=slot, **rest)
    _check_slot(slot)
    _check_scratch("weights", weights, torch.float32, len(ring), slot.device)
    sums: torch.Tensor = ops.refresh_error(after, before, slot, list(ring), weights)
    return sums


def _check_operands(**operands: torch.Tensor | None) -> None:
    """Floating-point tensors of one shape on one device, or None."""
    first: tuple[str, torch.Tensor] | None = None
    for name, operand in operands.items():
        if operand is None:
            continue
        if not isinstance(operand, torch.Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(operand).__name__}")
        if not operand.is_floating_point():
            raise TypeError(f"{name} must be of a floating dtype, got {operand.dtype}")
        first = first or (name, operand)
        if operand.shape != first[1].shape:
            raise ValueError(
                f"{name} must have the shape of {first[0]}, {_shape(first[1])}, "
                f"got {_shape(operand)}"
            )
        if operand.device != first[1].device:
            raise ValueError(
                f"{name} must be on the device of {first[0]}, {first[1].device}, "
                f"got {operand.device}"
            )


def _check_slot(slot: torch.Tensor) -> None:
    if any(by == 0 and size > 1 for size, by in zip(slot.shape, slot.stride(), strict=True)):
        raise ValueError(f"slot must not be expanded, got strides {slot.stride()}")


def _check_scratch(
    name: str, tensor: torch.Tensor, dtype: torch.dtype, size: int, device: torch.device
) -> None:
    """A contiguous vector that a kernel indexes by itself."""
    right = tensor.dtype == dtype and tuple(tensor.shape) == (size,) and tensor.is_contiguous()
    if not right or tensor.device != device:
        raise ValueError(
            f"{name} must be contiguous {dtype} [{size}] on {device}, "
            f"got {tensor.dtype} {_shape(tensor)} on {tensor.device}"
        )


def _shape(tensor: torch.Tensor) -> list[int]:
    return list(tensor.shape)
