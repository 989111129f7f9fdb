"""The stages of a row, one function each, over the whole row or a slice of it; the kernels put them together.

State   of a slice, and by :func:`merged` of several, in lanes, programs or ranks: the peaks of z and u (−inf of
        nothing); relative to them Σ exp(z − peak) without the label's column, Σ exp((z − peak)/T),
        Σ exp((u − peak)/T) and the moment, which is the sum of one side's exponentials times the difference of z and u
        above their peaks; a second one, the other side's or, of a cross-entropy, Σ exp((u − peak)/T)·(z − peak);
        Σ z − anchor.
Sums    of a slice, given the row's normalisers: S, and G in both forms of g. They are added.
Walks   A slice begins at ``ptr`` with ``head`` columns that are not the row's and ends before ``length``; ``label`` is
        its column of the label, −1 if it has none. All three count from ``ptr``.
"""

import triton
import triton.language as tl

from fastkd.kernels import divergence
from fastkd.kernels.divergence import (
    CROSS_ENTROPY,
    FAR,
    HUGE,
    MIX_BOTH,
    MIX_STUDENT,
    MIX_TEACHER,
    NEAR,
    SYMMETRIC_KL,
    TOTAL_VARIATION,
    exact_term,
    excess_of_teacher,
    far_mixture,
    log2_odds,
    mul0,
    ratio,
)
from fastkd.kernels.lse import (
    DROP,
    KEEP,
    LOG2_E,
    NO_TILE,
    columns_of,
    inside,
    lane_sum,
    listed_tile,
    load_tile,
    new_peak,
    of_lanes,
    shift_of,
    store_tile,
    tile_apart,
    tile_at,
    tile_range,
)

OF_NONE = tl.constexpr(divergence.MOMENT_NONE)
OF_STUDENT = tl.constexpr(divergence.MOMENT_STUDENT)
OF_BOTH = tl.constexpr(divergence.MOMENT_BOTH)
# Below this a divergence has too few digits if what it is averaged from is good to 1e-7.
FEW_DIGITS = tl.constexpr(0.05)
# The column of a label that is in another slice of the vocabulary.
ELSEWHERE = tl.constexpr(-2)


@triton.jit
def slice_state(
    z_ptr, u_ptr, head, length, label, k, anchor,
    FORMULA: tl.constexpr, MOMENT: tl.constexpr, POWER: tl.constexpr, SMOOTH: tl.constexpr,
    HARD: tl.constexpr, SOFT: tl.constexpr, BLOCK: tl.constexpr, VEC: tl.constexpr, PEEL: tl.constexpr,
):  # fmt: skip
    """Stage 1: a state a lane. ``u_ptr`` may be to bits that list columns: then u is z without these."""
    z_peak = of_lanes(-float("inf"), BLOCK, VEC)
    u_peak = of_lanes(-float("inf"), BLOCK, VEC)
    sum_h = of_lanes(0.0, BLOCK, VEC)
    sum_s = of_lanes(0.0, BLOCK, VEC)
    sum_t = of_lanes(0.0, BLOCK, VEC)
    moment = of_lanes(0.0, BLOCK, VEC)
    second = of_lanes(0.0, BLOCK, VEC)
    sum_z = of_lanes(0.0, BLOCK, VEC)
    apart = tile_apart(label, length, BLOCK, PEEL)
    for masked in tl.static_range(2):
        first, end = tile_range(length, apart, BLOCK, PEEL, masked)
        for i in tl.range(first, end):
            tile = tile_at(i, first, end, length, apart, BLOCK, PEEL, masked, False)
            z = load_tile(z_ptr, tile, head, length, BLOCK, VEC, masked, KEEP)
            if SOFT:
                if u_ptr.dtype.element_ty.is_int():
                    u = tl.where(listed_tile(u_ptr, tile, BLOCK, VEC), -float("inf"), z)
                else:
                    u = load_tile(u_ptr, tile, head, length, BLOCK, VEC, masked, KEEP)
            old_z = z_peak
            z_peak, z_ref = new_peak(old_z, z)
            z_drop = old_z - z_ref
            x = z - z_ref[None, :, None]
            if SOFT:
                old_u = u_peak
                u_peak, u_ref = new_peak(old_u, u)
                u_drop = old_u - u_ref
                by_s = tl.exp2(z_drop * k)
                by_t = tl.exp2(u_drop * k)
                s = tl.exp2(x * k)
                v = u - u_ref[None, :, None]
                t = tl.exp2(v * k)
                if MOMENT != OF_NONE:
                    moment = rescaled_moment(moment, sum_s, sum_t, z_drop, u_drop, by_s, by_t, MOMENT)
                    moment += lane_sum(moment_of(s, t, x, v, MOMENT))
                if MOMENT == OF_BOTH:
                    second = rescaled_moment(second, sum_s, sum_t, z_drop, u_drop, by_s, by_t, OF_STUDENT)
                    second += lane_sum(moment_of(s, t, x, v, OF_STUDENT))
                if FORMULA == CROSS_ENTROPY:
                    second = mul0(by_t, second + mul0(sum_t, z_drop)) + lane_sum(mul0(t, x))
                sum_s = sum_s * by_s + lane_sum(s)
                sum_t = sum_t * by_t + lane_sum(t)
            if HARD:
                if SOFT and POWER > 0:
                    by_h = integer_power(by_s, POWER)
                    h = s * integer_power(s, POWER - 1)
                else:
                    by_h = tl.exp2(z_drop * LOG2_E)
                    h = tl.exp2(x * LOG2_E)
                if masked:
                    h = tl.where(columns_of(BLOCK, VEC) == label - tile, 0.0, h)
                sum_h = sum_h * by_h + lane_sum(h)
            if SMOOTH:
                above = z - anchor
                if masked:
                    above = tl.where(inside(tile, head, length, BLOCK, VEC), above, 0.0)
                sum_z += lane_sum(above)
    return z_peak, u_peak, sum_h, sum_s, sum_t, moment, second, sum_z


@triton.jit
def merged(
    z_peak, u_peak, sum_h, sum_s, sum_t, moment, second, sum_z, k,
    FORMULA: tl.constexpr, MOMENT: tl.constexpr, SMOOTH: tl.constexpr, HARD: tl.constexpr, SOFT: tl.constexpr,
):  # fmt: skip
    """The one state of many, along their only axis; what the structure does without is 0."""
    z_top = tl.max(z_peak, 0)
    u_top = -float("inf")
    z_drop = z_peak - shift_of(z_top)
    total_h = 0.0
    total_s = 0.0
    total_t = 0.0
    total_moment = 0.0
    total_second = 0.0
    total_z = 0.0
    if HARD:
        total_h = tl.sum(sum_h * tl.exp2(z_drop * LOG2_E), 0)
    if SMOOTH:
        total_z = tl.sum(sum_z, 0)
    if SOFT:
        u_top = tl.max(u_peak, 0)
        u_drop = u_peak - shift_of(u_top)
        by_s = tl.exp2(z_drop * k)
        by_t = tl.exp2(u_drop * k)
        if MOMENT != OF_NONE:
            total_moment = tl.sum(rescaled_moment(moment, sum_s, sum_t, z_drop, u_drop, by_s, by_t, MOMENT), 0)
        if MOMENT == OF_BOTH:
            total_second = tl.sum(rescaled_moment(second, sum_s, sum_t, z_drop, u_drop, by_s, by_t, OF_STUDENT), 0)
        if FORMULA == CROSS_ENTROPY:
            total_second = tl.sum(mul0(by_t, second + mul0(sum_t, z_drop)), 0)
        total_s = tl.sum(sum_s * by_s, 0)
        total_t = tl.sum(sum_t * by_t, 0)
    return z_top, u_top, total_h, total_s, total_t, total_moment, total_second, total_z


@triton.jit
def moment_of(s, t, x, v, MOMENT: tl.constexpr):
    """What stage 1 averages, of columns or, of a shift of them all, of their sums: s and t are the exponentials of
    student and teacher, x and v what z and u are above their peaks. 0·inf may be NaN: see :func:`from_moment`."""
    if MOMENT == OF_STUDENT:
        return s * tl.maximum(x - v, -HUGE)
    else:
        return t * tl.maximum(v - x, -HUGE)


@triton.jit
def rescaled_moment(moment, sum_s, sum_t, z_drop, u_drop, by_s, by_t, MOMENT: tl.constexpr):
    """The moment relative to new peaks."""
    moment += moment_of(sum_s, sum_t, z_drop, u_drop, MOMENT)
    if MOMENT == OF_STUDENT:
        return by_s * moment
    else:
        return by_t * moment


@triton.jit
def hard_loss(z_shift, sum_h, z_y, label, sum_z, n, smoothing, SMOOTH: tl.constexpr):
    """(hard, log Σ exp(z − peak), 1 − p_y), given the label's column and logit. Of a column elsewhere hard is 0."""
    log_others = tl.log(sum_h)
    z_y = tl.where(label == ELSEWHERE, -float("inf"), tl.where(label < 0, float("nan"), z_y))
    t_y = (z_shift - z_y) + log_others
    small = tl.exp2(-tl.abs(t_y) * LOG2_E)
    log_small = log1p_positive(small)
    hard = tl.where(t_y != t_y, t_y, tl.maximum(t_y, 0.0) + log_small)  # softplus; max() may drop a NaN
    rest = tl.where(t_y > 0.0, 1.0, small) / (1.0 + small)  # sigmoid
    log_h = tl.where(t_y > 0.0, log_others, z_y - z_shift) + log_small
    log_h = tl.where(z_y == -float("inf"), log_others, log_h)
    if SMOOTH:
        hard -= smoothing * (sum_z / n)
    return tl.where(label == ELSEWHERE, 0.0, hard), log_h, rest


@triton.jit
def log1p_positive(x):
    """log(1 + x) for 0 <= x <= 1 (Kahan: the quotient undoes the rounding of the sum)."""
    sum = 1.0 + x
    return tl.where(sum == 1.0, x, tl.log(sum) * (x / tl.where(sum == 1.0, 1.0, sum - 1.0)))


@triton.jit
def from_moment(
    z_shift, u_shift, sum_s, sum_t, moment, second, log_s, log_r, inv_t, c_t, c_s,
    FORMULA: tl.constexpr, MOMENT: tl.constexpr,
):  # fmt: skip
    """(S, G in the far form, whether they have digits) where stage 1 knows them.

    The mean is good to some 1e-7 of its size. One that is not finite does not count: a column that has −inf on one side
    alone gives NaN where the other's exponential is 0, and a finite mean may come from a sum that is not. Nor do logits
    whose exponents overflow before they are compared, which the near form can take.
    """
    has_digits = (tl.abs(z_shift) < 1e30) & (tl.abs(u_shift) < 1e30)
    soft = 0.0
    grad_sum = 0.0
    if MOMENT != OF_STUDENT:
        value, is_good = kl_from_mean(moment / sum_t * inv_t, -log_r, 1e30)
        soft += c_t * value
        grad_sum -= c_t
        has_digits &= is_good
    if MOMENT == OF_STUDENT or MOMENT == OF_BOTH:
        # A large G must be rounded as the g are from which it is subtracted.
        sum = second if MOMENT == OF_BOTH else moment
        value, is_good = kl_from_mean(sum / sum_s * inv_t, log_r, 8.0)
        soft += c_s * value
        grad_sum += c_s * value
        has_digits &= is_good
    if FORMULA == CROSS_ENTROPY:
        soft = log_s - second / sum_t * inv_t
        has_digits &= tl.abs(soft) < 1e30
    return soft, grad_sum, has_digits


@triton.jit
def kl_from_mean(mean, log_r, bound):
    value = mean + log_r
    return value, (value >= FEW_DIGITS + 0.02 * tl.abs(mean)) & (tl.abs(mean) < bound)


@triton.jit
def offsets_and_shift(z_shift, u_shift, log_r, inv_t):
    """(c_z, c_u, shift) of d = ((u − c_u) − (z − c_z))/T − shift. Where the peaks are far apart the distance goes,
    before the difference is rounded, from the one that is farther from 0; where they are close both are 0, and u − z
    exact."""
    distance = u_shift - z_shift
    distance = tl.where(tl.abs(distance) < 4.0, 0.0, tl.floor(distance + 0.5))
    of_student = tl.abs(z_shift) > tl.abs(u_shift)
    z_offset = tl.where(of_student, -distance, 0.0)
    u_offset = tl.where(of_student, 0.0, distance)
    return z_offset, u_offset, ((u_shift - u_offset) - (z_shift - z_offset)) * inv_t + log_r


@triton.jit
def slice_far_sums(
    z_ptr, u_ptr, head, length, z_shift, u_shift, log_s, log_r, inv_t, w,
    BALANCED: tl.constexpr, FAST_LOG: tl.constexpr, BLOCK: tl.constexpr, VEC: tl.constexpr, PEEL: tl.constexpr,
):  # fmt: skip
    """Stage 2 of a mixture that is not known to be near, walking back: the sums of :func:`far_mixture`, a lane."""
    teacher = of_lanes(0.0, BLOCK, VEC)
    student = of_lanes(0.0, BLOCK, VEC)
    share = of_lanes(0.0, BLOCK, VEC)
    k = inv_t * LOG2_E
    log2_r = log2_odds(w, MIX_BOTH)
    for masked in tl.static_range(1, -1, -1):
        first, end = tile_range(length, NO_TILE, BLOCK, PEEL, masked)
        for i in tl.range(first, end):
            tile = tile_at(i, first, end, length, NO_TILE, BLOCK, PEEL, masked, True)
            z = load_tile(z_ptr, tile, head, length, BLOCK, VEC, masked, KEEP)
            u = load_tile(u_ptr, tile, head, length, BLOCK, VEC, masked, KEEP)
            b = (z - z_shift) * k - log_s * LOG2_E
            a = (u - u_shift) * k - (log_s + log_r) * LOG2_E
            of_teacher, of_student, of_share = far_mixture(a - b, tl.exp2(a), tl.exp2(b), log2_r, FAST_LOG)
            teacher += lane_sum(of_teacher)
            student += lane_sum(of_student)
            if not BALANCED:
                share += lane_sum(of_share)
    return teacher, student, share


@triton.jit
def slice_exact_sums(
    z_ptr, u_ptr, head, length, z_shift, u_shift, log_s, log_r, inv_t, c_t, c_s, w,
    FORMULA: tl.constexpr, MIX: tl.constexpr, BALANCED: tl.constexpr, FAR_KNOWN: tl.constexpr,
    FAST_LOG: tl.constexpr, BLOCK: tl.constexpr, VEC: tl.constexpr, PEEL: tl.constexpr,
):  # fmt: skip
    """Stage 2, walking back: S, Σ g in the forms that it may take, and with tvd Σ p_t − p_s, a lane.

    Where m is the student, Σ g in the near form alone, and Σ p_s: the far one is less by c_t times that.
    """
    sum_term = of_lanes(0.0, BLOCK, VEC)
    sum_far = of_lanes(0.0, BLOCK, VEC)
    sum_near = of_lanes(0.0, BLOCK, VEC)
    sum_excess = of_lanes(0.0, BLOCK, VEC)
    k = inv_t * LOG2_E
    log2_r = log2_odds(w, MIX)
    z_offset, u_offset, shift = offsets_and_shift(z_shift, u_shift, log_r, inv_t)
    for masked in tl.static_range(1, -1, -1):
        first, end = tile_range(length, NO_TILE, BLOCK, PEEL, masked)
        for i in tl.range(first, end):
            tile = tile_at(i, first, end, length, NO_TILE, BLOCK, PEEL, masked, True)
            z = load_tile(z_ptr, tile, head, length, BLOCK, VEC, masked, KEEP)
            u = load_tile(u_ptr, tile, head, length, BLOCK, VEC, masked, KEEP)
            x = z - z_shift
            p_s = tl.exp2(x * k - log_s * LOG2_E)
            p_t = tl.exp2((u - u_shift) * k - (log_s + log_r) * LOG2_E)
            d = ((u - u_offset) - (z - z_offset)) * inv_t - shift
            b = x * inv_t - log_s
            sum_term += lane_sum(exact_term(b, d, p_t, p_s, c_t, c_s, w, FORMULA, MIX, FAST_LOG))
            if FORMULA == TOTAL_VARIATION:
                sum_excess += lane_sum(excess_of_teacher(d, p_t, p_s))
            if MIX == MIX_STUDENT and FORMULA != TOTAL_VARIATION:
                sum_near += lane_sum(-c_t * excess_of_teacher(d, p_t, p_s))
                sum_excess += lane_sum(p_s)
                if FORMULA == SYMMETRIC_KL:
                    sum_far += lane_sum(mul0(p_s, -c_s * d))  # the other part, infinite where that is
            else:
                d2_r = d * LOG2_E + log2_r
                if not FAR_KNOWN:
                    sum_far += lane_sum(p_s * ratio(d, d2_r, c_t, c_s, w, FORMULA, MIX, BALANCED, FAR, FAST_LOG))
                if MIX != MIX_TEACHER or FORMULA == TOTAL_VARIATION:
                    sum_near += lane_sum(p_s * ratio(d, d2_r, c_t, c_s, w, FORMULA, MIX, BALANCED, NEAR, FAST_LOG))
    return sum_term, sum_far, sum_near, sum_excess


@triton.jit
def from_exact_sums(
    soft, sum_far, sum_near, sum_excess, c_t, c_s, w, near_below, FORMULA: tl.constexpr, MIX: tl.constexpr
):  # fmt: skip
    """(S, G, the form of g: 0 far, 1 near) of a row that has been summed."""
    if FORMULA == TOTAL_VARIATION:
        soft += 0.5 * sum_excess * (sum_far + sum_near)  # Σ p_t − p_s is not 0 by the normalisers' rounding
        near = -sum_near < sum_far
        # 0·S shows a NaN of the teacher's, which no sign does.
        return soft, tl.where(near, sum_near, sum_far) + 0.0 * soft, tl.where(near, 1.0, 0.0)
    elif FORMULA == CROSS_ENTROPY:
        return soft, sum_near, 1.0
    # An error δ of d in all columns adds c·δ²/2 to S, and −c·δ to Σ g, which is δ's alone where S is small enough.
    c = c_t * (1.0 - w) * (1.0 - w) + c_s * w * w
    if FORMULA == SYMMETRIC_KL:
        c = c_t + c_s
    if MIX == MIX_TEACHER:
        of_rounding = sum_far - soft
    elif FORMULA == SYMMETRIC_KL:
        of_rounding = sum_far + sum_near
    else:
        of_rounding = sum_near
    soft -= tl.where(soft < 1e-6 * c, 0.5 * of_rounding * of_rounding / c, 0.0)
    if MIX == MIX_TEACHER:
        return soft, tl.where(soft == float("inf"), soft, sum_far), 0.0
    elif FORMULA == SYMMETRIC_KL:
        return soft, sum_far + sum_near, 1.0
    elif MIX == MIX_STUDENT:  # at any distance
        return soft, sum_near, 1.0
    else:
        near = soft < near_below
        return soft, tl.where(near, sum_near, sum_far), tl.where(near, 1.0, 0.0)


@triton.jit
def rounded_normaliser(shift, log_sum, k):
    """(the logarithm of the normaliser in log₂, rounded, and what 2^(x·k − it) lacks to be the probability)."""
    rounded = tl.fma(shift, k, log_sum * LOG2_E)
    return rounded, tl.exp2(tl.fma(-shift, k, rounded) - log_sum * LOG2_E)


@triton.jit
def factor_of(shift, k):
    """What exponents relative to a peak are multiplied by: k, or 1 of a huge peak, whose product with k is rounded by
    much or overflows. Logits that differ there do so by 64 or more, times k too: the others are nothing."""
    return tl.where(tl.abs(shift) * tl.minimum(k, 1.0) > 536870912.0, 1.0, k)


@triton.jit
def hard_factors(hard_scale, z_scale, z_shift, log_h, rest, smoothing, n):
    """Of the hard term and the z-loss: (the factor of softmax(z), the label's gradient, what smoothing takes off)."""
    z_grad = tl.where(z_scale != 0.0, 2.0 * z_scale * (z_shift + log_h), 0.0)  # of softmax(z), at the label too
    label_grad = hard_scale * (smoothing - rest) + z_grad * (1.0 - rest)
    return hard_scale + z_grad, label_grad, hard_scale * (smoothing / n)


@triton.jit
def slice_gradient(
    z_ptr, u_ptr, dz_ptr, head, length, label, hard_scale, label_grad, smooth_grad, soft_scale,
    z_shift, u_shift, log_h, log_s, log_r, grad_sum, inv_t, c_t, c_s, w,
    FORMULA: tl.constexpr, MIX: tl.constexpr, BALANCED: tl.constexpr, FORM: tl.constexpr, POWER: tl.constexpr,
    FAST_LOG: tl.constexpr, HARD: tl.constexpr, SOFT: tl.constexpr, SMOOTH: tl.constexpr,
    BLOCK: tl.constexpr, VEC: tl.constexpr, PEEL: tl.constexpr,
):  # fmt: skip
    """Stage 3, walking back. The scales are folded into the numbers; p_s has one, power_scale·p_s^(T−1) − scale·G.

    Without ``u_ptr`` u is z.
    """
    k = inv_t * LOG2_E
    if SOFT:
        z_offset, u_offset, shift = offsets_and_shift(z_shift, u_shift, log_r, inv_t)
        infinite = grad_sum == float("inf")  # an infinite reverse KL has no gradient
        scale = tl.where(infinite, 0.0, soft_scale * inv_t)
        scale = tl.where(log_r == log_r, scale, float("nan"))  # a minimum and mul0 hide a NaN of the logits
        common = tl.where(infinite, 0.0, -scale * grad_sum)
        c_t *= scale
        c_s *= scale
        far_shift = -log_r * LOG2_E + log2_odds(w, MIX)
        power_scale = hard_scale * tl.exp2((POWER * log_s - log_h) * LOG2_E)
        # What is proportional to a probability takes its exponent in one fused step, whose constant is rounded, and the
        # rounding's inverse into its factors.
        PRODUCTS: tl.constexpr = (MIX == MIX_STUDENT and FORMULA != TOTAL_VARIATION) and FORM == FAR
        if PRODUCTS:
            k_s = k
            k_t = k
            if u_ptr is None:
                k_s = factor_of(z_shift, k)
                k_t = factor_of(u_shift, k)
            s_at, of_s = rounded_normaliser(z_shift, log_s, k_s)
            t_at, of_t = rounded_normaliser(u_shift, log_s + log_r, k_t)
            common *= of_s
            c_t *= of_t
            c_s *= of_s
            power_scale *= integer_power(of_s, POWER)
    apart = tile_apart(label, length, BLOCK, PEEL)
    for masked in tl.static_range(1, -1, -1):
        first, end = tile_range(length, apart, BLOCK, PEEL, masked)
        for i in tl.range(first, end):
            tile = tile_at(i, first, end, length, apart, BLOCK, PEEL, masked, True)
            z = load_tile(z_ptr, tile, head, length, BLOCK, VEC, masked, DROP)
            x = z - z_shift
            if HARD and masked:
                is_label = columns_of(BLOCK, VEC) == label - tile
            dz = 0.0
            if SOFT:
                if u_ptr is None:
                    u = z
                else:
                    u = load_tile(u_ptr, tile, head, length, BLOCK, VEC, masked, DROP)
                v = u - u_shift
                if PRODUCTS:
                    p_s = tl.exp2(tl.fma(z, k_s, -s_at))
                    p_t = tl.exp2(tl.fma(u, k_t, -t_at))
                else:
                    p_s = tl.exp2(x * k - log_s * LOG2_E)
                    p_t = tl.exp2(v * k - (log_s + log_r) * LOG2_E)
                factor = common
                if HARD and POWER > 0:
                    hard = power_scale * integer_power(p_s, POWER - 1)
                    if masked:
                        hard = tl.where(is_label, 0.0, hard)
                    factor += hard
                d = ((u - u_offset) - (z - z_offset)) * inv_t - shift
                if MIX == MIX_STUDENT and FORMULA != TOTAL_VARIATION:
                    if FORM == NEAR:
                        p_t = excess_of_teacher(d, p_t, p_s)
                    if FORMULA == SYMMETRIC_KL:
                        factor += ratio(d, 0.0, c_t, c_s, w, FORMULA, MIX, BALANCED, FORM, FAST_LOG)
                    dz = p_s * factor - c_t * p_t
                else:
                    d2_r = (v - x) * k + far_shift
                    dz = p_s * (factor + ratio(d, d2_r, c_t, c_s, w, FORMULA, MIX, BALANCED, FORM, FAST_LOG))
            if HARD:
                if not SOFT or POWER == 0:
                    hard = hard_scale * tl.exp2((x - log_h) * LOG2_E)
                    if masked:
                        hard = tl.where(is_label, 0.0, hard)
                    dz += hard
                if SMOOTH:
                    dz -= smooth_grad
                if masked:
                    dz += tl.where(is_label, label_grad, 0.0)
            store_tile(dz_ptr, tile, head, length, dz, BLOCK, VEC, masked)


@triton.jit
def integer_power(x, POWER: tl.constexpr):
    """x^POWER, 0 to 4."""
    if POWER == 0:
        return 1.0
    elif POWER == 1:
        return x
    elif POWER == 2:
        return x * x
    elif POWER == 3:
        return x * x * x
    else:
        return (x * x) * (x * x)


@triton.jit
def zero_columns(ptr, first, end, BLOCK: tl.constexpr):
    for start in tl.range(first, end, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        tl.store(ptr + cols, tl.zeros([BLOCK], ptr.dtype.element_ty), mask=cols < end)
