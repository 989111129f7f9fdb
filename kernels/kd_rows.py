"""The row operation: losses and gradient of one token a program, in two reads of the logits where one sum allows it.

Math    b = log softmax(z/T), a = log softmax(u/T); hard = lse(z) − z_y; soft = Σ term(a, b); G = Σ g(a, b);
        dz = hard_scale·(softmax(z) − 1_y) + soft_scale/T·(g − p_s·G).
        With t = lse of the columns other than y, less z_y: hard = softplus(t), 1 − p_y = sigmoid(t), both with all
        their digits as p_y → 1. Label smoothing ε adds ε·(z_y − mean z) to hard and ε·(1_y − 1/n) to its gradient.
        d = a − b comes from u − z, which is exact where the two are close.
Stages  1 normalisers, walking forward; 2 sums of term and g; 3 gradient. Stages 2 and 3 walk back, since the row's
        tail is still in L2. S comes with stage 1 where a mean of d gives it (MOMENT), and stage 2 is left out; where
        that mean has not the digits, or G is not known otherwise, stage 2 sums both.
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
from fastkd.kernels.config import alignment, device_of, launch_options, row_strides
from fastkd.kernels.divergence import moment_rule, mul0, term_and_g
from fastkd.kernels.lse import (
    LN_2,
    LOG2_E,
    align,
    columns_of,
    inside,
    load_tile,
    new_peak,
    row_start,
    shift_of,
    store_tile,
    tile_at,
    tile_range,
)

# Below this a divergence has too few digits if its terms, or what it is averaged from, are good to 1e-7.
FEW_DIGITS = tl.constexpr(0.05)
MIXTURE_KL = tl.constexpr(int(_request.Formula.MIXTURE_KL))
NONE = tl.constexpr(divergence.MOMENT_NONE)
TEACHER_RATIO = tl.constexpr(divergence.MOMENT_TEACHER_RATIO)
STUDENT_RATIO = tl.constexpr(divergence.MOMENT_STUDENT_RATIO)
TEACHER_LOG = tl.constexpr(divergence.MOMENT_TEACHER_LOG)
PEAK_STUDENT = tl.constexpr(_request.PEAK_STUDENT)
PEAK_TEACHER = tl.constexpr(_request.PEAK_TEACHER)
LOG_HARD = tl.constexpr(_request.LOG_HARD)
LOG_STUDENT = tl.constexpr(_request.LOG_STUDENT)
LOG_TEACHER = tl.constexpr(_request.LOG_TEACHER)
GRAD_SUM = tl.constexpr(_request.GRAD_SUM)
LABEL_REST = tl.constexpr(_request.LABEL_REST)
NUM_STATS = tl.constexpr(_request.NUM_STATS)


# What varies from call to call must not compile the kernel again.
@triton.jit(
    do_not_specialize=["inner_rows"],
    do_not_specialize_on_alignment=["y_ptr", "hard_scale_ptr", "soft_scale_ptr", "hard_ptr", "soft_ptr", "stats_ptr"],
)
def kd_rows_kernel(
    z_ptr, u_ptr, y_ptr, hard_scale_ptr, soft_scale_ptr, hard_ptr, soft_ptr, stats_ptr, dz_ptr,
    inner_rows, z_outer, z_inner, u_outer, u_inner, dz_outer, dz_inner,
    n, columns, temperature, c_t, c_s, w, smoothing,
    FORMULA: tl.constexpr, MIX: tl.constexpr, MOMENT: tl.constexpr, POWER: tl.constexpr, SMOOTH: tl.constexpr,
    FROM_STATS: tl.constexpr, BLOCK: tl.constexpr, VEC: tl.constexpr, PEEL: tl.constexpr,
):  # fmt: skip
    HARD: tl.constexpr = y_ptr is not None
    SOFT: tl.constexpr = u_ptr is not None
    GRAD: tl.constexpr = dz_ptr is not None
    LANES: tl.constexpr = BLOCK // VEC

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
        u_start = align(row_start(row, inner_rows, u_outer, u_inner), VEC, PEEL)[0]
        u_ptr += u_start
    length = n + head
    inv_t = 1.0 / temperature
    k = inv_t * LOG2_E
    stats_ptr += row.to(tl.int64) * NUM_STATS

    y = -1
    if HARD:
        label = tl.load(y_ptr + row)
        y = tl.where((label >= 0) & (label < n), label, -1).to(tl.int32)

    # The peaks; log₂ normalisers of z, z/T, u/T, relative to them; of d = (u − z)/T − shift; G; 1 − p_y.
    z_shift = 0.0
    u_shift = 0.0
    lse_h = 0.0
    lse_s = 0.0
    lse_t = 0.0
    shift = 0.0
    grad_sum = -c_t
    rest = 0.0
    if FROM_STATS:
        z_shift = tl.load(stats_ptr + PEAK_STUDENT)
        if HARD:
            lse_h = tl.load(stats_ptr + LOG_HARD) * LOG2_E
            rest = tl.load(stats_ptr + LABEL_REST)
        if SOFT:
            u_shift = tl.load(stats_ptr + PEAK_TEACHER)
            log_s = tl.load(stats_ptr + LOG_STUDENT)
            log_t = tl.load(stats_ptr + LOG_TEACHER)
            lse_s = log_s * LOG2_E
            lse_t = log_t * LOG2_E
            shift = (u_shift - z_shift) * inv_t + (log_t - log_s)
            grad_sum = tl.load(stats_ptr + GRAD_SUM)
    else:
        # Stage 1, a state a lane.
        z_peak = tl.full([LANES], -float("inf"), tl.float32)
        u_peak = tl.full([LANES], -float("inf"), tl.float32)
        sum_h = tl.zeros([LANES], tl.float32)  # Σ exp(z − peak), the label's column apart
        sum_s = tl.zeros([LANES], tl.float32)  # Σ exp((z − peak)/T)
        sum_t = tl.zeros([LANES], tl.float32)  # Σ exp((u − peak)/T)
        moment = tl.zeros([LANES], tl.float32)
        sum_z = tl.zeros([LANES], tl.float32)  # Σ z − anchor
        if SMOOTH:  # far from 0 a sum of z would have no digits left
            anchor = shift_of(tl.load(z_ptr + head + tl.maximum(y, 0)).to(tl.float32))
        for masked in tl.static_range(2):
            first, end = tile_range(length, BLOCK, PEEL, masked)
            for i in tl.range(first, end):
                tile = tile_at(i, first, end, length, BLOCK, masked, False)
                z = load_tile(z_ptr, tile, head, length, BLOCK, VEC, masked)
                if SOFT:
                    u = load_tile(u_ptr, tile, head, length, BLOCK, VEC, masked)
                old_z = z_peak
                z_peak, z_ref = new_peak(old_z, z)
                z_drop = old_z - z_ref
                x = z - z_ref[:, None]
                if SOFT:
                    old_u = u_peak
                    u_peak, u_ref = new_peak(old_u, u)
                    u_drop = old_u - u_ref
                    by_s = tl.exp2(z_drop * k)
                    by_t = tl.exp2(u_drop * k)
                    s = tl.exp2(x * k)
                    v = u - u_ref[:, None]
                    t = tl.exp2(v * k)
                    moment = rescaled_moment(moment, sum_s, sum_t, z_drop, u_drop, by_s, by_t, MOMENT)
                    moment += tl.sum(moment_of(s, t, x, v, MOMENT), 1)
                    sum_s = sum_s * by_s + tl.sum(s, 1)
                    sum_t = sum_t * by_t + tl.sum(t, 1)
                if HARD:
                    if SOFT and POWER > 0:
                        by_h = integer_power(by_s, POWER)
                        h = integer_power(s, POWER)
                    else:
                        by_h = tl.exp2(z_drop * LOG2_E)
                        h = tl.exp2(x * LOG2_E)
                    is_label = columns_of(BLOCK, VEC) == y + head - tile
                    sum_h = sum_h * by_h + tl.sum(tl.where(is_label, 0.0, h), 1)
                if SMOOTH:
                    sum_z += tl.sum(tl.where(inside(tile, head, length, BLOCK, VEC), z - anchor, 0.0), 1)

        # The row's, from its lanes'. The label's logit is loaded before the sums, whose barriers keep it from other
        # warps' stores, where dz is z.
        z_shift = shift_of(tl.max(z_peak, 0))
        z_drop = z_peak - z_shift
        tl.store(stats_ptr + PEAK_STUDENT, z_shift)
        if HARD:
            z_y = tl.where(y >= 0, tl.load(z_ptr + head + tl.maximum(y, 0)).to(tl.float32), float("nan"))
            log_others = tl.log(tl.sum(sum_h * tl.exp2(z_drop * LOG2_E), 0))
            t_y = (z_shift - z_y) + log_others
            small = tl.exp2(-tl.abs(t_y) * LOG2_E)
            hard = tl.where(t_y != t_y, t_y, tl.maximum(t_y, 0.0) + log1p(small))  # softplus; max() may drop a NaN
            rest = tl.where(t_y > 0.0, 1.0, small) / (1.0 + small)  # sigmoid
            lse_h = (tl.where(t_y > 0.0, log_others, z_y - z_shift) + log1p(small)) * LOG2_E
            if SMOOTH:
                hard -= smoothing * (tl.sum(sum_z, 0) / n)
            tl.store(hard_ptr + row, hard)
        else:
            tl.store(hard_ptr + row, 0.0)
        tl.store(stats_ptr + LOG_HARD, lse_h * LN_2)
        tl.store(stats_ptr + LABEL_REST, rest)
        soft = 0.0
        if SOFT:
            u_shift = shift_of(tl.max(u_peak, 0))
            u_drop = u_peak - u_shift
            by_s = tl.exp2(z_drop * k)
            by_t = tl.exp2(u_drop * k)
            moment = rescaled_moment(moment, sum_s, sum_t, z_drop, u_drop, by_s, by_t, MOMENT)
            total_s = tl.sum(sum_s * by_s, 0)
            total_t = tl.sum(sum_t * by_t, 0)
            lse_s = tl.log2(total_s)
            lse_t = tl.log2(total_t)
            log_ratio = tl.log(total_t / total_s)
            shift = (u_shift - z_shift) * inv_t + log_ratio
            has_digits = False
            if MOMENT == TEACHER_LOG:
                soft = lse_s * LN_2 - tl.sum(moment, 0) / total_t * inv_t
                has_digits = True
            elif MOMENT != NONE:
                if MOMENT == TEACHER_RATIO:
                    mean = tl.sum(moment, 0) / total_t * inv_t
                    value = mean - log_ratio
                    soft = c_t * value
                else:
                    mean = tl.sum(moment, 0) / total_s * inv_t
                    value = mean + log_ratio
                    soft = c_s * value
                    grad_sum = c_s + soft
                # The mean is good to some 1e-7 of its size; written so that a NaN is not summed again.
                has_digits = (value < FEW_DIGITS + 0.02 * tl.abs(mean)) == 0
                if MOMENT == STUDENT_RATIO:  # a G of thousands must be rounded as the g are from which it is subtracted
                    has_digits = has_digits & ((tl.abs(mean) > 64.0) == 0)

            # Stage 2. A mixture's terms lose digits near 0, and exact ones do not.
            if MOMENT == NONE:
                soft, grad_sum = sum_terms(
                    z_ptr, u_ptr, head, length, z_shift, u_shift, k, inv_t, lse_s, lse_t, shift, c_t, c_s, w,
                    FORMULA, MIX, False, BLOCK, VEC, PEEL,
                )  # fmt: skip
                has_digits = (soft < FEW_DIGITS) == 0
            if FORMULA == MIXTURE_KL:
                if not has_digits:
                    soft, sum_g = sum_terms(
                        z_ptr, u_ptr, head, length, z_shift, u_shift, k, inv_t, lse_s, lse_t, shift, c_t, c_s, w,
                        FORMULA, MIX, True, BLOCK, VEC, PEEL,
                    )  # fmt: skip
                    if MOMENT == NONE or MOMENT == STUDENT_RATIO:
                        grad_sum = sum_g
            tl.store(soft_ptr + row, tl.where(soft < 0.0, 0.0, soft))
        else:
            tl.store(soft_ptr + row, 0.0)
        tl.store(stats_ptr + PEAK_TEACHER, u_shift)
        tl.store(stats_ptr + LOG_STUDENT, lse_s * LN_2)
        tl.store(stats_ptr + LOG_TEACHER, lse_t * LN_2)
        tl.store(stats_ptr + GRAD_SUM, grad_sum)

    # Stage 3
    if GRAD:
        dz_ptr += align(row_start(row, inner_rows, dz_outer, dz_inner), VEC, PEEL)[0]
        soft_factor = soft_scale * inv_t
        smooth = 0.0
        if SMOOTH:
            smooth = smoothing / n
        label_grad = hard_scale * (smoothing - smooth - rest)
        power_scale = hard_scale * tl.exp2(POWER * lse_s - lse_h)
        for step in tl.static_range(2):
            first, end = tile_range(length, BLOCK, PEEL, 1 - step)
            for i in tl.range(first, end):
                tile = tile_at(i, first, end, length, BLOCK, 1 - step, True)
                z = load_tile(z_ptr, tile, head, length, BLOCK, VEC, 1 - step)
                dz = tl.zeros([LANES, VEC], tl.float32)
                if SOFT:
                    u = load_tile(u_ptr, tile, head, length, BLOCK, VEC, 1 - step)
                    _, g, p_s = evaluate(
                        z, u, z_shift, u_shift, k, inv_t, lse_s, lse_t, shift, c_t, c_s, w,
                        FORMULA, MIX, False,
                    )  # fmt: skip
                    dz = soft_factor * (g - p_s * grad_sum)
                    if MOMENT == STUDENT_RATIO:  # an infinite reverse KL has no gradient
                        dz = tl.where(grad_sum == float("inf"), 0.0, dz)
                if HARD:
                    if SOFT and POWER > 0:
                        hard_grad = power_scale * integer_power(p_s, POWER)
                    else:
                        hard_grad = hard_scale * tl.exp2((z - z_shift) * LOG2_E - lse_h)
                    if SMOOTH:
                        hard_grad -= hard_scale * smooth
                    is_label = columns_of(BLOCK, VEC) == y + head - tile
                    dz += tl.where(is_label, label_grad, hard_grad)
                store_tile(dz_ptr, tile, head, length, dz, BLOCK, VEC, 1 - step)
        zero_columns(dz_ptr + head, n, columns, BLOCK)


@triton.jit
def moment_of(s, t, x, v, MOMENT: tl.constexpr):
    """What stage 1 averages, of columns or, of a shift of them all, of their sums: s and t are the exponentials of
    student and teacher, x and v what z and u are above their peaks."""
    if MOMENT == TEACHER_RATIO:
        return mul0(t, v - x)
    elif MOMENT == STUDENT_RATIO:
        return mul0(s, x - v)
    elif MOMENT == TEACHER_LOG:
        return mul0(t, x)
    else:
        return tl.zeros_like(s)


@triton.jit
def rescaled_moment(moment, sum_s, sum_t, z_drop, u_drop, by_s, by_t, MOMENT: tl.constexpr):
    """The moment relative to new peaks."""
    by = by_t
    if MOMENT == STUDENT_RATIO:
        by = by_s
    return mul0(by, moment + moment_of(sum_s, sum_t, z_drop, u_drop, MOMENT))


@triton.jit
def sum_terms(
    z_ptr, u_ptr, head, length, z_shift, u_shift, k, inv_t, lse_s, lse_t, shift, c_t, c_s, w,
    FORMULA: tl.constexpr, MIX: tl.constexpr, EXACT: tl.constexpr,
    BLOCK: tl.constexpr, VEC: tl.constexpr, PEEL: tl.constexpr,
):  # fmt: skip
    """(Σ term, Σ g) of a row: a walk back over it."""
    sum_term = tl.zeros([BLOCK // VEC], tl.float32)
    sum_g = tl.zeros([BLOCK // VEC], tl.float32)
    for step in tl.static_range(2):
        first, end = tile_range(length, BLOCK, PEEL, 1 - step)
        for i in tl.range(first, end):
            tile = tile_at(i, first, end, length, BLOCK, 1 - step, True)
            z = load_tile(z_ptr, tile, head, length, BLOCK, VEC, 1 - step)
            u = load_tile(u_ptr, tile, head, length, BLOCK, VEC, 1 - step)
            term, g, _ = evaluate(
                z, u, z_shift, u_shift, k, inv_t, lse_s, lse_t, shift, c_t, c_s, w, FORMULA, MIX, EXACT
            )
            sum_term += tl.sum(term, 1)
            sum_g += tl.sum(g, 1)
    return tl.sum(sum_term, 0), tl.sum(sum_g, 0)


@triton.jit
def evaluate(
    z, u, z_shift, u_shift, k, inv_t, lse_s, lse_t, shift, c_t, c_s, w,
    FORMULA: tl.constexpr, MIX: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """(term, g, p_s) of a tile."""
    b = (z - z_shift) * k - lse_s
    p_s = tl.exp2(b)
    p_t = tl.exp2((u - u_shift) * k - lse_t)
    d = tl.where(u == z, 0.0, u - z) * inv_t - shift  # u == z: both may be −inf
    term, g = term_and_g(b * LN_2, d, p_t, p_s, c_t, c_s, w, FORMULA, MIX, EXACT)
    return term, g, p_s


@triton.jit
def integer_power(x, POWER: tl.constexpr):
    if POWER == 1:
        return x
    elif POWER == 2:
        return x * x
    elif POWER == 3:
        return x * x * x
    else:
        return (x * x) * (x * x)


@triton.jit
def log1p(x):
    """log(1 + x) for 0 <= x <= 1 (Kahan: the quotient undoes the rounding of the sum)."""
    sum = 1.0 + x
    return tl.where(sum == 1.0, x, tl.log(sum) * (x / tl.where(sum == 1.0, 1.0, sum - 1.0)))


@triton.jit
def zero_columns(ptr, first, end, BLOCK: tl.constexpr):
    for start in tl.range(first, end, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        tl.store(ptr + cols, tl.zeros([BLOCK], ptr.dtype.element_ty), mask=cols < end)


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
            SMOOTH=spec.label_smoothing > 0, FROM_STATS=hard is None,
            **alignment(z, u, dz), **launch_options(columns, heavy=u is not None and mix == Mix.BOTH),
        )  # fmt: skip
