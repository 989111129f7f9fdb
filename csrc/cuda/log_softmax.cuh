// Temperature-scaled log-softmax and its gradient on a GPU: a cluster or parts work on one row.
//
// Math    out = (x − peak)/T − log Σ exp((x − peak)/T);  dx = (dy − exp(out)·Σ dy)/T
// Shapes  x, out, dy, dx [B, S, columns] fp32|bf16|fp16, last stride 1; x and dx of one dtype, out and dy of another or
//         the same; lse [N, 2] fp32
// Bytes   e bytes an element of one dtype. Resident, x and dy are read once: 2e forward, 3e backward, the floor.
//         Otherwise what is summed is read again: 3e and 4e.
// Grid    N·C blocks of up to 256 threads, in clusters of C or as parts; slices and merges as in kd_rows.cuh
#pragma once

#include <cmath>

#include "../lse.h"
#include "reader.cuh"
#include "reduce.cuh"

namespace fastkd {

struct PeakSum {
    float peak = -kInfinity, sum = 0.0f;

    FASTKD_D void move_to(float to, float k) {
        sum *= rescale(peak, to, k);
        peak = to;
    }
};

// What a reduction gives its first warp, for all.
template <bool kResident, class State, class Merge>
FASTKD_D State reduce_for_all(Exchange<kResident>& exchange, State state, Merge&& merge) {
    state = exchange.reduce(merge(state), 0, merge);
    if (thread_rank() == 0) memcpy(&exchange.warps[0], &state, sizeof(State));
    block_barrier();
    memcpy(static_cast<void*>(&state), &exchange.warps[0], sizeof(State));
    return state;
}

template <class T, class Out, bool kResident>
FASTKD_KERNEL void FASTKD_BOUNDS(3) log_softmax_kernel(const LogSoftmaxParams p, const Split split) {
    FASTKD_SHARED(Exchange<kResident>, exchange);
    constexpr int kColumns = Vec<T>::kColumns;
    const int index = block_rank() / cluster_size(), n = static_cast<int>(p.columns);
    if (thread_rank() == 0) exchange.blocks.init(split, index);
    cluster_arrive();
    Out* out_data = reinterpret_cast<Out*>(p.out.row(index, p.inner_rows));
    const int head = head_of<kColumns>(out_data);
    const Row<Out, kColumns> out_row(out_data, n, head);
    const Source<T> x_row(p.x.row(index, p.inner_rows), type_of<T>(), n, head);
    const RowReader<T, false, kResident> reader(x_row, x_row, split.share, dynamic_shared());
    reader.start();
    const float inv_t = 1.0f / p.temperature, k = inv_t * kLog2E;
    cluster_wait();
    copy_async_wait();

    PeakSum state;
    reader.template for_each<false>([&](int slot) {
        const Vec<T> x = reader.x_at(slot);
        float peak = state.peak;
#pragma unroll
        for (int j = 0; j < kColumns; ++j) peak = max(x[j], peak);
        state.move_to(peak, k);
        const float shift = shift_of(peak);
#pragma unroll
        for (int j = 0; j < kColumns; ++j) state.sum += exp2((x[j] - shift) * k);
    });
    state = reduce_for_all(exchange, state, [&](PeakSum lane) {
        lane.move_to(warp_max(lane.peak), k);
        return PeakSum{lane.peak, warp_sum(lane.sum)};
    });
    const float shift = shift_of(state.peak), log_sum = log2f(state.sum) * kLn2;

    reader.template for_each<true>([&](int slot) {
        const Vec<T> x = reader.x_at(slot);
        float out[kColumns];
#pragma unroll
        for (int j = 0; j < kColumns; ++j) out[j] = (x[j] - shift) * inv_t - log_sum;
        store(out_row, reader.column(slot), out);
    });
    if (exchange.blocks.rank() == 0 && thread_rank() == 0) {
        p.lse[2 * index] = shift;
        p.lse[2 * index + 1] = log_sum;
    }
}

struct Sum {
    float sum = 0.0f;
};

template <class T, class Out, bool kResident>
FASTKD_KERNEL void FASTKD_BOUNDS(3) log_softmax_backward_kernel(const LogSoftmaxParams p, const Split split) {
    FASTKD_SHARED(Exchange<kResident>, exchange);
    constexpr int kColumns = Vec<Out>::kColumns;
    const int index = block_rank() / cluster_size(), n = static_cast<int>(p.columns);
    if (thread_rank() == 0) exchange.blocks.init(split, index);
    cluster_arrive();
    T* dx_data = reinterpret_cast<T*>(p.out.row(index, p.inner_rows));
    const int head = head_of<kColumns>(dx_data);
    const Row<T, kColumns> dx_row(dx_data, n, head);
    const Row<const T, kColumns> x_row(reinterpret_cast<const T*>(p.x.row(index, p.inner_rows)), n, head);
    const Source<Out> dy_row(p.dy.row(index, p.inner_rows), type_of<Out>(), n, head);
    const RowReader<Out, false, kResident> reader(dy_row, dy_row, split.share, dynamic_shared());
    reader.start();
    const float inv_t = 1.0f / p.temperature, k = inv_t * kLog2E;
    const float shift = p.lse[2 * index], log2_sum = p.lse[2 * index + 1] * kLog2E;
    cluster_wait();
    copy_async_wait();

    Sum state;
    reader.template for_each<false>([&](int slot) {
        const Vec<Out> dy = reader.x_at(slot);
        const int first = reader.column(slot);
#pragma unroll
        for (int j = 0; j < kColumns; ++j) state.sum += first + j >= 0 && first + j < n ? dy[j] : 0.0f;
    });
    state = reduce_for_all(exchange, state, [](const Sum& lane) { return Sum{warp_sum(lane.sum)}; });

    reader.template for_each<true>([&](int slot) {
        const Vec<Out> dy = reader.x_at(slot);
        const int first = reader.column(slot);
        float x[kColumns];
        load_floats(x_row, first, x);
#pragma unroll
        for (int j = 0; j < kColumns; ++j)
            x[j] = (dy[j] - exp2((x[j] - shift) * k - log2_sum) * state.sum) * inv_t;
        store(dx_row, first, x);
    });
}

}  // namespace fastkd
