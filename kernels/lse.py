"""Online log-sum-exp: the running (max, sum) of a row, tile by tile, and the tiles themselves.

Math    a state is (peak, Σ exp((x − peak)·k)); a larger peak rescales the sum by exp((old − new)·k). Sums stay one
        value a lane until the end of the row, so a tile costs one reduction, of its peak.
Tiles   BLOCK columns. A row whose start is not 16-byte aligned is walked from the aligned address before it (HEAD
        columns early), so that all tiles but the first and the last load and store 16 bytes unmasked.
"""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def row_start(row, inner_rows, outer_stride, inner_stride):
    """Offset of a row of [B, S, V], in 64 bits: N·V is beyond 2³¹ in ordinary use."""
    row = row.to(tl.int64)
    return (row // inner_rows) * outer_stride + (row % inner_rows) * inner_stride


@triton.jit
def align(start, VEC: tl.constexpr, PEEL: tl.constexpr):
    """(the offset to walk from, columns before the row's start)."""
    if PEEL:
        aligned = (start // VEC) * VEC
        return aligned, (start - aligned).to(tl.int32)
    else:
        return start, 0


@triton.jit
def tile_range(length, BLOCK: tl.constexpr, PEEL: tl.constexpr, MASKED: tl.constexpr):
    """(first, end) of the unmasked tiles of a walk over ``length`` columns, head included, or of the masked ones.

    Masked are the last tile, as number 0, and with a head the first, as number 1; see :func:`masked_tile`.
    """
    last = length // BLOCK
    if MASKED:
        if PEEL:
            return 0, 1 + (last > 0).to(tl.int32)
        else:
            return 0, 1
    else:
        if PEEL:
            return 1, last
        else:
            return 0, last


@triton.jit
def tile_at(i, first, end, length, BLOCK: tl.constexpr, MASKED: tl.constexpr, REVERSE: tl.constexpr):
    """The tile that step ``i`` of a range visits."""
    if MASKED:
        return (length // BLOCK) * (1 - i)
    elif REVERSE:
        return first + end - 1 - i
    else:
        return i


@triton.jit
def load_tile(ptr, tile, head, n, BLOCK: tl.constexpr, MASKED: tl.constexpr):
    """(columns, their values in float32, −inf outside the row)."""
    offsets = tile * BLOCK + tl.arange(0, BLOCK)
    cols = offsets - head
    if MASKED:
        x = tl.load(ptr + offsets, mask=(cols >= 0) & (cols < n), other=-float("inf"))
    else:
        x = tl.load(ptr + offsets)
    return cols, x.to(tl.float32)


@triton.jit
def store_tile(ptr, tile, head, n, x, BLOCK: tl.constexpr, MASKED: tl.constexpr):
    offsets = tile * BLOCK + tl.arange(0, BLOCK)
    if MASKED:
        cols = offsets - head
        tl.store(ptr + offsets, x.to(ptr.dtype.element_ty), mask=(cols >= 0) & (cols < n))
    else:
        tl.store(ptr + offsets, x.to(ptr.dtype.element_ty))


@triton.jit
def new_peak(peak, x):
    """(the running max, the same with −inf replaced by 0: what exponents may subtract)."""
    peak = tl.maximum(peak, tl.max(x, 0))  # a NaN may be lost here, but not in the sum
    return peak, tl.where(peak == -float("inf"), 0.0, peak)
