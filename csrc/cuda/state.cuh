// Stage 1 of a row on a GPU: the sums of exponentials of student and teacher.
//
// Math    x = z·k − peak·k and y likewise of u, in units of log 2, each one FMA; s = 2^x, t = 2^y.
//         moment  Σ t·(y − x) or Σ s·(x − y), as the functor's kMoment has it
//         second  its kSecond: Σ s·(x − y); or Σ t·y, of the teacher's entropy, and then moment has only −Σ t·x
//         others  Σ exp(z − peak) of the columns other than the label's, since 1 − p_y keeps its digits only as a sum of
//                 those: Σ s² where T is 2, Σ s where T is 1
// Rules   0·inf is 0 in a moment. Plain sums do without that rule, and know no label. Vectors at the ends of a row and
//         that of the label are summed with care, and so is all of a thread's slice where no finite moment comes out.
#pragma once

#include "../row.h"
#include "reduce.cuh"
#include "vec.cuh"

namespace fastkd {

// What stage 1 averages here: where S does not follow from it, a walk from coefficients tells as early.
template <class Functor>
constexpr Moment kMomentOf = Functor::kMeanIsValue ? Functor::kMoment : Moment::kNone;

// Where the exponents of a peak begin: rounded, and the sums are relative to what it is rounded to.
FASTKD_D float origin_of(float peak, float k) {
#ifdef __CUDA_ARCH__
    return __fmul_rn(peak, k);  // never half of an FMA
#else
    return peak * k;
#endif
}

// By how much the origin is above the peak.
FASTKD_D float rounding_of(float peak, float k) { return fma(-peak, k, origin_of(peak, k)); }

struct RowState {
    float z_peak = -kInfinity, u_peak = -kInfinity;
    float s = 0.0f, t = 0.0f, others = 0.0f, moment = 0.0f, second = 0.0f;
    float z_y = 0.0f, s_y = 0.0f;  // of the label, where it was met; a thread keeps s_y out of s until it has all
    float sum_z = 0.0f;  // Σ z − anchor
};

// What stage 1 knows of a row.
struct RowScale {
    float k;              // log2(e)/T
    bool squares, smooth; // T is 2; labels are smoothed
    float anchor;         // z_y, for the mean of z: far from 0 a sum of z has no digits left
    int label, n;         // label: −1 for none
};

// kPower: ``others`` comes from s, since T is 1 or 2 and nothing is smoothed.
template <bool kSoft, bool kPower, class Functor>
struct Stage1 {
    static constexpr Moment kMoment = kMomentOf<Functor>;
    static constexpr Moment kSecond = Functor::kSecond;
    static constexpr bool kEntropy = kSecond == Moment::kTeacherLog;

    template <Moment kOf>
    static FASTKD_D float of_side(float student, float teacher) {
        return kOf == Moment::kStudentRatio ? student : teacher;
    }

    template <Moment kOf>
    static FASTKD_D float moment_of(float s, float t, float x, float y) {
        if constexpr (kOf == Moment::kTeacherRatio) return kEntropy ? t * -x : t * (y - x);
        if constexpr (kOf == Moment::kStudentRatio) return s * -(y - x);
        if constexpr (kOf == Moment::kTeacherLog) return t * y;
        return 0.0f;
    }

    // Of d, in units of log 2 and relative to the origins.
    static FASTKD_D float mean(const RowState& state) {
        const float moment = kEntropy ? state.moment + state.second : state.moment;
        return moment / of_side<kMoment>(state.s, state.t);
    }
    static FASTKD_D float second_mean(const RowState& state) { return state.second / of_side<kSecond>(state.s, state.t); }

    // Makes the sums relative to new peaks. A state that has seen nothing has a peak of −inf and gets a factor of 0.
    static FASTKD_D void rescale(RowState& state, float z_peak, float u_peak, const RowScale& row) {
        const float x = origin_of(state.z_peak, row.k) - shift_of(origin_of(z_peak, row.k));
        const float by_s = exp2(x);
        state.others *= kPower ? (row.squares ? by_s * by_s : by_s)
                               : exp2(origin_of(state.z_peak, kLog2E) - shift_of(origin_of(z_peak, kLog2E)));
        state.z_peak = z_peak;
        if constexpr (kSoft) {
            const float y = origin_of(state.u_peak, row.k) - shift_of(origin_of(u_peak, row.k));
            const float by_t = exp2(y);
            const auto move = [&](auto of, float& sum) {
                constexpr Moment kOf = decltype(of)::value;
                const float moved = moment_of<kOf>(1.0f, 1.0f, x, y);
                sum = mul0(of_side<kOf>(by_s, by_t), sum + mul0(of_side<kOf>(state.s, state.t), moved));
            };
            move(std::integral_constant<Moment, kMoment>(), state.moment);
            if constexpr (kSecond != Moment::kNone) move(std::integral_constant<Moment, kSecond>(), state.second);
            state.t *= by_t;
            state.u_peak = u_peak;
        }
        state.s *= by_s;
        state.s_y *= by_s;
    }

    // Adds a vector, given peaks that are no smaller. ``first`` is its first column.
    template <bool kCareful, class T>
    static FASTKD_D void add(RowState& state, const Vec<T>& z, const Vec<T>& u, int first, const RowScale& row) {
        const float z_origin = shift_of(origin_of(state.z_peak, row.k));
        const float u_origin = shift_of(origin_of(state.u_peak, row.k));
        const float hard_origin = shift_of(origin_of(state.z_peak, kLog2E));
        const auto column = [&](int j, float z_j, float u_j) {
            const float x = fma(z_j, row.k, -z_origin);
            const float s = exp2(x);
            if (kCareful && first + j == row.label) {
                state.z_y = z_j;
                state.s_y = s;
            } else {
                state.s += s;
                state.others += kPower ? s * s : exp2(fma(z_j, kLog2E, -hard_origin));
            }
            if constexpr (kSoft) {
                const float y = fma(u_j, row.k, -u_origin);
                const float t = exp2(y);
                state.t += t;
                if (!kCareful || of_side<kMoment>(s, t) != 0.0f) state.moment += moment_of<kMoment>(s, t, x, y);
                if constexpr (kSecond != Moment::kNone) {
                    if (!kCareful || of_side<kSecond>(s, t) != 0.0f) state.second += moment_of<kSecond>(s, t, x, y);
                }
            }
            if (!kPower && row.smooth) {
                const bool inside = first + j >= 0 && first + j < row.n;
                state.sum_z += inside ? z_j - row.anchor : 0.0f;
            }
        };
        if constexpr (kCareful) {
            for_columns(z, u, column);
        } else {
#pragma unroll
            for (int j = 0; j < Vec<T>::kColumns; ++j) column(j, z[j], u[j]);
        }
    }

    // Whether plain sums were enough.
    static FASTKD_D bool is_finite(const RowState& state) {
        if constexpr (kMoment == Moment::kNone) return true;
        return abs(state.moment + state.second) < kInfinity;
    }

    // After a thread's last vector.
    static FASTKD_D void finish(RowState& state, const RowScale& row) {
        if (kPower && !row.squares) state.others = state.s;
        state.s += state.s_y;
        state.s_y = 0.0f;
    }

    // Merges one state a lane; every lane gets the result. kSamePeaks: the lanes have one peak already.
    template <bool kSamePeaks>
    static FASTKD_D RowState merge(RowState state, const RowScale& row) {
        if constexpr (!kSamePeaks)
            rescale(state, warp_max(state.z_peak), kSoft ? warp_max(state.u_peak) : 0.0f, row);
        if constexpr (kSoft) {
            float sums[] = {state.s, state.others, state.t, state.moment};
            warp_sums(sums);
            state.s = sums[0], state.others = sums[1], state.t = sums[2], state.moment = sums[3];
        } else {
            state.s = warp_sum(state.s);
            state.others = warp_sum(state.others);
        }
        if constexpr (kSecond != Moment::kNone) state.second = warp_sum(state.second);
        if constexpr (!kPower) state.sum_z = warp_sum(state.sum_z);
        return state;
    }

    static FASTKD_D RowState merge_warps(const RowState& lane, const RowScale& row) {
        RowState state = merge<false>(lane, row);
        state.z_y = warp_sum(state.z_y);
        return state;
    }
};

}  // namespace fastkd
