// Between a row in its storage type and tiles of float.
#pragma once

#if defined(__F16C__)
#include <immintrin.h>
#endif

#include "../numeric.h"
#include "../params.h"

// Loops over a tile are compiled once, not into each of their many callers.
#define FASTKD_TILE_LOOP __attribute__((noinline))

namespace fastkd {
inline namespace FASTKD_ISA {

template <class T>
inline void widen(const T* in, int n, float* out) {
#pragma omp simd
    for (int j = 0; j < n; ++j) out[j] = to_float(in[j]);
}

template <class T>
inline void narrow(const float* in, int n, T* out) {
#pragma omp simd
    for (int j = 0; j < n; ++j) from_float(in[j], out[j]);
}

#if defined(__F16C__)
// The hardware's conversions, which no compiler finds by itself: 8 at a time, the rest one by one.
template <>
inline void widen(const float16* in, int n, float* out) {
    int j = 0;
    for (; j + 8 <= n; j += 8)
        _mm256_storeu_ps(out + j, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(in + j))));
    for (; j < n; ++j) out[j] = to_float(in[j]);
}

template <>
inline void narrow(const float* in, int n, float16* out) {
    int j = 0;
    for (; j + 8 <= n; j += 8)
        _mm_storeu_si128(reinterpret_cast<__m128i*>(out + j), _mm256_cvtps_ph(_mm256_loadu_ps(in + j), 0));
    for (; j < n; ++j) from_float(in[j], out[j]);
}
#endif

// Columns [at, at + n) of a row as float: in place if they are float already, else in the buffer.
FASTKD_TILE_LOOP inline const float* load_tile(const char* row, DType dtype, int64_t at, int n, float* buffer) {
    switch (dtype) {
        case DType::kFloat32: return reinterpret_cast<const float*>(row) + at;
        case DType::kBFloat16: widen(reinterpret_cast<const bfloat16*>(row) + at, n, buffer); break;
        case DType::kFloat16: widen(reinterpret_cast<const float16*>(row) + at, n, buffer); break;
        case DType::kFloat64: widen(reinterpret_cast<const double*>(row) + at, n, buffer); break;
    }
    return buffer;
}

// Where to write columns [at, at + n) as float; store_tile then brings them into the row.
inline float* out_tile(char* row, DType dtype, int64_t at, float* buffer) {
    return dtype == DType::kFloat32 ? reinterpret_cast<float*>(row) + at : buffer;
}

FASTKD_TILE_LOOP inline void store_tile(char* row, DType dtype, int64_t at, int n, const float* buffer) {
    switch (dtype) {
        case DType::kFloat32: break;
        case DType::kBFloat16: narrow(buffer, n, reinterpret_cast<bfloat16*>(row) + at); break;
        case DType::kFloat16: narrow(buffer, n, reinterpret_cast<float16*>(row) + at); break;
        case DType::kFloat64: narrow(buffer, n, reinterpret_cast<double*>(row) + at); break;
    }
}

}  // namespace FASTKD_ISA
}  // namespace fastkd
