"""The row operation: losses and gradient, in two reads of the logits where one sum allows it.

Math    b = log softmax(z/T), a = log softmax(u/T); hard = lse(z) − z_y; soft = Σ term(a, b); G = Σ g(a, b);
        dz = hard_scale·(softmax(z) − 1_y) + soft_scale/T·(g − p_s·G).
        With t = lse of the columns other than y, less z_y: hard = softplus(t), 1 − p_y = sigmoid(t), both with all
        their digits as p_y → 1. Label smoothing ε adds ε·(z_y − mean z) to hard and ε·(1_y − 1/n) to its gradient;
        a z-loss, 2·z_scale·lse(z)·softmax(z) to dz.
Stages  1 normalisers, walking forward; 2 sums of term and g; 3 gradient. Stages 2 and 3 walk back, since the row's
        tail is still in L2. S comes with stage 1 where a mean of d gives it, and stage 2 is left out; where that mean
        has not the digits, or there is none, stage 2 sums S and G.
Shapes  z, u, dz [B, S, V_i] bf16|fp16|fp32, each its own, last stride 1; y [N] int64; scales, losses [N] fp32;
        stats [N, 8] fp32. A row whose scales are 0 is not read.
Bytes   an element, e bytes wide: loss 2e, loss and gradient 5e, 2e more for each stage 2, gradient from statistics 3e,
        of which the second and later reads are L2's where the rows in flight fit there. The floors are 2e, 3e and 3e.
Grid    As many programs as fill the GPU, or as many rows as L2 holds; each walks every so-manieth row. Where rows are
        few, a row is split into slices, a program each, in three launches, the state, the sums (if need be) and the
        gradient of a slice; each merges what the slices before it left, all in the same order.
"""

import math

import torch
import triton
import triton.language as tl

from fastkd import _request
from fastkd._request import Rows, RowSpec
from fastkd.kernels.config import (
    LEAST_SHARE,
    LEAST_SHARE_OF_THREE,
    MAX_SLICES,
    alignment,
    device_of,
    gpu_of,
    is_heavy,
    launch_options,
    programs_of,
    row_strides,
    slices_of,
)
from fastkd.kernels.divergence import (
    FAR,
    MIX_BOTH,
    MIX_TEACHER,
    MOMENT_BOTH,
    MOMENT_NONE,
    NEAR,
    TOTAL_VARIATION,
    from_far_mixture,
    moment_rule,
)
from fastkd.kernels.lse import LN_2, LOG2_E, PER, align, row_start, shift_of, slice_at
from fastkd.kernels.row_stages import (
    ELSEWHERE,
    from_exact_sums,
    from_moment,
    hard_factors,
    hard_loss,
    merged,
    slice_exact_sums,
    slice_far_sums,
    slice_gradient,
    slice_state,
    zero_columns,
)

PEAK_STUDENT = tl.constexpr(_request.PEAK_STUDENT)
PEAK_TEACHER = tl.constexpr(_request.PEAK_TEACHER)
LOG_HARD = tl.constexpr(_request.LOG_HARD)
LOG_STUDENT = tl.constexpr(_request.LOG_STUDENT)
LOG_RATIO = tl.constexpr(_request.LOG_RATIO)
GRAD_SUM = tl.constexpr(_request.GRAD_SUM)
LABEL_REST = tl.constexpr(_request.LABEL_REST)
GRAD_FORM = tl.constexpr(_request.GRAD_FORM)
NUM_STATS = tl.constexpr(_request.NUM_STATS)
LABEL_ELSEWHERE = tl.constexpr(_request.ELSEWHERE)
# Numbers of a slice's state, the last the label's logit, which its slice alone adds; and of its sums.
STATE = tl.constexpr(9)
SUMS = tl.constexpr(4)

# What varies from call to call must not compile a kernel again.
FREE = {
    "do_not_specialize": ["rows", "inner_rows", "slices"],
    "do_not_specialize_on_alignment": [
        "y_ptr", "hard_scale_ptr", "soft_scale_ptr", "z_scale_ptr", "hard_ptr", "soft_ptr", "stats_ptr", "states_ptr",
        "sums_ptr",
    ],
}  # fmt: skip


@triton.jit
def row_scales(hard_scale_ptr, soft_scale_ptr, z_scale_ptr, row):
    """(of the hard and the soft term, of the z-loss, whether the row counts)"""
    hard_scale = 0.0
    soft_scale = 0.0
    z_scale = 0.0
    if hard_scale_ptr is not None:
        hard_scale = tl.load(hard_scale_ptr + row)
    if soft_scale_ptr is not None:
        soft_scale = tl.load(soft_scale_ptr + row)
    if z_scale_ptr is not None:
        z_scale = tl.load(z_scale_ptr + row)
    return hard_scale, soft_scale, z_scale, (hard_scale != 0.0) | (soft_scale != 0.0) | (z_scale != 0.0)


@triton.jit
def label_column(y_ptr, row, n, head):
    """Where a walk over the row meets its label; −1 if there is none, or none of the row's; ELSEWHERE."""
    if y_ptr is not None:
        y = tl.load(y_ptr + row)
        return tl.where((y >= 0) & (y < n), y + head, tl.where(y == LABEL_ELSEWHERE, ELSEWHERE, -1)).to(tl.int32)
    else:
        return -1


@triton.jit
def label_logit(z_ptr, label, head):
    """(the label's logit, if there is a label; a number near the row's logits, since far from 0 their sum has no
    digits)."""
    z = tl.load(z_ptr + tl.where(label < 0, head, label)).to(tl.float32)
    return z, shift_of(z)


@triton.jit
def normalisers(z_peak, u_peak, sum_s, sum_t, SOFT: tl.constexpr):
    """(the peaks as shifts; of the sums relative to them the logarithm of the student's and that of their ratio)."""
    if SOFT:
        # A slice of −inf alone has no mass, but the teacher's may.
        log_r = tl.log2(sum_t / tl.where(sum_s == 0.0, 1.0, sum_s)) * LN_2
        return shift_of(z_peak), shift_of(u_peak), tl.log2(sum_s) * LN_2, log_r
    else:
        return shift_of(z_peak), 0.0, 0.0, 0.0


@triton.jit
def store_row(
    hard_ptr, soft_ptr, stats_ptr, row, hard, soft, z_shift, u_shift, log_h, log_s, log_r, grad_sum, rest, form
):  # fmt: skip
    tl.store(hard_ptr + row, hard)
    tl.store(soft_ptr + row, tl.where(soft < 0.0, 0.0, soft))
    stats_ptr += row.to(tl.int64) * NUM_STATS
    tl.store(stats_ptr + PEAK_STUDENT, z_shift)
    tl.store(stats_ptr + PEAK_TEACHER, u_shift)
    tl.store(stats_ptr + LOG_HARD, log_h)
    tl.store(stats_ptr + LOG_STUDENT, log_s)
    tl.store(stats_ptr + LOG_RATIO, log_r)
    tl.store(stats_ptr + GRAD_SUM, grad_sum)
    tl.store(stats_ptr + LABEL_REST, rest)
    tl.store(stats_ptr + GRAD_FORM, form)


@triton.jit
def gradient(
    z_ptr, u_ptr, dz_ptr, head, length, label, hard_scale, soft_scale, z_scale,
    z_shift, u_shift, log_h, log_s, log_r, grad_sum, rest, form, inv_t, c_t, c_s, w, smoothing, n,
    FORMULA: tl.constexpr, MIX: tl.constexpr, BALANCED: tl.constexpr, POWER: tl.constexpr, FAST_LOG: tl.constexpr,
    HARD: tl.constexpr, SOFT: tl.constexpr, SMOOTH: tl.constexpr,
    BLOCK: tl.constexpr, VEC: tl.constexpr, PEEL: tl.constexpr,
):  # fmt: skip
    """Stage 3 in the row's form of g."""
    hard_scale, label_grad, smooth_grad = hard_factors(hard_scale, z_scale, z_shift, log_h, rest, smoothing, n)
    TWO_FORMS: tl.constexpr = SOFT and (MIX != MIX_TEACHER or FORMULA == TOTAL_VARIATION)
    is_near = False
    if TWO_FORMS:
        is_near = form != 0.0
    if is_near:
        slice_gradient(
            z_ptr, u_ptr, dz_ptr, head, length, label, hard_scale, label_grad, smooth_grad, soft_scale,
            z_shift, u_shift, log_h, log_s, log_r, grad_sum, inv_t, c_t, c_s, w,
            FORMULA, MIX, BALANCED, NEAR, POWER, FAST_LOG, HARD, SOFT, SMOOTH, BLOCK, VEC, PEEL,
        )  # fmt: skip
    else:
        slice_gradient(
            z_ptr, u_ptr, dz_ptr, head, length, label, hard_scale, label_grad, smooth_grad, soft_scale,
            z_shift, u_shift, log_h, log_s, log_r, grad_sum, inv_t, c_t, c_s, w,
            FORMULA, MIX, BALANCED, FAR, POWER, FAST_LOG, HARD, SOFT, SMOOTH, BLOCK, VEC, PEEL,
        )  # fmt: skip


@triton.jit(**FREE)
def kd_rows_kernel(
    z_ptr, u_ptr, y_ptr, hard_scale_ptr, soft_scale_ptr, z_scale_ptr, hard_ptr, soft_ptr, stats_ptr, dz_ptr,
    rows, inner_rows, z_outer, z_inner, u_outer, u_inner, dz_outer, dz_inner,
    n, columns, temperature, c_t, c_s, w, log_v, near_below, smoothing,
    FORMULA: tl.constexpr, MIX: tl.constexpr, BALANCED: tl.constexpr, MOMENT: tl.constexpr, POWER: tl.constexpr,
    SMOOTH: tl.constexpr, FAST_LOG: tl.constexpr, BLOCK: tl.constexpr, VEC: tl.constexpr, PEEL: tl.constexpr,
):  # fmt: skip
    """All stages of whole rows."""
    LABELS: tl.constexpr = y_ptr is not None
    HARD: tl.constexpr = LABELS or z_scale_ptr is not None
    SOFT: tl.constexpr = u_ptr is not None
    GRAD: tl.constexpr = dz_ptr is not None
    inv_t = 1.0 / temperature
    k = inv_t * LOG2_E
    for further in tl.range(0, rows - tl.program_id(0), tl.num_programs(0)):
        row = tl.program_id(0) + further
        hard_scale, soft_scale, z_scale, counts = row_scales(hard_scale_ptr, soft_scale_ptr, z_scale_ptr, row)
        if not counts:
            tl.store(hard_ptr + row, 0.0)
            tl.store(soft_ptr + row, 0.0)
            if GRAD:
                zero_columns(dz_ptr + row_start(row, inner_rows, dz_outer, dz_inner), 0, columns, BLOCK)
        else:
            start, head = align(row_start(row, inner_rows, z_outer, z_inner), VEC, PEEL)
            z_row = z_ptr + start
            u_row = None
            if SOFT:
                u_row = u_ptr + align(row_start(row, inner_rows, u_outer, u_inner), VEC, PEEL)[0]
            length = n + head
            label = label_column(y_ptr, row, n, head)
            z_y = 0.0
            anchor = 0.0
            if LABELS:  # before stage 1, whose barriers keep it from other warps' stores where dz is z
                z_y, anchor = label_logit(z_row, label, head)
            z_peak, u_peak, sum_h, sum_s, sum_t, moment, second, sum_z = slice_state(
                z_row, u_row, head, length, label, k, anchor,
                FORMULA, MOMENT, POWER, SMOOTH, HARD, SOFT, BLOCK, VEC, PEEL,
            )  # fmt: skip
            z_peak, u_peak, sum_h, sum_s, sum_t, moment, second, sum_z = merged(
                z_peak, u_peak, sum_h, sum_s, sum_t, moment, second, sum_z, k, FORMULA, MOMENT, SMOOTH, HARD, SOFT
            )
            z_shift, u_shift, log_s, log_r = normalisers(z_peak, u_peak, sum_s, sum_t, SOFT)
            hard = 0.0
            log_h = 0.0
            rest = 0.0
            if LABELS:
                hard, log_h, rest = hard_loss(z_shift, sum_h, z_y, label, sum_z, n, smoothing, SMOOTH)
            elif HARD:
                log_h = tl.log(sum_h)
            soft = 0.0
            grad_sum = 0.0
            form = 0.0
            if SOFT:
                has_digits = False
                if MIX == MIX_BOTH:
                    teacher, student, share = slice_far_sums(
                        z_row, u_row, head, length, z_shift, u_shift, log_s, log_r, inv_t, w,
                        BALANCED, FAST_LOG, BLOCK, VEC, PEEL,
                    )  # fmt: skip
                    soft, grad_sum, has_digits = from_far_mixture(
                        teacher, student, share, c_t, c_s, w, log_v, near_below, BALANCED
                    )
                elif FORMULA != TOTAL_VARIATION:
                    soft, grad_sum, has_digits = from_moment(
                        z_shift, u_shift, sum_s, sum_t, moment, second, log_s, log_r, inv_t, c_t, c_s, FORMULA, MOMENT
                    )
                if not has_digits:
                    sum_term, sum_far, sum_near, sum_excess = slice_exact_sums(
                        z_row, u_row, head, length, z_shift, u_shift, log_s, log_r, inv_t, c_t, c_s, w,
                        FORMULA, MIX, BALANCED, MIX == MIX_BOTH, FAST_LOG, BLOCK, VEC, PEEL,
                    )  # fmt: skip
                    if MIX != MIX_BOTH:
                        grad_sum = tl.sum(sum_far, 0)
                    soft, grad_sum, form = from_exact_sums(
                        tl.sum(sum_term, 0), grad_sum, tl.sum(sum_near, 0), tl.sum(sum_excess, 0),
                        c_t, c_s, w, near_below, FORMULA, MIX,
                    )  # fmt: skip
            store_row(
                hard_ptr, soft_ptr, stats_ptr, row,
                hard, soft, z_shift, u_shift, log_h, log_s, log_r, grad_sum, rest, form,
            )  # fmt: skip
            if GRAD:
                dz_row = dz_ptr + align(row_start(row, inner_rows, dz_outer, dz_inner), VEC, PEEL)[0]
                gradient(
                    z_row, u_row, dz_row, head, length, label, hard_scale, soft_scale, z_scale,
                    z_shift, u_shift, log_h, log_s, log_r, grad_sum, rest, form, inv_t, c_t, c_s, w, smoothing, n,
                    FORMULA, MIX, BALANCED, POWER, FAST_LOG, HARD, SOFT, SMOOTH, BLOCK, VEC, PEEL,
                )  # fmt: skip
                zero_columns(dz_row + head, n, columns, BLOCK)


@triton.jit(**FREE)
def slice_state_kernel(
    z_ptr, u_ptr, y_ptr, hard_scale_ptr, soft_scale_ptr, z_scale_ptr, states_ptr,
    inner_rows, z_outer, z_inner, u_outer, u_inner, n, width, temperature,
    FORMULA: tl.constexpr, MOMENT: tl.constexpr, POWER: tl.constexpr, SMOOTH: tl.constexpr,
    BLOCK: tl.constexpr, VEC: tl.constexpr, PEEL: tl.constexpr,
):  # fmt: skip
    """Stage 1 of a slice: its state [N, slices, STATE]. ``u_ptr`` may be to bits that list columns."""
    LABELS: tl.constexpr = y_ptr is not None
    HARD: tl.constexpr = LABELS or z_scale_ptr is not None
    SOFT: tl.constexpr = u_ptr is not None
    row = tl.program_id(0)
    part = tl.program_id(1)
    _, _, _, counts = row_scales(hard_scale_ptr, soft_scale_ptr, z_scale_ptr, row)
    if not counts:
        return
    k = 1.0 / temperature * LOG2_E
    row_at, head = align(row_start(row, inner_rows, z_outer, z_inner), VEC, PEEL)
    z_ptr += row_at
    label = label_column(y_ptr, row, n, head)
    z_y = 0.0
    anchor = 0.0
    if LABELS:
        z_y, anchor = label_logit(z_ptr, label, head)
    start, head, length, label = slice_at(part, width, head, n + head, label)
    if SOFT:
        if u_ptr.dtype.element_ty.is_int():
            u_ptr += row_start(row, inner_rows, u_outer, u_inner) + start // (PER * VEC)
        else:
            u_ptr += align(row_start(row, inner_rows, u_outer, u_inner), VEC, PEEL)[0] + start
    z_peak, u_peak, sum_h, sum_s, sum_t, moment, second, sum_z = slice_state(
        z_ptr + start, u_ptr, head, length, label, k, anchor,
        FORMULA, MOMENT, POWER, SMOOTH, HARD, SOFT, BLOCK, VEC, PEEL,
    )  # fmt: skip
    z_peak, u_peak, sum_h, sum_s, sum_t, moment, second, sum_z = merged(
        z_peak, u_peak, sum_h, sum_s, sum_t, moment, second, sum_z, k, FORMULA, MOMENT, SMOOTH, HARD, SOFT
    )
    states_ptr += (row * tl.num_programs(1) + part) * STATE
    tl.store(states_ptr, z_peak)
    tl.store(states_ptr + 1, u_peak)
    tl.store(states_ptr + 2, sum_h)
    tl.store(states_ptr + 3, sum_s)
    tl.store(states_ptr + 4, sum_t)
    tl.store(states_ptr + 5, moment)
    tl.store(states_ptr + 6, second)
    tl.store(states_ptr + 7, sum_z)
    tl.store(states_ptr + 8, tl.where(label < 0, 0.0, z_y))


@triton.jit
def merged_state(
    states_ptr, row, slices, k,
    FORMULA: tl.constexpr, MOMENT: tl.constexpr, SMOOTH: tl.constexpr, HARD: tl.constexpr, SOFT: tl.constexpr,
    MAX: tl.constexpr,
):  # fmt: skip
    """The row's state, and its label's logit, from its slices'."""
    part = tl.arange(0, MAX)
    there = part < slices
    ptrs = states_ptr + (row * slices + part) * STATE
    z_peak, u_peak, sum_h, sum_s, sum_t, moment, second, sum_z = merged(
        tl.load(ptrs, there, -float("inf")), tl.load(ptrs + 1, there, -float("inf")),
        tl.load(ptrs + 2, there, 0.0), tl.load(ptrs + 3, there, 0.0), tl.load(ptrs + 4, there, 0.0),
        tl.load(ptrs + 5, there, 0.0), tl.load(ptrs + 6, there, 0.0), tl.load(ptrs + 7, there, 0.0),
        k, FORMULA, MOMENT, SMOOTH, HARD, SOFT,
    )  # fmt: skip
    return z_peak, u_peak, sum_h, sum_s, sum_t, moment, second, sum_z, tl.sum(tl.load(ptrs + 8, there, 0.0), 0)


@triton.jit(**FREE)
def slice_sums_kernel(
    z_ptr, u_ptr, hard_scale_ptr, soft_scale_ptr, z_scale_ptr, states_ptr, sums_ptr,
    inner_rows, z_outer, z_inner, u_outer, u_inner, n, width, temperature, c_t, c_s, w,
    FORMULA: tl.constexpr, MIX: tl.constexpr, BALANCED: tl.constexpr, MOMENT: tl.constexpr, FAST_LOG: tl.constexpr,
    MAX: tl.constexpr, BLOCK: tl.constexpr, VEC: tl.constexpr, PEEL: tl.constexpr,
):  # fmt: skip
    """Stage 2 of a slice, where the row's state does not tell S and G: its sums [N, slices, SUMS]."""
    row = tl.program_id(0)
    part = tl.program_id(1)
    _, _, _, counts = row_scales(hard_scale_ptr, soft_scale_ptr, z_scale_ptr, row)
    if not counts:
        return
    slices = tl.num_programs(1)
    inv_t = 1.0 / temperature
    z_peak, u_peak, _, sum_s, sum_t, moment, second, _, _ = merged_state(
        states_ptr, row, slices, inv_t * LOG2_E, FORMULA, MOMENT, False, False, True, MAX
    )
    z_shift, u_shift, log_s, log_r = normalisers(z_peak, u_peak, sum_s, sum_t, True)
    if MIX != MIX_BOTH and FORMULA != TOTAL_VARIATION:
        _, _, has_digits = from_moment(
            z_shift, u_shift, sum_s, sum_t, moment, second, log_s, log_r, inv_t, c_t, c_s, FORMULA, MOMENT
        )
        if has_digits:
            return
    row_at, head = align(row_start(row, inner_rows, z_outer, z_inner), VEC, PEEL)
    start, head, length, _ = slice_at(part, width, head, n + head, -1)
    sum_term, sum_far, sum_near, sum_excess = slice_exact_sums(
        z_ptr + row_at + start, u_ptr + align(row_start(row, inner_rows, u_outer, u_inner), VEC, PEEL)[0] + start,
        head, length, z_shift, u_shift, log_s, log_r, inv_t, c_t, c_s, w,
        FORMULA, MIX, BALANCED, False, FAST_LOG, BLOCK, VEC, PEEL,
    )  # fmt: skip
    sums_ptr += (row * slices + part) * SUMS
    tl.store(sums_ptr, tl.sum(sum_term, 0))
    tl.store(sums_ptr + 1, tl.sum(sum_far, 0))
    tl.store(sums_ptr + 2, tl.sum(sum_near, 0))
    tl.store(sums_ptr + 3, tl.sum(sum_excess, 0))


@triton.jit(**FREE)
def slice_gradient_kernel(
    z_ptr, u_ptr, y_ptr, hard_scale_ptr, soft_scale_ptr, z_scale_ptr, hard_ptr, soft_ptr, stats_ptr, states_ptr,
    sums_ptr, dz_ptr,
    inner_rows, z_outer, z_inner, u_outer, u_inner, dz_outer, dz_inner,
    n, columns, width, slices, temperature, c_t, c_s, w, near_below, smoothing,
    FORMULA: tl.constexpr, MIX: tl.constexpr, BALANCED: tl.constexpr, MOMENT: tl.constexpr, POWER: tl.constexpr,
    SMOOTH: tl.constexpr, FAST_LOG: tl.constexpr, MAX: tl.constexpr,
    BLOCK: tl.constexpr, VEC: tl.constexpr, PEEL: tl.constexpr,
):  # fmt: skip
    """Stage 3 of a slice from the row's statistics; if there are states, these come from them, and the losses too."""
    LABELS: tl.constexpr = y_ptr is not None
    HARD: tl.constexpr = LABELS or z_scale_ptr is not None
    SOFT: tl.constexpr = u_ptr is not None
    GRAD: tl.constexpr = dz_ptr is not None
    FROM_STATES: tl.constexpr = states_ptr is not None
    row = tl.program_id(0)
    part = tl.program_id(1)
    hard_scale, soft_scale, z_scale, counts = row_scales(hard_scale_ptr, soft_scale_ptr, z_scale_ptr, row)
    if not counts:
        if FROM_STATES:
            if part == 0:
                tl.store(hard_ptr + row, 0.0)
                tl.store(soft_ptr + row, 0.0)
        if GRAD:
            dz_ptr += row_start(row, inner_rows, dz_outer, dz_inner)
            zero_columns(dz_ptr, part * width, tl.minimum(part * width + width, columns), BLOCK)
        return
    row_at, head = align(row_start(row, inner_rows, z_outer, z_inner), VEC, PEEL)
    label = label_column(y_ptr, row, n, head)
    inv_t = 1.0 / temperature
    u_shift = 0.0
    log_h = 0.0
    log_s = 0.0
    log_r = 0.0
    grad_sum = 0.0
    form = 0.0
    rest = 0.0
    if FROM_STATES:
        z_peak, u_peak, sum_h, sum_s, sum_t, moment, second, sum_z, z_y = merged_state(
            states_ptr, row, slices, inv_t * LOG2_E, FORMULA, MOMENT, SMOOTH, HARD, SOFT, MAX
        )
        z_shift, u_shift, log_s, log_r = normalisers(z_peak, u_peak, sum_s, sum_t, SOFT)
        hard = 0.0
        if LABELS:
            hard, log_h, rest = hard_loss(z_shift, sum_h, z_y, label, sum_z, n, smoothing, SMOOTH)
        elif HARD:
            log_h = tl.log(sum_h)
        soft = 0.0
        if SOFT:
            has_digits = False
            if MIX != MIX_BOTH and FORMULA != TOTAL_VARIATION:
                soft, grad_sum, has_digits = from_moment(
                    z_shift, u_shift, sum_s, sum_t, moment, second, log_s, log_r, inv_t, c_t, c_s, FORMULA, MOMENT
                )
            if not has_digits:
                at = tl.arange(0, MAX)
                ptrs = sums_ptr + (row * slices + at) * SUMS
                soft, grad_sum, form = from_exact_sums(
                    tl.sum(tl.load(ptrs, at < slices, 0.0), 0), tl.sum(tl.load(ptrs + 1, at < slices, 0.0), 0),
                    tl.sum(tl.load(ptrs + 2, at < slices, 0.0), 0), tl.sum(tl.load(ptrs + 3, at < slices, 0.0), 0),
                    c_t, c_s, w, near_below, FORMULA, MIX,
                )  # fmt: skip
        if part == 0:
            store_row(
                hard_ptr, soft_ptr, stats_ptr, row,
                hard, soft, z_shift, u_shift, log_h, log_s, log_r, grad_sum, rest, form,
            )  # fmt: skip
    else:
        stats_ptr += row.to(tl.int64) * NUM_STATS
        z_shift = tl.load(stats_ptr + PEAK_STUDENT)
        if HARD:
            log_h = tl.load(stats_ptr + LOG_HARD)
            rest = tl.load(stats_ptr + LABEL_REST)
        if SOFT:
            u_shift = tl.load(stats_ptr + PEAK_TEACHER)
            log_s = tl.load(stats_ptr + LOG_STUDENT)
            log_r = tl.load(stats_ptr + LOG_RATIO)
            grad_sum = tl.load(stats_ptr + GRAD_SUM)
            form = tl.load(stats_ptr + GRAD_FORM)
    if GRAD:
        start, slice_head, length, label = slice_at(part, width, head, n + head, label)
        if SOFT:
            u_ptr += align(row_start(row, inner_rows, u_outer, u_inner), VEC, PEEL)[0] + start
        dz_ptr += align(row_start(row, inner_rows, dz_outer, dz_inner), VEC, PEEL)[0]
        gradient(
            z_ptr + row_at + start, u_ptr, dz_ptr + start, slice_head, length, label, hard_scale, soft_scale, z_scale,
            z_shift, u_shift, log_h, log_s, log_r, grad_sum, rest, form, inv_t, c_t, c_s, w, smoothing, n,
            FORMULA, MIX, BALANCED, POWER, FAST_LOG, HARD, SOFT, SMOOTH, BLOCK, VEC, PEEL,
        )  # fmt: skip
        if part == 0:
            zero_columns(dz_ptr + head, n, columns, BLOCK)


def hard_kind_of(spec: RowSpec) -> dict[str, int | bool]:
    """exp(x) = exp(x/T)^T saves an exponential a column at small integer T."""
    power = int(spec.temperature) if spec.temperature in (1.0, 2.0, 3.0, 4.0) else 0
    return {"POWER": power, "SMOOTH": spec.label_smoothing > 0}


def kd_rows(rows: Rows, spec: RowSpec, hard, soft, stats, grad) -> None:
    """Losses and statistics, and the gradient if ``grad`` is given, whose dtype is its own; without ``hard`` the
    gradient from statistics."""
    z, u, y, hard_scale, soft_scale, z_scale = rows
    outer, inner, columns = z.shape
    count = outer * inner
    if count == 0:
        return
    gpu, n, mix = gpu_of(z), spec.vocab_size, spec.mix
    tiles = alignment(z, u, grad)
    slices, width = slices_of(gpu, count, columns, tiles["VEC"])
    kind = {
        "FORMULA": int(spec.formula), "MIX": int(mix), "BALANCED": spec.imbalance == 0.0,
        "MOMENT": moment_rule(spec.formula, mix), "FAST_LOG": gpu.is_nvidia,
    }  # fmt: skip
    hard_kind = hard_kind_of(spec)
    weights = (spec.c_t, spec.c_s, spec.w)
    log_v = math.log1p(-spec.w) if spec.w < 1.0 else 0.0
    inputs = (inner, *row_strides(z), *row_strides(u))
    with device_of(z):
        if hard is not None and slices == 1:
            heavy = is_heavy(gpu, mix, tiles["PEEL"], kind["MOMENT"] == MOMENT_BOTH)
            options = launch_options(gpu, columns, tiles["VEC"], heavy)
            row_bytes = columns * (z.element_size() + (0 if u is None else u.element_size()))
            least = LEAST_SHARE_OF_THREE if kind["MOMENT"] == MOMENT_NONE else LEAST_SHARE
            kd_rows_kernel[(programs_of(gpu, count, row_bytes, options["num_warps"], least),)](
                z, u, y, hard_scale, soft_scale, z_scale, hard, soft, stats, grad,
                count, *inputs, *row_strides(grad), n, columns, spec.temperature, *weights, log_v, spec.near_below,
                spec.label_smoothing,
                **kind, **hard_kind, **tiles, **options,
            )  # fmt: skip
            return
        grid = (count, slices)
        options = launch_options(gpu, width, tiles["VEC"], heavy=slices > 1)  # few programs, with room for registers
        states = sums = None
        if hard is not None:
            states = torch.empty(count, slices, STATE.value, device=z.device)
            moment_kind = {name: kind[name] for name in ("FORMULA", "MOMENT")}
            slice_state_kernel[grid](
                z, u, y, hard_scale, soft_scale, z_scale, states, *inputs, n, width, spec.temperature,
                **moment_kind, **hard_kind, **tiles, **options,
            )  # fmt: skip
        if states is not None and u is not None:
            sums = torch.empty(count, slices, SUMS.value, device=z.device)
            slice_sums_kernel[grid](
                z, u, hard_scale, soft_scale, z_scale, states, sums, *inputs, n, width, spec.temperature, *weights,
                **kind, MAX=MAX_SLICES, **tiles, **options,
            )  # fmt: skip
        slice_gradient_kernel[grid if grad is not None else (count, 1)](
            z, u, y, hard_scale, soft_scale, z_scale, hard, soft, stats, states, sums, grad,
            *inputs, *row_strides(grad), n, columns, width, slices, spec.temperature, *weights, spec.near_below,
            spec.label_smoothing,
            **kind, **hard_kind, MAX=MAX_SLICES, **tiles, **options,
        )  # fmt: skip
