// The divergences of a row that is far from convergence, from the exponentials of stage 1 as they are: no column is
// normalised, all that is the same in a row is folded into its coefficients.
//
// Math    s = 2^x, t = 2^y as in stage 1, p_s = s·student, p_t = t·teacher, e = y − x, log₂ p_t/p_s = e − log_ratio.
//         factor·(g − p_s·G) + constant·s = s·coefficient(x, y, s), less c.other·t if kTeacher, with g in the far form
//         of divergence.h; of a mixture q = r·e^d is an exponential, and log(1 + q) a logarithm of what is not small.
// Rules   −inf on either side is no NaN: a difference of logarithms is bounded before it meets an s of 0.
#pragma once

#include "../divergence.h"
#include "grid.cuh"

namespace fastkd {

// What a row is known by after stage 1.
struct Normalisers {
    float student, teacher;  // 1/Σs, 1/Σt
    float log_ratio;         // log₂ Σt/Σs
};

// base, slope and the rest mean what the divergence makes of them.
struct Coefficients {
    float base, slope, other, ratio;
};

// Sums of stage 2, whatever they are of, and what follows from them.
struct SumState {
    float first = 0.0f, second = 0.0f, third = 0.0f, fourth = 0.0f;
};

struct RowSums {
    float value, grad_sum, other_side;
};

constexpr float kBound = 1e30f;

template <class Functor>
struct Linear;

template <bool kT, bool kS>
struct Linear<MixtureKL<kT, kS, Mix::kStudent>> {
    static constexpr bool kTeacher = true;  // dz has a term of t
    MixtureKL<kT, kS, Mix::kStudent> functor;
    Coefficients c = {};

    FASTKD_D explicit Linear(const MixtureKL<kT, kS, Mix::kStudent>& functor) : functor(functor) {}

    FASTKD_D void fold(const Normalisers& row, float grad_sum, float, float factor, float constant) {
        c.base = constant - factor * grad_sum * row.student;
        c.other = factor * functor.weight() * row.teacher;
    }
    FASTKD_D float coefficient(float, float, float) const { return c.base; }
};

template <>
struct Linear<CrossEntropy> : Linear<MixtureKL<true, false, Mix::kStudent>> {
    using Linear<MixtureKL<true, false, Mix::kStudent>>::Linear;
};

// What multiplies s where g has a term in p_s·d; of a column with −inf on one side, whatever s of 0 it meets.
FASTKD_D float along(const Coefficients& c, float e) { return fma(c.slope, max(-max(-e, -kBound), -kBound), c.base); }

template <bool kT, bool kS>
struct Linear<MixtureKL<kT, kS, Mix::kTeacher>> {
    static constexpr bool kTeacher = false;
    MixtureKL<kT, kS, Mix::kTeacher> functor;
    Coefficients c = {};

    FASTKD_D explicit Linear(const MixtureKL<kT, kS, Mix::kTeacher>& functor) : functor(functor) {}

    // An infinite value has no gradient.
    FASTKD_D void fold(const Normalisers& row, float grad_sum, float, float factor, float constant) {
        const float scale = grad_sum == kInfinity ? 0.0f : factor * row.student;
        const float per_bit = functor.weight() * kLn2;
        c.slope = -scale * per_bit;
        c.base = constant + (grad_sum == kInfinity ? 0.0f : scale * (per_bit * row.log_ratio - grad_sum));
    }
    FASTKD_D float coefficient(float x, float y, float) const { return along(c, y - x); }
};

template <>
struct Linear<SymmetricKL> {
    static constexpr bool kTeacher = true;
    SymmetricKL functor;
    Coefficients c = {};

    FASTKD_D explicit Linear(const SymmetricKL& functor) : functor(functor) {}

    FASTKD_D void fold(const Normalisers& row, float grad_sum, float, float factor, float constant) {
        const float scale = factor * row.student, per_bit = functor.numbers.c_s * kLn2;
        c.slope = -scale * per_bit;
        c.base = constant + scale * (per_bit * row.log_ratio - grad_sum + functor.weight());
        c.other = factor * functor.weight() * row.teacher;
    }
    FASTKD_D float coefficient(float x, float y, float) const { return along(c, y - x); }
};

template <bool kT, bool kS>
struct Linear<MixtureKL<kT, kS, Mix::kBoth>> {
    static constexpr bool kTeacher = false;
    MixtureKL<kT, kS, Mix::kBoth> functor;
    Coefficients c = {};

    FASTKD_D explicit Linear(const MixtureKL<kT, kS, Mix::kBoth>& functor) : functor(functor) {}

    FASTKD_D float weights() const { return c_t() + c_s(); }
    FASTKD_D float odds() const { return functor.numbers.w / (1.0f - functor.numbers.w); }
    FASTKD_D float c_t() const { return kT ? functor.numbers.c_t : 0.0f; }
    FASTKD_D float c_s() const { return kS ? functor.numbers.c_s : 0.0f; }

    // κ/w. With both terms it is 0 for a Jensen-Shannon divergence; others are left to the functor.
    static constexpr bool kShare = kT != kS;
    FASTKD_D float share_weight() const { return kS ? c_s() : -c_t() * (1.0f - functor.numbers.w) / functor.numbers.w; }
    FASTKD_D bool is_served() const {
        const float w = functor.numbers.w;
        return kShare || abs(c_s() * w - c_t() * (1.0f - w)) < 1e-6f * weights();
    }

    // q = ratio·2^e.
    FASTKD_D void prepare(const Normalisers& row) { c.ratio = odds() * row.teacher / row.student; }

    // Σ s·log₂(1+q), Σ t·(e − log₂(1+q)) and Σ s·q/(1+q); t is s·2^e, so s may be next to nothing but not 0.
    FASTKD_D void add(SumState& sums, float x, float y) const {
        const float bounded = max(x, -100.0f);
        const float e = max(y - bounded, -126.0f);
        const float s = exp2(bounded), quotient = exp2(e);
        const float over_student = fma(quotient, c.ratio, 1.0f);
        const float log_over = log2(over_student);
        if (kS) sums.first = fma(s, log_over, sums.first);
        if (kT) sums.second = fma(s * quotient, e - log_over, sums.second);
        if constexpr (kShare) sums.third = fma(s, divide(quotient, over_student), sums.third);
    }

    // log_w, log_v: log₂ of w and 1 − w.
    FASTKD_D RowSums finish(const SumState& sums, const Normalisers& row, float log_w, float log_v) const {
        const float log_odds = log_w - log_v - row.log_ratio;  // of q, above e
        const float of_student = -sums.first * row.student;
        float value = 0.0f;
        if (kT) value += c_t() * (sums.second * row.teacher + log_odds - log_w);
        if (kS) value += c_s() * (of_student - log_v);
        const float share = kShare ? share_weight() * c.ratio * sums.third * row.student : 0.0f;
        return {value * kLn2, c_s() * kLn2 * of_student + share, 0.0f};
    }

    FASTKD_D void fold(const Normalisers& row, float grad_sum, float, float factor, float constant) {
        prepare(row);
        const float scale = factor * row.student;
        c.base = constant - scale * grad_sum;
        c.slope = -scale * c_s() * kLn2;
        c.other = kShare ? scale * share_weight() * c.ratio : 0.0f;
    }

    FASTKD_D float coefficient(float x, float y, float) const {
        const float e = -max(x - y, -100.0f);
        const float quotient = exp2(e);
        const float over_student = fma(quotient, c.ratio, 1.0f);
        float sum = c.base;
        if (kS) sum = fma(c.slope, log2(over_student), sum);
        if constexpr (kShare) sum = fma(c.other, divide(quotient, over_student), sum);
        return sum;
    }
};

template <>
struct Linear<TotalVariation> {
    static constexpr bool kTeacher = false;
    FASTKD_D float weights() const { return 1.0f; }
    FASTKD_D bool is_served() const { return true; }
    TotalVariation functor;
    Coefficients c = {};

    FASTKD_D explicit Linear(const TotalVariation& functor) : functor(functor) {}

    FASTKD_D void prepare(const Normalisers& row) { c.ratio = row.teacher / row.student; }

    // 2·Σ abs(p_s − p_t) and the student's mass on either side, in units of p_s/s.
    FASTKD_D void add(SumState& sums, float x, float y) const {
        const float s = exp2(x), difference = fma(-c.ratio, exp2(y), s);
        sums.first += abs(difference);
        difference > 0.0f ? sums.second += s : sums.third += s;
    }

    FASTKD_D RowSums finish(const SumState& sums, const Normalisers& row, float, float) const {
        const bool above = sums.second <= sums.third;
        return {0.5f * sums.first * row.student, row.student * (above ? sums.second : -sums.third), above ? 0.0f : 1.0f};
    }

    FASTKD_D void fold(const Normalisers& row, float grad_sum, float other_side, float factor, float constant) {
        prepare(row);
        const float scale = factor * row.student;
        c.slope = constant + scale * (1.0f - other_side - grad_sum);
        c.base = constant + scale * (-other_side - grad_sum);
    }

    FASTKD_D float coefficient(float, float y, float s) const { return s > c.ratio * exp2(y) ? c.slope : c.base; }
};

template <>
struct Linear<NoSoftTerm> {
    static constexpr bool kTeacher = false;
    NoSoftTerm functor;
    Coefficients c = {};

    FASTKD_D explicit Linear(const NoSoftTerm& functor) : functor(functor) {}
    FASTKD_D void fold(const Normalisers&, float, float, float, float constant) { c.base = constant; }
    FASTKD_D float coefficient(float, float, float) const { return c.base; }
};

}  // namespace fastkd
