"""How the kernels walk over tensors of any strides: few dimensions, in the order of memory."""

from collections.abc import Sequence
from typing import NamedTuple

import torch

#: A tile is what a program of four warps takes at once: 16 bytes a thread and load, and per row
#: of a flat tile one more load in flight.
THREADS, LOAD_BYTES, FLAT_ROWS = 128, 16, 2
STRIDED_TILE, WIDEST_ROW, SQUARE = 1024, 512, 32

#: The kernels know an outer, a middle and an inner dimension, and rings of up to five residuals.
MAX_DIMS, MAX_RING = 3, 5

Strides = tuple[int, int, int]


class Layout(NamedTuple):
    """Dimensions shared by several tensors: sizes and strides are (outer, middle, inner).

    `strides` holds one triple an operand; an absent operand has zeros.
    """

    sizes: tuple[int, int, int]
    strides: tuple[Strides, ...]
    is_flat: bool
    #: Whether the inner dimension lies next to each other in every operand.
    is_aligned: bool

    @property
    def is_wide(self) -> bool:
        """Whether 32 bits cannot count the rows or the columns."""
        outer, middle, inner = self.sizes
        return max(outer * middle, inner) > 2**31 - STRIDED_TILE

    def tile(self, itemsize: int) -> tuple[int, int]:
        """Rows and columns of a tile, for elements of at least `itemsize` bytes."""
        if self.is_flat:
            return FLAT_ROWS, THREADS * LOAD_BYTES // itemsize
        if not self.is_aligned:
            return SQUARE, STRIDED_TILE // SQUARE
        columns = 16
        while columns < self.sizes[2] and columns < WIDEST_ROW:
            columns *= 2
        return STRIDED_TILE // columns, columns

    def tiles(self, rows: int, columns: int) -> int:
        """How many tiles of `rows` by `columns` cover the whole."""
        outer, middle, inner = self.sizes
        if self.is_flat:
            return ceil_div(inner, rows * columns)
        return ceil_div(outer * middle, rows) * ceil_div(inner, columns)


def ceil_div(number: int, by: int) -> int:
    return (number + by - 1) // by


def walk(
    first: torch.Tensor, others: Sequence[torch.Tensor | None], *, first_dim: int
) -> tuple[torch.Tensor, list[torch.Tensor | None], Layout]:
    """Lay out the dimensions from `first_dim` on, in the order in which `first` lies in memory.

    Returns the operands and their layout. Operands that need more dimensions than the kernels know
    come back contiguous.

    Raises:
        ValueError: operands of different shapes, which a kernel would read out of bounds.
    """
    present = [first, *(operand for operand in others if operand is not None)]
    if any(operand.shape != first.shape for operand in present):
        raise ValueError(f"operands must have one shape, got {[list(t.shape) for t in present]}")
    layout = _collapse(first, others, first_dim)
    if layout is not None:
        return first, list(others), layout
    first = _dense(first)
    others = [operand if operand is None else _dense(operand) for operand in others]
    layout = _collapse(first, others, first_dim)
    assert layout is not None, "contiguous tensors collapse to one dimension"
    return first, others, layout


def _dense(operand: torch.Tensor) -> torch.Tensor:
    """`operand` itself where it is contiguous: under functionalization a copy has no identity."""
    return operand if operand.is_contiguous() else operand.contiguous()


def _collapse(
    first: torch.Tensor, others: Sequence[torch.Tensor | None], first_dim: int
) -> Layout | None:
    """The fewest dimensions that describe all operands, or None where they are too many."""
    present = [first, *(operand for operand in others if operand is not None)]
    dims = [
        (size, tuple(operand.stride(first_dim + i) for operand in present))
        for i, size in enumerate(first.shape[first_dim:])
        if size != 1
    ]
    # An expanded dimension says nothing about the order: there the next operand decides.
    dims.sort(key=lambda dim: next((s for s in dim[1] if s != 0), 0), reverse=True)
    merged: list[tuple[int, tuple[int, ...]]] = []
    for size, strides in dims:
        outer = merged[-1] if merged else None
        if outer and all(o == s * size for o, s in zip(outer[1], strides, strict=True)):
            merged[-1] = (outer[0] * size, strides)
        else:
            merged.append((size, strides))
    if len(merged) > MAX_DIMS:
        return None
    merged = merged or [(1, (1,) * len(present))]
    is_aligned = all(stride == 1 for stride in merged[-1][1])
    is_flat = len(merged) == 1 and is_aligned
    merged = [(1, (0,) * len(present))] * (MAX_DIMS - len(merged)) + merged
    (outer_size, outer_by), (middle_size, middle_by), (inner_size, inner_by) = merged
    found = iter(zip(outer_by, middle_by, inner_by, strict=True))
    every = tuple((0, 0, 0) if operand is None else next(found) for operand in (first, *others))
    return Layout((outer_size, middle_size, inner_size), every, is_flat, is_aligned)
