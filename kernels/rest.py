"""What a sparse teacher, who lists K columns of a row, needs of the others: their sum, and the gradient.

Math    c = max z_j and rest = log Σ exp((z_j − c)/T) over the columns j that are not listed; the hard term and the
        z-loss as in kd_rows. With g of the K + 1 outcomes, dz is the hard part and, at a listed column, g_i/T, at the
        others g_K/T·exp((z_j − c)/T − rest).
Listing A walk cannot compare its columns with K numbers each: they become bits of a row, a number of PER·VEC bits a
        lane of each tile, by which stage 1 of kd_rows takes u = z, −inf at the listed columns. The gradient needs none:
        all columns are written as if they were not listed, then, behind a barrier, the K once more.
Shapes  z, dz [B, S, V] bf16|fp16|fp32, each its own, last stride 1; listed [N, K] int32, −1 for none;
        g [N, K + 1] fp32; y, scales, losses, stats as in kd_rows, with LOG_RATIO = rest
Bytes   an element of z, e bytes wide: rest e, and 1/8 written and read, its bit; gradient 2e. The bits are scratch
        memory, N·V/8 bytes.
Grid    one program a row, or a slice of it where rows are few. What slices leave is merged in the same order always.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from fastkd._request import Formula, Rows, RowSpec
from fastkd.kernels.config import (
    MAX_SLICES,
    VECTORS_PER_THREAD,
    alignment,
    device_of,
    gpu_of,
    launch_options,
    list_options,
    row_strides,
    slices_of,
)
from fastkd.kernels.divergence import FAR, MIX_STUDENT, MOMENT_NONE
from fastkd.kernels.kd_rows import (
    FREE,
    LABEL_REST,
    LOG_HARD,
    LOG_RATIO,
    NUM_STATS,
    PEAK_STUDENT,
    PEAK_TEACHER,
    STATE,
    hard_kind_of,
    label_column,
    merged_state,
    row_scales,
    slice_state_kernel,
)
from fastkd.kernels.lse import LN_2, LOG2_E, align, listed_bit, row_start, shift_of, slice_at
from fastkd.kernels.row_stages import hard_factors, hard_loss, slice_gradient, zero_columns

# Of what stage 1 is for: no divergence, so no moment.
FORMULA = tl.constexpr(int(Formula.MIXTURE_KL))
NO_MOMENT = tl.constexpr(MOMENT_NONE)
BITS = {8: torch.uint8, 16: torch.int16}


@triton.jit
def listed_columns(listed_ptr, row, num_listed, n, LISTED: tl.constexpr):
    """(the listed columns of a row, which of these are columns)."""
    at = tl.arange(0, LISTED)
    column = tl.load(listed_ptr + row.to(tl.int64) * num_listed + at, mask=at < num_listed, other=-1)
    return column, (column >= 0) & (column < n)


@triton.jit(do_not_specialize=["inner_rows", "num_listed"], do_not_specialize_on_alignment=["listed_ptr"])
def list_kernel(
    listed_ptr, bits_ptr, inner_rows, z_outer, z_inner, n, num_listed, words,
    LISTED: tl.constexpr, BLOCK: tl.constexpr, VEC: tl.constexpr, PEEL: tl.constexpr,
):  # fmt: skip
    """The bits of a row [N, words] int32, from 0."""
    row = tl.program_id(0)
    _, head = align(row_start(row, inner_rows, z_outer, z_inner), VEC, PEEL)
    column, is_column = listed_columns(listed_ptr, row, num_listed, n, LISTED)
    bit = listed_bit(tl.where(is_column, column + head, 0), BLOCK, VEC)
    words_ptr = bits_ptr + row.to(tl.int64) * words + bit // 32
    tl.atomic_or(words_ptr, 1 << (bit % 32), mask=is_column, sem="relaxed")


@triton.jit(
    do_not_specialize=["n", "slices"],
    do_not_specialize_on_alignment=FREE["do_not_specialize_on_alignment"],
)
def rest_kernel(
    y_ptr, hard_scale_ptr, soft_scale_ptr, z_scale_ptr, hard_ptr, soft_ptr, stats_ptr, states_ptr,
    n, slices, temperature, smoothing, SMOOTH: tl.constexpr, MAX: tl.constexpr,
):  # fmt: skip
    """Losses and statistics of a row from the states of its slices."""
    LABELS: tl.constexpr = y_ptr is not None
    HARD: tl.constexpr = LABELS or z_scale_ptr is not None
    row = tl.program_id(0)
    _, _, _, counts = row_scales(hard_scale_ptr, soft_scale_ptr, z_scale_ptr, row)
    hard = 0.0
    rest = 0.0
    if counts:
        z_peak, u_peak, sum_h, _, sum_t, _, _, sum_z, z_y = merged_state(
            states_ptr, row, slices, 1.0 / temperature * LOG2_E, FORMULA, NO_MOMENT, SMOOTH, HARD, True, MAX
        )
        z_shift = shift_of(z_peak)
        rest = tl.log2(sum_t) * LN_2
        log_h = 0.0
        label_rest = 0.0
        if LABELS:
            label = label_column(y_ptr, row, n, 0)
            hard, log_h, label_rest = hard_loss(z_shift, sum_h, z_y, label, sum_z, n, smoothing, SMOOTH)
        elif HARD:
            log_h = tl.log(sum_h)
        stats_ptr += row.to(tl.int64) * NUM_STATS
        tl.store(stats_ptr + PEAK_STUDENT, z_shift)
        tl.store(stats_ptr + PEAK_TEACHER, shift_of(u_peak))
        tl.store(stats_ptr + LOG_HARD, log_h)
        tl.store(stats_ptr + LOG_RATIO, rest)
        tl.store(stats_ptr + LABEL_REST, label_rest)
    tl.store(hard_ptr + row, hard)
    tl.store(soft_ptr + row, rest)


@triton.jit(
    do_not_specialize=["inner_rows", "num_listed"],
    do_not_specialize_on_alignment=[*FREE["do_not_specialize_on_alignment"], "listed_ptr", "outcome_ptr"],
)
def rest_grad_kernel(
    z_ptr, listed_ptr, outcome_ptr, y_ptr, hard_scale_ptr, soft_scale_ptr, z_scale_ptr, stats_ptr, dz_ptr,
    inner_rows, z_outer, z_inner, dz_outer, dz_inner, n, columns, width, num_listed, temperature, smoothing,
    POWER: tl.constexpr, SMOOTH: tl.constexpr, LISTED: tl.constexpr,
    BLOCK: tl.constexpr, VEC: tl.constexpr, PEEL: tl.constexpr,
):  # fmt: skip
    """The gradient of a slice, from the row's statistics."""
    HARD: tl.constexpr = y_ptr is not None or z_scale_ptr is not None
    row = tl.program_id(0)
    part = tl.program_id(1)
    hard_scale, _, z_scale, counts = row_scales(hard_scale_ptr, soft_scale_ptr, z_scale_ptr, row)
    if not counts:
        dz_ptr += row_start(row, inner_rows, dz_outer, dz_inner)
        zero_columns(dz_ptr, part * width, tl.minimum(part * width + width, columns), BLOCK)
        return
    row_at, head = align(row_start(row, inner_rows, z_outer, z_inner), VEC, PEEL)
    start, slice_head, length, label = slice_at(part, width, head, n + head, label_column(y_ptr, row, n, head))
    z_ptr += row_at + start
    dz_ptr += align(row_start(row, inner_rows, dz_outer, dz_inner), VEC, PEEL)[0]
    inv_t = 1.0 / temperature
    stats_ptr += row.to(tl.int64) * NUM_STATS
    z_shift = tl.load(stats_ptr + PEAK_STUDENT)
    u_shift = tl.load(stats_ptr + PEAK_TEACHER)
    log_h = tl.load(stats_ptr + LOG_HARD)
    rest = tl.load(stats_ptr + LOG_RATIO)
    hard_scale, label_grad, smooth_grad = hard_factors(
        hard_scale, z_scale, z_shift, log_h, tl.load(stats_ptr + LABEL_REST), smoothing, n
    )
    outcome_ptr += row.to(tl.int64) * (num_listed + 1)
    is_empty = rest == -float("inf")
    of_rest = tl.where(is_empty, 0.0, tl.load(outcome_ptr + num_listed))

    # The listed columns of this slice, before its logits may be written over.
    column, is_column = listed_columns(listed_ptr, row, num_listed, n, LISTED)
    column += head - start
    is_column &= (column >= 0) & (column < length)
    listed_dz = tl.load(outcome_ptr + tl.arange(0, LISTED), mask=is_column, other=0.0) * inv_t
    if HARD:
        z = tl.load(z_ptr + column, mask=is_column, other=0.0).to(tl.float32)
        hard = hard_scale * tl.exp2((z - z_shift - log_h) * LOG2_E)
        listed_dz += tl.where(column == label, label_grad, hard)
        if SMOOTH:
            listed_dz -= smooth_grad
    tl.debug_barrier()
    # As in the KL of a teacher z from whom nothing is learnt but his own p_t: −c_t·p_t, with c_t = −1 and G = 0.
    slice_gradient(
        z_ptr, None, dz_ptr + start, slice_head, length, label, hard_scale, label_grad, smooth_grad, of_rest,
        z_shift, u_shift, log_h, 0.0, tl.where(is_empty, 0.0, rest), 0.0, inv_t, -1.0, 0.0, 0.0,
        FORMULA, MIX_STUDENT, True, FAR, POWER, False, HARD, True, SMOOTH, BLOCK, VEC, PEEL,
    )  # fmt: skip
    tl.debug_barrier()
    tl.store(dz_ptr + start + column, listed_dz.to(dz_ptr.dtype.element_ty), mask=is_column)
    if part == 0:
        zero_columns(dz_ptr + head, n, columns, BLOCK)


def slices_for(z, tiles) -> tuple[int, int, dict[str, Any]]:
    """(slices of a row, columns of one, how one is launched)."""
    outer, inner, columns = z.shape
    gpu = gpu_of(z)
    slices, width = slices_of(gpu, outer * inner, columns, tiles["VEC"])
    return slices, width, launch_options(gpu, width, tiles["VEC"], heavy=slices > 1)


def rest_rows(rows: Rows, spec: RowSpec, listed, hard, rest, stats) -> None:
    """Fill ``hard``, ``rest`` [N] and ``stats`` from the student's logits and ``listed`` [N, K]."""
    z, _, y, *scales = rows
    outer, inner, columns = z.shape
    count = outer * inner
    if count == 0:
        return
    tiles, n = alignment(z), spec.vocab_size
    slices, width, options = slices_for(z, tiles)
    block = options["BLOCK"]
    words = ((columns + tiles["VEC"]) // block + 1) * block // 32  # a walk ends with a masked tile, which may be empty
    hard_kind = hard_kind_of(spec)
    with device_of(z):
        bits = torch.zeros(outer, inner, words, dtype=torch.int32, device=z.device)
        list_kernel[(count,)](
            listed, bits, inner, *row_strides(z), n, listed.shape[1], words,
            BLOCK=block, **list_options(listed.shape[1]), **tiles,
        )  # fmt: skip
        bits = bits.view(BITS[VECTORS_PER_THREAD * tiles["VEC"]])
        states = torch.empty(count, slices, STATE.value, device=z.device)
        slice_state_kernel[(count, slices)](
            z, bits, y, *scales, states, inner, *row_strides(z), *row_strides(bits), n, width, spec.temperature,
            FORMULA=FORMULA.value, MOMENT=MOMENT_NONE, **hard_kind, **tiles, **options,
        )  # fmt: skip
        rest_kernel[(count,)](
            y, *scales, hard, rest, stats, states, n, slices, spec.temperature, spec.label_smoothing,
            SMOOTH=hard_kind["SMOOTH"], MAX=MAX_SLICES, num_warps=1, enable_fp_fusion=True,
        )  # fmt: skip


def rest_grad(rows: Rows, spec: RowSpec, listed, outcome_grad, stats, grad) -> None:
    """Fill ``grad``, whose dtype is its own, from what ``rest_rows`` left and ``outcome_grad`` [N, K + 1]."""
    z, _, y, *scales = rows
    outer, inner, columns = z.shape
    count = outer * inner
    if count == 0:
        return
    tiles = alignment(z, grad)
    slices, width, options = slices_for(z, tiles)
    with device_of(z):
        rest_grad_kernel[(count, slices)](
            z, listed, outcome_grad, y, *scales, stats, grad, inner, *row_strides(z), *row_strides(grad),
            spec.vocab_size, columns, width, listed.shape[1], spec.temperature, spec.label_smoothing,
            **hard_kind_of(spec), LISTED=triton.next_power_of_2(listed.shape[1]), **tiles, **options,
        )  # fmt: skip
