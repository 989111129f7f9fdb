"""The row operation: losses and gradient of one token a program, in two reads of the logits where one sum allows it.

Math    b = log softmax(z/T), a = log softmax(u/T); hard = lse(z) − z_y; soft = Σ term(a, b); G = Σ g(a, b);
        dz = hard_scale·(softmax(z) − 1_y) + soft_scale/T·(g − p_s·G).
        With t = lse of the columns other than y, less z_y: hard = softplus(t), 1 − p_y = sigmoid(t), both with all
        their digits as p_y → 1. Label smoothing ε adds ε·(z_y − mean z) to hard and ε·(1_y − 1/n) to its gradient.
Stages  1 normalisers, walking forward; 2 sums of term and g; 3 gradient. Stages 2 and 3 walk back, since the row's
        tail is still in L2. S comes with stage 1 where a mean of d gives it, and stage 2 is left out; where that mean
        has not the digits, or there is none, stage 2 sums S and G.
Shapes  z, u, dz [B, S, V_i] bf16|fp16|fp32, last stride 1; y [N] int64; scales, losses [N] fp32; stats [N, 8] fp32.
Bytes   an element, e bytes wide: loss 2e; loss and gradient 5e; 2e more for each stage 2; gradient from statistics 3e.
        The floors are 2e, 3e and 3e: a row of both tensors does not fit in one SM.
Grid    one program a row, BLOCK columns a step. A row whose scales are 0 is not read.
"""

import triton
import triton.language as tl

from fastkd import _request
from fastkd._request import Mix, Rows, RowSpec
from fastkd.kernels import divergence
from fastkd.kernels.config import alignment, device_of, is_nvidia, launch_options, row_strides
from fastkd.kernels.divergence import (
    FAR,
    MIX_BOTH,
    MIX_TEACHER,
    NEAR,
    TOTAL_VARIATION,
    from_far_mixture,
    moment_rule,
)
from fastkd.kernels.lse import LN_2, align, row_start, shift_of
from fastkd.kernels.row_stages import (
    from_exact_sums,
    from_moment,
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
LOG_TEACHER = tl.constexpr(_request.LOG_TEACHER)
GRAD_SUM = tl.constexpr(_request.GRAD_SUM)
LABEL_REST = tl.constexpr(_request.LABEL_REST)
GRAD_FORM = tl.constexpr(_request.GRAD_FORM)
NUM_STATS = tl.constexpr(_request.NUM_STATS)


@triton.jit
def exact_sums(
    z_ptr, u_ptr, head, length, z_shift, u_shift, log_s, log_t, inv_t, c_t, c_s, w,
    FORMULA: tl.constexpr, MIX: tl.constexpr, BALANCED: tl.constexpr,
    FAST_LOG: tl.constexpr, BLOCK: tl.constexpr, VEC: tl.constexpr, PEEL: tl.constexpr,
):  # fmt: skip
    """(S, G, the form of g) of a row by stage 2."""
    soft, sum_far, sum_near, sum_excess = slice_exact_sums(
        z_ptr, u_ptr, head, length, z_shift, u_shift, log_s, log_t, inv_t, c_t, c_s, w,
        FORMULA, MIX, BALANCED, FAST_LOG, BLOCK, VEC, PEEL,
    )  # fmt: skip
    return from_exact_sums(
        tl.sum(soft, 0), tl.sum(sum_far, 0), tl.sum(sum_near, 0), tl.sum(sum_excess, 0), c_t, c_s, w,
        FORMULA, MIX,
    )  # fmt: skip


# What varies from call to call must not compile the kernel again.
@triton.jit(
    do_not_specialize=["inner_rows"],
    do_not_specialize_on_alignment=["y_ptr", "hard_scale_ptr", "soft_scale_ptr", "hard_ptr", "soft_ptr", "stats_ptr"],
)
def kd_rows_kernel(
    z_ptr, u_ptr, y_ptr, hard_scale_ptr, soft_scale_ptr, hard_ptr, soft_ptr, stats_ptr, dz_ptr,
    inner_rows, z_outer, z_inner, u_outer, u_inner, dz_outer, dz_inner,
    n, columns, temperature, c_t, c_s, w, smoothing,
    FORMULA: tl.constexpr, MIX: tl.constexpr, BALANCED: tl.constexpr, MOMENT: tl.constexpr, POWER: tl.constexpr,
    SMOOTH: tl.constexpr, FAST_LOG: tl.constexpr, FROM_STATS: tl.constexpr,
    BLOCK: tl.constexpr, VEC: tl.constexpr, PEEL: tl.constexpr,
):  # fmt: skip
    HARD: tl.constexpr = y_ptr is not None
    SOFT: tl.constexpr = u_ptr is not None
    GRAD: tl.constexpr = dz_ptr is not None

    row = tl.program_id(0)
    hard_scale = 0.0
    soft_scale = 0.0
    if HARD:
        hard_scale = tl.load(hard_scale_ptr + row)
    if SOFT:
        soft_scale = tl.load(soft_scale_ptr + row)
    if (hard_scale == 0.0) & (soft_scale == 0.0):
        if not FROM_STATS:
            tl.store(hard_ptr + row, 0.0)
            tl.store(soft_ptr + row, 0.0)
        if GRAD:
            zero_columns(dz_ptr + row_start(row, inner_rows, dz_outer, dz_inner), 0, columns, BLOCK)
        return

    z_start, head = align(row_start(row, inner_rows, z_outer, z_inner), VEC, PEEL)
    z_ptr += z_start
    if SOFT:
        u_ptr += align(row_start(row, inner_rows, u_outer, u_inner), VEC, PEEL)[0]
    length = n + head
    inv_t = 1.0 / temperature
    stats_ptr += row.to(tl.int64) * NUM_STATS

    label = -1
    if HARD:
        y = tl.load(y_ptr + row)
        label = tl.where((y >= 0) & (y < n), y + head, -1).to(tl.int32)

    # The peaks and the logarithms of the normalisers relative to them; G and the form of g; 1 − p_y.
    u_shift = 0.0
    log_h = 0.0
    log_s = 0.0
    log_t = 0.0
    grad_sum = 0.0
    near = 0.0
    rest = 0.0
    if FROM_STATS:
        z_shift = tl.load(stats_ptr + PEAK_STUDENT)
        if HARD:
            log_h = tl.load(stats_ptr + LOG_HARD)
            rest = tl.load(stats_ptr + LABEL_REST)
        if SOFT:
            u_shift = tl.load(stats_ptr + PEAK_TEACHER)
            log_s = tl.load(stats_ptr + LOG_STUDENT)
            log_t = tl.load(stats_ptr + LOG_TEACHER)
            grad_sum = tl.load(stats_ptr + GRAD_SUM)
            near = tl.load(stats_ptr + GRAD_FORM)
    else:
        # The label's logit is loaded before stage 1, whose barriers keep it from other warps' stores, where dz is z.
        z_y = float("nan")
        anchor = 0.0
        if HARD:
            z_0 = tl.load(z_ptr + tl.where(label < 0, head, label)).to(tl.float32)
            z_y = tl.where(label < 0, float("nan"), z_0)
            anchor = shift_of(z_0)  # far from 0 a sum of z would have no digits left
        k = inv_t * divergence.LOG2_E
        z_peak, u_peak, sum_h, sum_s, sum_t, moment, mean_z, sum_z = slice_state(
            z_ptr, u_ptr, head, length, label, k, anchor,
            FORMULA, MOMENT, POWER, SMOOTH, HARD, SOFT, BLOCK, VEC, PEEL,
        )  # fmt: skip
        z_peak, u_peak, sum_h, sum_s, sum_t, moment, mean_z, sum_z = merged(
            z_peak, u_peak, sum_h, sum_s, sum_t, moment, mean_z, sum_z, k, FORMULA, MOMENT, SOFT
        )
        z_shift = shift_of(z_peak)
        hard = 0.0
        if HARD:
            hard, log_h, rest = hard_loss(z_shift, sum_h, z_y, sum_z, n, smoothing, SMOOTH)
        soft = 0.0
        if SOFT:
            u_shift = shift_of(u_peak)
            log_s = tl.log2(sum_s) * LN_2
            log_t = tl.log2(sum_t) * LN_2
            if FORMULA == TOTAL_VARIATION:
                soft, grad_sum, near = exact_sums(
                    z_ptr, u_ptr, head, length, z_shift, u_shift, log_s, log_t, inv_t, c_t, c_s, w,
                    FORMULA, MIX, BALANCED, FAST_LOG, BLOCK, VEC, PEEL,
                )  # fmt: skip
            else:
                if MIX == MIX_BOTH:
                    teacher, student, share = slice_far_sums(
                        z_ptr, u_ptr, head, length, z_shift, u_shift, log_s, log_t, inv_t, w,
                        BALANCED, FAST_LOG, BLOCK, VEC, PEEL,
                    )  # fmt: skip
                    soft, grad_sum, has_digits = from_far_mixture(
                        tl.sum(teacher, 0), tl.sum(student, 0), tl.sum(share, 0), c_t, c_s, w
                    )
                else:
                    soft, grad_sum, has_digits = from_moment(
                        sum_s, sum_t, moment, mean_z, log_s, log_t, inv_t, c_t, c_s, FORMULA, MOMENT
                    )
                if not has_digits:
                    soft, grad_sum, near = exact_sums(
                        z_ptr, u_ptr, head, length, z_shift, u_shift, log_s, log_t, inv_t, c_t, c_s, w,
                        FORMULA, MIX, BALANCED, FAST_LOG, BLOCK, VEC, PEEL,
                    )  # fmt: skip
            soft = tl.where(soft < 0.0, 0.0, soft)
        tl.store(hard_ptr + row, hard)
        tl.store(soft_ptr + row, soft)
        tl.store(stats_ptr + PEAK_STUDENT, z_shift)
        tl.store(stats_ptr + PEAK_TEACHER, u_shift)
        tl.store(stats_ptr + LOG_HARD, log_h)
        tl.store(stats_ptr + LOG_STUDENT, log_s)
        tl.store(stats_ptr + LOG_TEACHER, log_t)
        tl.store(stats_ptr + GRAD_SUM, grad_sum)
        tl.store(stats_ptr + LABEL_REST, rest)
        tl.store(stats_ptr + GRAD_FORM, near)

    # Stage 3
    if GRAD:
        dz_ptr += align(row_start(row, inner_rows, dz_outer, dz_inner), VEC, PEEL)[0]
        label_grad = hard_scale * (smoothing - rest)
        smooth_grad = hard_scale * smoothing / n
        if SOFT and MIX != MIX_TEACHER:
            if near != 0.0:
                slice_gradient(
                    z_ptr, u_ptr, dz_ptr, head, length, label, hard_scale, label_grad, smooth_grad, soft_scale,
                    z_shift, u_shift, log_h, log_s, log_t, grad_sum, inv_t, c_t, c_s, w,
                    FORMULA, MIX, BALANCED, NEAR, POWER, FAST_LOG, HARD, SOFT, SMOOTH, BLOCK, VEC, PEEL,
                )  # fmt: skip
            else:
                slice_gradient(
                    z_ptr, u_ptr, dz_ptr, head, length, label, hard_scale, label_grad, smooth_grad, soft_scale,
                    z_shift, u_shift, log_h, log_s, log_t, grad_sum, inv_t, c_t, c_s, w,
                    FORMULA, MIX, BALANCED, FAR, POWER, FAST_LOG, HARD, SOFT, SMOOTH, BLOCK, VEC, PEEL,
                )  # fmt: skip
        else:
            slice_gradient(
                z_ptr, u_ptr, dz_ptr, head, length, label, hard_scale, label_grad, smooth_grad, soft_scale,
                z_shift, u_shift, log_h, log_s, log_t, grad_sum, inv_t, c_t, c_s, w,
                FORMULA, MIX, BALANCED, FAR, POWER, FAST_LOG, HARD, SOFT, SMOOTH, BLOCK, VEC, PEEL,
            )  # fmt: skip
        zero_columns(dz_ptr + head, n, columns, BLOCK)


def kd_rows(rows: Rows, spec: RowSpec, hard, soft, stats, grad) -> None:
    """Losses and statistics, and the gradient if ``grad`` is given; without ``hard`` the gradient from statistics."""
    z, u, dz = rows.student, rows.teacher, grad
    outer, inner, columns = z.shape
    if outer * inner == 0:
        return
    mix = spec.mix
    # exp(x) = exp(x/T)^T saves an exponential a column at small integer T.
    power = int(spec.temperature) if spec.temperature in (1.0, 2.0, 3.0, 4.0) else 0
    with device_of(z):
        kd_rows_kernel[(outer * inner,)](
            z, u, rows.labels, rows.hard_scale, rows.soft_scale, hard, soft, stats, dz,
            inner, *row_strides(z), *row_strides(u), *row_strides(dz),
            spec.vocab_size, columns, spec.temperature, spec.c_t, spec.c_s, spec.w, spec.label_smoothing,
            FORMULA=int(spec.formula), MIX=int(mix), MOMENT=moment_rule(spec.formula, mix), POWER=power,
            BALANCED=spec.c_s * spec.w == spec.c_t * (1.0 - spec.w),
            SMOOTH=spec.label_smoothing > 0, FAST_LOG=is_nvidia(), FROM_STATS=hard is None,
            **alignment(z, u, dz), **launch_options(columns, heavy=u is not None and mix == Mix.BOTH),
        )  # fmt: skip
