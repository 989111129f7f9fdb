"""The row operation: losses and gradient of one token a program, in two reads of the logits (three for mixtures).

Math    b = log softmax(z/T), a = log softmax(u/T); hard = lse(z) − z_y; soft = Σ term(a, b); G = Σ g(a, b);
        dz = hard_scale·(softmax(z) − 1_y) + soft_scale/T·(g − p_s·G).
        With t = lse of the columns other than y, less z_y: hard = softplus(t), 1 − p_y = sigmoid(t), both with all
        their digits as p_y → 1. Label smoothing ε adds ε·(z_y − mean z) to hard and ε·(1_y − 1/n) to its gradient.
        d = a − b comes from u − z, which is exact where the two are close.
Stages  1 normalisers, walking forward; 2 sums of term and g; 3 gradient. Stages 2 and 3 walk back, since the row's
        tail is still in L2. Loss alone is 1 and 2. Loss and gradient is 1 and 3, term summed in 3, where G is known
        before g (see divergence.py); else it is two launches, 1 and 2, then 3 from the statistics.
Shapes  z, u, dz [B, S, V_i] bf16|fp16|fp32, last stride 1; y [N] int64; scales, losses [N] fp32; stats [N, 7] fp32.
Bytes   an element, e bytes wide: loss 4e (two walks over two tensors); gradient from statistics 3e; loss and gradient
        5e, or 7e in two launches. The floors are 2e, 3e and 3e: a row of both tensors does not fit in one SM.
Grid    one program a row, BLOCK columns a step. A row whose scales are 0 is not read.
"""

import triton
import triton.language as tl

from fastkd import _request
from fastkd._request import Rows, RowSpec
from fastkd.kernels.config import alignment, device_of, launch_options, row_strides
from fastkd.kernels.divergence import FUNCTORS, GRAD_SUM_CONSTANT, GRAD_SUM_ONLINE, GRAD_SUM_WALK, grad_sum_rule
from fastkd.kernels.lse import (
    LN_2,
    LOG2_E,
    align,
    load_tile,
    new_peak,
    row_start,
    store_tile,
    tile_at,
    tile_range,
)

_CONSTANT = tl.constexpr(GRAD_SUM_CONSTANT)
_ONLINE = tl.constexpr(GRAD_SUM_ONLINE)
PEAK_STUDENT = tl.constexpr(_request.PEAK_STUDENT)
PEAK_TEACHER = tl.constexpr(_request.PEAK_TEACHER)
LOG_HARD = tl.constexpr(_request.LOG_HARD)
LOG_STUDENT = tl.constexpr(_request.LOG_STUDENT)
LOG_TEACHER = tl.constexpr(_request.LOG_TEACHER)
GRAD_SUM = tl.constexpr(_request.GRAD_SUM)
LABEL_REST = tl.constexpr(_request.LABEL_REST)
NUM_STATS = tl.constexpr(_request.NUM_STATS)


@triton.jit
def kd_rows_kernel(
    z_ptr, u_ptr, y_ptr, hard_scale_ptr, soft_scale_ptr, hard_ptr, soft_ptr, stats_ptr, dz_ptr,
    inner_rows, z_outer, z_inner, u_outer, u_inner, dz_outer, dz_inner,
    n, columns, temperature, c_t, c_s, w, smoothing,
    DIVERGENCE: tl.constexpr, MIX: tl.constexpr, GRAD_SUM_RULE: tl.constexpr, POWER: tl.constexpr,
    SMOOTH: tl.constexpr, FROM_STATS: tl.constexpr, BLOCK: tl.constexpr, VEC: tl.constexpr, PEEL: tl.constexpr,
):  # fmt: skip
    HARD: tl.constexpr = y_ptr is not None
    SOFT: tl.constexpr = u_ptr is not None
    GRAD: tl.constexpr = dz_ptr is not None
    ONLINE: tl.constexpr = (SOFT and GRAD) and (not FROM_STATS and GRAD_SUM_RULE == _ONLINE)

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

    # Stage 1. The peaks; log₂ normalisers of z, z/T, u/T, relative to them; 1 − p_y; G if it is averaged.
    z_shift = 0.0
    u_shift = 0.0
    lse_h = 0.0
    lse_s = 0.0
    lse_t = 0.0
    grad_sum = -c_t
    rest = 0.0
    if FROM_STATS:
        z_shift = tl.load(stats_ptr + PEAK_STUDENT)
        if HARD:
            lse_h = tl.load(stats_ptr + LOG_HARD) * LOG2_E
            rest = tl.load(stats_ptr + LABEL_REST)
        if SOFT:
            u_shift = tl.load(stats_ptr + PEAK_TEACHER)
            lse_s = tl.load(stats_ptr + LOG_STUDENT) * LOG2_E
            lse_t = tl.load(stats_ptr + LOG_TEACHER) * LOG2_E
            grad_sum = tl.load(stats_ptr + GRAD_SUM)
    else:
        z_peak = -float("inf")
        u_peak = -float("inf")
        sum_h = tl.zeros([BLOCK], tl.float32)  # Σ exp(z − peak), the label's column apart
        sum_s = tl.zeros([BLOCK], tl.float32)  # Σ exp((z − peak)/T)
        sum_t = tl.zeros([BLOCK], tl.float32)  # Σ exp((u − peak)/T)
        sum_z = tl.zeros([BLOCK], tl.float32)  # Σ z − z_y
        sum_diff = tl.zeros([BLOCK], tl.float32)  # Σ exp((z − peak)/T)·(z − u)
        sum_hole = tl.zeros([BLOCK], tl.float32)  # Σ exp((z − peak)/T) where u is −inf
        if SMOOTH:  # far from 0 a sum of z would have no digits left
            anchor = tl.load(z_ptr + head + tl.maximum(y, 0)).to(tl.float32)
            anchor = tl.where(anchor == -float("inf"), 0.0, anchor)
        for masked in tl.static_range(2):
            first, end = tile_range(length, BLOCK, PEEL, masked)
            for i in tl.range(first, end):
                tile = tile_at(i, first, end, length, BLOCK, masked, False)
                cols, z = load_tile(z_ptr, tile, head, n, BLOCK, masked)
                old = z_peak
                z_peak, z_shift = new_peak(old, z)
                if SOFT:
                    u = load_tile(u_ptr, tile, head, n, BLOCK, masked)[1]
                    rescale = tl.exp2((old - z_shift) * k)
                    e = tl.exp2((z - z_shift) * k)
                    sum_s = sum_s * rescale + e
                    if ONLINE:
                        hole = u == -float("inf")
                        sum_diff = sum_diff * rescale + tl.where(hole | (e == 0.0), 0.0, e * (z - u))
                        sum_hole = sum_hole * rescale + tl.where(hole, e, 0.0)
                    u_old = u_peak
                    u_peak, u_shift = new_peak(u_old, u)
                    sum_t = sum_t * tl.exp2((u_old - u_shift) * k) + tl.exp2((u - u_shift) * k)
                if HARD:
                    if SOFT and POWER > 0:
                        rescale_h = integer_power(rescale, POWER)
                        e_h = integer_power(e, POWER)
                    else:
                        rescale_h = tl.exp2((old - z_shift) * LOG2_E)
                        e_h = tl.exp2((z - z_shift) * LOG2_E)
                    sum_h = sum_h * rescale_h + tl.where(cols == y, 0.0, e_h)
                if SMOOTH:
                    sum_z += tl.where((cols >= 0) & (cols < n), z - anchor, 0.0)

        tl.store(stats_ptr + PEAK_STUDENT, z_shift)
        if HARD:
            z_y = tl.where(y >= 0, tl.load(z_ptr + head + tl.maximum(y, 0)).to(tl.float32), float("nan"))
            log_others = tl.log(tl.sum(sum_h, 0))
            t = (z_shift - z_y) + log_others
            small = tl.exp2(-tl.abs(t) * LOG2_E)
            hard = tl.where(t != t, t, tl.maximum(t, 0.0) + log1p(small))  # softplus; max() may drop a NaN
            rest = tl.where(t > 0.0, 1.0, small) / (1.0 + small)  # sigmoid
            lse_h = (tl.where(t > 0.0, log_others, z_y - z_shift) + log1p(small)) * LOG2_E
            if SMOOTH:
                hard -= smoothing * (tl.sum(sum_z, 0) / n)
            tl.store(hard_ptr + row, hard)
            tl.store(stats_ptr + LOG_HARD, lse_h * LN_2)
            tl.store(stats_ptr + LABEL_REST, rest)
        else:
            tl.store(hard_ptr + row, 0.0)
            tl.store(stats_ptr + LOG_HARD, 0.0)
            tl.store(stats_ptr + LABEL_REST, 0.0)
        if SOFT:
            total = tl.sum(sum_s, 0)
            lse_s = tl.log2(total)
            lse_t = tl.log2(tl.sum(sum_t, 0))
            tl.store(stats_ptr + PEAK_TEACHER, u_shift)
            tl.store(stats_ptr + LOG_STUDENT, lse_s * LN_2)
            tl.store(stats_ptr + LOG_TEACHER, lse_t * LN_2)
            if ONLINE:
                mean = (tl.sum(sum_diff, 0) / total + (u_shift - z_shift)) * inv_t + (lse_t - lse_s) * LN_2
                grad_sum = tl.where(tl.sum(sum_hole, 0) > 0.0, float("inf"), c_s * (1.0 + mean))

    shift_d = (u_shift - z_shift) * inv_t + (lse_t - lse_s) * LN_2  # d = (u − z)/T − shift_d
    sum_term = tl.zeros([BLOCK], tl.float32)

    # Stage 2
    if SOFT and not GRAD:
        sum_g = tl.zeros([BLOCK], tl.float32)
        for step in tl.static_range(2):
            first, end = tile_range(length, BLOCK, PEEL, 1 - step)
            for i in tl.range(first, end):
                tile = tile_at(i, first, end, length, BLOCK, 1 - step, True)
                z = load_tile(z_ptr, tile, head, n, BLOCK, 1 - step)[1]
                u = load_tile(u_ptr, tile, head, n, BLOCK, 1 - step)[1]
                term, g, p_s = evaluate(
                    z, u, z_shift, u_shift, k, inv_t, lse_s, lse_t, shift_d, c_t, c_s, w, DIVERGENCE, MIX
                )
                sum_term += term
                sum_g += g
        if GRAD_SUM_RULE != _CONSTANT:
            grad_sum = tl.sum(sum_g, 0)

    # Stage 3
    if GRAD:
        dz_ptr += align(row_start(row, inner_rows, dz_outer, dz_inner), VEC, PEEL)[0]
        soft_factor = soft_scale * inv_t
        smooth = 0.0
        if SMOOTH:
            smooth = smoothing / n
        label_grad = smoothing - smooth - rest
        for step in tl.static_range(2):
            first, end = tile_range(length, BLOCK, PEEL, 1 - step)
            for i in tl.range(first, end):
                tile = tile_at(i, first, end, length, BLOCK, 1 - step, True)
                cols, z = load_tile(z_ptr, tile, head, n, BLOCK, 1 - step)
                dz = tl.zeros([BLOCK], tl.float32)
                if SOFT:
                    u = load_tile(u_ptr, tile, head, n, BLOCK, 1 - step)[1]
                    term, g, p_s = evaluate(
                        z, u, z_shift, u_shift, k, inv_t, lse_s, lse_t, shift_d, c_t, c_s, w, DIVERGENCE, MIX
                    )
                    if not FROM_STATS:
                        sum_term += term
                    # An infinite reverse KL has no gradient; anywhere else G is finite, or the logits hold a NaN.
                    dz = tl.where(grad_sum == float("inf"), 0.0, soft_factor * (g - p_s * grad_sum))
                if HARD:
                    if SOFT and POWER > 0:
                        p_h = integer_power(p_s, POWER) * tl.exp2(POWER * lse_s - lse_h)
                    else:
                        p_h = tl.exp2((z - z_shift) * LOG2_E - lse_h)
                    dz += hard_scale * tl.where(cols == y, label_grad, p_h - smooth)
                store_tile(dz_ptr, tile, head, n, dz, BLOCK, 1 - step)
        zero_columns(dz_ptr + head, n, columns, BLOCK)

    if not FROM_STATS:
        if SOFT:
            tl.store(soft_ptr + row, tl.sum(sum_term, 0))
            tl.store(stats_ptr + GRAD_SUM, grad_sum)
        else:
            tl.store(soft_ptr + row, 0.0)
            tl.store(stats_ptr + PEAK_TEACHER, 0.0)
            tl.store(stats_ptr + LOG_STUDENT, 0.0)
            tl.store(stats_ptr + LOG_TEACHER, 0.0)
            tl.store(stats_ptr + GRAD_SUM, 0.0)


@triton.jit
def evaluate(
    z, u, z_shift, u_shift, k, inv_t, lse_s, lse_t, shift_d, c_t, c_s, w,
    DIVERGENCE: tl.constexpr, MIX: tl.constexpr,
):  # fmt: skip
    """(term, g, p_s) of a tile."""
    b = (z - z_shift) * k - lse_s
    p_s = tl.exp2(b)
    p_t = tl.exp2((u - u_shift) * k - lse_t)
    d = tl.where(u == z, 0.0, u - z) * inv_t - shift_d  # u == z: both may be −inf
    term, g = DIVERGENCE(b * LN_2, d, p_t, p_s, c_t, c_s, w, MIX)
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
    """Losses and statistics, and the gradient unless ``grad`` is None."""
    if grad is not None and rows.teacher is not None and grad_sum_rule(spec.formula, spec.mix) == GRAD_SUM_WALK:
        _launch(rows, spec, hard, soft, stats, None, from_stats=False)
        kd_grad(rows, spec, stats, grad)
    else:
        _launch(rows, spec, hard, soft, stats, grad, from_stats=False)


def kd_grad(rows: Rows, spec: RowSpec, stats, grad) -> None:
    """The gradient alone, from statistics."""
    _launch(rows, spec, None, None, stats, grad, from_stats=True)


def _launch(rows: Rows, spec: RowSpec, hard, soft, stats, grad, *, from_stats: bool) -> None:
    z, u, dz = rows.student, rows.teacher, grad
    outer, inner, columns = z.shape
    if outer * inner == 0:
        return
    matrices = [matrix for matrix in (z, u, dz) if matrix is not None]
    # exp(x) = exp(x/T)^T saves an exponential a column at small integer T.
    power = int(spec.temperature) if spec.temperature in (1.0, 2.0, 3.0, 4.0) else 0
    with device_of(z):
        kd_rows_kernel[(outer * inner,)](
            z, u, rows.labels, rows.hard_scale, rows.soft_scale, hard, soft, stats, dz,
            inner, *row_strides(z), *row_strides(u), *row_strides(dz),
            spec.vocab_size, columns, spec.temperature, spec.c_t, spec.c_s, spec.w, spec.label_smoothing,
            DIVERGENCE=FUNCTORS[spec.formula], MIX=int(spec.mix), GRAD_SUM_RULE=grad_sum_rule(spec.formula, spec.mix),
            POWER=power, SMOOTH=spec.label_smoothing > 0, FROM_STATS=from_stats,
            **alignment(*matrices), **launch_options(columns),
        )  # fmt: skip
