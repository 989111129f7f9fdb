"""The divergence functors: (term, g) of one column, in Triton.

Math    a = log p_t, b = log p_s, d = a − b, m = w·p_t + (1−w)·p_s; D = Σ term and g = ∂D/∂b. The family is
        c_t·KL(p_t‖m) + c_s·KL(p_s‖m); its term has the masses m − p added, which sum to 0 over a row: then every term
        is >= 0 and the rounding of the normalisers cancels, so a divergence near 0 keeps its digits.
Exact   With EXACT a term near 0 has all its digits, which costs series; without, it is off by some 1e-7 of p, which
        is enough for g, and for a sum that is not small itself.
Rules   0·log 0 = 0 and 0·inf = 0; d is 0 where both sides are −inf. Neither loads, nor a temperature, nor a max here.
"""

import triton
import triton.language as tl

from fastkd._request import Formula, Mix

MIX_STUDENT = tl.constexpr(int(Mix.STUDENT))
MIX_TEACHER = tl.constexpr(int(Mix.TEACHER))
CROSS_ENTROPY = tl.constexpr(int(Formula.CROSS_ENTROPY))
TOTAL_VARIATION = tl.constexpr(int(Formula.TOTAL_VARIATION))

# What stage 1 can average of the term, so that S is known after one walk: E_t[d], −E_s[d] or −E_t[b]. With the second G
# is c_s + S, with the others it is constant; with none of them stage 2 sums both.
MOMENT_NONE, MOMENT_TEACHER_RATIO, MOMENT_STUDENT_RATIO, MOMENT_TEACHER_LOG = range(4)

NEAR = tl.constexpr(0.5)
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def mul0(p, x):
    """p·x with 0·inf = 0. A product outermost, so that a sum of them is fused."""
    return p * tl.where(p == 0.0, 0.0, x)


@triton.jit
def exp_remainder(x):
    """exp(−x) − 1 + x for abs(x) < NEAR: the Taylor series to x⁸, 4e-8 relative at the end of the range."""
    series = -1.0 / 5040.0 + x * (1.0 / 40320.0)
    series = 1.0 / 720.0 + x * series
    series = -1.0 / 120.0 + x * series
    series = 1.0 / 24.0 + x * series
    series = -1.0 / 6.0 + x * series
    return x * x * (0.5 + x * series)


@triton.jit
def bregman(p, x, q, EXACT: tl.constexpr):
    """p·x − p + q, which is p·log(p/q) − p + q >= 0, given x = log(p/q)."""
    far = mul0(p, x) + (q - p)
    if EXACT:
        return tl.where(tl.abs(x) < NEAR, p * exp_remainder(x), far)
    else:
        return far


@triton.jit
def log_mixture(d, w, EXACT: tl.constexpr):
    """(log(m/p_t), log(m/p_s)) = (log(w + (1−w)·exp(−d)), log((1−w) + w·exp(d))), neither overflowing; and p_s/m."""
    size = tl.abs(d)
    exp_minus = tl.exp2(-size * LOG2_E)
    own = tl.where(d > 0, w, 1.0 - w)  # weight of the larger probability
    other = tl.where(d > 0, 1.0 - w, w)
    ratio = own + other * exp_minus  # m over the larger one
    share = tl.where(d > 0, exp_minus, 1.0) / ratio
    if EXACT:
        near = size < NEAR
        excess = other * tl.where(near, exp_remainder(size) - size, 0.0)  # ratio less 1
        ratio = tl.where(near, 1.0 + excess, ratio)
        log_ratio = tl.log(ratio)
        # log1p: the quotient undoes the rounding of 1 + excess (Kahan).
        exact = tl.where(ratio == 1.0, excess, log_ratio * (excess / (ratio - 1.0)))
        log_ratio = tl.where(near, exact, log_ratio)
    else:
        log_ratio = tl.log(ratio)
    return tl.where(d > 0, log_ratio, log_ratio - d), tl.where(d > 0, log_ratio + d, log_ratio), share


@triton.jit
def mixture_kl(d, p_t, p_s, c_t, c_s, w, MIX: tl.constexpr, EXACT: tl.constexpr):
    if MIX == MIX_STUDENT:
        return c_t * bregman(p_t, d, p_s, EXACT), -c_t * p_t
    elif MIX == MIX_TEACHER:
        return c_s * bregman(p_s, -d, p_t, EXACT), c_s * (p_s - mul0(p_s, d))
    else:
        log_m_t, log_m_s, share = log_mixture(d, w, EXACT)
        m = w * p_t + (1.0 - w) * p_s
        term = c_t * bregman(p_t, -log_m_t, m, EXACT) + c_s * bregman(p_s, -log_m_s, m, EXACT)
        return term, c_s * (p_s - mul0(p_s, log_m_s)) - (1.0 - w) * share * (c_t * p_t + c_s * p_s)


@triton.jit
def cross_entropy(b, p_t):
    return -mul0(p_t, b), -p_t


@triton.jit
def total_variation(p_t, p_s):
    half = tl.where(p_s > p_t, 0.5, tl.where(p_s < p_t, -0.5, p_s - p_t))  # the last keeps a NaN
    return half * (p_s - p_t), half * p_s


@triton.jit
def term_and_g(b, d, p_t, p_s, c_t, c_s, w, FORMULA: tl.constexpr, MIX: tl.constexpr, EXACT: tl.constexpr):
    """The functor that the numbers FORMULA and MIX name, which are compile-time; c_t, c_s and w are not."""
    if FORMULA == CROSS_ENTROPY:
        return cross_entropy(b, p_t)
    elif FORMULA == TOTAL_VARIATION:
        return total_variation(p_t, p_s)
    else:
        return mixture_kl(d, p_t, p_s, c_t, c_s, w, MIX, EXACT)


def moment_rule(formula: int, mix: int) -> int:
    if formula == Formula.CROSS_ENTROPY:
        return MOMENT_TEACHER_LOG
    if formula == Formula.MIXTURE_KL and mix != Mix.BOTH:
        return MOMENT_TEACHER_RATIO if mix == Mix.STUDENT else MOMENT_STUDENT_RATIO
    return MOMENT_NONE
