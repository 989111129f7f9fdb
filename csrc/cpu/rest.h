// What a sparse teacher, who lists K columns of a row, needs of the others: one row on one core.
//
// Math    c = max of the columns not listed, rest = log Σ exp((z_j − c)/T) over them; hard as in row.h;
//         dz_j = hard part + G/T·exp((z_j − c)/T − rest), and at a listed column hard part + outcome_grad_i/T, where
//         G = outcome_grad_K. Loops run over a row without its special columns, the listed ones and the label: these
//         are −inf where sums are taken, so that no sum has them to lose its digits to, and are written last where the
//         gradient is. At integer T the hard part is a power of the rest's exponential: one exponential a column.
// Shapes  z, dz [B, S, V] bf16|fp16|fp32 (dz fp64 too), last stride 1; listed [N, K] int32, −1 for none; labels [N]
//         int64; outcome_grad [N, K + 1], scales, losses [N], stats [N, 8] fp32. scratch: two tiles, four numbers a
//         tile, and six a listed column.
// Bytes   of memory: forward reads z, backward reads it again, from a cache if rows are few between, and writes dz.
#pragma once

#include "log_softmax.h"

namespace fastkd {
inline namespace FASTKD_ISA {

struct RestSums {
    float rest, hard, peak;
};

// So far from a tile's peak may lie what its exponents subtract: they round by 2e-7 more, and save a walk for the peak.
constexpr float kNearPeak = 4.0f;

template <Hard kHard>
FASTKD_TILE_LOOP inline RestSums rest_sums(const float* x, int n, float shift, float k) {
    float rest = 0.0f, hard = 0.0f, peak = -kInfinity;
#pragma omp simd reduction(+ : rest, hard) reduction(max : peak)
    for (int j = 0; j < n; ++j) {
        peak = x[j] > peak ? x[j] : peak;
        const float e = exp2((x[j] - shift) * k);
        rest += e;
        if constexpr (kHard == Hard::kOwn) {
            hard += exp(x[j] - shift);
        } else if constexpr (kHard != Hard::kNone) {
            hard += integer_power<static_cast<int>(kHard)>(e);
        }
    }
    return {rest, hard, peak};
}

// dz may be z.
template <Hard kHard>
FASTKD_TILE_LOOP inline void rest_gradient(const float* z, int n, float shift, float k, float of_rest, float of_hard,
                                           float constant, float* dz) {
#pragma omp simd
    for (int j = 0; j < n; ++j) {
        const float e = exp2((z[j] - shift) * k);
        float sum = constant + of_rest * e;
        if constexpr (kHard == Hard::kOwn) {
            sum += of_hard * exp(z[j] - shift);
        } else if constexpr (kHard != Hard::kNone) {
            sum += of_hard * integer_power<static_cast<int>(kHard)>(e);
        }
        dz[j] = sum;
    }
}

class RestRow {
   public:
    RestRow(const RestParams& params, int64_t row, float* scratch)
        : p_(params), row_(row), n_(params.n), k_(params.k), hard_mode_(hard_mode(params, true)) {
        z_row_ = p_.z.row(row, p_.inner_rows);
        listed_ = p_.listed + row * k_;
        label_ = label_of(p_, row);
        outcome_grad_ = p_.outcome_grad + row * (k_ + 1);
        inv_t_ = 1.0f / p_.temperature;
        scale_ = static_cast<float>(1.4426950408889634 / p_.temperature);
        for (float** part : {&z_tile_, &x_tile_}) *part = scratch, scratch += kTile;
        for (float** part : {&peaks_, &rests_, &hards_}) *part = scratch, scratch += tiles_of(n_);
        special_ = scratch, scratch += k_ + 1;
        starts_ = reinterpret_cast<int32_t*>(scratch);
        in_tiles_ = starts_ + tiles_of(n_) + 1;
        sort_into_tiles();
    }

    static int64_t scratch_floats(const RestParams& p) { return 2 * kTile + 4 * tiles_of(p.n) + 1 + 2 * (p.k + 1); }

    void rest() {
        z_y_ = p_.labels ? kNaN : -kInfinity;
        if (label_ >= 0) z_y_ = *load_tile(z_row_, p_.z.dtype, label_, 1, z_tile_);
        const float near = kNearPeak * (p_.temperature < 1.0f ? p_.temperature : 1.0f);
        double sum_z = 0.0;
        float peak = -kInfinity, special_peak = -kInfinity;
        for_tiles(n_, [&](int64_t at, int n) {
            const int64_t i = at / kTile;
            const float* x = load_tile(z_row_, p_.z.dtype, at, n, z_tile_);
            if (p_.smoothing > 0.0f && p_.labels) sum_z += sum_of(x, n, shift_of(z_y_));
            if (starts_[i] < starts_[i + 1]) {
                std::copy_n(x, n, x_tile_);
                for (int32_t s = starts_[i]; s < starts_[i + 1]; ++s) {
                    float& z = x_tile_[column(s) - at];
                    special_[s] = column(s) == label_ ? -kInfinity : z;
                    special_peak = max(special_[s], special_peak);
                    z = -kInfinity;
                }
                x = x_tile_;
            }
            peaks_[i] = i > 0 && peaks_[i - 1] > -kInfinity ? peaks_[i - 1] : max_of(x, n);
            with_hard<true>(hard_mode_, [&](auto hard) {
                RestSums sums = rest_sums<hard.value>(x, n, shift_of(peaks_[i]), scale_);
                if (!(abs(sums.peak - peaks_[i]) <= near)) {
                    peaks_[i] = sums.peak;
                    sums = rest_sums<hard.value>(x, n, shift_of(peaks_[i]), scale_);
                }
                rests_[i] = sums.rest, hards_[i] = sums.hard;
                peak = max(sums.peak, peak);
            });
        });
        const float c = label_is_apart_ ? max(z_y_, peak) : peak, z_peak = max(special_peak, max(z_y_, peak));
        double rest = label_is_apart_ ? rescale(z_y_, c, scale_) : 0.0, hard = 0.0;
        for (int64_t i = 0; i < tiles_of(n_); ++i) {
            rest += static_cast<double>(rests_[i]) * rescale(peaks_[i], c, scale_);
            hard += static_cast<double>(hards_[i]) * rescale(peaks_[i], z_peak, kLog2E);
        }
        float* stats = p_.stats + row_ * kNumStats;
        p_.hard[row_] = 0.0f;
        p_.soft[row_] = static_cast<float>(std::log(rest));
        std::fill_n(stats, static_cast<int>(kNumStats), 0.0f);
        if (hard_mode_ != Hard::kNone) {
            const int count = starts_[tiles_of(n_)];
            hard_term(p_, row_, hard + sum_of_exp(special_, count, shift_of(z_peak), kLog2E), z_peak, z_y_, sum_z);
        }
        stats[kPeakTeacher] = shift_of(c);
        stats[kLogRatio] = p_.soft[row_];
    }

    // z' [k + 1] at temperature 1, less the largest logit: far from 0 it would have no digits left. After rest().
    void outcomes(float* z) const {
        const float* stats = p_.stats + row_ * kNumStats;
        std::fill_n(z, k_ + 1, -kInfinity);
        for (int32_t s = 0; s < starts_[tiles_of(n_)]; ++s)
            if (in_tiles_[s] < k_) z[in_tiles_[s]] = column(s) == label_ ? z_y_ : special_[s];
        const float rest = stats[kLogRatio], c = stats[kPeakTeacher];
        if (rest != -kInfinity) z[k_] = c;
        const float largest = shift_of(max_of(z, static_cast<int>(k_ + 1)));
        for (int64_t i = 0; i < k_; ++i) z[i] = (z[i] - largest) * inv_t_;
        z[k_] = (c - largest) * inv_t_ + rest;
    }

    void gradient_from(const float* outcome_grad) {
        outcome_grad_ = outcome_grad;
        gradient_from_stats();
    }

    void gradient_from_stats() {
        const float* stats = p_.stats + row_ * kNumStats;
        const float c = stats[kPeakTeacher], z_peak = stats[kPeakStudent];
        const float of_rest =
            stats[kLogRatio] == -kInfinity ? 0.0f : outcome_grad_[k_] * inv_t_ * std::exp(-stats[kLogRatio]);
        const float hard_scale = p_.labels ? p_.hard_scale[row_] : 0.0f, z_scale = z_factor(p_, row_);
        const float smooth = hard_scale * p_.smoothing / static_cast<float>(n_);
        const float of_peak = std::exp(-stats[kLogHard]);
        const float of_hard = (hard_scale + z_scale) * of_peak * rescale(c, z_peak, kLog2E);  // of exp(z − c)
        const float rest = stats[kLabelRest];
        const float of_label = hard_scale * (p_.smoothing - rest) + z_scale * (1.0f - rest) - smooth;
        char* dz_row = p_.dz.row(row_, p_.inner_rows);
        for_tiles(n_, [&](int64_t at, int n) {
            const int64_t i = at / kTile;
            const float* z = load_tile(z_row_, p_.z.dtype, at, n, z_tile_);
            float* dz = out_tile(dz_row, p_.dz.dtype, at, x_tile_);
            for (int32_t s = starts_[i]; s < starts_[i + 1]; ++s) special_[s] = z[column(s) - at];
            with_hard<true>(hard_mode_, [&](auto hard) {
                rest_gradient<hard.value>(z, n, c, scale_, of_rest, of_hard, -smooth, dz);
            });
            // What is over the peak of the others, whose exponentials may be infinite, and the label.
            for (int32_t s = starts_[i]; s < starts_[i + 1]; ++s) {
                const bool is_listed = in_tiles_[s] < k_;
                float sum = is_listed ? outcome_grad_[in_tiles_[s]] * inv_t_ : of_rest * rescale(special_[s], c, scale_);
                if (hard_mode_ != Hard::kNone) {
                    const float p = of_peak * rescale(special_[s], z_peak, kLog2E);
                    sum += column(s) == label_ ? of_label : (hard_scale + z_scale) * p - smooth;
                }
                dz[column(s) - at] = sum;
            }
            store_tile(dz_row, p_.dz.dtype, at, n, dz);
        });
    }

   private:
    // Of a special column by its place: the listed ones', and the label's where it is none of them.
    int64_t column(int32_t place) const { return in_tiles_[place] < k_ ? listed_[in_tiles_[place]] : label_; }

    // in_tiles_[starts_[i]] to before starts_[i + 1] are those of tile i, as numbers in [0, k], k being the label.
    void sort_into_tiles() {
        const int64_t tiles = tiles_of(n_);
        label_is_apart_ = label_ >= 0;
        std::fill_n(starts_, tiles + 1, 0);
        for (int64_t i = 0; i < k_; ++i) {
            if (listed_[i] < 0) continue;
            ++starts_[listed_[i] / kTile];
            if (listed_[i] == label_) label_is_apart_ = false;
        }
        if (label_is_apart_) ++starts_[label_ / kTile];
        for (int64_t i = 1; i <= tiles; ++i) starts_[i] += starts_[i - 1];  // where each ends, from which it fills down
        for (int64_t i = 0; i < k_; ++i)
            if (listed_[i] >= 0) in_tiles_[--starts_[listed_[i] / kTile]] = static_cast<int32_t>(i);
        if (label_is_apart_) in_tiles_[--starts_[label_ / kTile]] = static_cast<int32_t>(k_);
    }

    const RestParams& p_;
    const int64_t row_, n_, k_;
    const Hard hard_mode_;
    const char* z_row_;
    const int32_t* listed_;
    int64_t label_;
    bool label_is_apart_;
    float inv_t_, scale_;  // 1/T, and in units of log 2
    float z_y_ = 0.0f;
    const float* outcome_grad_;
    float *z_tile_, *x_tile_, *peaks_, *rests_, *hards_, *special_;
    int32_t *starts_, *in_tiles_;
};

}  // namespace FASTKD_ISA
}  // namespace fastkd
