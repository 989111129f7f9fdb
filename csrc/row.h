// The three stages of a row, by column. The only place besides the launchers that knows T, scales and labels.
//
// Math    stage 1  normalisers lse(z), lse(z/T), lse(u/T), and what can be averaged with their exponentials
//         stage 2  S = Σ term(a, b) and G = Σ g(a, b), with b = log softmax(z/T), a = log softmax(u/T)
//         stage 3  dz = hard_scale·(softmax(z) − 1_y) + soft_scale/T·(g − p_s·G)
//         With t = lse of the columns other than y, less z_y: hard = softplus(t), 1 − p_y = sigmoid(t), both with all
//         their digits as p_y → 1. Label smoothing ε adds ε·(z_y − mean z) to hard and ε·(1_y − 1/n) to its gradient;
//         a z-loss, 2·z_scale·lse(z)·softmax(z) to dz.
#pragma once

#include "divergence.h"
#include "lse.h"

namespace fastkd {
inline namespace FASTKD_ISA {

// What goes from z and u before d is taken: the two sets of logits may lie at some distance, and the rounding of u − z
// is of its size. It goes from the one that is farther from 0, which loses nothing by it, the other being left as it is.
// None where the two are close, whose difference is exact.
struct Offsets {
    float z, u;
};
FASTKD_HD Offsets offsets_between(float z_peak, float u_peak) {
    const float distance = 8.0f * rint((u_peak - z_peak) * 0.125f);
    if (abs(z_peak) > abs(u_peak)) return {-distance, 0.0f};
    return {0.0f, distance};
}

// d = log p_t − log p_s = (u − z)/T − shift, both less their offsets.
FASTKD_HD float log_ratio(float z, float u, float z_offset, float u_offset, float inv_t, float shift) {
    z -= z_offset, u -= u_offset;
    return (u == z ? 0.0f : u - z) * inv_t - shift;  // u == z: both may be −inf
}

// T·∂D/∂z. An infinite reverse KL (G = inf) has no gradient; anywhere else G is finite, or the logits hold a NaN.
// Numbers, not a TermGrad: GCC vectorises no loop that hands a structure on.
template <class Functor>
FASTKD_HD float soft_gradient(float g, float apart, float p_s, float grad_sum) {
    if (Functor::kGradSum == GradSum::kFromMean && grad_sum == kInfinity) return 0.0f;
    const float residual = g - p_s * grad_sum;
    if constexpr (Functor::kApart) return residual + apart;
    return residual;
}

// What stage 1 averages, of one column or, of a shift of them all, of their sums: s and t are the exponentials of
// student and teacher, x and y what z and u are above their peaks.
template <Moment kMoment, class Real>
FASTKD_HD Real moment_of(Real s, Real t, Real x, Real y) {
    if constexpr (kMoment == Moment::kTeacherRatio) return mul0(t, y - x);
    if constexpr (kMoment == Moment::kStudentRatio) return mul0(s, x - y);
    if constexpr (kMoment == Moment::kTeacherLog) return mul0(t, y);
    return Real{};
}

template <class Real>
struct Mean {
    Real value;  // a KL
    bool has_digits;
};

// From that average over T, and log Σ exp of the teacher's less the student's.
template <Moment kMoment, class Real>
FASTKD_HD Mean<Real> kl_from_mean(Real mean, Real log_ratio) {
    const Real value = kMoment == Moment::kStudentRatio ? mean + log_ratio : mean - log_ratio;
    const Real size = mean < 0 ? -mean : mean;
    // The mean is good to some 1e-7 of its size; the sum before it was divided may have overflowed.
    bool has_digits = value >= Real(0.02) * size && size < Real(kInfinity);
    // A G of thousands must be rounded as the g are from which it is subtracted.
    if (kMoment == Moment::kStudentRatio && size > 64) has_digits = false;
    return {value, has_digits};
}

template <class Real>
struct Value {
    Real value, grad_sum;
    bool has_digits;  // else stage 2 sums them
    bool is_small;    // and in the near form at once
};

// S, or a KL that tells of its size, and G in the far form, from what stage 1 averaged. ``second`` is of kSecond.
template <class Functor, class Real>
FASTKD_HD Value<Real> value_from_means(const Functor& functor, Real mean, Real second, Real log_ratio) {
    const Mean<Real> kl = kl_from_mean<Functor::kMoment>(mean, log_ratio);
    Real value = functor.weight() * kl.value;
    Real grad_sum = Functor::kGradSum == GradSum::kFromMean ? value : -functor.weight();
    bool has_digits = kl.has_digits;
    if constexpr (Functor::kSecond == Moment::kStudentRatio) {
        const Mean<Real> reverse = kl_from_mean<Functor::kSecond>(second, log_ratio);
        grad_sum = functor.numbers.c_s * reverse.value;
        value += grad_sum;
        has_digits = has_digits && reverse.has_digits;
    }
    const Real near_below = Functor::kMeanIsValue ? functor.near_below() : kFewDigits;
    return {value, grad_sum, has_digits && Functor::kMeanIsValue, value < near_below};
}

struct LabelTerm {
    float loss, rest;  // −log p_y and 1 − p_y
};

FASTKD_HD LabelTerm label_term(float t) {
    const float small = exp(-abs(t));
    const float loss = (t > 0.0f ? t : 0.0f) + log1p(small, 1.0f + small);
    const float rest = (t > 0.0f ? 1.0f : small) / (1.0f + small);
    return {t != t ? t : loss, rest};
}

}  // namespace FASTKD_ISA
}  // namespace fastkd
