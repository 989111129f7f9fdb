// Log-sum-exp as a monoid: the state (peak, Σ exp((x − peak)·k)), one update and one merge.
//
// Math    k is 1/T in units of log 2 (log2(e)/T), so the sum is Σ 2^((x − peak)·k). Lanes, tiles, warps, blocks of a
//         cluster and ranks of a tensor-parallel group all merge by the same function. Other sums weighted with the
//         same exponentials are rescaled likewise.
// Rules   A peak of −inf (nothing yet, or nothing but masked tokens) has a sum of 0 and is the neutral element. A NaN
//         may be lost from the peak, but not from the sum.
#pragma once

#include "numeric.h"

namespace fastkd {
inline namespace FASTKD_ISA {

struct LogSumExp {
    float peak = -kInfinity;
    float sum = 0.0f;
};

// What exponents may subtract: the peak, or 0 where it is −inf, since −inf − (−inf) is NaN.
FASTKD_HD float shift_of(float peak) { return peak == -kInfinity ? 0.0f : peak; }

// What a sum relative to the peak ``from`` is multiplied by to be relative to the peak ``to``.
FASTKD_HD float rescale(float from, float to, float k) { return exp2((from - shift_of(to)) * k); }

FASTKD_HD LogSumExp merge(LogSumExp a, LogSumExp b, float k) {
    const float peak = a.peak > b.peak ? a.peak : b.peak;
    return {peak, a.sum * rescale(a.peak, peak, k) + b.sum * rescale(b.peak, peak, k)};
}

FASTKD_HD LogSumExp update(LogSumExp state, float x, float k) { return merge(state, {x, 1.0f}, k); }

}  // namespace FASTKD_ISA
}  // namespace fastkd
