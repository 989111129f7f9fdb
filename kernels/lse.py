"""Online log-sum-exp: the running (max, sum) of a row, tile by tile, and the tiles themselves.

Math    a state is (peak, Σ exp((x − peak)·k)); a larger peak rescales the sum by exp((old − new)·k).
Lanes   A tile of BLOCK columns is [PER, lanes, VEC]: a lane holds PER vectors of VEC columns side by side, which are 16
        bytes, and keeps a state of its own to the end of the row. So a tile needs no barrier to be summed, no warp
        waits for another, and the loads of one hide behind the arithmetic of the rest.
Tiles   A row whose start is not 16-byte aligned is walked from the aligned address before it (``head`` columns early),
        so that all tiles but the first and the last load and store 16 bytes unmasked.
"""

import triton
import triton.language as tl

from fastkd.kernels import config

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
NO_TILE = tl.constexpr(1 << 30)
PER = tl.constexpr(config.VECTORS_PER_THREAD)
# Eviction: what the row's next walk reads again stays in L2; what is read or written for the last time goes first.
KEEP = tl.constexpr("evict_last")
DROP = tl.constexpr("evict_first")


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
def slice_at(part, width, head, length, label):
    """(start, head, length, label) of a slice, the last three from its start."""
    start = part * width
    length = tl.maximum(tl.minimum(length - start, width), 0)
    label = tl.where((label >= start) & (label < start + length), label - start, -1)
    return start, tl.where(part == 0, head, 0), length, label


@triton.jit
def tile_apart(column, length, BLOCK: tl.constexpr, PEEL: tl.constexpr):
    """The number of the unmasked tile that holds ``column``, to be visited as a masked one, or NO_TILE."""
    tile = column // BLOCK
    return tl.where((column >= 0) & (tile >= PEEL) & (tile < length // BLOCK), tile, NO_TILE)


@triton.jit
def tile_range(length, apart, BLOCK: tl.constexpr, PEEL: tl.constexpr, MASKED: tl.constexpr):
    """(first, end) of the unmasked tiles of a walk over ``length`` columns, head included, or of the masked ones.

    Masked are the last tile, with a head the first, and the one ``apart``; see :func:`tile_at`.
    """
    last = length // BLOCK
    has_apart = tl.where(apart < NO_TILE, 1, 0)
    if MASKED:
        if PEEL:
            return 0, 1 + (last > 0).to(tl.int32) + has_apart
        else:
            return 0, 1 + has_apart
    else:
        if PEEL:
            return 1, last - has_apart
        else:
            return 0, last - has_apart


@triton.jit
def tile_at(
    i, first, end, length, apart,
    BLOCK: tl.constexpr, PEEL: tl.constexpr, MASKED: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """Where the tile begins that step ``i`` of a range visits, in columns from the start of the walk."""
    if MASKED:
        if PEEL:
            tile = tl.where(i == 0, length // BLOCK, tl.where(i == 1, 0, apart))
        else:
            tile = tl.where(i == 0, length // BLOCK, apart)
    else:
        if REVERSE:
            tile = first + end - 1 - i
        else:
            tile = i
        tile += (tile >= apart).to(tl.int32)
    return tile * BLOCK


@triton.jit
def columns_of(BLOCK: tl.constexpr, VEC: tl.constexpr):
    """The columns of a tile, from its start. [PER, lanes, VEC]."""
    return of_tile(tl.arange(0, BLOCK), VEC)


@triton.jit
def of_tile(x, VEC: tl.constexpr):
    """What is of columns in a row, [BLOCK], as a tile. Memory is accessed by the former: of a tile, Triton before 3.9
    spreads a lane's vectors over threads, which must then be summed by shuffles."""
    return tl.reshape(x, [PER, x.numel // VEC // PER, VEC])


@triton.jit
def of_lanes(x, BLOCK: tl.constexpr, VEC: tl.constexpr):
    """A state of each lane that is ``x``."""
    return tl.full([BLOCK // VEC // PER], x, tl.float32)


@triton.jit
def lane_sum(x):
    return tl.sum(tl.sum(x, 2), 0)


@triton.jit
def inside(tile, head, length, BLOCK: tl.constexpr, VEC: tl.constexpr):
    """Which columns of a tile are the row's."""
    return of_tile(within(tile, head, length, BLOCK), VEC)


@triton.jit
def within(tile, head, length, BLOCK: tl.constexpr):
    """The same of columns in a row."""
    cols = tl.arange(0, BLOCK)
    return (cols >= head - tile) & (cols < length - tile)


@triton.jit
def load_tile(
    ptr, tile, head, length,
    BLOCK: tl.constexpr, VEC: tl.constexpr, MASKED: tl.constexpr, EVICT: tl.constexpr,
):  # fmt: skip
    """In float32, −inf outside the row."""
    if MASKED:
        mask = within(tile, head, length, BLOCK)
        ptrs = ptr + tile + tl.arange(0, BLOCK)
        x = tl.load(ptrs, mask=mask, other=-float("inf"), eviction_policy=EVICT)
    elif ptr.dtype.element_ty == tl.bfloat16:
        # By pairs: the halves of a word are an instruction each, where two numbers take three.
        pairs = (ptr + tile).to(tl.pointer_type(tl.uint32)) + tl.arange(0, BLOCK // 2)
        pair = tl.load(pairs, eviction_policy=EVICT)
        low = (pair << 16).to(tl.float32, bitcast=True)
        high = (pair & 0xFFFF0000).to(tl.float32, bitcast=True)
        x = tl.interleave(low, high)
    else:
        x = tl.load(ptr + tile + tl.arange(0, BLOCK), eviction_policy=EVICT)
    return of_tile(x.to(tl.float32), VEC)


@triton.jit
def listed_bit(column, BLOCK: tl.constexpr, VEC: tl.constexpr):
    """Where among the bits of a row that lists columns the one of ``column``, from the start of the walk, is: each lane
    of a tile has the PER·VEC of its columns side by side, as one number to load."""
    LANES: tl.constexpr = BLOCK // VEC // PER
    vector = column % BLOCK // VEC
    return (column // BLOCK * LANES + vector % LANES) * (PER * VEC) + vector // LANES * VEC + column % VEC


@triton.jit
def listed_tile(ptr, tile, BLOCK: tl.constexpr, VEC: tl.constexpr):
    """Which columns of a tile are listed by the bits at ``ptr``, a pointer to the numbers of lanes."""
    LANES: tl.constexpr = BLOCK // VEC // PER
    bits = tl.load(ptr + tile // (PER * VEC) + tl.arange(0, LANES)).to(tl.int32)[None, :, None]
    return (bits >> (tl.arange(0, PER)[:, None, None] * VEC + tl.arange(0, VEC)[None, None, :])) & 1 != 0


@triton.jit
def store_tile(ptr, tile, head, length, x, BLOCK: tl.constexpr, VEC: tl.constexpr, MASKED: tl.constexpr):
    ptrs = ptr + tile + tl.arange(0, BLOCK)
    x = tl.reshape(x.to(ptr.dtype.element_ty), [BLOCK])
    if MASKED:
        tl.store(ptrs, x, mask=within(tile, head, length, BLOCK), eviction_policy=DROP)
    else:
        tl.store(ptrs, x, eviction_policy=DROP)


@triton.jit
def shift_of(peak):
    """What exponents may subtract: the peak, or 0 where it is −inf, since −inf − (−inf) is NaN."""
    return tl.where(peak == -float("inf"), 0.0, peak)


@triton.jit
def new_peak(peak, x):
    """(the lanes' running maxima, the same as shifts)."""
    peak = tl.maximum(peak, tl.max(tl.max(x, 2), 0))  # a NaN may be lost here, but not in the sum
    return peak, shift_of(peak)
