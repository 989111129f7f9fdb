"""The divergence functors: a column's term of the value and of the gradient's g, in Triton.

Math    a = log p_t, b = log p_s, d = a − b, m = w·p_t + (1−w)·p_s; D = Σ term and g = ∂D/∂b. The family is
        c_t·KL(p_t‖m) + c_s·KL(p_s‖m).
Forms   A multiple of p_s added to g does not change dz = g − p_s·Σg. So there are two forms of g, far and near, each of
        which leaves nothing to cancel where the distributions are as its name says; a row takes one of them throughout.
            m = p_s     −c_t·p_t                            −c_t·p_s·expm1(d)
            m = p_t     −c_s·p_s·d                          the same
            mixture     p_s·(c_s·x + κ·p_t/m), κ = c_s·w − c_t·(1−w), which is 0 for every Jensen-Shannon divergence;
                        x = −log1p(w/(1−w)·exp(d))          x = −log1p(w·expm1(d)), and p_t/m less 1
            tvd         p_s where p_s > p_t                 −p_s where p_s < p_t; whichever has the smaller sum
        The symmetric KL has the sum of the first two.
Exact   A term near 0 has all its digits: the masses m − p are added, which sum to 0 over a row, so that every term is
        >= 0 and the rounding of the normalisers cancels, and it is summed by series where d is small.
Rules   0·log 0 = 0 and 0·inf = 0. d may be NaN where both sides are −inf: minimum and maximum drop a NaN; a product
        with p_s or p_t keeps one that comes from the logits. No loads here, no temperature, no sums.
"""

import triton
import triton.language as tl

from fastkd._request import Formula, Mix

MIX_STUDENT = tl.constexpr(int(Mix.STUDENT))
MIX_TEACHER = tl.constexpr(int(Mix.TEACHER))
MIX_BOTH = tl.constexpr(int(Mix.BOTH))
CROSS_ENTROPY = tl.constexpr(int(Formula.CROSS_ENTROPY))
TOTAL_VARIATION = tl.constexpr(int(Formula.TOTAL_VARIATION))
SYMMETRIC_KL = tl.constexpr(int(Formula.SYMMETRIC_KL))

# Whose mean of d stage 1 takes, so that S is known after one walk: E_t[d], −E_s[d], both; or none: stage 2 sums S, G.
MOMENT_NONE, MOMENT_TEACHER, MOMENT_STUDENT, MOMENT_BOTH = range(4)

FAR, NEAR = tl.constexpr(0), tl.constexpr(1)  # the forms of g
SMALL = tl.constexpr(0.5)  # abs(d) of the series
BOUND = tl.constexpr(92.0)  # of log₂ p_t/p_s in a mixture: beyond it one side is nothing beside the other
HUGE = tl.constexpr(3.4028234663852886e38)  # the largest number
LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def mul0(p, x):
    """p·x with 0·inf = 0. A product outermost, so that a sum of them is fused."""
    return p * tl.where(p == 0.0, 0.0, x)


@triton.jit
def bounded(d, bound):
    """d within ±bound; a NaN becomes a number."""
    return tl.minimum(tl.maximum(d, -bound), bound)


@triton.jit
def exp_remainder(x):
    """exp(−x) − 1 + x for abs(x) < SMALL: the Taylor series to x⁸, 4e-8 relative at the end of the range."""
    series = -1.0 / 5040.0 + x * (1.0 / 40320.0)
    series = 1.0 / 720.0 + x * series
    series = -1.0 / 120.0 + x * series
    series = 1.0 / 24.0 + x * series
    series = -1.0 / 6.0 + x * series
    return x * x * (0.5 + x * series)


@triton.jit
def expm1(d):
    return tl.where(tl.abs(d) < SMALL, d + exp_remainder(-d), tl.exp2(d * LOG2_E) - 1.0)


@triton.jit
def log2(x, FAST_LOG: tl.constexpr):
    """To 3e-7, absolute near x = 1. FAST_LOG: by NVIDIA's instruction, for which Triton has no name of its own."""
    if FAST_LOG:
        lg2: tl.constexpr = "lg2.approx.ftz.f32 $0, $1;"
        return tl.inline_asm_elementwise(lg2, "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)
    else:
        return tl.log2(x)


@triton.jit
def log2_1p(x, FAST_LOG: tl.constexpr):
    """log₂(1 + x), x > −1, to 6e-6 relative at worst, where the logarithm takes over from the series."""
    series = x * (LOG2_E / -4.0) + LOG2_E / 3.0
    series = x * series + LOG2_E / -2.0
    series = x * series + LOG2_E
    return tl.where(tl.abs(x) < 0.03125, x * series, log2(1.0 + x, FAST_LOG))


@triton.jit
def excess_of_teacher(d, p_t, p_s):
    """p_t − p_s, with all its digits where d has them."""
    return tl.where(tl.abs(d) < SMALL, p_s * (d + exp_remainder(-d)), p_t - p_s)


@triton.jit
def bregman(p, x, q):
    """p·x − p + q, which is p·log(p/q) − p + q >= 0, given x = log(p/q)."""
    return tl.where(tl.abs(x) < SMALL, p * exp_remainder(x), mul0(p, x) + (q - p))


@triton.jit
def imbalance(c_t, c_s, w):
    """κ"""
    return c_s * w - c_t * (1.0 - w)


@triton.jit
def log2_odds(w, MIX: tl.constexpr):
    """log₂ r of a mixture, r = w/(1−w)."""
    if MIX == MIX_BOTH:
        return tl.log2(w / (1.0 - w))
    else:
        return 0.0


@triton.jit
def far_mixture(d2, p_t, p_s, log2_r, FAST_LOG: tl.constexpr):
    """(p_t·log₂(p_t/m·(1−w)), p_s·log₂(m/p_s/(1−w)), p_s·p_t/m·w) given d in log₂: what the sums of a mixture are made
    of by :func:`from_far_mixture`."""
    d2 = tl.minimum(tl.maximum(d2, -BOUND), BOUND)
    excess = tl.exp2(d2 + log2_r)
    log_m = log2_1p(excess, FAST_LOG)
    of_teacher = tl.where(excess > 16777216.0, -log2_r, d2 - log_m)  # the limit, before the difference loses digits
    return p_t * of_teacher, p_s * log_m, p_s * (excess / (1.0 + excess))


@triton.jit
def from_far_mixture(teacher, student, share, c_t, c_s, w, log_v, near_below, BALANCED: tl.constexpr):
    """(S, G in the far form, whether S has digits) from the sums of :func:`far_mixture`, a lane; log_v = log(1−w)."""
    constant = -(c_t + c_s) * log_v
    grad_sum = tl.sum(student, 0) * LN_2 * -c_s
    soft = tl.sum(teacher, 0) * LN_2 * c_t + grad_sum + constant
    has_digits = soft >= tl.maximum(near_below, 0.06 * constant)
    if not BALANCED:
        grad_sum += tl.sum(share, 0) * (imbalance(c_t, c_s, w) / w)
    return soft, grad_sum, has_digits


@triton.jit
def ratio(
    d, d2_r, c_t, c_s, w,
    FORMULA: tl.constexpr, MIX: tl.constexpr, BALANCED: tl.constexpr, FORM: tl.constexpr, FAST_LOG: tl.constexpr,
):  # fmt: skip
    """g/p_s, of all but m = p_s. A mixture in the far form takes log₂(r·p_t/p_s). BALANCED: κ = 0."""
    if FORMULA == TOTAL_VARIATION:
        larger = tl.minimum(tl.maximum(0.5 - d * 1e30, 0.0), 1.0)  # 1 where p_s > p_t, 1/2 where they are equal
        if FORM == NEAR:
            larger -= 1.0
        return c_t * larger
    elif MIX == MIX_TEACHER or FORMULA == SYMMETRIC_KL:  # of this the part in p_s·d
        return -c_s * tl.maximum(tl.minimum(d, 1e30), -HUGE)  # above p_s is 0, and below, in an infinite row, c_s
    else:
        if FORM == NEAR:
            e = expm1(bounded(d, BOUND * LN_2))
            excess = w * e
            share = (1.0 - w) * e
        else:
            excess = tl.exp2(tl.minimum(d2_r, BOUND))
            share = excess / w
        ratio = log2_1p(excess, FAST_LOG) * (LN_2 * -c_s)
        if not BALANCED:
            ratio += imbalance(c_t, c_s, w) * (share / (1.0 + excess))
        return ratio


@triton.jit
def exact_term(b, d, p_t, p_s, c_t, c_s, w, FORMULA: tl.constexpr, MIX: tl.constexpr, FAST_LOG: tl.constexpr):
    """Of which S is the sum."""
    if FORMULA == CROSS_ENTROPY:
        return -mul0(p_t, b)
    elif FORMULA == TOTAL_VARIATION:
        return 0.5 * tl.abs(excess_of_teacher(d, p_t, p_s))
    elif FORMULA == SYMMETRIC_KL:
        return c_t * bregman(p_t, d, p_s) + c_s * bregman(p_s, -d, p_t)
    elif MIX == MIX_STUDENT:
        return c_t * bregman(p_t, d, p_s)
    elif MIX == MIX_TEACHER:
        return c_s * bregman(p_s, -d, p_t)
    else:
        d = bounded(d, BOUND * LN_2)
        log_m_s = log2_1p(w * expm1(d), FAST_LOG) * LN_2  # log(m/p_s)
        log_m_t = tl.where(d < SMALL, log_m_s - d, log2(w + (1.0 - w) * tl.exp2(-d * LOG2_E), FAST_LOG) * LN_2)
        m = w * p_t + (1.0 - w) * p_s
        return c_t * bregman(p_t, -log_m_t, m) + c_s * bregman(p_s, -log_m_s, m)


def moment_rule(formula: int, mix: int) -> int:
    if formula == Formula.TOTAL_VARIATION or mix == Mix.BOTH:
        return MOMENT_NONE
    if formula == Formula.SYMMETRIC_KL:
        return MOMENT_BOTH
    return MOMENT_TEACHER if mix == Mix.STUDENT else MOMENT_STUDENT
