// A vector of floats as wide as the processor's: for loops that the compiler does not vectorise, because they fetch
// ahead, or that have instructions for an exponential.
#pragma once

#include "../numeric.h"
#include "../params.h"

#if defined(__AVX512F__) && defined(__AVX512DQ__)
#include <immintrin.h>
#endif

namespace fastkd {
inline namespace FASTKD_ISA {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float Lanes __attribute__((vector_size(4 * kLanes)));
typedef uint32_t BitLanes __attribute__((vector_size(4 * kLanes)));

FASTKD_HD Lanes load(const float* x) {
    Lanes lanes;
    memcpy(&lanes, x, sizeof(lanes));
    return lanes;
}

FASTKD_HD void store(Lanes lanes, float* out) { memcpy(out, &lanes, sizeof(lanes)); }

// Of fewer columns than lanes; the other lanes are −inf, which adds nothing to a sum of exponentials.
FASTKD_HD Lanes load(const float* x, int n) {
    Lanes lanes = Lanes{} - kInfinity;
    memcpy(&lanes, x, n * sizeof(float));
    return lanes;
}

FASTKD_HD void store(Lanes lanes, int n, float* out) { memcpy(out, &lanes, n * sizeof(float)); }

FASTKD_HD float sum_of(Lanes lanes) {
    float sum = 0.0f;
    for (int i = 0; i < kLanes; ++i) sum += lanes[i];
    return sum;
}

FASTKD_HD float max_of(Lanes lanes) {
    float peak = lanes[0];
    for (int i = 1; i < kLanes; ++i) peak = lanes[i] > peak ? lanes[i] : peak;
    return peak;
}

// As of a float. With AVX-512 a result may be denormal, and the one at −0 or just below it is 1 but for an ulp.
FASTKD_HD Lanes exp2(Lanes x) {
#if defined(__AVX512F__) && defined(__AVX512DQ__)
    // x = n + i/16 + r with 0 <= r < 1/16, all rounded down: the sum with 1.5·2¹⁹ has i in its low bits, vreduce gives r
    // (0 of −inf), and vscalef takes n from x itself. 9 operations, 4 of them products; the polynomial alone has 12.
    constexpr __mmask16 kAll = 0xffff;  // GCC warns of what the forms without a mask leave undefined
    const __m512 table = _mm512_setr_ps(1.0f, 1.04427373f, 1.09050775f, 1.13878858f, 1.18920708f, 1.24185777f,
                                        1.29683959f, 1.35425556f, 1.41421354f, 1.47682619f, 1.54221082f, 1.61049032f,
                                        1.68179286f, 1.75625217f, 1.8340081f, 1.91520655f);
    constexpr int kDown = _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC;
    const __m512 sum = _mm512_maskz_add_round_ps(kAll, x, _mm512_set1_ps(786432.0f), kDown);
    const __m512 of_i = _mm512_maskz_permutexvar_ps(kAll, _mm512_castps_si512(sum), table);
    const Lanes r = _mm512_maskz_reduce_ps(kAll, x, 4 << 4 | kDown);
    // Minimax over the range, 1.3e-9 relative.
    const Lanes p = ((0.056669876f * r + 0.240184247f) * r + 0.6931476f) * r;
    return _mm512_maskz_scalef_ps(kAll, _mm512_fmadd_ps(of_i, p, of_i), x);
#else
    return exp2_by_polynomial<Lanes, BitLanes>(x);
#endif
}

FASTKD_HD Lanes exp(Lanes x) { return exp2(x * kLog2E); }

// Rows are longer than what the processor fetches by itself ahead of a walk. So walks that compute much fetch the columns
// that come so far behind: two tiles, to L2, a vector at a time, which a burst at each tile's start would not do as well.
constexpr int64_t kAhead = 2048;

struct Ahead {
    const char* at = nullptr;
    int64_t step = 0;

    Ahead(const char* row, DType dtype, int64_t column)
        : at(row + (column + kAhead) * size_of(dtype)), step(kLanes * size_of(dtype)) {}

    // Of the next vector. Past the end of a row the next one begins; past that of a matrix nothing is fetched.
    FASTKD_HD void fetch() {
        __builtin_prefetch(at, 0, 2);
        at += step;
    }
};

}  // namespace FASTKD_ISA
}  // namespace fastkd
