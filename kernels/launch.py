"""Launch the Triton kernels: what the operators do with tensors on a GPU.

Operands are taken as valid; `api` checks them. Between `wrap_triton` and the kernel lies about a
millisecond of host time when a launcher is called by itself: time the operators instead.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch.library import wrap_triton

from .layout import MAX_RING, ceil_div, walk
from .triton_kernels import forecast_kernel, refresh_kernel, residual_diff_kernel

#: Programs that a multiprocessor holds at once: a measurement is one wave, its partial sums few.
RESIDENT = 8


def launch_residual_diff(
    h_out: torch.Tensor,
    h_in: torch.Tensor | None,
    reference: torch.Tensor,
    tickets: torch.Tensor | None,
) -> torch.Tensor:
    """float32 [B, 2] sums; `tickets` are int32 [B] zeros, and zeros again afterwards."""
    batch = h_out.shape[0]
    if h_out.numel() == 0:
        return h_out.new_zeros((batch, 2), dtype=torch.float32)
    h_out, others, layout = walk(h_out, (h_in, reference), first_dim=1)
    operands = (h_out, *others)
    rows, columns = layout.tile(_itemsize(operands))
    tiles = layout.tiles(rows, columns)
    programs = min(tiles, ceil_div(RESIDENT * processors(h_out.device), batch))
    sums = h_out.new_empty((batch, 2), dtype=torch.float32)
    partial = h_out.new_empty((batch, programs, 2), dtype=torch.float32)
    if tickets is None:
        tickets = h_out.new_zeros((batch,), dtype=torch.int32)
    outer, middle, inner = layout.sizes
    strides = [
        stride
        for operand, within in zip(operands, layout.strides, strict=True)
        # One sample may lie at any stride: 0 keeps it aligned in the eyes of Triton.
        for stride in (0 if operand is None or batch == 1 else operand.stride(0), *within)
    ]
    wrap_triton(residual_diff_kernel)[(batch * programs,)](
        *operands,
        partial,
        sums,
        tickets,
        programs,
        tiles,
        outer * middle,
        middle,
        inner,
        *strides,
        FLAT=layout.is_flat,
        WIDE=layout.is_wide,
        ROWS=rows,
        COLUMNS=columns,
    )
    return sums


def launch_forecast(
    before: torch.Tensor | None, ring: Sequence[torch.Tensor], weights: torch.Tensor | None
) -> torch.Tensor:
    """A new tensor ``before + sum_j weights[j] * ring[j]``."""
    like = ring[0] if before is None else before
    dtype = torch.promote_types(like.dtype, ring[0].dtype) if weights is None else like.dtype
    out = torch.empty_like(like, dtype=dtype)
    if out.numel() == 0:
        return out
    tensors, numbers, known, tiles = _by_tiles(out, (before,), ring)
    wrap_triton(forecast_kernel)[(tiles,)](*tensors, weights, *numbers, **known)
    if tensors[0] is not out:
        out.copy_(tensors[0])
    return out


def launch_refresh(after: torch.Tensor, before: torch.Tensor | None, slot: torch.Tensor) -> None:
    """Write ``after - before`` into `slot`."""
    if slot.numel() > 0:
        _refresh(after, before, slot, (), None)


def launch_refresh_error(
    after: torch.Tensor,
    before: torch.Tensor | None,
    slot: torch.Tensor,
    ring: Sequence[torch.Tensor],
    weights: torch.Tensor,
) -> torch.Tensor:
    """Write ``after - before`` into `slot`; float32 [2] sums of how far off a forecast was."""
    if slot.numel() == 0:
        return slot.new_zeros((2,), dtype=torch.float32)
    return _refresh(after, before, slot, ring, weights).sum(0)


def _refresh(
    after: torch.Tensor,
    before: torch.Tensor | None,
    slot: torch.Tensor,
    ring: Sequence[torch.Tensor],
    weights: torch.Tensor | None,
) -> torch.Tensor:
    """The partial sums of each program, float32 [programs, 2]; without a ring, not written."""
    tensors, numbers, known, tiles = _by_tiles(slot, (after, before), ring)
    partial = slot.new_empty((tiles if ring else 0, 2), dtype=torch.float32)
    wrap_triton(refresh_kernel)[(tiles,)](
        *tensors, weights, partial if ring else None, *numbers, **known
    )
    if tensors[0] is not slot:
        slot.copy_(tensors[0])
    return partial


def _by_tiles(
    out: torch.Tensor, operands: Sequence[torch.Tensor | None], ring: Sequence[torch.Tensor]
) -> tuple[list[Any], list[int], dict[str, Any], int]:
    """What a kernel takes that writes `out` one tile a program: tensors, sizes and strides, and
    what is known at compile time; and how many tiles there are. The first tensor is `out`, or what
    must be copied there.
    """
    if any(residual.stride() != ring[0].stride() for residual in ring):
        ring = [residual.contiguous() for residual in ring]
    target, others, layout = walk(out, (*operands, *ring), first_dim=0)
    rows, columns = layout.tile(_itemsize((target, *others)))
    outer, middle, inner = layout.sizes
    # All of the ring lie alike; without a ring, its strides are not looked at.
    strides = [*layout.strides, (0, 0, 0)][: len(operands) + 2]
    return (
        [target, *others, *[None] * (MAX_RING - len(ring))],
        [outer * middle, middle, inner, *(stride for within in strides for stride in within)],
        {
            "RING": len(ring),
            "FLAT": layout.is_flat,
            "WIDE": layout.is_wide,
            "ROWS": rows,
            "COLUMNS": columns,
        },
        layout.tiles(rows, columns),
    )


def processors(device: torch.device) -> int:
    """Multiprocessors of `device`; 1 for the interpreter, which runs programs one by one."""
    if device.type == "cpu":
        return 1
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def _itemsize(operands: Sequence[torch.Tensor | None]) -> int:
    return min(operand.element_size() for operand in operands if operand is not None)
