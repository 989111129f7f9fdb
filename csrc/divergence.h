// The divergence functors: (term, g) of one column.
//
// Math    d = log p_t − log p_s, m = w·p_t + (1−w)·p_s; D = Σ term and g = ∂D/∂log p_s. The family is
//         c_t·KL(p_t‖m) + c_s·KL(p_s‖m); its term has the masses m − p added, which sum to 0 over a row: then every
//         term is >= 0 and the rounding of the normalisers cancels, so a divergence near 0 keeps its digits.
// Forms   dz = g − p_s·Σg does not see a multiple of p_s in g, which decides what cancels. With r = w/(1−w) and
//         κ = c_s·w − c_t·(1−w), a row takes throughout one of
//           far    g = p_s·(κ·p_t/m − c_s·log(1 + r·e^d)),              which has its digits where d ≪ 0 and p_s is large
//           near   g = p_s·(κ·(p_t/m − 1) − c_s·log(1 + w·(e^d − 1))),  where the two are close: all of it is small then
//         near is for rows whose D is small; its term has all its digits as d → 0, which costs series.
// Rules   0·log 0 = 0 and 0·inf = 0; d is 0 where both sides are −inf. Neither loads, nor a temperature, nor a max.
#pragma once

#include <cmath>

#include "numeric.h"

namespace fastkd {
inline namespace FASTKD_ISA {

struct TermGrad {
    float term, g;
    float apart = 0.0f;  // what T·∂D/∂z has beside g − p_s·G, where that would take its digits; if the functor's kApart
};

// As in fastkd/_request.py; a test compares them.
enum class Formula : int { kMixtureKL = 0, kCrossEntropy = 1, kTotalVariation = 2, kSymmetricKL = 3 };

// What m is: compile-time structure, derived from the number w.
enum class Mix : int { kStudent = 0, kTeacher = 1, kBoth = 2 };

// The numbers, which are run-time arguments.
struct Numbers {
    Formula formula;
    float c_t, c_s, w;

    FASTKD_HD Mix mix() const { return w == 0.0f ? Mix::kStudent : w == 1.0f ? Mix::kTeacher : Mix::kBoth; }
};

// What stage 1 averages: E_t[d] or −E_s[d], a KL, which is S itself or tells early whether the two are close; and
// E_t[log t], of an entropy. A functor has one of them, and may have a second one.
enum class Moment : int { kNone, kTeacherRatio, kStudentRatio, kTeacherLog };

// What is known of G = Σ g, in the far form, before g itself: −c_t; c_s·KL(p_s‖p_t), which stage 1 averages; or nothing,
// and stage 2 sums it.
enum class GradSum : int { kConstant, kFromMean, kSummed };

// Below this a divergence of weight 1 is small: terms good to 1e-7 leave it too few digits.
constexpr float kFewDigits = 0.05f;

// The sum of a few columns' far terms that makes the whole row far: they are >= 0, and no near_below is larger.
FASTKD_HD float surely_far(const Numbers& numbers) { return kFewDigits * (numbers.c_t + numbers.c_s); }

// p·x − p + q, which is p·log(p/q) − p + q >= 0, given x = log(p/q). kNear: with all its digits as x → 0.
template <bool kNear>
FASTKD_HD float bregman(float p, float x, float q) {
    const float far = mul0(p, x) + (q - p);
    if constexpr (!kNear) return far;
    const float near = p * exp_remainder(x);
    return abs(x) < 0.5f ? near : far;
}

// p_t − p_s and e^d − 1, each with all its digits as d → 0. d is moved to within ±80, beyond which one of the two has no
// mass, and all that multiplies it must stay finite.
struct Excess {
    float d, mass, ratio;

    FASTKD_HD Excess(float any_d, float p_t, float p_s) {
        d = any_d < -80.0f ? -80.0f : any_d > 80.0f ? 80.0f : any_d;
        const bool close = abs(d) < 0.5f;
        const float near = exp_remainder(-d) + d;
        mass = close ? p_s * near : p_t - p_s;
        ratio = close ? near : exp(d) - 1.0f;
    }
};

template <bool kTeacherTerm, bool kStudentTerm, Mix kMix>
struct MixtureKL {
    Numbers numbers;

    static constexpr bool kTwoSided = false;
    static constexpr bool kApart = false;
    static constexpr bool kGradNeedsRatio = kMix != Mix::kStudent;
    static constexpr Moment kMoment = kMix == Mix::kTeacher ? Moment::kStudentRatio : Moment::kTeacherRatio;
    static constexpr Moment kSecond = Moment::kNone;
    static constexpr bool kMeanIsValue = kMix != Mix::kBoth;
    static constexpr GradSum kGradSum = kMix == Mix::kStudent   ? GradSum::kConstant
                                        : kMix == Mix::kTeacher ? GradSum::kFromMean
                                                                : GradSum::kSummed;

    static bool matches(const Numbers& n) {
        if (n.formula != Formula::kMixtureKL || n.mix() != kMix) return false;
        return kMix != Mix::kBoth || (kTeacherTerm == (n.c_t != 0.0f) && kStudentTerm == (n.c_s != 0.0f));
    }

    // Of what stage 1 averages.
    FASTKD_HD float weight() const {
        return kMix == Mix::kStudent ? numbers.c_t : kMix == Mix::kTeacher ? numbers.c_s : 1.0f;
    }

    // Below this a row takes the near form. The largest value of a mixture may be small itself (JSD(0.01): 0.056).
    FASTKD_HD float near_below() const {
        if constexpr (kMix != Mix::kBoth) return kFewDigits * weight();
        const float largest = -numbers.c_t * std::log(numbers.w) - numbers.c_s * std::log1p(-numbers.w);
        const float few = 0.2f * kFewDigits * (numbers.c_t + numbers.c_s);
        return few < 0.25f * largest ? few : 0.25f * largest;
    }

    template <bool kNear>
    FASTKD_HD TermGrad column(float d, float p_t, float p_s) const {
        if constexpr (kNear) return near(d, p_t, p_s);
        const float c_t = kTeacherTerm ? numbers.c_t : 0.0f;
        const float c_s = kStudentTerm ? numbers.c_s : 0.0f;
        if constexpr (kMix == Mix::kStudent) return {c_t * bregman<false>(p_t, d, p_s), -c_t * p_t};
        if constexpr (kMix == Mix::kTeacher) return {c_s * bregman<false>(p_s, -d, p_t), -c_s * mul0(p_s, d)};
        const float w = numbers.w, v = 1.0f - w;
        const float log_v = log(v);
        const bool teacher_larger = d > 0.0f;
        const float exp_minus = exp_from_ratio(abs(d), teacher_larger ? p_s : p_t, teacher_larger ? p_t : p_s);
        // log(m/p_t) where the teacher's is larger, else log(m/p_s) − log v.
        const float excess = teacher_larger ? v * (exp_minus - 1.0f) : w / v * exp_minus;
        const float log_ratio = log1p(excess, 1.0f + excess);
        const float over_student = teacher_larger ? log_ratio + d : log_ratio + log_v;
        const float m = w * p_t + v * p_s;
        float term = 0.0f, slope = 0.0f;
        if constexpr (kTeacherTerm) {
            const float over_teacher = teacher_larger ? log_ratio : over_student - d;
            term += c_t * bregman<false>(p_t, -over_teacher, m);
        }
        if constexpr (kStudentTerm) {
            term += c_s * bregman<false>(p_s, -over_student, m);
            slope = -c_s * (teacher_larger ? over_student - log_v : log_ratio);
        }
        const float over_larger = teacher_larger ? 1.0f + excess : v * (1.0f + excess);  // m over the larger one
        const float teacher_share = divide(teacher_larger ? 1.0f : exp_minus, over_larger);  // p_t/m
        return {term, mul0(p_s, slope + (c_s * w - c_t * v) * teacher_share)};
    }

   private:
    FASTKD_HD TermGrad near(float d, float p_t, float p_s) const {
        const float c_t = kTeacherTerm ? numbers.c_t : 0.0f;
        const float c_s = kStudentTerm ? numbers.c_s : 0.0f;
        const Excess excess(d, p_t, p_s);
        if constexpr (kMix == Mix::kStudent) return {c_t * bregman<true>(p_t, d, p_s), -c_t * excess.mass};
        if constexpr (kMix == Mix::kTeacher) return {c_s * bregman<true>(p_s, -d, p_t), -c_s * mul0(p_s, d)};
        const float w = numbers.w, v = 1.0f - w;
        const float over = 1.0f + w * excess.ratio, m = p_s + w * excess.mass;
        const float log_s = -log1p(w * excess.ratio, over);  // log(p_s/m)
        float term = 0.0f, slope = (c_s * w - c_t * v) * v * divide(excess.ratio, over);
        if constexpr (kTeacherTerm) term += c_t * bregman<true>(p_t, excess.d + log_s, m);
        if constexpr (kStudentTerm) {
            term += c_s * bregman<true>(p_s, log_s, m);
            slope += c_s * log_s;
        }
        return {term, mul0(p_s, slope)};
    }
};

// H(p_t, p_s): forward KL plus the teacher's entropy, which has no gradient.
struct CrossEntropy : MixtureKL<true, false, Mix::kStudent> {
    static constexpr Moment kSecond = Moment::kTeacherLog;

    static bool matches(const Numbers& n) { return n.formula == Formula::kCrossEntropy; }
};

// c_t·KL(p_t‖p_s) + c_s·KL(p_s‖p_t), both > 0: a sum of two of the family, in one walk. In the far form the first one's
// gradient is apart from a G that may be of thousands.
struct SymmetricKL {
    Numbers numbers;
    static constexpr bool kTwoSided = false;
    static constexpr bool kApart = true;
    static constexpr bool kGradNeedsRatio = true;
    static constexpr Moment kMoment = Moment::kTeacherRatio;
    static constexpr Moment kSecond = Moment::kStudentRatio;
    static constexpr bool kMeanIsValue = true;
    static constexpr GradSum kGradSum = GradSum::kFromMean;

    static bool matches(const Numbers& n) { return n.formula == Formula::kSymmetricKL; }
    FASTKD_HD float weight() const { return numbers.c_t; }
    FASTKD_HD float near_below() const { return kFewDigits * (numbers.c_t + numbers.c_s); }
    template <bool kNear>
    FASTKD_HD TermGrad column(float d, float p_t, float p_s) const {
        const MixtureKL<true, false, Mix::kStudent> forward{numbers};
        const MixtureKL<false, true, Mix::kTeacher> reverse{numbers};
        const TermGrad a = forward.template column<kNear>(d, p_t, p_s), b = reverse.template column<kNear>(d, p_t, p_s);
        const float term = a.term + b.term;
        if constexpr (kNear) return {term, a.g + b.g};
        return {term, b.g, a.g + numbers.c_t * p_s};
    }
};

// Two-sided: g is p_s·[p_s > p_t] or, in the other form, less p_s, −p_s·[p_s < p_t]: the side that has less of p_s leaves
// less to cancel. A tie is half on each.
struct TotalVariation {
    Numbers numbers;
    static constexpr bool kTwoSided = true;
    static constexpr bool kApart = false;
    static constexpr bool kGradNeedsRatio = true;
    static constexpr Moment kMoment = Moment::kTeacherRatio;
    static constexpr Moment kSecond = Moment::kNone;
    static constexpr bool kMeanIsValue = false;
    static constexpr GradSum kGradSum = GradSum::kSummed;

    static bool matches(const Numbers& n) { return n.formula == Formula::kTotalVariation; }
    FASTKD_HD float weight() const { return 1.0f; }
    FASTKD_HD float near_below() const { return kFewDigits; }
    template <bool kNear>
    FASTKD_HD TermGrad column(float d, float p_t, float p_s) const {
        const float difference = kNear ? Excess(d, p_t, p_s).mass : p_t - p_s;
        return {0.5f * abs(difference), p_s * (d < 0.0f ? 1.0f : d > 0.0f ? 0.0f : 0.5f)};
    }
};

// Stands for the divergence where there is no soft term.
struct NoSoftTerm {
    static constexpr bool kTwoSided = false;
    static constexpr bool kApart = false;
    static constexpr bool kGradNeedsRatio = false;
    static constexpr Moment kMoment = Moment::kNone;
    static constexpr Moment kSecond = Moment::kNone;
    static constexpr bool kMeanIsValue = false;
    static constexpr GradSum kGradSum = GradSum::kConstant;

    FASTKD_HD float weight() const { return 0.0f; }
    FASTKD_HD float near_below() const { return 0.0f; }
    template <bool kNear>
    FASTKD_HD TermGrad column(float, float, float) const {
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
                                TotalVariation,
                                SymmetricKL>;

}  // namespace FASTKD_ISA
}  // namespace fastkd
