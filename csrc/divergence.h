// The divergence functors: (term, g) of one column.
//
// Math    a = log p_t, b = log p_s, d = a − b, m = w·p_t + (1−w)·p_s; D = Σ term and g = ∂D/∂b. The family is
//         c_t·KL(p_t‖m) + c_s·KL(p_s‖m); its term has the masses m − p added, which sum to 0 over a row: then every
//         term is >= 0 and the rounding of the normalisers cancels, so a divergence near 0 keeps its digits.
// Exact   Each functor has column<kExact>(b, d, p_t, p_s). With kExact a term near 0 has all its digits, which costs
//         series; without, it is off by some 1e-7 of p, which is enough for g, and for a sum that is not small itself.
// Rules   0·log 0 = 0 and 0·inf = 0; d is 0 where both sides are −inf. Neither loads, nor a temperature, nor a max.
#pragma once

#include "numeric.h"

namespace fastkd {
inline namespace FASTKD_ISA {

struct TermGrad {
    float term, g;
};

// As in fastkd/_request.py; a test compares them.
enum class Formula : int { kMixtureKL = 0, kCrossEntropy = 1, kTotalVariation = 2 };

// What m is: compile-time structure, derived from the number w.
enum class Mix : int { kStudent = 0, kTeacher = 1, kBoth = 2 };

// The numbers, which are run-time arguments.
struct Numbers {
    Formula formula;
    float c_t, c_s, w;

    FASTKD_HD Mix mix() const { return w == 0.0f ? Mix::kStudent : w == 1.0f ? Mix::kTeacher : Mix::kBoth; }
};

// What stage 1 can average of the term, so that S is known after one walk: E_t[d], −E_s[d] or −E_t[b].
enum class Moment : int { kNone, kTeacherRatio, kStudentRatio, kTeacherLog };

// What is known of G = Σ g before g itself: −c_t; c_s + S; or nothing, and stage 2 sums it.
enum class GradSum : int { kConstant, kFromValue, kSummed };

// p·x − p + q, which is p·log(p/q) − p + q >= 0, given x = log(p/q).
template <bool kExact>
FASTKD_HD float bregman(float p, float x, float q) {
    const float far = mul0(p, x) + (q - p);
    if constexpr (!kExact) return far;
    const float near = p * exp_remainder(x);
    return abs(x) < 0.5f ? near : far;
}

// log(m/p_t) = log(w + (1−w)·exp(−d)) and log(m/p_s) = log((1−w) + w·exp(d)), neither overflowing; and p_s/m.
struct LogMixture {
    float over_teacher, over_student, student_share;
};

template <bool kExact>
FASTKD_HD LogMixture log_mixture(float d, float p_t, float p_s, float w) {
    const float size = abs(d);
    const bool teacher_larger = d > 0.0f;
    const float own = teacher_larger ? w : 1.0f - w;  // weight of the larger probability
    const float other = teacher_larger ? 1.0f - w : w;
    const float exp_minus = exp_from_ratio(size, teacher_larger ? p_s : p_t, teacher_larger ? p_t : p_s);
    const float ratio = own + other * exp_minus;  // m over the larger probability
    float log_ratio;
    if constexpr (kExact) {
        const float expm1_minus = size < 0.5f ? exp_remainder(size) - size : exp_minus - 1.0f;
        log_ratio = log1p(other * expm1_minus, ratio);
    } else {
        log_ratio = log(ratio);
    }
    return {teacher_larger ? log_ratio : log_ratio - d, teacher_larger ? log_ratio + d : log_ratio,
            divide(teacher_larger ? exp_minus : 1.0f, ratio)};
}

template <bool kTeacherTerm, bool kStudentTerm, Mix kMix>
struct MixtureKL {
    Numbers numbers;

    static constexpr bool kExactDiffers = true;
    static constexpr bool kGradNeedsRatio = kMix != Mix::kStudent;
    static constexpr Moment kMoment = kMix == Mix::kStudent   ? Moment::kTeacherRatio
                                      : kMix == Mix::kTeacher ? Moment::kStudentRatio
                                                              : Moment::kNone;
    static constexpr GradSum kGradSum = kMix == Mix::kStudent   ? GradSum::kConstant
                                        : kMix == Mix::kTeacher ? GradSum::kFromValue
                                                                : GradSum::kSummed;

    static bool matches(const Numbers& n) {
        if (n.formula != Formula::kMixtureKL || n.mix() != kMix) return false;
        return kMix != Mix::kBoth || (kTeacherTerm == (n.c_t != 0.0f) && kStudentTerm == (n.c_s != 0.0f));
    }

    FASTKD_HD float weight() const { return kMix == Mix::kStudent ? numbers.c_t : numbers.c_s; }

    template <bool kExact>
    FASTKD_HD TermGrad column(float, float d, float p_t, float p_s) const {
        const float c_t = kTeacherTerm ? numbers.c_t : 0.0f;
        const float c_s = kStudentTerm ? numbers.c_s : 0.0f;
        if constexpr (kMix == Mix::kStudent) return {c_t * bregman<kExact>(p_t, d, p_s), -c_t * p_t};
        if constexpr (kMix == Mix::kTeacher)
            return {c_s * bregman<kExact>(p_s, -d, p_t), c_s * (p_s - mul0(p_s, d))};
        const float w = numbers.w;
        const LogMixture log_m = log_mixture<kExact>(d, p_t, p_s, w);
        const float m = w * p_t + (1.0f - w) * p_s;
        float term = 0.0f;
        float g = (w - 1.0f) * log_m.student_share * (c_t * p_t + c_s * p_s);
        if constexpr (kTeacherTerm) term += c_t * bregman<kExact>(p_t, -log_m.over_teacher, m);
        if constexpr (kStudentTerm) {
            term += c_s * bregman<kExact>(p_s, -log_m.over_student, m);
            g += c_s * (p_s - mul0(p_s, log_m.over_student));
        }
        return {term, g};
    }
};

// H(p_t, p_s): forward KL plus the teacher's entropy; the same gradient.
struct CrossEntropy {
    Numbers numbers;
    static constexpr bool kExactDiffers = false;
    static constexpr bool kGradNeedsRatio = false;
    static constexpr Moment kMoment = Moment::kTeacherLog;
    static constexpr GradSum kGradSum = GradSum::kConstant;

    static bool matches(const Numbers& n) { return n.formula == Formula::kCrossEntropy; }
    FASTKD_HD float weight() const { return 1.0f; }
    template <bool kExact>
    FASTKD_HD TermGrad column(float b, float, float p_t, float) const {
        return {-mul0(p_t, b), -p_t};
    }
};

struct TotalVariation {
    Numbers numbers;
    static constexpr bool kExactDiffers = false;
    static constexpr bool kGradNeedsRatio = false;
    static constexpr Moment kMoment = Moment::kNone;
    static constexpr GradSum kGradSum = GradSum::kSummed;

    static bool matches(const Numbers& n) { return n.formula == Formula::kTotalVariation; }
    FASTKD_HD float weight() const { return 1.0f; }
    template <bool kExact>
    FASTKD_HD TermGrad column(float, float, float p_t, float p_s) const {
        const float half = p_s > p_t ? 0.5f : p_s < p_t ? -0.5f : p_s - p_t;  // the last keeps a NaN
        return {half * (p_s - p_t), half * p_s};
    }
};

// Stands for the divergence where there is no soft term.
struct NoSoftTerm {
    static constexpr bool kExactDiffers = false;
    static constexpr bool kGradNeedsRatio = false;
    static constexpr Moment kMoment = Moment::kNone;
    static constexpr GradSum kGradSum = GradSum::kConstant;

    FASTKD_HD float weight() const { return 0.0f; }
    template <bool kExact>
    FASTKD_HD TermGrad column(float, float, float, float) const {
        return {0.0f, 0.0f};
    }
};

// The one list: what is instantiated, dispatched on and tested.
template <class... Functors>
struct FunctorList {
    // Calls visit(functor) with the first functor that these numbers select; false if there is none.
    template <class Visit>
    static bool dispatch(const Numbers& numbers, Visit&& visit) {
        return ((Functors::matches(numbers) && (visit(Functors{numbers}), true)) || ...);
    }
};

using Divergences = FunctorList<MixtureKL<true, false, Mix::kStudent>,
                                MixtureKL<false, true, Mix::kTeacher>,
                                MixtureKL<true, true, Mix::kBoth>,
                                MixtureKL<true, false, Mix::kBoth>,
                                MixtureKL<false, true, Mix::kBoth>,
                                CrossEntropy,
                                TotalVariation>;

}  // namespace FASTKD_ISA
}  // namespace fastkd
