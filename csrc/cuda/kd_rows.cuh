// The row operation on a GPU: a cluster of blocks works on one row.
//
// Math    see row.h; term and g come from the functor. S comes with stage 1 where a mean of d gives it (Moment), and
//         stage 2 is left out; where that mean has not the digits, or G is not known otherwise, stage 2 sums both.
// Shapes  z, u, dz [B, S, columns] fp32|bf16|fp16, last stride 1; labels [N] int64; scales, losses [N]; stats [N, 8].
// Bytes   an element, e bytes wide. Resident: each logit is read once into shared memory and stays there between the
//         stages: loss 2e, loss and gradient 3e, the floor. Otherwise each stage reads the row again, from L2 where it
//         still is: loss 2e, loss and gradient 5e, and 2e more for each stage 2; gradient from statistics 3e.
// Work    at T = 2, bytes at 3 TB/s leave an H100 57 instructions a column of bfloat16; 4 of them are exponentials. So
//         what only the label's column, a ragged end, smoothing or another T needs is kept out of the main loops.
// Grid    N·C blocks of up to 256 threads in clusters of C (1, 2, 4, 8 or 16). Each block has a contiguous slice of
//         the row, whose vectors its threads take in turn.
// Merge   A warp merges its lanes by shuffles, then writes its state to its slot in every block of the cluster; after
//         one cluster barrier each warp merges all slots, in the same order everywhere, so results are deterministic.
//         The barriers of a row: that everyone has started (hidden behind the loads), stage 1, and each stage 2.
#pragma once

#include <cmath>

#include "../params.h"
#include "../row.h"
#include "reader.cuh"
#include "reduce.cuh"

namespace fastkd {

struct RowState {
    float z_peak = -kInfinity, u_peak = -kInfinity;
    float others = 0.0f;          // Σ exp(z − z_peak), the label's column apart
    float s = 0.0f, t = 0.0f;     // Σ exp((z − z_peak)/T), Σ exp((u − u_peak)/T)
    float moment = 0.0f;          // Σ of what kMoment names, with the same exponentials and peaks
    float entropy = 0.0f;         // Σ exp((u − u_peak)/T)·(u − u_peak)
    float sum_z = 0.0f;           // Σ z − anchor
};

// Everything that is the same in all columns of a row.
struct RowNumbers {
    float k, inv_t;              // log2(e)/T and 1/T
    int label;                   // −1: none
    bool hard, smooth;
    // Whether exp(z) comes as e·(square·e + linear) of e = exp(z/T): T is 1 or 2, or there is no hard term to use it.
    bool is_power;
    float square, linear;
    float anchor;                // z_y, for the mean of z: far from 0 a sum of z has no digits left
    float z_shift, u_shift;      // the peaks
    float lse_h, lse_s, lse_t;   // log₂ normalisers of z, z/T, u/T, relative to the peaks
    float offset, shift;         // of d, in natural units
    bool near;                   // the form of g
    float other_side;
    float log_ratio_of_sums;
    float grad_sum, rest;

    // Given log Σ exp((u − peak)/T) less that of z.
    FASTKD_D void set_ratio(float log_sums) {
        lse_t = lse_s + log_sums * kLog2E;
        offset = offset_between(z_shift, u_shift);
        shift = (u_shift - offset - z_shift) * inv_t + log_sums;
        log_ratio_of_sums = log_sums;
    }

    template <bool kPower>
    FASTKD_D float hard_exp(float tempered, float x) const {
        return kPower ? tempered * (square * tempered + linear) : exp2(x * kLog2E);
    }
};

// Makes the sums relative to new peaks. A state that has seen nothing has a peak of −inf and gets a factor of 0.
template <bool kSoft, bool kPower, class Functor>
FASTKD_D void rescale(RowState& state, float z_peak, float u_peak, const RowNumbers& row) {
    const float z_drop = state.z_peak - shift_of(z_peak);
    const float by_s = kSoft ? exp2(z_drop * row.k) : 0.0f;
    state.others *= row.hard_exp<kPower>(by_s, z_drop);
    state.z_peak = z_peak;
    if constexpr (kSoft) {
        const float u_drop = state.u_peak - shift_of(u_peak);
        const float by_t = exp2(u_drop * row.k);
        constexpr Moment kMoment = Functor::kMoment;
        const float of_shift = moment_of<kMoment>(state.s, state.t, z_drop, u_drop);
        if constexpr (Functor::kEntropy) state.entropy = mul0(by_t, state.entropy + mul0(state.t, u_drop));
        state.moment = mul0(kMoment == Moment::kStudentRatio ? by_s : by_t, state.moment + of_shift);
        state.s *= by_s;
        state.t *= by_t;
        state.u_peak = u_peak;
    }
}

// Stage 1 of a vector. kLabel: it may hold the label's column.
template <bool kSoft, bool kPower, class Functor, bool kLabel, class T>
FASTKD_D void accumulate(RowState& state, int first, const Vec<T>& z, const Vec<T>& u, int n, const RowNumbers& row) {
    constexpr int kColumns = Vec<T>::kColumns;
    float z_peak = state.z_peak, u_peak = state.u_peak;
#pragma unroll
    for (int j = 0; j < kColumns; ++j) {
        z_peak = max(z[j], z_peak);
        if (kSoft) u_peak = max(u[j], u_peak);
    }
    rescale<kSoft, kPower, Functor>(state, z_peak, u_peak, row);
    const float z_shift = shift_of(z_peak), u_shift = shift_of(u_peak);
#pragma unroll
    for (int j = 0; j < kColumns; ++j) {
        const float x = z[j] - z_shift, y = u[j] - u_shift;
        float s = 0.0f;
        if constexpr (kSoft) {
            s = exp2(x * row.k);
            const float t = exp2(y * row.k);
            state.s += s;
            state.t += t;
            state.moment += moment_of<Functor::kMoment>(s, t, x, y);
            if constexpr (Functor::kEntropy) state.entropy += mul0(t, y);
        }
        if (!kLabel || first + j != row.label) state.others += row.hard_exp<kPower>(s, x);
        if (!kPower && row.smooth) state.sum_z += first + j >= 0 && first + j < n ? z[j] - row.anchor : 0.0f;
    }
}

// Merges the states of a warp's lanes; every lane gets the result.
template <bool kSoft, bool kPower, class Functor>
FASTKD_D void merge_lanes(RowState& state, const RowNumbers& row) {
    rescale<kSoft, kPower, Functor>(state, warp_max(state.z_peak), kSoft ? warp_max(state.u_peak) : 0.0f, row);
    state.others = warp_sum(state.others);
    state.sum_z = warp_sum(state.sum_z);
    if constexpr (kSoft) {
        state.s = warp_sum(state.s);
        state.t = warp_sum(state.t);
        if constexpr (Functor::kMoment != Moment::kNone) state.moment = warp_sum(state.moment);
        if constexpr (Functor::kEntropy) state.entropy = warp_sum(state.entropy);
    }
}

// The state of the whole row, by way of every block's slots.
template <bool kSoft, bool kPower, class Functor>
FASTKD_D RowState merge_cluster(RowState state, Slots<8>& slots, const RowNumbers& row) {
    merge_lanes<kSoft, kPower, Functor>(state, row);
    cluster_wait();  // of the kernel's start
    slots.publish({state.z_peak, state.u_peak, state.others, state.s, state.t, state.moment, state.sum_z, state.entropy});
    cluster_arrive();
    cluster_wait();
    RowState all;
    for (int slot = thread_rank() % kWarp; slot < Slots<8>::count(); slot += kWarp) {
        const auto& value = slots.values;
        RowState other = {value[0][slot], value[1][slot], value[2][slot], value[3][slot],
                          value[4][slot], value[5][slot], value[7][slot], value[6][slot]};
        const float z_peak = max(other.z_peak, all.z_peak), u_peak = max(other.u_peak, all.u_peak);
        rescale<kSoft, kPower, Functor>(all, z_peak, u_peak, row);
        rescale<kSoft, kPower, Functor>(other, z_peak, u_peak, row);
        all.others += other.others;
        all.s += other.s;
        all.t += other.t;
        all.moment += other.moment;
        all.entropy += other.entropy;
        all.sum_z += other.sum_z;
    }
    merge_lanes<kSoft, kPower, Functor>(all, row);
    return all;
}

// The normalisers, from the state of the row; returns the hard loss.
template <bool kSoft>
FASTKD_D float normalise(RowNumbers& row, const RowState& state, float z_y, float smoothing, int n) {
    row.z_shift = shift_of(state.z_peak);
    if constexpr (kSoft) {
        row.u_shift = shift_of(state.u_peak);
        row.lse_s = log2f(state.s);
        row.set_ratio(log2f(state.t / state.s) * kLn2);
    }
    if (!row.hard) return 0.0f;
    const float log_others = log2f(state.others) * kLn2;
    const float t = (row.z_shift - z_y) + log_others;
    const LabelTerm term = label_term(t);
    row.rest = term.rest;
    // z_y − peak + softplus(t), without inf − inf where the label is a masked token.
    const float log_sum = t > 0.0f ? log_others + (term.loss - t > 0.0f ? term.loss - t : 0.0f)
                                   : (z_y - row.z_shift) + term.loss;
    row.lse_h = log_sum * kLog2E;
    return term.loss - (row.smooth ? smoothing * (state.sum_z / static_cast<float>(n)) : 0.0f);
}

// A walk that sums terms takes more registers.
template <class Functor, bool kSoft>
constexpr int kBlocks = kSoft && !Functor::kMeanIsValue ? 2 : 3;

template <class T, class Functor, bool kSoft, bool kResident>
FASTKD_KERNEL void FASTKD_BOUNDS((kBlocks<Functor, kSoft>))
kd_rows_kernel(const KDRowsParams p, const Functor functor) {
    FASTKD_SHARED(Slots<8>, state_slots);
    FASTKD_SHARED(Slots<4>, far_slots);
    FASTKD_SHARED(Slots<4>, near_slots);
    FASTKD_SHARED(Slots<4>, centred_slots);
    constexpr Moment kMoment = Functor::kMoment;
    constexpr int kColumns = Vec<T>::kColumns;

    const int64_t index = block_rank() / cluster_size();
    const int n = static_cast<int>(p.n);
    const float hard_scale = p.labels ? p.hard_scale[index] : 0.0f;
    const float soft_scale = kSoft ? p.soft_scale[index] : 0.0f;
    const bool first_thread = cluster_rank() == 0 && thread_rank() == 0;
    const int rank = cluster_rank() * block_threads() + thread_rank();
    const int threads = cluster_size() * block_threads();
    T* dz_data = p.dz.data ? reinterpret_cast<T*>(p.dz.row(index, p.inner_rows)) : nullptr;

    if (hard_scale == 0.0f && soft_scale == 0.0f) {  // the same in every block of the cluster
        if (first_thread && !p.from_stats) p.hard[index] = p.soft[index] = 0.0f;
        if (dz_data) store_zeros(dz_data, 0, p.columns, rank, threads);
        return;
    }
    cluster_start();

    const T* z_data = reinterpret_cast<const T*>(p.z.row(index, p.inner_rows));
    const T* u_data = kSoft ? reinterpret_cast<const T*>(p.u.row(index, p.inner_rows)) : nullptr;
    const RowReader<T, kSoft, kResident> reader(z_data, u_data, n, dynamic_shared());
    reader.start();

    RowNumbers row = {};
    row.inv_t = 1.0f / p.temperature;
    row.k = row.inv_t * kLog2E;
    row.hard = p.labels != nullptr;
    row.smooth = row.hard && p.smoothing > 0.0f;
    row.square = p.temperature == 2.0f ? 1.0f : 0.0f;
    row.linear = 1.0f - row.square;
    row.is_power = !row.hard || (!row.smooth && (p.temperature == 1.0f || p.temperature == 2.0f));
    const int64_t label = row.hard ? p.labels[index] : -1;
    const bool valid = label >= 0 && label < p.n;
    row.label = valid ? static_cast<int>(label) : -1;
    const int label_index = reader.index_of(valid ? row.label : n + kColumns);
    const int label_first = reader.column(label_index);
    const bool walks_label = reader.walks(label_index);
    // Before anyone writes over it. From statistics only the thread that writes the label's gradient reads it.
    const float z_y = valid && (walks_label || !p.from_stats) ? to_float(z_data[label]) : kNaN;
    row.anchor = shift_of(z_y);
    float* stats = p.stats + index * kNumStats;

    // term and g of a column.
    const auto evaluate = [&](auto near, float z, float u, float& p_s, float* excess) {
        const float p_t = exp2((u - row.u_shift) * row.k - row.lse_t);
        p_s = exp2((z - row.z_shift) * row.k - row.lse_s);
        const float d = log_ratio(z, u, row.offset, row.inv_t, row.shift);
        if (excess) *excess = Excess(d, p_t, p_s).mass;
        return functor.template column<decltype(near)::value>(d, p_t, p_s);
    };
    const auto g_of = [&](float z, float u, float& p_s) {
        const float g = row.near ? evaluate(std::true_type(), z, u, p_s, nullptr).g
                                 : evaluate(std::false_type(), z, u, p_s, nullptr).g;
        return g - row.other_side * p_s;
    };

    if (p.from_stats) {
        row.z_shift = stats[kPeakStudent];
        row.u_shift = stats[kPeakTeacher];
        row.lse_h = stats[kLogHard] * kLog2E;
        row.lse_s = stats[kLogStudent] * kLog2E;
        row.set_ratio(stats[kLogRatio]);
        row.near = !Functor::kTwoSided && stats[kGradForm] != 0.0f;
        row.other_side = Functor::kTwoSided ? stats[kGradForm] : 0.0f;
        row.rest = stats[kLabelRest];
        row.grad_sum = stats[kGradSum];
        cluster_wait();
    } else {
        copy_async_wait();
        const auto stage1 = [&](auto power) {
            constexpr bool kPower = decltype(power)::value;
            RowState state;
            reader.template for_each<false>([&](int first, const Vec<T>& z, const Vec<T>& u) {
                if (first != label_first) accumulate<kSoft, kPower, Functor, false>(state, first, z, u, n, row);
            });
            if (walks_label) {
                reader.at(label_index, [&](int first, const Vec<T>& z, const Vec<T>& u) {
                    accumulate<kSoft, kPower, Functor, true>(state, first, z, u, n, row);
                });
            }
            return merge_cluster<kSoft, kPower, Functor>(state, state_slots, row);
        };
        const RowState state = kSoft && row.is_power ? stage1(std::bool_constant<kSoft>()) : stage1(std::false_type());
        const float hard = normalise<kSoft>(row, state, z_y, p.smoothing, n);

        Value<float> soft = {0.0f, false, false};
        row.grad_sum = -functor.weight();
        if constexpr (kMoment != Moment::kNone) {
            const float mean = state.moment / (kMoment == Moment::kStudentRatio ? state.s : state.t) * row.inv_t;
            soft = value_from_mean(functor, mean, row.log_ratio_of_sums);
            if (Functor::kGradSum == GradSum::kFromValue) row.grad_sum = soft.value;
        }
        float excess = 0.0f;
        const auto stage2 = [&](auto near, Slots<4>& slots) {
            float term = 0.0f, g = 0.0f, other_g = 0.0f, mass = 0.0f;
            reader.template for_each<true>([&](int, const Vec<T>& z, const Vec<T>& u) {
#pragma unroll
                for (int j = 0; j < kColumns; ++j) {
                    float p_s, of_column = 0.0f;
                    const TermGrad column = evaluate(near, z[j], u[j], p_s, decltype(near)::value ? &of_column : nullptr);
                    term += column.term;
                    g += column.g;
                    if (Functor::kTwoSided) other_g += column.g - p_s;
                    mass += of_column;
                }
            });
            slots.publish({warp_sum(term), warp_sum(g), warp_sum(other_g), warp_sum(mass)});
            cluster_arrive();
            cluster_wait();
            soft.value = slots.sum(0);
            if (decltype(near)::value || Functor::kGradSum != GradSum::kConstant) row.grad_sum = slots.sum(1);
            if (Functor::kTwoSided) {
                row.other_side = row.grad_sum > -slots.sum(2) ? 1.0f : 0.0f;
                if (row.other_side != 0.0f) row.grad_sum = slots.sum(2);
            }
            excess = slots.sum(3);
        };
        // Every block of the cluster takes the same way.
        if constexpr (kSoft) {
            row.near = soft.is_small;
            if (!soft.has_digits && !soft.is_small) {
                stage2(std::false_type(), far_slots);
                row.near = soft.value < functor.near_below();
            }
            if (row.near) {
                stage2(std::true_type(), near_slots);
                if (Functor::kTwoSided || excess * excess > 2e-6f * soft.value) {
                    row.set_ratio(row.log_ratio_of_sums + excess);
                    stage2(std::true_type(), centred_slots);
                }
            }
            if (Functor::kEntropy)
                soft.value += (row.lse_s * kLn2 + row.log_ratio_of_sums) - state.entropy / state.t * row.inv_t;
        }
        if (first_thread) {
            p.hard[index] = hard;
            p.soft[index] = soft.value < 0.0f ? 0.0f : soft.value;
            stats[kPeakStudent] = row.z_shift;
            stats[kPeakTeacher] = row.u_shift;
            stats[kLogHard] = row.lse_h * kLn2;
            stats[kLogStudent] = row.lse_s * kLn2;
            stats[kLogRatio] = row.log_ratio_of_sums;
            stats[kGradSum] = row.grad_sum;
            stats[kLabelRest] = row.rest;
            stats[kGradForm] = Functor::kTwoSided ? row.other_side : row.near ? 1.0f : 0.0f;
        }
    }
    if (!dz_data) return;

    // Stage 3, the label's column apart.
    const Row<T> dz_row(dz_data, n, reader.head);
    const float soft_factor = soft_scale * row.inv_t;
    const float smooth = row.smooth ? p.smoothing / static_cast<float>(n) : 0.0f;
    const float power_scale = hard_scale * exp2((1.0f + row.square) * row.lse_s - row.lse_h);
    const float square = power_scale * row.square, linear = power_scale * row.linear;
    const auto stage3 = [&](auto power) {
        reader.template for_each<true>([&](int first, const Vec<T>& z, const Vec<T>& u) {
            float dz[kColumns];
#pragma unroll
            for (int j = 0; j < kColumns; ++j) {
                float soft = 0.0f, p_s = 0.0f;
                if (kSoft) {
                    const float g = g_of(z[j], u[j], p_s);
                    soft = soft_factor * soft_gradient<Functor>(g, p_s, row.grad_sum);
                }
                if constexpr (decltype(power)::value) {
                    dz[j] = soft + p_s * (square * p_s + linear);
                } else {
                    dz[j] = soft + hard_scale * (exp2((z[j] - row.z_shift) * kLog2E - row.lse_h) - smooth);
                }
            }
            store(dz_row, first, dz);
        });
    };
    kSoft && row.is_power ? stage3(std::bool_constant<kSoft>()) : stage3(std::false_type());
    if (walks_label) {
        float soft = 0.0f;
        if (kSoft) {
            float p_s;
            const float g = g_of(z_y, to_float(u_data[label]), p_s);
            soft = soft_factor * soft_gradient<Functor>(g, p_s, row.grad_sum);
        }
        const float hard = hard_scale * ((row.smooth ? p.smoothing - smooth : 0.0f) - row.rest);
        from_float(soft + hard, dz_data[label]);
    }
    store_zeros(dz_data, p.n, p.columns, rank, threads);
}

}  // namespace fastkd
