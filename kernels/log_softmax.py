"""Temperature-scaled log-softmax, forward and backward.

Math    out = (x − peak)/T − log Σ exp((x − peak)/T);  dx = (dy − exp(out)·Σ dy)/T
Shapes  x, out, dy, dx [B, S, V] bf16|fp16|fp32, last stride 1; lse [N, 2] fp32: the peak, and the logarithm above
Bytes   e bytes an element: forward 3e (x is read twice), backward 4e (dy is read twice). The floor is 2e and 3e; the
        second read comes from L2 where the rows in flight fit there.
Grid    As many programs as fill the GPU, or as many rows as L2 holds; each walks every so-manieth row, BLOCK columns a
        step, the second walk backwards. Where rows are few, a row is split into slices, a program each, in two
        launches, which both take the row's statistics from its slices'.
"""

import torch
import triton
import triton.language as tl

from fastkd.kernels.config import (
    MAX_SLICES,
    alignment,
    device_of,
    gpu_of,
    launch_options,
    programs_of,
    row_strides,
    slices_of,
)
from fastkd.kernels.lse import (
    DROP,
    KEEP,
    LN_2,
    LOG2_E,
    NO_TILE,
    align,
    inside,
    lane_sum,
    load_tile,
    new_peak,
    of_lanes,
    row_start,
    shift_of,
    slice_at,
    store_tile,
    tile_at,
    tile_range,
)

FREE = {"do_not_specialize": ["rows", "inner_rows"], "do_not_specialize_on_alignment": ["lse_ptr", "parts_ptr"]}


@triton.jit
def slice_state(x_ptr, head, length, k, BLOCK: tl.constexpr, VEC: tl.constexpr, PEEL: tl.constexpr):
    """(peak, Σ exp((x − peak)·k)) a lane."""
    peak = of_lanes(-float("inf"), BLOCK, VEC)
    total = of_lanes(0.0, BLOCK, VEC)
    for masked in tl.static_range(2):
        first, end = tile_range(length, NO_TILE, BLOCK, PEEL, masked)
        for i in tl.range(first, end):
            tile = tile_at(i, first, end, length, NO_TILE, BLOCK, PEEL, masked, False)
            x = load_tile(x_ptr, tile, head, length, BLOCK, VEC, masked, KEEP)
            old = peak
            peak, ref = new_peak(old, x)
            total = total * tl.exp2((old - ref) * k) + lane_sum(tl.exp2((x - ref[None, :, None]) * k))
    return peak, total


@triton.jit
def merged(peak, total, k):
    top = tl.max(peak, 0)
    return top, tl.sum(total * tl.exp2((peak - shift_of(top)) * k), 0)


@triton.jit
def slice_output(
    x_ptr, out_ptr, head, length, shift, lse, inv_t, BLOCK: tl.constexpr, VEC: tl.constexpr, PEEL: tl.constexpr
):  # fmt: skip
    for masked in tl.static_range(1, -1, -1):
        first, end = tile_range(length, NO_TILE, BLOCK, PEEL, masked)
        for i in tl.range(first, end):
            tile = tile_at(i, first, end, length, NO_TILE, BLOCK, PEEL, masked, True)
            x = load_tile(x_ptr, tile, head, length, BLOCK, VEC, masked, DROP)
            store_tile(out_ptr, tile, head, length, (x - shift) * inv_t - lse, BLOCK, VEC, masked)


@triton.jit
def slice_sum(dy_ptr, head, length, BLOCK: tl.constexpr, VEC: tl.constexpr, PEEL: tl.constexpr):
    total = of_lanes(0.0, BLOCK, VEC)
    for masked in tl.static_range(2):
        first, end = tile_range(length, NO_TILE, BLOCK, PEEL, masked)
        for i in tl.range(first, end):
            tile = tile_at(i, first, end, length, NO_TILE, BLOCK, PEEL, masked, False)
            dy = load_tile(dy_ptr, tile, head, length, BLOCK, VEC, masked, KEEP)
            if masked:
                dy = tl.where(inside(tile, head, length, BLOCK, VEC), dy, 0.0)
            total += lane_sum(dy)
    return tl.sum(total, 0)


@triton.jit
def slice_gradient(
    dy_ptr, x_ptr, dx_ptr, head, length, shift, lse, grad_sum, inv_t,
    BLOCK: tl.constexpr, VEC: tl.constexpr, PEEL: tl.constexpr,
):  # fmt: skip
    k = inv_t * LOG2_E
    for masked in tl.static_range(1, -1, -1):
        first, end = tile_range(length, NO_TILE, BLOCK, PEEL, masked)
        for i in tl.range(first, end):
            tile = tile_at(i, first, end, length, NO_TILE, BLOCK, PEEL, masked, True)
            x = load_tile(x_ptr, tile, head, length, BLOCK, VEC, masked, DROP)
            dy = load_tile(dy_ptr, tile, head, length, BLOCK, VEC, masked, DROP)
            dx = (dy - tl.exp2((x - shift) * k - lse * LOG2_E) * grad_sum) * inv_t
            store_tile(dx_ptr, tile, head, length, dx, BLOCK, VEC, masked)


@triton.jit(**FREE)
def log_softmax_kernel(
    x_ptr, out_ptr, lse_ptr, rows, inner_rows, x_outer, x_inner, out_outer, out_inner, columns, temperature,
    BLOCK: tl.constexpr, VEC: tl.constexpr, PEEL: tl.constexpr,
):  # fmt: skip
    inv_t = 1.0 / temperature
    k = inv_t * LOG2_E
    for further in tl.range(0, rows - tl.program_id(0), tl.num_programs(0)):
        row = tl.program_id(0) + further
        start, head = align(row_start(row, inner_rows, x_outer, x_inner), VEC, PEEL)
        out_start = align(row_start(row, inner_rows, out_outer, out_inner), VEC, PEEL)[0]
        peak, total = slice_state(x_ptr + start, head, columns + head, k, BLOCK, VEC, PEEL)
        peak, total = merged(peak, total, k)
        lse = tl.log2(total) * LN_2
        tl.store(lse_ptr + row.to(tl.int64) * 2, shift_of(peak))
        tl.store(lse_ptr + row.to(tl.int64) * 2 + 1, lse)
        slice_output(
            x_ptr + start, out_ptr + out_start, head, columns + head, shift_of(peak), lse, inv_t, BLOCK, VEC, PEEL
        )


@triton.jit(**FREE)
def slice_state_kernel(
    x_ptr, parts_ptr, inner_rows, x_outer, x_inner, columns, width, temperature,
    BLOCK: tl.constexpr, VEC: tl.constexpr, PEEL: tl.constexpr,
):  # fmt: skip
    """The states of slices, [N, slices, 2]."""
    row = tl.program_id(0)
    part = tl.program_id(1)
    k = 1.0 / temperature * LOG2_E
    row_at, head = align(row_start(row, inner_rows, x_outer, x_inner), VEC, PEEL)
    start, head, length, _ = slice_at(part, width, head, columns + head, -1)
    peak, total = slice_state(x_ptr + row_at + start, head, length, k, BLOCK, VEC, PEEL)
    peak, total = merged(peak, total, k)
    parts_ptr += (row * tl.num_programs(1) + part) * 2
    tl.store(parts_ptr, peak)
    tl.store(parts_ptr + 1, total)


@triton.jit(**FREE)
def slice_output_kernel(
    x_ptr, parts_ptr, out_ptr, lse_ptr, inner_rows, x_outer, x_inner, out_outer, out_inner, columns, width,
    temperature, MAX: tl.constexpr, BLOCK: tl.constexpr, VEC: tl.constexpr, PEEL: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    part = tl.program_id(1)
    slices = tl.num_programs(1)
    inv_t = 1.0 / temperature
    at = tl.arange(0, MAX)
    parts_ptr += row * slices * 2 + at * 2
    peak, total = merged(
        tl.load(parts_ptr, at < slices, -float("inf")), tl.load(parts_ptr + 1, at < slices, 0.0), inv_t * LOG2_E
    )
    lse = tl.log2(total) * LN_2
    if part == 0:
        tl.store(lse_ptr + row.to(tl.int64) * 2, shift_of(peak))
        tl.store(lse_ptr + row.to(tl.int64) * 2 + 1, lse)
    row_at, head = align(row_start(row, inner_rows, x_outer, x_inner), VEC, PEEL)
    out_at = align(row_start(row, inner_rows, out_outer, out_inner), VEC, PEEL)[0]
    start, head, length, _ = slice_at(part, width, head, columns + head, -1)
    slice_output(
        x_ptr + row_at + start, out_ptr + out_at + start, head, length, shift_of(peak), lse, inv_t, BLOCK, VEC, PEEL
    )


@triton.jit(**FREE)
def log_softmax_backward_kernel(
    dy_ptr, x_ptr, lse_ptr, dx_ptr, rows, inner_rows, dy_outer, dy_inner, x_outer, x_inner, dx_outer, dx_inner,
    columns, temperature, BLOCK: tl.constexpr, VEC: tl.constexpr, PEEL: tl.constexpr,
):  # fmt: skip
    for further in tl.range(0, rows - tl.program_id(0), tl.num_programs(0)):
        row = tl.program_id(0) + further
        start, head = align(row_start(row, inner_rows, dy_outer, dy_inner), VEC, PEEL)
        x_start = align(row_start(row, inner_rows, x_outer, x_inner), VEC, PEEL)[0]
        dx_start = align(row_start(row, inner_rows, dx_outer, dx_inner), VEC, PEEL)[0]
        grad_sum = slice_sum(dy_ptr + start, head, columns + head, BLOCK, VEC, PEEL)
        slice_gradient(
            dy_ptr + start, x_ptr + x_start, dx_ptr + dx_start, head, columns + head,
            tl.load(lse_ptr + row.to(tl.int64) * 2), tl.load(lse_ptr + row.to(tl.int64) * 2 + 1), grad_sum,
            1.0 / temperature, BLOCK, VEC, PEEL,
        )  # fmt: skip


@triton.jit(**FREE)
def slice_sum_kernel(
    dy_ptr, parts_ptr, inner_rows, dy_outer, dy_inner, columns, width,
    BLOCK: tl.constexpr, VEC: tl.constexpr, PEEL: tl.constexpr,
):  # fmt: skip
    """The sums of slices, [N, slices]."""
    row = tl.program_id(0)
    part = tl.program_id(1)
    row_at, head = align(row_start(row, inner_rows, dy_outer, dy_inner), VEC, PEEL)
    start, head, length, _ = slice_at(part, width, head, columns + head, -1)
    total = slice_sum(dy_ptr + row_at + start, head, length, BLOCK, VEC, PEEL)
    tl.store(parts_ptr + row * tl.num_programs(1) + part, total)


@triton.jit(**FREE)
def slice_gradient_kernel(
    dy_ptr, x_ptr, lse_ptr, parts_ptr, dx_ptr, inner_rows, dy_outer, dy_inner, x_outer, x_inner, dx_outer, dx_inner,
    columns, width, temperature, MAX: tl.constexpr, BLOCK: tl.constexpr, VEC: tl.constexpr, PEEL: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    part = tl.program_id(1)
    slices = tl.num_programs(1)
    at = tl.arange(0, MAX)
    grad_sum = tl.sum(tl.load(parts_ptr + row * slices + at, at < slices, 0.0), 0)
    row_at, head = align(row_start(row, inner_rows, dy_outer, dy_inner), VEC, PEEL)
    x_at = align(row_start(row, inner_rows, x_outer, x_inner), VEC, PEEL)[0]
    dx_at = align(row_start(row, inner_rows, dx_outer, dx_inner), VEC, PEEL)[0]
    start, head, length, _ = slice_at(part, width, head, columns + head, -1)
    slice_gradient(
        dy_ptr + row_at + start, x_ptr + x_at + start, dx_ptr + dx_at + start, head, length,
        tl.load(lse_ptr + row.to(tl.int64) * 2), tl.load(lse_ptr + row.to(tl.int64) * 2 + 1), grad_sum,
        1.0 / temperature, BLOCK, VEC, PEEL,
    )  # fmt: skip


def log_softmax(x, out, lse, temperature: float) -> None:
    """Fill ``out`` and ``lse`` [N, 2] from [B, S, V] views ``x``, ``out``."""
    outer, inner, columns = x.shape
    count = outer * inner
    if count == 0:
        return
    gpu, tiles = gpu_of(x), alignment(x, out)
    slices, width = slices_of(gpu, count, columns, tiles["VEC"])
    with device_of(x):
        if slices == 1:
            options = launch_options(gpu, columns, tiles["VEC"])
            log_softmax_kernel[(programs_of(gpu, count, columns * x.element_size(), options["num_warps"]),)](
                x, out, lse, count, inner, *row_strides(x), *row_strides(out), columns, temperature, **tiles, **options
            )
            return
        options = launch_options(gpu, width, tiles["VEC"])
        parts = torch.empty(count, slices, 2, device=x.device)
        slice_state_kernel[(count, slices)](
            x, parts, inner, *row_strides(x), columns, width, temperature, **tiles, **options
        )
        slice_output_kernel[(count, slices)](
            x, parts, out, lse, inner, *row_strides(x), *row_strides(out), columns, width, temperature,
            MAX=MAX_SLICES, **tiles, **options,
        )  # fmt: skip


def log_softmax_backward(dy, x, lse, dx, temperature: float) -> None:
    """Fill ``dx`` from [B, S, V] views ``dy``, ``x`` and the normalisers ``lse`` [N, 2]."""
    outer, inner, columns = x.shape
    count = outer * inner
    if count == 0:
        return
    gpu, tiles = gpu_of(x), alignment(dy, x, dx)
    slices, width = slices_of(gpu, count, columns, tiles["VEC"])
    strides = (*row_strides(dy), *row_strides(x), *row_strides(dx))
    with device_of(x):
        if slices == 1:
            options = launch_options(gpu, columns, tiles["VEC"])
            log_softmax_backward_kernel[(programs_of(gpu, count, columns * dy.element_size(), options["num_warps"]),)](
                dy, x, lse, dx, count, inner, *strides, columns, temperature, **tiles, **options
            )
            return
        options = launch_options(gpu, width, tiles["VEC"])
        parts = torch.empty(count, slices, device=x.device)
        slice_sum_kernel[(count, slices)](dy, parts, inner, *row_strides(dy), columns, width, **tiles, **options)
        slice_gradient_kernel[(count, slices)](
            dy, x, lse, parts, dx, inner, *strides, columns, width, temperature, MAX=MAX_SLICES, **tiles, **options
        )
