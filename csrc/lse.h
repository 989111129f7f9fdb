// Log-sum-exp of what comes piece by piece: sums of exponentials relative to a peak, moved to a larger one.
//
// Math    k is 1/T in units of log 2 (log2(e)/T), so a sum is Σ 2^((x − peak)·k). Those of lanes, tiles, warps, blocks
//         of a row and ranks of a tensor-parallel group merge alike: moved to the largest peak, and added.
// Rules   A peak of −inf (nothing yet, or nothing but masked tokens) has a sum of 0. A NaN may be lost from the peak,
//         but not from the sum.
#pragma once

#include "numeric.h"

namespace fastkd {
inline namespace FASTKD_ISA {

// What exponents may subtract: the peak, or 0 where it is −inf, since −inf − (−inf) is NaN.
FASTKD_HD float shift_of(float peak) { return peak == -kInfinity ? 0.0f : peak; }

// What a sum relative to the peak ``from`` is multiplied by to be relative to the peak ``to``.
FASTKD_HD float rescale(float from, float to, float k) { return exp2((from - shift_of(to)) * k); }

}  // namespace FASTKD_ISA
}  // namespace fastkd
