// The stages over a tile of columns in L1: the loops that the compiler vectorises, and nothing else.
//
// Sums of a tile are float, one a vector lane; tiles are added in double (lse.h, kd_rows.cpp).
#pragma once

#include "../row.h"
#include "convert.h"
#include "lanes.h"

namespace fastkd {
inline namespace FASTKD_ISA {

constexpr int kTile = 1024;  // columns: six tiles of floats are 24 KB of L1

// How softmax(z) at temperature 1 comes about: exp(z) = exp(z/T)^T saves an exponential at small integer T.
enum class Hard : int { kNone = 0, kPower1 = 1, kPower2 = 2, kPower3 = 3, kPower4 = 4, kOwn = 5 };

template <int kPower, class Real>
FASTKD_HD Real integer_power(Real x) {
    static_assert(kPower >= 1 && kPower <= 4, "powers 1 to 4");
    if constexpr (kPower == 1) return x;
    if constexpr (kPower == 2) return x * x;
    if constexpr (kPower == 3) return x * x * x;
    return (x * x) * (x * x);
}

// Largest of n values, −inf for none; NaN is passed over.
FASTKD_TILE_LOOP inline float max_of(const float* x, int n) {
    float peak = -kInfinity;
#pragma omp simd reduction(max : peak)
    for (int j = 0; j < n; ++j) peak = x[j] > peak ? x[j] : peak;
    return peak;
}

FASTKD_TILE_LOOP inline float sum_of(const float* x, int n, float shift = 0.0f) {
    float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
    for (int j = 0; j < n; ++j) sum += x[j] - shift;
    return sum;
}

FASTKD_TILE_LOOP inline float sum_of_exp(const float* x, int n, float shift, float k) {
    float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
    for (int j = 0; j < n; ++j) sum += exp2((x[j] - shift) * k);
    return sum;
}

struct ExpSums {
    float s = 0.0f, t = 0.0f, hard = 0.0f, moment = 0.0f, second = 0.0f;
};

// Stage 1: the exponentials of a tile, and their sums.
//   e_s = exp((z − z_shift)/T), e_t = exp((u − u_shift)/T); e_h = exp(z − h_shift), kept only if it is no power of e_s
template <bool kSoft, Hard kHard, Moment kMoment, Moment kSecond>
FASTKD_TILE_LOOP inline void exponentials(const float* z, const float* u, int n, float z_shift, float u_shift,
                                          float h_shift, float k, float* e_s, float* e_t, float* e_h, ExpSums& sums,
                                          Ahead next_z, Ahead next_u) {
    Lanes sum_s = {}, sum_t = {}, sum_h = {}, moment = {}, second = {};
    const auto add = [&](int j, auto... count) {
        const Lanes any_z = load(z + j, count...), z_j = any_z - z_shift;
        Lanes s = {};
        if constexpr (kSoft) {
            const Lanes u_j = load(u + j, count...) - u_shift;
            s = exp2(z_j * k);
            const Lanes t = exp2(u_j * k);
            store(s, count..., e_s + j);
            store(t, count..., e_t + j);
            sum_s += s;
            sum_t += t;
            if constexpr (kMoment != Moment::kNone) moment += moment_of<kMoment>(s, t, z_j, u_j);
            if constexpr (kSecond != Moment::kNone) second += moment_of<kSecond>(s, t, z_j, u_j);
        }
        if constexpr (kHard == Hard::kOwn) {
            const Lanes h = exp(any_z - h_shift);
            store(h, count..., e_h + j);
            sum_h += h;
        } else if constexpr (kHard != Hard::kNone) {
            sum_h += integer_power<static_cast<int>(kHard)>(s);
        }
    };
    int j = 0;
    for (; j + kLanes <= n; j += kLanes) {
        next_z.fetch();
        if constexpr (kSoft) next_u.fetch();
        add(j);
    }
    if (j < n) add(j, n - j);
    sums.s += sum_of(sum_s);
    sums.t += sum_of(sum_t);
    sums.hard += sum_of(sum_h);
    sums.moment += sum_of(moment);
    sums.second += sum_of(second);
}

// What turns a tile's exponentials into probabilities, and the numbers of stages 2 and 3.
struct TileFactors {
    float p_s = 0.0f, p_t = 0.0f;               // p_s = p_s_factor·e_s, p_t = p_t_factor·e_t
    float u_peak = 0.0f, k = 0.0f, p_t_of_peak = 0.0f;  // p_t = p_t_of_peak·2^((u − u_peak)·k)
    float z_offset = 0.0f, u_offset = 0.0f, inv_t = 1.0f, shift = 0.0f;  // of d, see log_ratio
    float soft = 0.0f, grad_sum = 0.0f;         // soft_scale/T, G
    float other_side = 0.0f;                    // of a two-sided g: 1 for the one less p_s
    float hard = 0.0f, constant = 0.0f;         // hard_scale·p_h = hard·e_h; what is added to every column
};

struct TermSums {
    float term = 0.0f, g = 0.0f;
    float other_g = 0.0f;  // of a two-sided g, less p_s
    float excess = 0.0f;   // Σ p_t − p_s, of the near form and of a two-sided one
};

// Stage 2: the sums of term and g. g is kept in e_t's place if asked for, where the near form may find that of the far.
template <bool kNear, bool kKeepG, class Functor>
FASTKD_TILE_LOOP inline void evaluate(const Functor& functor, const float* z, const float* u, int n,
                                      const TileFactors& by, const float* e_s, float* e_t, TermSums& sums) {
    float sum_term = 0.0f, sum_g = 0.0f, sum_other = 0.0f, sum_excess = 0.0f;
    const TileFactors f = by;
#pragma omp simd reduction(+ : sum_term, sum_g, sum_other, sum_excess)
    for (int j = 0; j < n; ++j) {
        const float d = log_ratio(z[j], u[j], f.z_offset, f.u_offset, f.inv_t, f.shift), p_s = f.p_s * e_s[j];
        const float p_t = kNear ? f.p_t_of_peak * exp2((u[j] - f.u_peak) * f.k) : f.p_t * e_t[j];
        const TermGrad column = functor.template column<kNear>(d, p_t, p_s);
        sum_term += column.term;
        sum_g += column.g;
        if constexpr (Functor::kTwoSided) sum_other += column.g - p_s;
        if constexpr (kNear)
            sum_excess += Excess(d, p_t, p_s).mass;
        else if constexpr (Functor::kTwoSided && !kKeepG)
            sum_excess += p_t - p_s;
        if constexpr (kKeepG) e_t[j] = column.g;
    }
    sums.term += sum_term;
    sums.g += sum_g;
    sums.other_g += sum_other;
    sums.excess += sum_excess;
}

// Where stage 3 takes g from: nowhere, the functor, or stage 2.
enum class GradSource { kNoSoft, kFunctor, kKept };

// Stage 3. dz may be z.
template <GradSource kSource, Hard kHard, class Functor>
FASTKD_TILE_LOOP inline void gradient(const Functor& functor, const float* z, const float* u, int n,
                                      const TileFactors& by, const float* e_s, const float* e_t, const float* e_h,
                                      float* dz) {
    const TileFactors f = by;
#pragma omp simd
    for (int j = 0; j < n; ++j) {
        float sum = f.constant;
        if constexpr (kSource != GradSource::kNoSoft) {
            const float p_s = f.p_s * e_s[j];
            TermGrad column = {0.0f, e_t[j]};
            if constexpr (kSource == GradSource::kFunctor) {
                float d = 0.0f;
                if constexpr (Functor::kGradNeedsRatio)
                    d = log_ratio(z[j], u[j], f.z_offset, f.u_offset, f.inv_t, f.shift);
                column = functor.template column<false>(d, f.p_t * e_t[j], p_s);
            }
            if constexpr (Functor::kTwoSided) column.g -= f.other_side * p_s;
            sum += f.soft * soft_gradient<Functor>(column.g, column.apart, p_s, f.grad_sum);
        }
        if constexpr (kHard == Hard::kOwn) {
            sum += f.hard * e_h[j];
        } else if constexpr (kHard != Hard::kNone) {
            sum += f.hard * integer_power<static_cast<int>(kHard)>(e_s[j]);
        }
        dz[j] = sum;
    }
}

}  // namespace FASTKD_ISA
}  // namespace fastkd
