"""The kernels in Triton; `launch` says how they are launched.

All walk over their operands tile by tile (`layout`). A flat walk (one contiguous dimension)
leaves out the mask on whole tiles, so that loads have 16 bytes whatever the size is a multiple of.
Upper case marks what is known at compile time, as in Triton's own kernels.
"""
# ruff: noqa: N803, N806
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
# mypy: disable-error-code="import-untyped, import-not-found"

import triton
import triton.language as tl

#: Partial sums that the last program reads at once.
FINISH = tl.constexpr(1024)


@triton.jit
def _flat_offsets(ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    return tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]


@triton.jit
def _tile_index(tile, rows, columns, WIDE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Row numbers, column numbers and mask of a strided tile."""
    across = tl.cdiv(columns, COLUMNS)
    row, column = tile // across, tile % across
    if WIDE:
        row, column = row.to(tl.int64), column.to(tl.int64)
    row = row * ROWS + tl.arange(0, ROWS)[:, None]
    column = column * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    return row, column, (row < rows) & (column < columns)


@triton.jit
def _tile_offsets(row, column, middle, outer_stride, middle_stride, inner_stride):
    outer = (row // middle).to(tl.int64) * outer_stride
    return outer + (row % middle).to(tl.int64) * middle_stride + column.to(tl.int64) * inner_stride


@triton.jit
def _load(base, offsets, mask):
    """float32 values; 0 where the mask is off, everything where it is None."""
    if mask is None:
        value = tl.load(base + offsets)
    else:
        value = tl.load(base + offsets, mask=mask, other=0.0)
    return value.to(tl.float32)


@triton.jit
def _residual(after, before, after_offsets, before_offsets, mask):
    """float32 `after - before`, rounded as eager rounds it: to the wider of the two dtypes."""
    value = _load(after, after_offsets, mask)
    if before is not None:
        value -= _load(before, before_offsets, mask)
        if after.dtype.element_ty == before.dtype.element_ty:
            value = value.to(after.dtype.element_ty).to(tl.float32)
    return value


@triton.jit
def _terms(h_out, h_in, reference, out_offsets, in_offsets, reference_offsets, mask):
    residual = _residual(h_out, h_in, out_offsets, in_offsets, mask)
    expected = _load(reference, reference_offsets, mask)
    return tl.abs(residual - expected), tl.abs(expected)


@triton.jit
def residual_diff_kernel(
    h_out,
    h_in,
    reference,
    partial,
    sums,
    tickets,
    programs,
    tiles,
    rows,
    middle,
    columns,
    out_batch,
    out_outer,
    out_middle,
    out_inner,
    in_batch,
    in_outer,
    in_middle,
    in_inner,
    reference_batch,
    reference_outer,
    reference_middle,
    reference_inner,
    FLAT: tl.constexpr,
    WIDE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Sums of one sample by `programs` programs; the one that comes last adds their partial sums.

    Which program comes last does not matter: partial sums are added in the order of programs.
    """
    pid = tl.program_id(0)
    sample = (pid // programs).to(tl.int64)
    program = pid % programs
    h_out += sample * out_batch
    reference += sample * reference_batch
    if h_in is not None:
        h_in += sample * in_batch

    if FLAT:
        TILE: tl.constexpr = ROWS * COLUMNS
        offsets = _flat_offsets(ROWS, COLUMNS)
        change = tl.zeros([COLUMNS], tl.float32)
        scale = tl.zeros([COLUMNS], tl.float32)
        tail = tl.cast(columns // TILE * TILE, tl.int64)
        for start in range(program.to(tl.int64) * TILE, tail, programs * TILE):
            at = start + offsets
            differences, sizes = _terms(h_out, h_in, reference, at, at, at, None)
            change += tl.sum(differences, 0)
            scale += tl.sum(sizes, 0)
        if program == columns // TILE % programs:
            for start in range(tail, columns, COLUMNS):  # row by row: it takes fewer registers
                at = start + _flat_offsets(1, COLUMNS)
                differences, sizes = _terms(h_out, h_in, reference, at, at, at, at < columns)
                change += tl.sum(differences, 0)
                scale += tl.sum(sizes, 0)
    else:
        change = tl.zeros([ROWS, COLUMNS], tl.float32)
        scale = tl.zeros([ROWS, COLUMNS], tl.float32)
        for tile in range(program, tiles, programs):
            row, column, mask = _tile_index(tile, rows, columns, WIDE, ROWS, COLUMNS)
            differences, sizes = _terms(
                h_out,
                h_in,
                reference,
                _tile_offsets(row, column, middle, out_outer, out_middle, out_inner),
                _tile_offsets(row, column, middle, in_outer, in_middle, in_inner),
                _tile_offsets(
                    row, column, middle, reference_outer, reference_middle, reference_inner
                ),
                mask,
            )
            change += differences
            scale += sizes

    own = partial + pid.to(tl.int64) * 2
    tl.store(own, tl.sum(change))
    tl.store(own + 1, tl.sum(scale))
    tl.debug_barrier()  # the partial sums are written before any thread takes the ticket
    ticket = tl.atomic_add(tickets + sample, 1, sem="acq_rel", scope="gpu")
    if ticket == programs - 1:
        all_change = tl.zeros([FINISH], tl.float32)
        all_scale = tl.zeros([FINISH], tl.float32)
        for first in range(0, programs, FINISH):
            index = first + tl.arange(0, FINISH)
            part = partial + (sample * programs + index) * 2
            # Other multiprocessors wrote these: read them past the first-level cache.
            in_range = index < programs
            all_change += tl.load(part, mask=in_range, other=0.0, cache_modifier=".cg")
            all_scale += tl.load(part + 1, mask=in_range, other=0.0, cache_modifier=".cg")
        tl.store(sums + sample * 2, tl.sum(all_change))
        tl.store(sums + sample * 2 + 1, tl.sum(all_scale))
        tl.store(tickets + sample, 0)


@triton.jit
def _weighted(weight, residual):
    """A ring slot without a weight may hold anything, even NaN."""
    return tl.where(weight == 0, 0.0, weight * residual)


@triton.jit
def _refresh_tile(
    slot,
    after,
    before,
    ring,
    weights,
    slot_offsets,
    after_offsets,
    before_offsets,
    ring_offsets,
    mask,
    RING: tl.constexpr,
):
    """Store the residual; with a ring, sums of how far it is from the weighted ring, and of its
    size.
    """
    residual = _residual(after, before, after_offsets, before_offsets, mask)
    tl.store(slot + slot_offsets, residual.to(slot.dtype.element_ty), mask=mask)
    if RING == 0:
        return 0.0, 0.0
    off = residual
    for j in tl.static_range(RING):
        off -= _weighted(tl.load(weights + j), _load(ring[j], ring_offsets, mask))
    return tl.sum(tl.abs(off)), tl.sum(tl.abs(residual))


@triton.jit
def refresh_kernel(
    slot,
    after,
    before,
    ring_0,
    ring_1,
    ring_2,
    ring_3,
    ring_4,
    weights,
    partial,
    rows,
    middle,
    columns,
    slot_outer,
    slot_middle,
    slot_inner,
    after_outer,
    after_middle,
    after_inner,
    before_outer,
    before_middle,
    before_inner,
    ring_outer,
    ring_middle,
    ring_inner,
    RING: tl.constexpr,
    FLAT: tl.constexpr,
    WIDE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Write the residual into the slot, one tile a program; with a ring, sum up how far it is from
    the weighted ring, and its size.
    """
    ring = (ring_0, ring_1, ring_2, ring_3, ring_4)
    tile = tl.program_id(0)
    off, size = 0.0, 0.0
    if FLAT:
        TILE: tl.constexpr = ROWS * COLUMNS
        start = tile.to(tl.int64) * TILE
        if start + TILE <= columns:
            at = start + _flat_offsets(ROWS, COLUMNS)
            off, size = _refresh_tile(
                slot, after, before, ring, weights, at, at, at, at, None, RING
            )
        else:
            for row_start in range(start, columns, COLUMNS):  # row by row: fewer registers
                at = row_start + _flat_offsets(1, COLUMNS)
                row_off, row_size = _refresh_tile(
                    slot, after, before, ring, weights, at, at, at, at, at < columns, RING
                )
                off += row_off
                size += row_size
    else:
        row, column, mask = _tile_index(tile, rows, columns, WIDE, ROWS, COLUMNS)
        off, size = _refresh_tile(
            slot,
            after,
            before,
            ring,
            weights,
            _tile_offsets(row, column, middle, slot_outer, slot_middle, slot_inner),
            _tile_offsets(row, column, middle, after_outer, after_middle, after_inner),
            _tile_offsets(row, column, middle, before_outer, before_middle, before_inner),
            _tile_offsets(row, column, middle, ring_outer, ring_middle, ring_inner),
            mask,
            RING,
        )
    if RING > 0:
        own = partial + tile.to(tl.int64) * 2
        tl.store(own, off)
        tl.store(own + 1, size)


@triton.jit
def _forecast_tile(
    out, before, ring, weights, out_offsets, before_offsets, ring_offsets, mask, RING: tl.constexpr
):
    value = _load(ring[0], ring_offsets, mask)
    if weights is not None:
        value = _weighted(tl.load(weights), value)
        for j in tl.static_range(1, RING):
            value += _weighted(tl.load(weights + j), _load(ring[j], ring_offsets, mask))
    if before is not None:
        value += _load(before, before_offsets, mask)
    tl.store(out + out_offsets, value.to(out.dtype.element_ty), mask=mask)


@triton.jit
def forecast_kernel(
    out,
    before,
    ring_0,
    ring_1,
    ring_2,
    ring_3,
    ring_4,
    weights,
    rows,
    middle,
    columns,
    out_outer,
    out_middle,
    out_inner,
    before_outer,
    before_middle,
    before_inner,
    ring_outer,
    ring_middle,
    ring_inner,
    RING: tl.constexpr,
    FLAT: tl.constexpr,
    WIDE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Add the weighted ring to the stream, one tile a program."""
    ring = (ring_0, ring_1, ring_2, ring_3, ring_4)
    tile = tl.program_id(0)
    if FLAT:
        TILE: tl.constexpr = ROWS * COLUMNS
        start = tile.to(tl.int64) * TILE
        offsets = _flat_offsets(ROWS, COLUMNS)
        at = start + offsets
        if start + TILE <= columns:
            _forecast_tile(out, before, ring, weights, at, at, at, None, RING)
        else:
            mask = offsets < columns - start
            _forecast_tile(out, before, ring, weights, at, at, at, mask, RING)
    else:
        row, column, mask = _tile_index(tile, rows, columns, WIDE, ROWS, COLUMNS)
        _forecast_tile(
            out,
            before,
            ring,
            weights,
            _tile_offsets(row, column, middle, out_outer, out_middle, out_inner),
            _tile_offsets(row, column, middle, before_outer, before_middle, before_inner),
            _tile_offsets(row, column, middle, ring_outer, ring_middle, ring_inner),
            mask,
            RING,
        )
