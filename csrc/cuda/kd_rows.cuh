// The row operation on a GPU: a cluster of blocks works on one row.
//
// Math    see row.h; term and g come from the functor.
// Shapes  z, u, dz [B, S, columns] fp32|bf16|fp16, last stride 1; labels [N] int64; scales, losses [N]; stats [N, 7].
// Bytes   an element, e bytes wide. Resident: each logit is read once into shared memory and stays there between the
//         stages: loss 2e, loss and gradient 3e, the floor. Otherwise each stage reads the row again, from L2 where it
//         still is: loss 4e, loss and gradient 5e, or 7e if G needs a stage of its own; gradient from statistics 3e.
// Grid    N·C blocks of up to 512 threads in clusters of C (1, 2, 4, 8 or 16). Each block has a contiguous slice of
//         the row, whose vectors its threads take in turn.
// Merge   A warp merges its lanes by shuffles, then writes its state to its slot in every block of the cluster; after
//         one cluster barrier each warp merges all slots, in the same order everywhere, so results are deterministic.
//         The barriers of a row: that everyone has started (hidden behind the loads), stage 1, stage 2 if there is
//         one, and the end.
#pragma once

#include <cmath>

#include "../params.h"
#include "../row.h"
#include "reader.cuh"
#include "reduce.cuh"

namespace fastkd {

// The functor of a call without a soft term.
struct NoSoftTerm {
    Numbers numbers;
    static constexpr GradSum kGradSum = GradSum::kConstant;
    FASTKD_HD TermGrad operator()(float, float, float, float) const { return {0.0f, 0.0f}; }
};

struct RowState {
    float z_peak, u_peak;
    float others;  // Σ exp(z − z_peak), the label's column apart
    float s, t;    // Σ exp((z − z_peak)/T), Σ exp((u − u_peak)/T)
    float sum_z;   // Σ z − anchor
};

// Everything that is the same in all columns of a row.
struct RowNumbers {
    float k, inv_t;              // log2(e)/T and 1/T
    int power;                   // T where it is 1 or 2, and exp(z) comes as a power of exp(z/T); else 0
    int label;                   // −1: none
    bool hard, smooth;
    float anchor;                // z_y, for the mean of z: far from 0 a sum of z has no digits left
    float z_shift, u_shift;      // the peaks
    float lse_h, lse_s, lse_t;   // log₂ normalisers of z, z/T, u/T, relative to the peaks
    float shift;                 // of d, in natural units
    float power_scale;           // p_h = p_s^power · power_scale
    float grad_sum, rest;
};

FASTKD_D float hard_exp(float tempered, float x, int power) {
    return power == 1 ? tempered : power == 2 ? tempered * tempered : exp2(x * kLog2E);
}

// Makes the sums relative to new peaks. A state that has seen nothing has a peak of −inf and gets a factor of 0.
template <bool kSoft>
FASTKD_D void rescale(RowState& state, float z_peak, float u_peak, const RowNumbers& row) {
    const float z_drop = state.z_peak - shift_of(z_peak);
    const float factor = kSoft ? exp2(z_drop * row.k) : 0.0f;
    if (row.hard) state.others *= hard_exp(factor, z_drop, kSoft ? row.power : 0);
    if (kSoft) {
        state.s *= factor;
        state.t *= exp2((state.u_peak - shift_of(u_peak)) * row.k);
        state.u_peak = u_peak;
    }
    state.z_peak = z_peak;
}

// Stage 1 of a vector.
template <bool kSoft, class T>
FASTKD_D void accumulate(RowState& state, const Vec<T>& z, const Vec<T>& u, int first, int n, const RowNumbers& row) {
    float z_peak = state.z_peak, u_peak = state.u_peak;
#pragma unroll
    for (int j = 0; j < Vec<T>::kColumns; ++j) {
        z_peak = z[j] > z_peak ? z[j] : z_peak;
        if (kSoft) u_peak = u[j] > u_peak ? u[j] : u_peak;
    }
    rescale<kSoft>(state, z_peak, u_peak, row);
    const float z_shift = shift_of(z_peak), u_shift = shift_of(u_peak);
#pragma unroll
    for (int j = 0; j < Vec<T>::kColumns; ++j) {
        const float x = z[j] - z_shift;
        const float e = kSoft ? exp2(x * row.k) : 0.0f;
        if (kSoft) {
            state.s += e;
            state.t += exp2((u[j] - u_shift) * row.k);
        }
        if (row.hard) state.others += first + j == row.label ? 0.0f : hard_exp(e, x, kSoft ? row.power : 0);
        if (row.smooth) state.sum_z += first + j >= 0 && first + j < n ? z[j] - row.anchor : 0.0f;
    }
}

// Merges the states of a warp's lanes; every lane gets the result.
template <bool kSoft>
FASTKD_D void merge_lanes(RowState& state, const RowNumbers& row) {
    rescale<kSoft>(state, warp_max(state.z_peak), kSoft ? warp_max(state.u_peak) : 0.0f, row);
    if (row.hard) state.others = warp_sum(state.others);
    if (row.smooth) state.sum_z = warp_sum(state.sum_z);
    if (kSoft) {
        state.s = warp_sum(state.s);
        state.t = warp_sum(state.t);
    }
}

template <bool kSoft>
FASTKD_D void normalise(RowNumbers& row, const RowState& state, float z_y, float smoothing, int n, float& hard) {
    row.z_shift = shift_of(state.z_peak);
    if (kSoft) {
        row.u_shift = shift_of(state.u_peak);
        row.lse_s = log2f(state.s);
        row.lse_t = log2f(state.t);
    }
    if (row.hard) {
        const float log_others = log2f(state.others) * kLn2;
        const float t = (row.z_shift - z_y) + log_others;
        const LabelTerm term = label_term(t);
        row.rest = term.rest;
        // z_y − peak + softplus(t), without inf − inf where the label is a masked token.
        const float log_sum =
            t > 0.0f ? log_others + (term.loss - t > 0.0f ? term.loss - t : 0.0f) : (z_y - row.z_shift) + term.loss;
        row.lse_h = log_sum * kLog2E;
        hard = term.loss - (row.smooth ? smoothing * (state.sum_z / static_cast<float>(n)) : 0.0f);
    }
}

template <class T, class Functor, bool kSoft, bool kResident>
FASTKD_KERNEL void FASTKD_BOUNDS kd_rows_kernel(const KDRowsParams p, const Functor functor) {
    FASTKD_SHARED(Slots<6>, state_slots);
    FASTKD_SHARED(Slots<2>, sum_slots);
    FASTKD_SHARED(Slots<1>, loss_slots);

    const int64_t index = block_rank() / cluster_size();
    const int n = static_cast<int>(p.n);
    const float hard_scale = p.labels ? p.hard_scale[index] : 0.0f;
    const float soft_scale = kSoft ? p.soft_scale[index] : 0.0f;
    const bool first_thread = cluster_rank() == 0 && thread_rank() == 0;
    const int rank = cluster_rank() * block_threads() + thread_rank();
    const int threads = cluster_size() * block_threads();
    T* dz_row = p.dz.data ? reinterpret_cast<T*>(p.dz.row(index, p.inner_rows)) : nullptr;

    if (hard_scale == 0.0f && soft_scale == 0.0f) {  // the same in every block of the cluster
        if (first_thread && !p.from_stats) p.hard[index] = p.soft[index] = 0.0f;
        if (dz_row) store_zeros(dz_row, 0, p.columns, rank, threads);
        return;
    }
    cluster_arrive();

    const T* z_row = reinterpret_cast<const T*>(p.z.row(index, p.inner_rows));
    const T* u_row = kSoft ? reinterpret_cast<const T*>(p.u.row(index, p.inner_rows)) : nullptr;
    const RowReader<T, kSoft, kResident> reader(z_row, u_row, n, dynamic_shared());
    reader.start();

    RowNumbers row = {};
    row.inv_t = 1.0f / p.temperature;
    row.k = row.inv_t * kLog2E;
    row.power = p.temperature == 1.0f ? 1 : p.temperature == 2.0f ? 2 : 0;
    row.hard = p.labels != nullptr;
    row.smooth = row.hard && p.smoothing > 0.0f;
    const int64_t label = row.hard ? p.labels[index] : -1;
    const bool valid = label >= 0 && label < p.n;
    row.label = valid ? static_cast<int>(label) : -1;
    const float z_y = valid ? to_float(z_row[label]) : kNaN;  // before anyone writes over it
    row.anchor = shift_of(z_y);
    float* stats = p.stats + index * kNumStats;

    float hard = 0.0f;
    if (p.from_stats) {
        row.z_shift = stats[kPeakStudent];
        row.u_shift = stats[kPeakTeacher];
        row.lse_h = stats[kLogHard] * kLog2E;
        row.lse_s = stats[kLogStudent] * kLog2E;
        row.lse_t = stats[kLogTeacher] * kLog2E;
        row.rest = stats[kLabelRest];
        row.grad_sum = stats[kGradSum];
        cluster_wait();
    } else {
        copy_async_wait();
        RowState state = {-kInfinity, -kInfinity, 0.0f, 0.0f, 0.0f, 0.0f};
        reader.template for_each<false>([&](int first, const Vec<T>& z, const Vec<T>& u) {
            accumulate<kSoft>(state, z, u, first, n, row);
        });
        merge_lanes<kSoft>(state, row);
        cluster_wait();
        state_slots.publish({state.z_peak, state.u_peak, state.others, state.s, state.t, state.sum_z});
        cluster_arrive();
        cluster_wait();
        state = {-kInfinity, -kInfinity, 0.0f, 0.0f, 0.0f, 0.0f};
        for (int slot = thread_rank() % kWarp; slot < Slots<6>::count(); slot += kWarp) {
            const auto& value = state_slots.values;
            RowState other = {value[0][slot], value[1][slot], value[2][slot],
                              value[3][slot], value[4][slot], value[5][slot]};
            const float z_peak = other.z_peak > state.z_peak ? other.z_peak : state.z_peak;
            const float u_peak = other.u_peak > state.u_peak ? other.u_peak : state.u_peak;
            rescale<kSoft>(state, z_peak, u_peak, row);
            rescale<kSoft>(other, z_peak, u_peak, row);
            state.others += other.others;
            state.s += other.s;
            state.t += other.t;
            state.sum_z += other.sum_z;
        }
        merge_lanes<kSoft>(state, row);
        normalise<kSoft>(row, state, z_y, p.smoothing, n, hard);
        row.grad_sum = -functor.numbers.c_t;
    }
    row.shift = (row.u_shift - row.z_shift) * row.inv_t + (row.lse_t - row.lse_s) * kLn2;
    row.power_scale = exp2(static_cast<float>(row.power) * row.lse_s - row.lse_h);

    // Stage 2, where the gradient must wait for G or there is none.
    constexpr bool kSummed = Functor::kGradSum != GradSum::kConstant;
    const bool walk = kSoft && !p.from_stats && (kSummed || !dz_row);
    float soft = 0.0f;
    const auto evaluate = [&](float z, float u, float& p_s) {
        const float b = (z - row.z_shift) * row.k - row.lse_s;
        p_s = exp2(b);
        return functor(b * kLn2, log_ratio(z, u, row.inv_t, row.shift), exp2((u - row.u_shift) * row.k - row.lse_t), p_s);
    };
    if (walk) {
        float sum_g = 0.0f;
        reader.template for_each<true>([&](int, const Vec<T>& z, const Vec<T>& u) {
#pragma unroll
            for (int j = 0; j < Vec<T>::kColumns; ++j) {
                float p_s;
                const TermGrad value = evaluate(z[j], u[j], p_s);
                soft += value.term;
                sum_g += value.g;
            }
        });
        sum_slots.publish({warp_sum(soft), warp_sum(sum_g)});
        cluster_arrive();
        cluster_wait();
        soft = sum_slots.sum(0);
        if (kSummed) row.grad_sum = sum_slots.sum(1);
    }

    // Stage 3
    if (dz_row) {
        const float soft_factor = soft_scale * row.inv_t;
        const float smooth = row.smooth ? p.smoothing / static_cast<float>(n) : 0.0f;
        const float label_grad = (row.smooth ? p.smoothing - smooth : 0.0f) - row.rest;
        reader.template for_each<true>([&](int first, const Vec<T>& z, const Vec<T>& u) {
            float out[Vec<T>::kColumns];
#pragma unroll
            for (int j = 0; j < Vec<T>::kColumns; ++j) {
                float dz = 0.0f, p_s = 0.0f;
                if (kSoft) {
                    const TermGrad value = evaluate(z[j], u[j], p_s);
                    if (!walk) soft += value.term;
                    dz = soft_factor * soft_gradient(value.g, p_s, row.grad_sum);
                }
                if (row.hard) {
                    const float tempered = row.power == 1 ? p_s : p_s * p_s;
                    const float p_h = kSoft && row.power ? tempered * row.power_scale : exp2((z[j] - row.z_shift) * kLog2E - row.lse_h);
                    dz += hard_scale * (first + j == row.label ? label_grad : p_h - smooth);
                }
                out[j] = dz;
            }
            store(dz_row, first, n, out);
        });
        store_zeros(dz_row, p.n, p.columns, rank, threads);
    }
    if (p.from_stats) return;

    if (kSoft && !walk) {
        loss_slots.publish({warp_sum(soft)}, 0);
        cluster_arrive();
        cluster_wait();
        if (cluster_rank() == 0) soft = loss_slots.sum(0);
    }
    if (first_thread) {
        p.hard[index] = hard;
        p.soft[index] = soft;
        stats[kPeakStudent] = row.z_shift;
        stats[kPeakTeacher] = row.u_shift;
        stats[kLogHard] = row.lse_h * kLn2;
        stats[kLogStudent] = row.lse_s * kLn2;
        stats[kLogTeacher] = row.lse_t * kLn2;
        stats[kGradSum] = row.grad_sum;
        stats[kLabelRest] = row.rest;
    }
}

}  // namespace fastkd
