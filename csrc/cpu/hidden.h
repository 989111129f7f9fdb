// The loss of hidden states: one row on one core.
//
// Math    mse: loss = Σ (s − t)²/H, ds = scale·2/H·(s − t).
//         cosine: with e = s/‖s‖ − t/‖t‖, loss = 1 − cos = Σ e²/2, whose digits last as the two come together;
//         ds = scale/‖s‖·(e − loss·s/‖s‖). A vector of zeros has no direction: loss 1, ds = 0.
// Shapes  s, t, ds [B, S, H] bf16|fp16|fp32 (t fp64 too), last stride 1; scale, loss [N] fp32. scratch: three tiles
// Bytes   of memory: reads s and t, writes ds, each once. cosine walks over the row three times, in cache
#pragma once

#include <cmath>

#include "log_softmax.h"

namespace fastkd {
inline namespace FASTKD_ISA {

inline int64_t hidden_scratch(const HiddenParams&) { return 3 * kTile; }

FASTKD_TILE_LOOP inline float sum_of_squares(const float* s, int n) {
    float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
    for (int j = 0; j < n; ++j) sum += s[j] * s[j];
    return sum;
}

// What both kinds are made of: e = a·s − b·t, its sum of squares, and ds = by_e·e + by_s·s.
struct HiddenFactors {
    float a = 1.0f, b = 1.0f, by_e = 0.0f, by_s = 0.0f;
};

FASTKD_TILE_LOOP inline float sum_of_errors(const float* s, const float* t, int n, const HiddenFactors& by) {
    const HiddenFactors f = by;
    float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
    for (int j = 0; j < n; ++j) {
        const float e = f.a * s[j] - f.b * t[j];
        sum += e * e;
    }
    return sum;
}

FASTKD_TILE_LOOP inline void hidden_gradient(const float* s, const float* t, int n, const HiddenFactors& by,
                                             float* ds) {
    const HiddenFactors f = by;
#pragma omp simd
    for (int j = 0; j < n; ++j) ds[j] = f.by_e * (f.a * s[j] - f.b * t[j]) + f.by_s * s[j];
}

// 1/‖x‖ from the square; 0 for zeros, NaN where the square is infinite.
inline double inverse_norm(double square) { return square == 0.0 ? 0.0 : (1.0 + 0.0 * square) / std::sqrt(square); }

inline void hidden_row(const HiddenParams& p, int64_t row, float* scratch) {
    char* ds_row = p.ds.data ? p.ds.row(row, p.inner_rows) : nullptr;
    const float scale = p.scale[row];
    if (scale == 0.0f) {  // not read: a masked row may hold anything
        p.loss[row] = 0.0f;
        if (ds_row) std::memset(ds_row, 0, p.columns * size_of(p.ds.dtype));
        return;
    }
    const char *s_row = p.s.row(row, p.inner_rows), *t_row = p.t.row(row, p.inner_rows);
    float *s_tile = scratch, *t_tile = scratch + kTile, *ds_buffer = scratch + 2 * kTile;
    HiddenFactors by;
    const auto walk = [&](auto&& visit) {
        for_tiles(p.columns, [&](int64_t at, int n) {
            visit(load_tile(s_row, p.s.dtype, at, n, s_tile), load_tile(t_row, p.t.dtype, at, n, t_tile), at, n);
        });
    };
    const auto write = [&](const float* s, const float* t, int64_t at, int n) {
        if (!ds_row) return;
        float* ds = out_tile(ds_row, p.ds.dtype, at, ds_buffer);
        hidden_gradient(s, t, n, by, ds);
        store_tile(ds_row, p.ds.dtype, at, n, ds);
    };
    double errors = 0.0;
    if (p.kind == HiddenKind::kMSE) {
        by.by_e = static_cast<float>(2.0 * scale / static_cast<double>(p.columns));
        walk([&](const float* s, const float* t, int64_t at, int n) {
            errors += sum_of_errors(s, t, n, by);
            write(s, t, at, n);
        });
        p.loss[row] = static_cast<float>(errors / static_cast<double>(p.columns));
        return;
    }
    double s_square = 0.0, t_square = 0.0;
    walk([&](const float* s, const float* t, int64_t, int n) {
        s_square += sum_of_squares(s, n);
        t_square += sum_of_squares(t, n);
    });
    by.a = static_cast<float>(inverse_norm(s_square));
    by.b = static_cast<float>(inverse_norm(t_square));
    walk([&](const float* s, const float* t, int64_t, int n) { errors += sum_of_errors(s, t, n, by); });
    const bool has_directions = by.a != 0.0f && by.b != 0.0f;
    p.loss[row] = has_directions ? static_cast<float>(0.5 * errors) : 1.0f;
    by.by_e = has_directions ? scale * by.a : 0.0f;
    by.by_s = -by.by_e * by.a * p.loss[row];
    walk(write);
}

}  // namespace FASTKD_ISA
}  // namespace fastkd
