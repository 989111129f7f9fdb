// What a sparse teacher, who lists K columns of a row, needs of the others: one row on one core.
//
// Math    c = max of the columns not listed, rest = log Σ exp((z_j − c)/T) over them; hard as in row.h;
//         dz_j = hard part + G/T·exp((z_j − c)/T − rest), and at a listed column hard part + outcome_grad_i/T, where
//         G = outcome_grad_K. Loops run over a row without its special columns, the listed ones and the label: these
//         are −inf where sums are taken, so that no sum has them to lose its digits to, and are written last where the
//         gradient is. At integer T the hard part is a power of the rest's exponential: one exponential a column, which
//         is kept for the gradient if that follows at once, else computed again.
// Shapes  z, dz [B, S, V] bf16|fp16|fp32 (dz fp64 too), last stride 1; listed [N, K] int32, −1 for none; labels [N]
//         int64; outcome_grad [N, K + 1], scales, losses [N], stats [N, 8] fp32. scratch: two tiles, two more or two
//         rows, four numbers a tile, and six a listed column.
// Bytes   of memory: forward reads z, a backward of its own reads it again, and dz is written. Of the cache: 4 a column
//         written and read for the exponentials, where they are kept.
#pragma once

#include "log_softmax.h"

namespace fastkd {
inline namespace FASTKD_ISA {

struct RestSums {
    float rest, hard, peak;
};

// So far from a tile's peak may lie what its exponents subtract: they round by 2e-7 more, and save a walk for the peak.
constexpr float kNearPeak = 4.0f;

// The exponentials of a tile, e = exp((x − shift)/T) and, kept only if it is no power of e, h = exp(x − shift); their
// sums, and the peak of x.
template <Hard kHard>
FASTKD_TILE_LOOP inline RestSums rest_sums(const float* x, int n, float shift, float k, float* e, float* h, Ahead next) {
    Lanes rest = {}, hard = {}, peak = Lanes{} - kInfinity;
    const auto add = [&](int j, auto... count) {
        const Lanes x_j = load(x + j, count...);
        peak = x_j > peak ? x_j : peak;
        const Lanes e_j = exp2((x_j - shift) * k);
        store(e_j, count..., e + j);
        rest += e_j;
        if constexpr (kHard == Hard::kOwn) {
            const Lanes h_j = exp(x_j - shift);
            store(h_j, count..., h + j);
            hard += h_j;
        } else if constexpr (kHard != Hard::kNone) {
            hard += integer_power<static_cast<int>(kHard)>(e_j);
        }
    };
    int j = 0;
    for (; j + kLanes <= n; j += kLanes) {
        next.fetch();
        add(j);
    }
    if (j < n) add(j, n - j);
    return {sum_of(rest), sum_of(hard), max_of(peak)};
}

template <Hard kHard>
FASTKD_TILE_LOOP inline void rest_gradient(const float* e, const float* h, int n, float of_rest, float of_hard,
                                           float constant, float* dz) {
#pragma omp simd
    for (int j = 0; j < n; ++j) {
        float sum = constant + of_rest * e[j];
        if constexpr (kHard == Hard::kOwn) {
            sum += of_hard * h[j];
        } else if constexpr (kHard != Hard::kNone) {
            sum += of_hard * integer_power<static_cast<int>(kHard)>(e[j]);
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
        for (float** part : {&e_, &h_}) *part = scratch, scratch += kept_floats(p_);
        for (float** part : {&peaks_, &rests_, &hards_}) *part = scratch, scratch += tiles_of(n_);
        special_ = scratch, scratch += k_ + 1;
        starts_ = reinterpret_cast<int32_t*>(scratch);
        in_tiles_ = starts_ + tiles_of(n_) + 1;
        sort_into_tiles();
    }

    static int64_t scratch_floats(const RestParams& p) {
        return 2 * kTile + 2 * kept_floats(p) + 4 * tiles_of(p.n) + 1 + 2 * (p.k + 1);
    }

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
                RestSums sums = exponentials<hard.value>(x, at, n, shift_of(peaks_[i]));
                if (!(abs(sums.peak - peaks_[i]) <= near)) {
                    peaks_[i] = sums.peak;
                    sums = exponentials<hard.value>(x, at, n, shift_of(peaks_[i]));
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
        for (int32_t s = 0; s < starts_[tiles_of(n_)]; ++s)
            if (column(s) == label_) special_[s] = z_y_;
    }

    // z' [k + 1] at temperature 1, less the largest logit: far from 0 it would have no digits left. After rest().
    void outcomes(float* z) const {
        const float* stats = p_.stats + row_ * kNumStats;
        std::fill_n(z, k_ + 1, -kInfinity);
        for (int32_t s = 0; s < starts_[tiles_of(n_)]; ++s)
            if (in_tiles_[s] < k_) z[in_tiles_[s]] = special_[s];
        const float rest = stats[kLogRatio], c = stats[kPeakTeacher];
        if (rest != -kInfinity) z[k_] = c;
        const float largest = shift_of(max_of(z, static_cast<int>(k_ + 1)));
        for (int64_t i = 0; i < k_; ++i) z[i] = (z[i] - largest) * inv_t_;
        z[k_] = (c - largest) * inv_t_ + rest;
    }

    // From what rest() kept.
    void gradient_from(const float* outcome_grad) {
        outcome_grad_ = outcome_grad;
        gradient<false>();
    }

    void gradient_from_stats() { gradient<true>(); }

   private:
    // A row of exponentials where the gradient follows at once, else a tile.
    static bool keeps(const RestParams& p) { return p.outcomes && p.dz.data; }
    static int64_t kept_floats(const RestParams& p) { return (keeps(p) ? tiles_of(p.n) : 1) * kTile; }

    template <Hard kHard>
    RestSums exponentials(const float* x, int64_t at, int n, float shift) const {
        const int64_t to = keeps(p_) ? at : 0;
        return rest_sums<kHard>(x, n, shift, scale_, e_ + to, h_ + to, Ahead(z_row_, p_.z.dtype, at));
    }

    template <bool kFromStats>
    void gradient() {
        const float* stats = p_.stats + row_ * kNumStats;
        const float c = stats[kPeakTeacher], z_peak = stats[kPeakStudent];
        const float all_rest =
            stats[kLogRatio] == -kInfinity ? 0.0f : outcome_grad_[k_] * inv_t_ * std::exp(-stats[kLogRatio]);
        const float hard_scale = p_.labels ? p_.hard_scale[row_] : 0.0f, z_scale = z_factor(p_, row_);
        const float smooth = hard_scale * p_.smoothing / static_cast<float>(n_);
        const float of_peak = std::exp(-stats[kLogHard]);
        const float rest = stats[kLabelRest];
        const float of_label = hard_scale * (p_.smoothing - rest) + z_scale * (1.0f - rest) - smooth;
        char* dz_row = p_.dz.row(row_, p_.inner_rows);
        for_tiles(n_, [&](int64_t at, int n) {
            const int64_t i = at / kTile, kept = kFromStats ? 0 : at;
            const float peak = kFromStats ? c : peaks_[i];
            const float* z = kFromStats ? load_tile(z_row_, p_.z.dtype, at, n, z_tile_) : nullptr;
            float* dz = out_tile(dz_row, p_.dz.dtype, at, x_tile_);
            if (kFromStats)
                for (int32_t s = starts_[i]; s < starts_[i + 1]; ++s) special_[s] = z[column(s) - at];
            with_hard<true>(hard_mode_, [&](auto hard) {
                if (kFromStats) exponentials<hard.value>(z, at, n, c);
                const float of_rest = all_rest * rescale(peak, c, scale_);
                const float of_hard = (hard_scale + z_scale) * of_peak * rescale(peak, z_peak, kLog2E);
                rest_gradient<hard.value>(e_ + kept, h_ + kept, n, of_rest, of_hard, -smooth, dz);
            });
            // What is over the peak of the others, whose exponentials may be infinite, and the label.
            for (int32_t s = starts_[i]; s < starts_[i + 1]; ++s) {
                const bool is_listed = in_tiles_[s] < k_;
                float sum = is_listed ? outcome_grad_[in_tiles_[s]] * inv_t_ : all_rest * rescale(special_[s], c, scale_);
                if (hard_mode_ != Hard::kNone) {
                    const float p = of_peak * rescale(special_[s], z_peak, kLog2E);
                    sum += column(s) == label_ ? of_label : (hard_scale + z_scale) * p - smooth;
                }
                dz[column(s) - at] = sum;
            }
            store_tile(dz_row, p_.dz.dtype, at, n, dz);
        });
    }

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
    float *z_tile_, *x_tile_, *e_, *h_, *peaks_, *rests_, *hards_, *special_;
    int32_t *starts_, *in_tiles_;
};

}  // namespace FASTKD_ISA
}  // namespace fastkd
