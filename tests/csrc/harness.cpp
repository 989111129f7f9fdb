// The shared headers' functions over arrays, for test_headers.py to call through ctypes.
#include "../../csrc/divergence.h"
#include "../../csrc/lse.h"
#include "../../csrc/row.h"

using namespace fastkd;

extern "C" {

void exp2_of(const float* x, int64_t n, float* out) {
    for (int64_t i = 0; i < n; ++i) out[i] = fastkd::exp2(x[i]);
}

void log1p_of(const float* x, int64_t n, float* out) {
    for (int64_t i = 0; i < n; ++i) out[i] = fastkd::log1p(x[i], 1.0f + x[i]);
}

void exp_remainder_of(const float* x, int64_t n, float* out) {
    for (int64_t i = 0; i < n; ++i) out[i] = exp_remainder(x[i]);
}

void label_term_of(const float* t, int64_t n, float* loss, float* rest) {
    for (int64_t i = 0; i < n; ++i) {
        const LabelTerm term = label_term(t[i]);
        loss[i] = term.loss, rest[i] = term.rest;
    }
}

void widen_bfloat16(const uint16_t* x, int64_t n, float* out) {
    for (int64_t i = 0; i < n; ++i) out[i] = to_float(bfloat16{x[i]});
}

void widen_float16(const uint16_t* x, int64_t n, float* out) {
    for (int64_t i = 0; i < n; ++i) out[i] = to_float(float16{x[i]});
}

void narrow_bfloat16(const float* x, int64_t n, uint16_t* out) {
    for (int64_t i = 0; i < n; ++i) {
        bfloat16 narrow;
        from_float(x[i], narrow);
        out[i] = narrow.bits;
    }
}

void narrow_float16(const float* x, int64_t n, uint16_t* out) {
    for (int64_t i = 0; i < n; ++i) {
        float16 narrow;
        from_float(x[i], narrow);
        out[i] = narrow.bits;
    }
}

// The log₂-sum-exp of x in two halves, moved to their larger peak and added: (peak, sum).
void log_sum_exp_of(const float* x, int64_t n, float k, float* merged) {
    float peaks[2] = {-kInfinity, -kInfinity}, sums[2] = {0.0f, 0.0f};
    for (int64_t i = 0; i < n; ++i) peaks[i < n / 2] = fastkd::max(x[i], peaks[i < n / 2]);
    for (int64_t i = 0; i < n; ++i) sums[i < n / 2] += fastkd::exp2((x[i] - shift_of(peaks[i < n / 2])) * k);
    merged[0] = fastkd::max(peaks[0], peaks[1]);
    merged[1] = sums[0] * rescale(peaks[0], merged[0], k) + sums[1] * rescale(peaks[1], merged[0], k);
}

bool divergence_of(int formula, float c_t, float c_s, float w, const float* d, const float* p_t, const float* p_s,
                   int64_t n, bool near, float* term, float* g) {
    return Divergences::dispatch({static_cast<Formula>(formula), c_t, c_s, w}, [&](const auto& functor) {
        for (int64_t i = 0; i < n; ++i) {
            const TermGrad column = near ? functor.template column<true>(d[i], p_t[i], p_s[i])
                                         : functor.template column<false>(d[i], p_t[i], p_s[i]);
            term[i] = column.term, g[i] = column.g + column.apart;
        }
    });
}

}  // extern "C"
