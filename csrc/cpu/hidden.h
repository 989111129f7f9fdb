// The loss of hidden states: one row on one core.
//
// Math    mse: loss = Σ (s − t)²/H, ds = scale·2/H·(s − t).
//         cosine: with e = s/‖s‖ − t/‖t‖, loss = 1 − cos = Σ e²/2, whose digits last as the two come together;
//         ds = scale/‖s‖·(e − loss·s/‖s‖). A vector of zeros has no direction: loss 1, ds = 0.
// Shapes  s, t, ds [B, S, H] bf16|fp16|fp32 (t fp64 too), last stride 1; scale, loss [N] fp32. scratch: three rows
// Bytes   of memory: reads s and t, writes ds, each once. cosine walks over the row three times, in cache. float and
//         bfloat16 are converted in registers, float16 and two types through the scratch
#pragma once

#include <cmath>

#include "log_softmax.h"

namespace fastkd {
inline namespace FASTKD_ISA {

inline int64_t hidden_scratch(const HiddenParams& p) { return 3 * p.columns; }

// What both kinds are made of: e = a·s − b·t, its sum of squares, and ds = by_e·e + by_s·s.
struct HiddenFactors {
    float a = 1.0f, b = 1.0f, by_e = 0.0f, by_s = 0.0f;
};

struct TwoSums {
    double s = 0.0, t = 0.0;
};

template <class T>
FASTKD_TILE_LOOP inline void add_squares(const T* s, const T* t, int n, TwoSums& sums) {
    float sum_s = 0.0f, sum_t = 0.0f;
#pragma omp simd reduction(+ : sum_s, sum_t)
    for (int j = 0; j < n; ++j) {
        const float s_j = to_float(s[j]), t_j = to_float(t[j]);
        sum_s += s_j * s_j;
        sum_t += t_j * t_j;
    }
    sums.s += sum_s, sums.t += sum_t;
}

// Σ e² of a tile, and with kGradient ds, where it needs no sum of the row.
template <bool kGradient, class T>
FASTKD_TILE_LOOP inline float sum_of_errors(const T* s, const T* t, int n, const HiddenFactors& by, T* ds) {
    const HiddenFactors f = by;
    float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
    for (int j = 0; j < n; ++j) {
        const float e = f.a * to_float(s[j]) - f.b * to_float(t[j]);
        sum += e * e;
        if constexpr (kGradient) from_float(f.by_e * e, ds[j]);
    }
    return sum;
}

template <class T>
FASTKD_TILE_LOOP inline void hidden_gradient(const T* s, const T* t, int n, const HiddenFactors& by, T* ds) {
    const HiddenFactors f = by;
#pragma omp simd
    for (int j = 0; j < n; ++j) {
        const float s_j = to_float(s[j]);
        from_float(f.by_e * (f.a * s_j - f.b * to_float(t[j])) + f.by_s * s_j, ds[j]);
    }
}

// 1/‖x‖ from the square; 0 for zeros, NaN where the square is infinite.
inline double inverse_norm(double square) { return square == 0.0 ? 0.0 : (1.0 + 0.0 * square) / std::sqrt(square); }

// The loss, and ds unless it is null. Sums of a tile are float, of the row double.
template <class T>
inline float hidden_columns(HiddenKind kind, int64_t columns, float scale, const T* s, const T* t, T* ds) {
    HiddenFactors by;
    double errors = 0.0;
    if (kind == HiddenKind::kMSE) {
        by.by_e = static_cast<float>(2.0 * scale / static_cast<double>(columns));
        for_tiles(columns, [&](int64_t at, int n) {
            errors += ds ? sum_of_errors<true, T>(s + at, t + at, n, by, ds + at)
                         : sum_of_errors<false, T>(s + at, t + at, n, by, nullptr);
        });
        return static_cast<float>(errors / static_cast<double>(columns));
    }
    TwoSums squares;
    for_tiles(columns, [&](int64_t at, int n) { add_squares(s + at, t + at, n, squares); });
    by.a = static_cast<float>(inverse_norm(squares.s));
    by.b = static_cast<float>(inverse_norm(squares.t));
    for_tiles(columns, [&](int64_t at, int n) { errors += sum_of_errors<false, T>(s + at, t + at, n, by, nullptr); });
    const bool has_directions = by.a != 0.0f && by.b != 0.0f;
    const float loss = has_directions ? static_cast<float>(0.5 * errors) : 1.0f;
    by.by_e = has_directions ? scale * by.a : 0.0f;
    by.by_s = -by.by_e * by.a * loss;
    if (ds) for_tiles(columns, [&](int64_t at, int n) { hidden_gradient(s + at, t + at, n, by, ds + at); });
    return loss;
}

inline void hidden_row(const HiddenParams& p, int64_t row, float* scratch) {
    char* ds_row = p.ds.data ? p.ds.row(row, p.inner_rows) : nullptr;
    const float scale = p.scale[row];
    if (scale == 0.0f) {  // not read: a masked row may hold anything
        p.loss[row] = 0.0f;
        if (ds_row) std::memset(ds_row, 0, p.columns * size_of(p.ds.dtype));
        return;
    }
    const char *s_row = p.s.row(row, p.inner_rows), *t_row = p.t.row(row, p.inner_rows);
    if (p.s.dtype == DType::kBFloat16 && p.t.dtype == DType::kBFloat16) {  // ds is as s
        p.loss[row] = hidden_columns(p.kind, p.columns, scale, reinterpret_cast<const bfloat16*>(s_row),
                                     reinterpret_cast<const bfloat16*>(t_row), reinterpret_cast<bfloat16*>(ds_row));
        return;
    }
    const int n = static_cast<int>(p.columns);
    const float* s = load_tile(s_row, p.s.dtype, 0, n, scratch);
    const float* t = load_tile(t_row, p.t.dtype, 0, n, scratch + n);
    float* ds = ds_row ? out_tile(ds_row, p.ds.dtype, 0, scratch + 2 * n) : nullptr;
    p.loss[row] = hidden_columns(p.kind, p.columns, scale, s, t, ds);
    if (ds) store_tile(ds_row, p.ds.dtype, 0, n, ds);
}

}  // namespace FASTKD_ISA
}  // namespace fastkd
