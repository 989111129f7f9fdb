"""Temperature-scaled log-softmax, forward and backward.

Math    out = (x − peak)/T − log Σ exp((x − peak)/T);  dx = (dy − exp(out)·Σ dy)/T
Shapes  x, out, dy, dx [B, S, V] bf16|fp16|fp32, last stride 1; lse [N, 2] fp32: the peak, and the logarithm above
Bytes   e bytes an element: forward 3e (x is read twice), backward 4e (dy is read twice). The floor is 2e and 3e; the
        second read of a row of 256 KB comes from L2 as long as there are few rows in flight.
Grid    one program a row, BLOCK columns a step, the second walk backwards
"""

import triton
import triton.language as tl

from fastkd.kernels.config import alignment, device_of, launch_options, row_strides
from fastkd.kernels.lse import (
    DROP,
    KEEP,
    LN_2,
    LOG2_E,
    NO_TILE,
    align,
    inside,
    load_tile,
    new_peak,
    row_start,
    shift_of,
    store_tile,
    tile_at,
    tile_range,
)


@triton.jit(do_not_specialize=["inner_rows"], do_not_specialize_on_alignment=["lse_ptr"])
def log_softmax_kernel(
    x_ptr, out_ptr, lse_ptr, inner_rows, x_outer, x_inner, out_outer, out_inner, columns, temperature,
    BLOCK: tl.constexpr, VEC: tl.constexpr, PEEL: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    start, head = align(row_start(row, inner_rows, x_outer, x_inner), VEC, PEEL)
    out_start = align(row_start(row, inner_rows, out_outer, out_inner), VEC, PEEL)[0]
    x_ptr += start
    out_ptr += out_start
    length = columns + head
    inv_t = 1.0 / temperature
    k = inv_t * LOG2_E

    peak = tl.full([BLOCK // VEC], -float("inf"), tl.float32)  # a state a lane
    total = tl.zeros([BLOCK // VEC], tl.float32)
    for masked in tl.static_range(2):
        first, end = tile_range(length, NO_TILE, BLOCK, PEEL, masked)
        for i in tl.range(first, end):
            tile = tile_at(i, first, end, length, NO_TILE, BLOCK, PEEL, masked, False)
            x = load_tile(x_ptr, tile, head, length, BLOCK, VEC, masked, KEEP)
            old = peak
            peak, ref = new_peak(old, x)
            total = total * tl.exp2((old - ref) * k) + tl.sum(tl.exp2((x - ref[:, None]) * k), 1)
    shift = shift_of(tl.max(peak, 0))
    lse = tl.log2(tl.sum(total * tl.exp2((peak - shift) * k), 0)) * LN_2
    lse_ptr += row.to(tl.int64) * 2
    tl.store(lse_ptr, shift)
    tl.store(lse_ptr + 1, lse)

    for masked in tl.static_range(1, -1, -1):
        first, end = tile_range(length, NO_TILE, BLOCK, PEEL, masked)
        for i in tl.range(first, end):
            tile = tile_at(i, first, end, length, NO_TILE, BLOCK, PEEL, masked, True)
            x = load_tile(x_ptr, tile, head, length, BLOCK, VEC, masked, DROP)
            store_tile(out_ptr, tile, head, length, (x - shift) * inv_t - lse, BLOCK, VEC, masked)


@triton.jit(do_not_specialize=["inner_rows"], do_not_specialize_on_alignment=["lse_ptr"])
def log_softmax_backward_kernel(
    dy_ptr, x_ptr, lse_ptr, dx_ptr, inner_rows, dy_outer, dy_inner, x_outer, x_inner, dx_outer, dx_inner, columns,
    temperature, BLOCK: tl.constexpr, VEC: tl.constexpr, PEEL: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    start, head = align(row_start(row, inner_rows, dy_outer, dy_inner), VEC, PEEL)
    x_start = align(row_start(row, inner_rows, x_outer, x_inner), VEC, PEEL)[0]
    dx_start = align(row_start(row, inner_rows, dx_outer, dx_inner), VEC, PEEL)[0]
    dy_ptr += start
    x_ptr += x_start
    dx_ptr += dx_start
    length = columns + head
    inv_t = 1.0 / temperature
    k = inv_t * LOG2_E

    total = tl.zeros([BLOCK // VEC], tl.float32)
    for masked in tl.static_range(2):
        first, end = tile_range(length, NO_TILE, BLOCK, PEEL, masked)
        for i in tl.range(first, end):
            tile = tile_at(i, first, end, length, NO_TILE, BLOCK, PEEL, masked, False)
            dy = load_tile(dy_ptr, tile, head, length, BLOCK, VEC, masked, KEEP)
            if masked:
                dy = tl.where(inside(tile, head, length, BLOCK, VEC), dy, 0.0)
            total += tl.sum(dy, 1)
    grad_sum = tl.sum(total, 0)
    lse_ptr += row.to(tl.int64) * 2
    shift = tl.load(lse_ptr)
    lse = tl.load(lse_ptr + 1) * LOG2_E

    for masked in tl.static_range(1, -1, -1):
        first, end = tile_range(length, NO_TILE, BLOCK, PEEL, masked)
        for i in tl.range(first, end):
            tile = tile_at(i, first, end, length, NO_TILE, BLOCK, PEEL, masked, True)
            x = load_tile(x_ptr, tile, head, length, BLOCK, VEC, masked, DROP)
            dy = load_tile(dy_ptr, tile, head, length, BLOCK, VEC, masked, DROP)
            dx = (dy - tl.exp2((x - shift) * k - lse) * grad_sum) * inv_t
            store_tile(dx_ptr, tile, head, length, dx, BLOCK, VEC, masked)


def log_softmax(x, out, lse, temperature: float) -> None:
    """Fill ``out`` and ``lse`` [N, 2] from [B, S, V] views ``x``, ``out``."""
    outer, inner, columns = x.shape
    if outer * inner == 0:
        return
    with device_of(x):
        log_softmax_kernel[(outer * inner,)](
            x, out, lse, inner, *row_strides(x), *row_strides(out), columns, temperature,
            **alignment(x, out), **launch_options(columns),
        )  # fmt: skip


def log_softmax_backward(dy, x, lse, dx, temperature: float) -> None:
    """Fill ``dx`` from [B, S, V] views ``dy``, ``x`` and the normalisers ``lse`` [N, 2]."""
    outer, inner, columns = x.shape
    if outer * inner == 0:
        return
    with device_of(x):
        log_softmax_backward_kernel[(outer * inner,)](
            dy, x, lse, dx, inner, *row_strides(dy), *row_strides(x), *row_strides(dx), columns, temperature,
            **alignment(dy, x, dx), **launch_options(columns),
        )  # fmt: skip
