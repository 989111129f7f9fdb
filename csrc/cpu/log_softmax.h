// Temperature-scaled log-softmax, forward and backward, and the scaling of a gradient: one row on one core.
//
// Math    out = (x − peak)/T − log Σ exp((x − peak)/T);  dx = (dy − exp(out)·Σ dy)/T;  x *= s
// Shapes  x, out, dy, dx [B, S, V] bf16|fp16|fp32|fp64, last stride 1; lse [N, 2] fp32. scratch: three tiles, and two
//         numbers a tile
// Bytes   of memory: reads x (backward: dy too), writes the output, each once
#pragma once

#include "kd_rows.h"

namespace fastkd {
inline namespace FASTKD_ISA {

inline int64_t log_softmax_scratch(const LogSoftmaxParams& p) { return 3 * kTile + 2 * tiles_of(p.columns); }
inline int64_t scale_scratch(const ScaleParams&) { return kTile; }

// Calls visit(at, n) for the tiles of a row.
template <class Visit>
inline void for_tiles(int64_t columns, Visit&& visit) {
    for (int64_t at = 0; at < columns; at += kTile)
        visit(at, static_cast<int>(columns - at < kTile ? columns - at : kTile));
}

inline void log_softmax_forward(const LogSoftmaxParams& p, int64_t row, float* scratch) {
    const char* x_row = p.x.row(row, p.inner_rows);
    char* out_row = p.out.row(row, p.inner_rows);
    float *x_tile = scratch, *out_buffer = scratch + kTile;
    float *peaks = scratch + 3 * kTile, *sums = peaks + tiles_of(p.columns);
    const float inv_t = 1.0f / p.temperature, k = inv_t * kLog2E;
    float peak = -kInfinity;
    for_tiles(p.columns, [&](int64_t at, int n) {
        const float* x = load_tile(x_row, p.x.dtype, at, n, x_tile);
        const float tile_peak = max_of(x, n);
        peak = max(tile_peak, peak);
        peaks[at / kTile] = shift_of(tile_peak);
        sums[at / kTile] = sum_of_exp(x, n, shift_of(tile_peak), k);
    });
    double sum = 0.0;
    for (int64_t i = 0; i < tiles_of(p.columns); ++i) sum += static_cast<double>(sums[i]) * rescale(peaks[i], peak, k);
    const float shift = shift_of(peak), log_sum = static_cast<float>(std::log(sum));
    p.lse[2 * row] = shift;
    p.lse[2 * row + 1] = log_sum;
    for_tiles(p.columns, [&](int64_t at, int n) {
        const float* x = load_tile(x_row, p.x.dtype, at, n, x_tile);
        float* out = out_tile(out_row, p.out.dtype, at, out_buffer);
#pragma omp simd
        for (int j = 0; j < n; ++j) out[j] = (x[j] - shift) * inv_t - log_sum;
        store_tile(out_row, p.out.dtype, at, n, out);
    });
}

inline void log_softmax_backward(const LogSoftmaxParams& p, int64_t row, float* scratch) {
    const char* x_row = p.x.row(row, p.inner_rows);
    const char* dy_row = p.dy.row(row, p.inner_rows);
    char* dx_row = p.out.row(row, p.inner_rows);
    float *x_tile = scratch, *dy_tile = scratch + kTile, *dx_buffer = scratch + 2 * kTile;
    const float inv_t = 1.0f / p.temperature, k = inv_t * kLog2E;
    double sum = 0.0;
    for_tiles(p.columns, [&](int64_t at, int n) { sum += sum_of(load_tile(dy_row, p.dy.dtype, at, n, dy_tile), n); });
    const float grad_sum = static_cast<float>(sum), shift = p.lse[2 * row], log2_sum = p.lse[2 * row + 1] * kLog2E;
    for_tiles(p.columns, [&](int64_t at, int n) {
        const float* x = load_tile(x_row, p.x.dtype, at, n, x_tile);
        const float* dy = load_tile(dy_row, p.dy.dtype, at, n, dy_tile);
        float* dx = out_tile(dx_row, p.out.dtype, at, dx_buffer);
#pragma omp simd
        for (int j = 0; j < n; ++j) dx[j] = (dy[j] - exp2((x[j] - shift) * k - log2_sum) * grad_sum) * inv_t;
        store_tile(dx_row, p.out.dtype, at, n, dx);
    });
}

inline void log_softmax_row(const LogSoftmaxParams& p, int64_t row, float* scratch) {
    p.dy.data ? log_softmax_backward(p, row, scratch) : log_softmax_forward(p, row, scratch);
}

inline void scale_row(const ScaleParams& p, int64_t row, float* scratch) {
    char* x_row = p.x.row(row, p.inner_rows);
    const float scalar = p.scalar;
    for_tiles(p.columns, [&](int64_t at, int n) {
        const float* x = load_tile(x_row, p.x.dtype, at, n, scratch);
        float* out = out_tile(x_row, p.x.dtype, at, scratch);
#pragma omp simd
        for (int j = 0; j < n; ++j) out[j] = x[j] * scalar;
        store_tile(x_row, p.x.dtype, at, n, out);
    });
}

}  // namespace FASTKD_ISA
}  // namespace fastkd
