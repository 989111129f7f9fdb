"""The divergence functors: (term, g) of one column, in Triton.

Math    a = log p_t, b = log p_s, d = a − b, m = w·p_t + (1−w)·p_s; D = Σ term and g = ∂D/∂b. The family is
        c_t·KL(p_t‖m) + c_s·KL(p_s‖m); its term has the masses m − p added, which sum to 0 over a row: then every term
        is >= 0 and the rounding of the normalisers cancels, so a divergence near 0 keeps its digits.
Rules   0·log 0 = 0 and 0·inf = 0; d is 0 where both sides are −inf. Neither loads, nor a temperature, nor a max here.
"""

import triton
import triton.language as tl

# What is known of G = Σ g before g itself: it is −c_t; or c_s·(1 + E_s[b − a]), which the first walk can average; or
# nothing, and it takes a walk of its own.
GRAD_SUM_CONSTANT, GRAD_SUM_ONLINE, GRAD_SUM_WALK = 0, 1, 2

MIX_STUDENT = tl.constexpr(0)
MIX_TEACHER = tl.constexpr(1)

NEAR = tl.constexpr(0.5)
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def mul0(p, x):
    """p·x with 0·inf = 0."""
    return tl.where(p == 0.0, 0.0, p * x)


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
def bregman(p, x, q):
    """p·x − p + q, which is p·log(p/q) − p + q >= 0, given x = log(p/q)."""
    return tl.where(tl.abs(x) < NEAR, p * exp_remainder(x), mul0(p, x) + (q - p))


@triton.jit
def log_mixture(d, w):
    """(log(m/p_t), log(m/p_s)) = (log(w + (1−w)·exp(−d)), log((1−w) + w·exp(d))), neither overflowing."""
    size = tl.abs(d)
    near = size < NEAR
    own = tl.where(d > 0, w, 1.0 - w)  # weight of the larger probability
    other = tl.where(d > 0, 1.0 - w, w)
    excess = other * tl.where(near, exp_remainder(size) - size, 0.0)  # m over the larger one, less 1
    ratio = tl.where(near, 1.0 + excess, own + other * tl.exp2(-size * LOG2_E))
    # log1p: the quotient undoes the rounding of 1 + excess (Kahan). tl.log is accurate to the last digits.
    log_ratio = tl.log(ratio)
    exact = tl.where(ratio == 1.0, excess, log_ratio * (excess / (ratio - 1.0)))
    log_ratio = tl.where(near, exact, log_ratio)
    return tl.where(d > 0, log_ratio, log_ratio - d), tl.where(d > 0, log_ratio + d, log_ratio)


@triton.jit
def mixture_kl(b, d, p_t, p_s, c_t, c_s, w, MIX: tl.constexpr):
    if MIX == MIX_STUDENT:
        return c_t * bregman(p_t, d, p_s), -c_t * p_t
    elif MIX == MIX_TEACHER:
        return c_s * bregman(p_s, -d, p_t), c_s * (p_s - mul0(p_s, d))
    else:
        log_m_t, log_m_s = log_mixture(d, w)
        m = w * p_t + (1.0 - w) * p_s
        term = c_t * bregman(p_t, -log_m_t, m) + c_s * bregman(p_s, -log_m_s, m)
        shared = (1.0 - w) * tl.exp2(-log_m_s * LOG2_E) * (c_t * p_t + c_s * p_s)  # exp2: p_s/m
        return term, c_s * (p_s - mul0(p_s, log_m_s)) - shared


@triton.jit
def cross_entropy(b, d, p_t, p_s, c_t, c_s, w, MIX: tl.constexpr):
    return -mul0(p_t, b), -p_t


@triton.jit
def total_variation(b, d, p_t, p_s, c_t, c_s, w, MIX: tl.constexpr):
    half = tl.where(p_s > p_t, 0.5, tl.where(p_s < p_t, -0.5, p_s - p_t))  # the last keeps a NaN
    return half * (p_s - p_t), half * p_s


# By fastkd._request.Formula.
FUNCTORS = (mixture_kl, cross_entropy, total_variation)


def grad_sum_rule(formula: int, mix: int) -> int:
    if FUNCTORS[formula] is cross_entropy:
        return GRAD_SUM_CONSTANT
    if FUNCTORS[formula] is mixture_kl and mix in (MIX_STUDENT, MIX_TEACHER):
        return GRAD_SUM_CONSTANT if mix == MIX_STUDENT else GRAD_SUM_ONLINE
    return GRAD_SUM_WALK
