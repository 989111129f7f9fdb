// Elementary functions and storage types: plain scalar code, valid in C++17 and in CUDA.
//
// On a CPU every function here is inlined into loops that the compiler vectorises, so none branches: both sides of a
// selection are computed. On a GPU the same names use the hardware's instructions.
#pragma once

#include <cstdint>
#include <cstring>

// The CPU sources are compiled once per instruction set. Each build has a namespace of its own, lest the linker keep
// one build's copy of an inline function for all.
#ifndef FASTKD_ISA
#define FASTKD_ISA generic
#endif

#ifdef __CUDACC__
#define FASTKD_HD __host__ __device__ __forceinline__
#else
#define FASTKD_HD inline __attribute__((always_inline))
#endif

namespace fastkd {
inline namespace FASTKD_ISA {

constexpr float kLog2E = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;
constexpr float kInfinity = __builtin_huge_valf();
constexpr float kNaN = __builtin_nanf("");

template <class To, class From>
FASTKD_HD To bit_cast(From from) {
    static_assert(sizeof(To) == sizeof(From), "bit_cast keeps the size");
    To to;
    memcpy(&to, &from, sizeof(to));
    return to;
}

// 2^x for x <= 127; 0 for x < -126.5 (results that would be denormal included). 1 ulp; exact at 0. Keeps a NaN.
// Real is float, or a vector of it, and Bits its uint32_t.
template <class Real, class Bits>
FASTKD_HD Real exp2_by_polynomial(Real x) {
    // x = n + r with abs(r) <= 1/2. Adding 1.5·2²³ rounds to an integer, which is then in the low bits of the sum;
    // the 127 more make them the biased exponent of 2^n.
    constexpr float kRound = 12582912.0f + 127.0f;
    const Real bounded = x < -127.0f ? Real{} - 127.0f : x;
    const Real sum = bounded + kRound;
    const Real r = bounded - (sum - kRound);
    const Real scale = bit_cast<Real>(bit_cast<Bits>(sum) << 23);
    // Minimax over abs(r) <= 1/2, 2e-9 relative.
    Real p = Real{} + 0.00015345812f;
    p = p * r + 0.0013399931f;
    p = p * r + 0.0096184890f;
    p = p * r + 0.0555032878f;
    p = p * r + 0.2402264689f;
    p = p * r + 0.6931472057f;
    p = p * r + 1.0f;
    return p * scale;
}

FASTKD_HD float exp2(float x) {
#ifdef __CUDA_ARCH__
    return exp2f(x);
#else
    return exp2_by_polynomial<float, uint32_t>(x);
#endif
}

FASTKD_HD float exp(float x) { return exp2(x * kLog2E); }

// log(1 + x) for -1 < x <= 1, given one_plus_x > 0, which may be more precise than 1 + x far from x = 0. 3 ulp.
FASTKD_HD float log1p(float x, float one_plus_x) {
    // 1 + x = 2^n·(1 + f) with 2/3 <= 1 + f < 4/3; where n = 0, f is x and no digit is lost.
    const uint32_t bits = bit_cast<uint32_t>(one_plus_x) - 0x3f2aaaabu;
    const int32_t n = static_cast<int32_t>(bits) >> 23;
    const float reduced = bit_cast<float>((bits & 0x007fffffu) + 0x3f2aaaabu) - 1.0f;
    const float f = n == 0 ? x : reduced;
    // Minimax of (log(1 + f) − f + f²/2)/f³, 4e-8 of the logarithm; in pairs (Estrin), which halves the latency.
    const float square = f * f;
    const float low = (0.33333266f - 0.25004238f * f) + square * (0.20007919f - 0.16472325f * f);
    const float high = (0.14042328f - 0.15122190f * f) + square * 0.13820136f;
    const float p = low + square * square * high;
    return static_cast<float>(n) * kLn2 + (f + square * (f * p - 0.5f));
}

// For x in [2^-100, 2]; on a GPU off by up to 4e-7, however small the logarithm is.
FASTKD_HD float log(float x) {
#ifdef __CUDA_ARCH__
    return __logf(x);
#else
    return log1p(x - 1.0f, x);
#endif
}

// For normal x > 0; on a GPU off by up to 3e-7, or 2e-7 of the logarithm outside [1/2, 2].
FASTKD_HD float log2(float x) {
#ifdef __CUDA_ARCH__
    return __log2f(x);
#else
    return log1p(x - 1.0f, x) * kLog2E;
#endif
}

// a·b + c, rounded once.
FASTKD_HD float fma(float a, float b, float c) { return __builtin_fmaf(a, b, c); }

// exp(−x) − 1 + x for abs(x) < 1/2: the Taylor series to x⁸, 4e-8 relative at the end of the range.
FASTKD_HD float exp_remainder(float x) {
    const float square = x * x;
    const float low = (0.5f - x * (1.0f / 6.0f)) + square * (1.0f / 24.0f - x * (1.0f / 120.0f));
    const float high = (1.0f / 720.0f - x * (1.0f / 5040.0f)) + square * (1.0f / 40320.0f);
    return square * (low + square * square * high);
}

// p·x with 0·inf = 0. A product outermost, so that a sum of them is fused.
template <class Real>
FASTKD_HD Real mul0(Real p, Real x) {
    return p * (p == Real{} ? Real{} : x);
}

// The larger one; of a NaN and a number, on a CPU the second, on a GPU the number.
FASTKD_HD float max(float a, float b) {
#ifdef __CUDA_ARCH__
    return fmaxf(a, b);
#else
    return a > b ? a : b;
#endif
}

FASTKD_HD float abs(float x) {
#ifdef __CUDA_ARCH__
    return fabsf(x);  // part of the operation that uses it
#else
    return bit_cast<float>(bit_cast<uint32_t>(x) & 0x7fffffffu);
#endif
}

// To the nearest integer, for abs(x) < 2²²; larger ones stay, for they have no fraction worth taking off.
FASTKD_HD float rint(float x) {
    constexpr float kRound = 12582912.0f;
    return abs(x) < 4194304.0f ? (x + kRound) - kRound : x;
}

// exp(−size), given that it is smaller/larger: whichever is cheaper. On a CPU the quotient starts a chain of operations
// 30 cycles earlier. Where both are 0 it gives 0.
FASTKD_HD float exp_from_ratio(float size, float smaller, float larger) {
#ifdef __CUDA_ARCH__
    (void)smaller, (void)larger;
    return exp(-size);
#else
    (void)size;
    return smaller / (larger < 1e-37f ? 1e-37f : larger);
#endif
}

// x/y for 2^-126 <= y <= 2^126. 2 ulp on a GPU, where the exact quotient is a call.
FASTKD_HD float divide(float x, float y) {
#ifdef __CUDA_ARCH__
    return __fdividef(x, y);
#else
    return x / y;
#endif
}

// Storage types by their bits. Conversions round to nearest even and keep infinities and NaN.
struct bfloat16 {
    uint16_t bits;
};
struct float16 {
    uint16_t bits;
};

FASTKD_HD float to_float(float x) { return x; }
FASTKD_HD float to_float(double x) { return static_cast<float>(x); }
FASTKD_HD float to_float(bfloat16 x) { return bit_cast<float>(static_cast<uint32_t>(x.bits) << 16); }

FASTKD_HD float to_float(float16 x) {
#ifdef __CUDA_ARCH__
    float wide;
    asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(x.bits));
    return wide;
#else
    // Shifting a half's bits in place leaves its exponent 112 too small, which one product mends, denormals included.
    const uint32_t magnitude = (x.bits & 0x7fffu) << 13;
    const float finite = bit_cast<float>(magnitude) * 5.192296858534828e33f;  // 2^112
    const uint32_t special = magnitude | 0x7f800000u;
    const uint32_t bits = magnitude >= 0x0f800000u ? special : bit_cast<uint32_t>(finite);
    return bit_cast<float>(bits | (static_cast<uint32_t>(x.bits & 0x8000u) << 16));
#endif
}

FASTKD_HD void from_float(float x, float& out) { out = x; }
FASTKD_HD void from_float(float x, double& out) { out = x; }

FASTKD_HD void from_float(float x, bfloat16& out) {
#ifdef __CUDA_ARCH__
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(out.bits) : "f"(x));
#else
    const uint32_t bits = bit_cast<uint32_t>(x);
    const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    out.bits = static_cast<uint16_t>(x != x ? 0x7fc0u : rounded);
#endif
}

FASTKD_HD void from_float(float x, float16& out) {
#ifdef __CUDA_ARCH__
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(out.bits) : "f"(x));
#else
    const uint32_t sign = bit_cast<uint32_t>(x) >> 16 & 0x8000u;
    const uint32_t magnitude = bit_cast<uint32_t>(x) & 0x7fffffffu;
    // Normal: rebias the exponent and round off 13 bits. Below 2^-14 the sum with 1/2 rounds to a multiple of 2^-24.
    const uint32_t normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
    const uint32_t denormal = bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f) - 0x3f000000u;
    const uint32_t finite = magnitude < 0x38800000u ? denormal : normal;
    const uint32_t large = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
    out.bits = static_cast<uint16_t>(sign | (magnitude >= 0x477ff000u ? large : finite));
#endif
}

}  // namespace FASTKD_ISA
}  // namespace fastkd
