// Temperature-scaled log-softmax and its gradient on a GPU: a cluster of blocks works on one row.
//
// Math    out = (x − peak)/T − log Σ exp((x − peak)/T);  dx = (dy − exp(out)·Σ dy)/T
// Shapes  x, out, dy, dx [B, S, columns] fp32|bf16|fp16, last stride 1; x and dx of one dtype, out and dy of another or
//         the same; lse [N, 2] fp32
// Bytes   e bytes an element of one dtype. Resident, x and dy are read once: 2e forward, 3e backward, the floor.
//         Otherwise what is summed is read again: 3e and 4e.
// Grid    as in kd_rows.cuh
#pragma once

#include <cmath>

#include "../lse.h"
#include "../params.h"
#include "reader.cuh"
#include "reduce.cuh"

namespace fastkd {

template <class T, class Out, bool kResident>
FASTKD_KERNEL void FASTKD_BOUNDS(3) log_softmax_kernel(const LogSoftmaxParams p) {
    FASTKD_SHARED(Slots<2>, slots);
    cluster_start();
    const int64_t index = block_rank() / cluster_size();
    const int n = static_cast<int>(p.columns);
    const T* x_row = reinterpret_cast<const T*>(p.x.row(index, p.inner_rows));
    const RowReader<T, false, kResident> reader(x_row, nullptr, n, dynamic_shared());
    reader.start();
    const float inv_t = 1.0f / p.temperature, k = inv_t * kLog2E;

    copy_async_wait();
    float peak = -kInfinity, sum = 0.0f;
    reader.template for_each<false>([&](int, const Vec<T>& x, const Vec<T>&) {
        const float old = peak;
#pragma unroll
        for (int j = 0; j < Vec<T>::kColumns; ++j) peak = max(x[j], peak);
        const float shift = shift_of(peak);
        sum *= rescale(old, peak, k);
#pragma unroll
        for (int j = 0; j < Vec<T>::kColumns; ++j) sum += exp2((x[j] - shift) * k);
    });
    const float warp_peak = warp_max(peak);
    sum = warp_sum(sum * rescale(peak, warp_peak, k));
    cluster_wait();
    slots.publish({warp_peak, sum});
    cluster_arrive();
    cluster_wait();
    peak = slots.max(0);
    const float shift = shift_of(peak);
    sum = slots.sum_of([&](int slot) { return slots.values[1][slot] * rescale(slots.values[0][slot], peak, k); });
    const float log_sum = log2f(sum) * kLn2;

    const Row<Out> out_row(reinterpret_cast<Out*>(p.out.row(index, p.inner_rows)), n, reader.head);
    reader.template for_each<true>([&](int first, const Vec<T>& x, const Vec<T>&) {
        float out[Vec<T>::kColumns];
#pragma unroll
        for (int j = 0; j < Vec<T>::kColumns; ++j) out[j] = (x[j] - shift) * inv_t - log_sum;
        store(out_row, first, out);
    });
    if (cluster_rank() == 0 && thread_rank() == 0) {
        p.lse[2 * index] = shift;
        p.lse[2 * index + 1] = log_sum;
    }
}

template <class T, class Out, bool kResident>
FASTKD_KERNEL void FASTKD_BOUNDS(3) log_softmax_backward_kernel(const LogSoftmaxParams p) {
    FASTKD_SHARED(Slots<1>, slots);
    cluster_start();
    const int64_t index = block_rank() / cluster_size();
    const int n = static_cast<int>(p.columns);
    const Out* dy_row = reinterpret_cast<const Out*>(p.dy.row(index, p.inner_rows));
    const RowReader<Out, false, kResident> reader(dy_row, nullptr, n, dynamic_shared());
    reader.start();
    const float inv_t = 1.0f / p.temperature, k = inv_t * kLog2E;
    const float shift = p.lse[2 * index], log2_sum = p.lse[2 * index + 1] * kLog2E;

    copy_async_wait();
    float sum = 0.0f;
    reader.template for_each<false>([&](int first, const Vec<Out>& dy, const Vec<Out>&) {
#pragma unroll
        for (int j = 0; j < Vec<Out>::kColumns; ++j) sum += first + j >= 0 && first + j < n ? dy[j] : 0.0f;
    });
    cluster_wait();
    slots.publish({warp_sum(sum)});
    cluster_arrive();
    cluster_wait();
    sum = slots.sum(0);

    const Row<const T> x_row(reinterpret_cast<const T*>(p.x.row(index, p.inner_rows)), n, reader.head);
    const Row<T> dx_row(reinterpret_cast<T*>(p.out.row(index, p.inner_rows)), n, reader.head);
    reader.template for_each<true>([&](int first, const Vec<Out>& dy, const Vec<Out>&) {
        float x[Vec<Out>::kColumns];
        load_floats(x_row, first, x);
#pragma unroll
        for (int j = 0; j < Vec<Out>::kColumns; ++j) x[j] = (dy[j] - exp2((x[j] - shift) * k - log2_sum) * sum) * inv_t;
        store(dx_row, first, x);
    });
}

}  // namespace fastkd
