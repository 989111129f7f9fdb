// One row of the distillation loss, on one core.
//
// Math    row.h. Stage 1 keeps the exponentials of z and u, each tile relative to its own peak; stages 2 and 3 only
//         multiply them by one factor a tile, so a column costs two exponentials in all.
//         S comes with stage 1 where a mean of d under p_t or p_s gives it (Moment); else stage 2 sums it. Near 0, where
//         neither has digits left, stage 2 sums terms that are small themselves, and keeps g in its near form.
// Shapes  z, u, dz [B, S, V_i] bf16|fp16|fp32 (u and dz fp64 too), last stride 1; labels [N] int64; scales, losses [N]
//         fp32; stats [N, 8] fp32. scratch: three rows and three tiles of float, and ten numbers a tile.
// Bytes   of memory: reads z and u, writes dz, each once. Of the cache: 8 a column written and read for the
//         exponentials, and z and u again where g or a small S needs d.
#pragma once

#include <algorithm>
#include <cmath>
#include <initializer_list>
#include <type_traits>

#include "convert.h"
#include "tile.h"

namespace fastkd {
inline namespace FASTKD_ISA {

inline int64_t tiles_of(int64_t n) { return (n + kTile - 1) / kTile; }

inline Hard hard_mode(const KDRowsParams& p, bool soft) {
    if (p.labels == nullptr && p.z_scale == nullptr) return Hard::kNone;
    if (soft)
        for (int power = 1; power <= 4; ++power)
            if (p.temperature == static_cast<float>(power)) return static_cast<Hard>(power);
    return Hard::kOwn;
}

template <Hard kHard>
struct HardTag {
    static constexpr Hard value = kHard;
};

// Calls visit with the tag of the mode; without a soft term a power has nothing to be a power of.
template <bool kSoft, class Visit>
inline void with_hard(Hard mode, Visit&& visit) {
    if constexpr (kSoft) {
        switch (mode) {
            case Hard::kNone: return visit(HardTag<Hard::kNone>());
            case Hard::kPower1: return visit(HardTag<Hard::kPower1>());
            case Hard::kPower2: return visit(HardTag<Hard::kPower2>());
            case Hard::kPower3: return visit(HardTag<Hard::kPower3>());
            case Hard::kPower4: return visit(HardTag<Hard::kPower4>());
            case Hard::kOwn: break;
        }
    }
    return visit(HardTag<Hard::kOwn>());
}

// −1 if there is none, or none in range.
inline int64_t label_of(const KDRowsParams& p, int64_t row) {
    const int64_t label = p.labels ? p.labels[row] : -1;
    return label >= 0 && label < p.n ? label : -1;
}

// Σ exp(z − peak), given it of all columns but the label's: the hard loss and its statistics, which need nothing else.
inline double hard_term(const KDRowsParams& p, int64_t row, double others, float z_peak, float z_y, double sum_z) {
    double total = others;
    float* stats = p.stats + row * kNumStats;
    if (p.labels && p.labels[row] != kElsewhere) {
        const LabelTerm term = label_term(static_cast<float>(std::log(others) + (static_cast<double>(z_peak) - z_y)));
        total += exp(z_y - shift_of(z_peak));
        p.hard[row] = term.loss;
        if (p.smoothing > 0.0f) p.hard[row] -= static_cast<float>(p.smoothing * sum_z / static_cast<double>(p.n));
        stats[kLabelRest] = term.rest;
    }
    stats[kPeakStudent] = shift_of(z_peak);
    stats[kLogHard] = static_cast<float>(std::log(total));
    return total;
}

// What a z-loss adds to the factor of softmax(z).
inline float z_factor(const KDRowsParams& p, int64_t row) {
    const float z_scale = p.z_scale ? p.z_scale[row] : 0.0f;
    if (z_scale == 0.0f) return 0.0f;
    const float* stats = p.stats + row * kNumStats;
    return z_scale * static_cast<float>(2.0 * (static_cast<double>(stats[kPeakStudent]) + stats[kLogHard]));
}

template <class Functor>
class Row {
    static constexpr bool kSoft = !std::is_same_v<Functor, NoSoftTerm>;
    static constexpr bool kSummed = kSoft && Functor::kGradSum == GradSum::kSummed;

   public:
    Row(const KDRowsParams& params, const Functor& functor, int64_t row, float* scratch)
        : p_(params), functor_(functor), row_(row), n_(params.n), hard_mode_(hard_mode(params, params.u.data != nullptr)) {
        z_row_ = p_.z.row(row, p_.inner_rows);
        if (kSoft) u_row_ = p_.u.row(row, p_.inner_rows);
        inv_t_ = 1.0f / p_.temperature;
        k_ = kSoft ? static_cast<float>(1.4426950408889634 / p_.temperature) : kLog2E;
        label_ = label_of(p_, row);
        const int64_t row_floats = p_.from_stats ? kTile : tiles_of(n_) * kTile;
        for (float** part : {&e_s_, &e_t_, &e_h_}) *part = scratch, scratch += row_floats;
        for (float** part : {&z_tile_, &u_tile_, &dz_tile_}) *part = scratch, scratch += kTile;
        for (float** part : {&z_peaks_, &u_peaks_, &sum_s_, &sum_t_, &sum_h_, &moment_, &second_, &by_s_, &by_t_, &by_h_})
            *part = scratch, scratch += tiles_of(n_);
    }

    static int64_t scratch_floats(const KDRowsParams& p) {
        const int64_t tiles = tiles_of(p.n);
        return 3 * (p.from_stats ? 1 : tiles) * kTile + 3 * kTile + 10 * tiles;
    }

    void losses_and_gradient() {
        stage1();
        normalise();
        if constexpr (kSoft) finish_soft();
        if (p_.dz.data) stage3<false>();
    }

    void gradient_from_stats() {
        read_normalisers();
        const float* stats = p_.stats + row_ * kNumStats;
        total_h_ = std::exp(static_cast<double>(stats[kLogHard]));
        base_.grad_sum = stats[kGradSum];
        base_.other_side = stats[kGradForm];
        near_ = !Functor::kTwoSided && stats[kGradForm] != 0.0f;
        rest_ = stats[kLabelRest];
        stage3<true>();
    }

    // Stage 2 alone, as SliceParams have it.
    void sums_from_stats(float* sums) {
        read_normalisers();
        const TermSums far = columns_from_stats<false>();
        const TermSums near = far.term < surely_far(functor_.numbers) ? columns_from_stats<true>() : far;
        if (Functor::kTwoSided)
            sums[0] = near.term, sums[1] = near.g, sums[2] = near.excess, sums[3] = near.other_g;
        else
            sums[0] = far.term, sums[1] = far.g, sums[2] = near.term, sums[3] = near.g;
    }

   private:
    struct Tile {
        int64_t index, at;
        int n;
        const float *z, *u;
    };

    Tile tile(int64_t index, bool load_u = true, bool load_z = true) const {
        const int64_t at = index * kTile;
        const int n = static_cast<int>(n_ - at < kTile ? n_ - at : kTile);
        const float* z = load_z ? load_tile(z_row_, p_.z.dtype, at, n, z_tile_) : nullptr;
        const float* u = kSoft && load_u ? load_tile(u_row_, p_.u.dtype, at, n, u_tile_) : nullptr;
        return {index, at, n, z, u};
    }

    // Calls f(first, end, is_label) for the columns of a tile, the label's apart.
    template <class F>
    void around_label(const Tile& tile, F&& f) const {
        const int64_t y = label_ - tile.at;
        if (label_ < 0 || y < 0 || y >= tile.n) return f(0, tile.n, false);
        const int at = static_cast<int>(y);
        if (at > 0) f(0, at, false);
        f(at, at + 1, true);
        if (at + 1 < tile.n) f(at + 1, tile.n, false);
    }

    template <Hard kHard, Moment kMoment, Moment kSecond>
    void exponentials_of(const Tile& t, int first, int end, float z_shift, float u_shift, float h_shift, int64_t to,
                         ExpSums& sums) const {
        exponentials<kSoft, kHard, kMoment, kSecond>(t.z + first, t.u + first, end - first, z_shift, u_shift, h_shift, k_,
                                            e_s_ + to + first, e_t_ + to + first, e_h_ + to + first, sums,
                                            Ahead(z_row_, p_.z.dtype, t.at + first),
                                            Ahead(u_row_, p_.u.dtype, t.at + first));
    }

    void read_normalisers() {
        const float* stats = p_.stats + row_ * kNumStats;
        z_peak_ = stats[kPeakStudent];
        u_peak_ = stats[kPeakTeacher];
        total_s_ = std::exp(static_cast<double>(stats[kLogStudent]));
        total_t_ = total_s_ * std::exp(static_cast<double>(stats[kLogRatio]));
        set_ratio(stats[kLogRatio]);
    }

    template <bool kNear>
    TermSums columns_from_stats() {
        double term = 0.0, g = 0.0, other = 0.0, excess = 0.0;
        for (int64_t i = 0; i < tiles_of(n_); ++i) {
            const Tile t = tile(i);
            by_s_[i] = by_t_[i] = 1.0f;
            ExpSums none;
            exponentials_of<Hard::kNone, Moment::kNone, Moment::kNone>(t, 0, t.n, z_peak_, u_peak_, z_peak_, 0, none);
            TermSums sums;
            evaluate<kNear, false>(functor_, t.z, t.u, t.n, factors(i), e_s_, e_t_, sums);
            term += sums.term, g += sums.g, other += sums.other_g, excess += sums.excess;
        }
        return {static_cast<float>(term), static_cast<float>(g), static_cast<float>(other), static_cast<float>(excess)};
    }

    // Offsets and shift of d, given log Σ exp((u − peak)/T) − log Σ exp((z − peak)/T).
    void set_ratio(double log_sums) {
        const Offsets offsets = offsets_between(z_peak_, u_peak_);
        base_.z_offset = offsets.z, base_.u_offset = offsets.u;
        const double distance = (static_cast<double>(u_peak_) - offsets.u) - (static_cast<double>(z_peak_) - offsets.z);
        base_.shift = static_cast<float>(distance / p_.temperature + log_sums);
    }

    void stage1() {
        if (p_.labels) z_y_ = label_ < 0 ? kNaN : *load_tile(z_row_, p_.z.dtype, label_, 1, z_tile_);
        const float anchor = shift_of(z_y_);  // far from 0 a sum of z has no digits left
        float z_peak = -kInfinity, u_peak = -kInfinity;
        for (int64_t i = 0; i < tiles_of(n_); ++i) {
            const Tile t = tile(i);
            z_peaks_[i] = max_of(t.z, t.n);
            z_peak = max(z_peaks_[i], z_peak);
            u_peaks_[i] = kSoft ? max_of(t.u, t.n) : 0.0f;
            u_peak = max(u_peaks_[i], u_peak);
            if (p_.smoothing > 0.0f && p_.labels) sum_z_ += sum_of(t.z, t.n, anchor);
            ExpSums sums;
            with_hard<kSoft>(hard_mode_, [&](auto hard) {
                around_label(t, [&](int first, int end, bool is_label) {
                    const float others = sums.hard;
                    const float z_shift = shift_of(z_peaks_[i]), u_shift = shift_of(u_peaks_[i]);
                    exponentials_of<hard.value, Functor::kMoment, Functor::kSecond>(t, first, end, z_shift, u_shift,
                                                                                    z_shift, t.at, sums);
                    if (is_label) sums.hard = others;
                });
            });
            sum_s_[i] = sums.s, sum_t_[i] = sums.t, sum_h_[i] = sums.hard;
            moment_[i] = sums.moment, second_[i] = sums.second;
        }
        z_peak_ = z_peak;
        u_peak_ = u_peak;
    }

    // The row's normalisers from its tiles'; the hard loss, which needs nothing else.
    void normalise() {
        const int64_t tiles = tiles_of(n_);
        for (int64_t i = 0; i < tiles; ++i) {
            by_s_[i] = rescale(z_peaks_[i], z_peak_, k_);
            by_t_[i] = rescale(u_peaks_[i], u_peak_, k_);
            by_h_[i] = rescale(z_peaks_[i], z_peak_, kLog2E);
        }
        double s = 0.0, t = 0.0, h = 0.0;
        for (int64_t i = 0; i < tiles; ++i) {
            s += static_cast<double>(by_s_[i]) * sum_s_[i];
            t += static_cast<double>(by_t_[i]) * sum_t_[i];
            h += static_cast<double>(by_h_[i]) * sum_h_[i];
        }
        total_s_ = s, total_t_ = t;
        float* stats = p_.stats + row_ * kNumStats;
        p_.hard[row_] = 0.0f;
        p_.soft[row_] = 0.0f;
        std::fill_n(stats, static_cast<int>(kNumStats), 0.0f);
        stats[kPeakStudent] = shift_of(z_peak_);
        if (hard_mode_ != Hard::kNone) total_h_ = hard_term(p_, row_, h, z_peak_, z_y_, sum_z_);
        rest_ = stats[kLabelRest];
        if (kSoft) {
            stats[kPeakTeacher] = shift_of(u_peak_);
            stats[kLogStudent] = static_cast<float>(std::log(s));
            log_sums_ = std::log(t / s);
            set_ratio(log_sums_);
        }
    }

    // S and G, by the mean that stage 1 took or by stage 2.
    void finish_soft() {
        Value<double> sum = {0.0, 0.0, false, false};
        const double second = mean<Functor::kSecond>(second_);
        if constexpr (Functor::kMoment != Moment::kNone)
            sum = value_from_means(functor_, mean<Functor::kMoment>(moment_), second, log_sums_);
        base_.grad_sum = static_cast<float>(sum.grad_sum);
        if (!sum.has_digits && !sum.is_small) {
            sum.value = stage2<false>();
            sum.is_small = sum.value < functor_.near_below();
        }
        if constexpr (kSoft) {
            if (sum.is_small) {
                near_ = true;
                sum.value = stage2<true>();
                // What the rounding of the normalisers adds to every d shows in Σ (p_t − p_s) = 0. A divergence feels
                // its square, total variation itself.
                if (Functor::kTwoSided || excess_ * excess_ > 2e-6 * sum.value) {
                    log_sums_ += excess_;
                    set_ratio(log_sums_);
                    sum.value = stage2<true>();
                }
            }
        }
        if constexpr (Functor::kSecond == Moment::kTeacherLog) sum.value += std::log(total_t_) - second;
        p_.soft[row_] = static_cast<float>(sum.value < 0.0 ? 0.0 : sum.value);
        float* stats = p_.stats + row_ * kNumStats;
        // A slice of −inf alone has no mass, but the teacher's may.
        stats[kLogRatio] = static_cast<float>(total_s_ == 0.0 ? std::log(total_t_) : log_sums_);
        stats[kGradSum] = base_.grad_sum;
        stats[kGradForm] = Functor::kTwoSided ? base_.other_side : near_ ? 1.0f : 0.0f;
    }

    // A mean of what stage 1 summed, over T: relative to the row's peaks instead of each tile's.
    template <Moment kMoment>
    double mean(const float* sums) const {
        if constexpr (kMoment == Moment::kNone) return 0.0;
        constexpr bool kByStudent = kMoment == Moment::kStudentRatio;
        double sum = 0.0;
        for (int64_t i = 0; i < tiles_of(n_); ++i) {
            const double z = shift_of(z_peaks_[i]) - shift_of(z_peak_);
            const double u = shift_of(u_peaks_[i]) - shift_of(u_peak_);
            const double of_shift = moment_of<kMoment>(double{sum_s_[i]}, double{sum_t_[i]}, z, u);
            sum += mul0(double{kByStudent ? by_s_[i] : by_t_[i]}, sums[i] + of_shift);
        }
        return sum / (kByStudent ? total_s_ : total_t_) / p_.temperature;
    }

    template <bool kNear>
    double stage2() {
        double value = 0.0, grad_sum = 0.0, other_grad_sum = 0.0;
        excess_ = 0.0;
        for (int64_t i = 0; i < tiles_of(n_); ++i) {
            const Tile t = tile(i);
            TermSums sums;
            if ((kSummed || kNear) && p_.dz.data)
                evaluate<kNear, true>(functor_, t.z, t.u, t.n, factors(i), e_s_ + t.at, e_t_ + t.at, sums);
            else
                evaluate<kNear, false>(functor_, t.z, t.u, t.n, factors(i), e_s_ + t.at, e_t_ + t.at, sums);
            value += sums.term;
            grad_sum += sums.g;
            other_grad_sum += sums.other_g;
            excess_ += sums.excess;
        }
        if constexpr (Functor::kTwoSided) {
            base_.other_side = grad_sum > -other_grad_sum ? 1.0f : 0.0f;
            if (base_.other_side != 0.0f) grad_sum = other_grad_sum;
        }
        if (kNear || Functor::kGradSum != GradSum::kConstant) base_.grad_sum = static_cast<float>(grad_sum);
        return value;
    }

    TileFactors factors(int64_t i) const {
        TileFactors by = base_;
        by.inv_t = inv_t_;
        by.p_s = static_cast<float>(by_s_[i] / total_s_);
        by.p_t = static_cast<float>(by_t_[i] / total_t_);
        by.u_peak = shift_of(u_peak_), by.k = k_, by.p_t_of_peak = static_cast<float>(1.0 / total_t_);
        return by;
    }

    template <bool kFromStats>
    void stage3() {
        if constexpr (!kSoft) return stage3<kFromStats, GradSource::kNoSoft>();
        if constexpr (kSoft && (kFromStats || !kSummed)) {  // stage 2 of this call has kept no g
            if (!near_) return stage3<kFromStats, GradSource::kFunctor>();
        }
        if constexpr (kSoft) stage3<kFromStats, GradSource::kKept>();
    }

    template <bool kFromStats, GradSource kSource>
    void stage3() {
        const float hard_scale = p_.labels ? p_.hard_scale[row_] : 0.0f;
        const float z_scale = z_factor(p_, row_);
        // Comparisons hide a NaN of the logits, which the normalisers have.
        const float nan_or_0 = static_cast<float>(0.0 * (total_s_ + total_t_));
        const float soft = kSoft ? p_.soft_scale[row_] * inv_t_ + nan_or_0 : 0.0f;
        const float smooth = p_.smoothing / static_cast<float>(n_);
        char* dz_row = p_.dz.row(row_, p_.inner_rows);
        for (int64_t i = 0; i < tiles_of(n_); ++i) {
            const bool load = kFromStats || (kSource == GradSource::kFunctor && Functor::kGradNeedsRatio);
            const Tile t = tile(i, load, load);
            const int64_t kept = kFromStats ? 0 : t.at;
            if (kFromStats) by_s_[i] = by_t_[i] = by_h_[i] = 1.0f;  // all tiles relative to the row's peaks
            TileFactors by = factors(i);
            float* dz = out_tile(dz_row, p_.dz.dtype, t.at, dz_tile_);
            with_hard<kSoft>(hard_mode_, [&](auto hard) {
                if constexpr (kFromStats) {
                    ExpSums sums;
                    exponentials_of<hard.value, Moment::kNone, Moment::kNone>(t, 0, t.n, z_peak_, u_peak_, z_peak_, 0,
                                                                              sums);
                    if constexpr (kSource == GradSource::kKept) {
                        TermSums terms;
                        evaluate<true, true>(functor_, t.z, t.u, t.n, by, e_s_, e_t_, terms);
                    }
                }
                around_label(t, [&](int first, int end, bool is_label) {
                    by.soft = soft;
                    if (hard_mode_ != Hard::kNone) {
                        // The label's own p − 1 has its digits in rest.
                        by.hard = is_label ? 0.0f : (hard_scale + z_scale) * static_cast<float>(by_h_[i] / total_h_);
                        by.constant = -hard_scale * smooth;
                        if (is_label) by.constant += hard_scale * (p_.smoothing - rest_) + z_scale * (1.0f - rest_);
                    }
                    gradient<kSource, hard.value>(functor_, t.z + first, t.u + first, end - first, by,
                                                  e_s_ + kept + first, e_t_ + kept + first, e_h_ + kept + first,
                                                  dz + first);
                });
            });
            store_tile(dz_row, p_.dz.dtype, t.at, t.n, dz);
        }
    }

    const KDRowsParams& p_;
    const Functor functor_;
    const int64_t row_, n_;
    const Hard hard_mode_;
    const char *z_row_ = nullptr, *u_row_ = nullptr;
    float inv_t_, k_;
    int64_t label_;
    // Kept exponentials, tiles as float, and the tiles' shifts, sums and factors.
    float *e_s_, *e_t_, *e_h_, *z_tile_, *u_tile_, *dz_tile_;
    float *z_peaks_, *u_peaks_, *sum_s_, *sum_t_, *sum_h_, *moment_, *second_, *by_s_, *by_t_, *by_h_;
    float z_peak_ = 0.0f, u_peak_ = 0.0f;
    double sum_z_ = 0.0, total_s_ = 1.0, total_t_ = 1.0, total_h_ = 1.0, log_sums_ = 0.0, excess_ = 0.0;
    float z_y_ = 0.0f, rest_ = 0.0f;
    bool near_ = false;
    TileFactors base_;
};

}  // namespace FASTKD_ISA
}  // namespace fastkd
