// The row operation on a GPU: clusters of blocks, each of which works on one row after another.
//
// Math    see row.h for the stages, state.cuh for stage 1, linear.cuh for term and g of a row that is far from
//         convergence, divergence.h for one that is near. S comes with stage 1 where a mean of d gives it (Moment), and
//         stage 2 is left out; where that mean has not the digits, or G is not known otherwise, stage 2 sums both.
// Shapes  z, u, dz [B, S, columns], last stride 1; labels [N] int64; scales, losses [N]; stats [N, 8]. z, u and dz are all
//         of T; in a kernel of T = float, each is of any type.
// Bytes   an element, e bytes wide. Resident: each logit is read once into shared memory and stays there between the
//         stages: loss 2e, loss and gradient 3e, the floor. Otherwise each stage reads the row again, from L2 where it
//         still is: loss 2e, loss and gradient 5e, and 2e more for each stage 2; gradient from statistics 3e.
// Work    at T = 2, bytes at 3 TB/s leave an H100 57 instructions a column of bfloat16, at 4.3 TB/s an H200 40. So what
//         only the label's column, a ragged end, smoothing, another T or a row near convergence needs is kept out of the
//         loops, and one warp of a block works out what is the same in a row; tests/csrc counts the instructions.
// Grid    as many clusters of C blocks (1, 2, 4, 8 or 16) as the device holds, of up to 256 threads each. A block has a
//         contiguous slice of the row, whose vectors its threads take in turn. In stage 3 a thread that has read a
//         vector for the last time begins the copy of the next row's into its place. A row that is streamed has blocks
//         of its own: one, or where rows are few up to 32, its parts.
// Merge   lanes, then the warps of a block, then the blocks of the row, see reduce.cuh: always in the same order, so
//         that results do not depend on the number of clusters.
#pragma once

#include <cmath>

#include "linear.cuh"
#include "reader.cuh"
#include "state.cuh"

namespace fastkd {

// What is the same in all rows, beside the params.
struct RowGrid : Split {
    bool hard, writes;  // softmax(z) at temperature 1 is wanted, for labels or a z-loss; there is a gradient to write
    bool is_power;  // exp(z) is a power of exp(z/T), T being 1 or 2, or there is no hard term to use it
    bool smooths;
    float near_below;    // rows of a smaller S take the near form
    float log_w, log_v;  // log₂ of w and 1 − w
};

// The params as the kernel wants them, and all of its grid but how it is split.
template <class Functor>
RowGrid prepare_rows(KDRowsParams& p, const Functor& functor) {
    // Rows at one distance from each other need no division.
    const auto is_even = [&](const Matrix& m) { return !m.data || m.outer == m.inner * p.inner_rows; };
    if (is_even(p.z) && is_even(p.u) && is_even(p.dz)) p.inner_rows = p.rows;
    const bool smooths = p.labels && p.smoothing > 0.0f;
    const bool is_power = !p.u.data || p.temperature == 1.0f || p.temperature == 2.0f;
    const double w = p.w;
    RowGrid grid;
    grid.hard = p.labels || p.z_scale, grid.writes = p.dz.data;
    grid.is_power = !grid.hard || (!smooths && is_power);
    grid.smooths = smooths;
    grid.near_below = functor.near_below();
    grid.log_w = static_cast<float>(std::log2(w)), grid.log_v = static_cast<float>(std::log2(1.0 - w));
    return grid;
}

constexpr int kInAnotherSlice = -2;

// A row to work on, and what of it is fetched ahead.
struct Task {
    int row;
    float hard_scale, soft_scale;
    int label;  // −1: none, or outside the vocabulary; or kInAnotherSlice of it
    bool counts;
};

// Where a row begins, in bytes from its matrix's data: of pointers that go round a loop, the compiler would not know
// that they are to global memory.
struct Place {
    int64_t z, u, dz;
};

// How term and g of a row are had: from coefficients, where it is far from convergence; else by the functor.
enum class Form : int { kLinear, kFar, kNear };

// A stage 2 by the functor that a row needs still: in the far form, in the near form, or, the latter having shown an
// error of the normalisers, again without it.
enum class Again : int { kNo, kFar, kNear, kCentred };

// All that the threads of a block must know of a row, worked out by its first thread.
struct RowNumbers {
    float z_peak, u_peak;
    float lse_h, lse_s;  // log₂ normalisers of z and z/T, relative to the peak
    float log_ratio;     // log Σ exp of u/T, relative to its peak, less that of z/T
    float hard, soft, entropy, grad_sum, other_side, rest;
    Form form;
    Again again;
    // Stage 3 from coefficients: the hard term comes as square·s² or in soft_term, or with an exponential of its own.
    Normalisers sums;
    Coefficients soft_term;
    float square, hard_factor, label_hard;
};

template <class T, class Functor, bool kSoft, bool kResident>
struct KDRow {
    static constexpr int kColumns = Vec<T>::kColumns;
    static constexpr Moment kMoment = kMomentOf<Functor>;
    static constexpr bool kSummed = kSoft && kMoment == Moment::kNone;  // stage 2 always runs
    using Reader = RowReader<T, kSoft, kResident>;
    using Blocks = RowBlocks<kResident>;
    using Exchange = fastkd::Exchange<kResident>;

    const KDRowsParams& p;
    Linear<Functor> linear;
    const RowGrid& grid;
    float k;  // log2(e)/T

    FASTKD_D KDRow(const KDRowsParams& p, const Functor& functor, const RowGrid& grid)
        : p(p), linear(functor), grid(grid), k(inv_t() * kLog2E) {}

    // Not kept: registers are scarcer than instructions outside the loops.
    FASTKD_D float inv_t() const { return kSoft ? 1.0f / p.temperature : 1.0f; }
    FASTKD_D int rows() const { return static_cast<int>(p.rows); }
    FASTKD_D bool squares() const { return kSoft && p.temperature == 2.0f; }

    FASTKD_D Task fetch(int row) const {
        Task task = {row, 0.0f, 0.0f, -1, false};
        if (row >= rows()) return task;
        if (kSoft) task.soft_scale = p.soft_scale[row];
        if (p.labels) {
            task.hard_scale = p.hard_scale[row];
            const uint64_t label = p.labels[row];
            if (label < static_cast<uint64_t>(p.n)) task.label = static_cast<int>(label);
            if (label == static_cast<uint64_t>(kElsewhere)) task.label = kInAnotherSlice;
        }
        task.counts = task.hard_scale != 0.0f || task.soft_scale != 0.0f || z_scale(row) != 0.0f;
        return task;
    }

    // Few ask for it, and a register is more than reading it again.
    FASTKD_D float z_scale(int row) const { return p.z_scale ? p.z_scale[row] : 0.0f; }

    // The addresses of a row. Host code makes inner_rows the number of rows where the strides allow it.
    FASTKD_D Place place(int row) const {
        const unsigned inner_rows = static_cast<unsigned>(p.inner_rows), index = static_cast<unsigned>(row);
        const auto at = [&](const Matrix& matrix, unsigned outer, unsigned inner) {
            return (outer * matrix.outer + inner * matrix.inner) * size_of(dtype_of(matrix));
        };
        const auto all = [&](unsigned outer, unsigned inner) {
            return Place{at(p.z, outer, inner), at(p.u, outer, inner), at(p.dz, outer, inner)};
        };
        return index < inner_rows ? all(0, index) : all(index / inner_rows, index % inner_rows);
    }

    FASTKD_D DType dtype_of(const Matrix& matrix) const { return sizeof(T) == 2 ? type_of<T>() : matrix.dtype; }

    FASTKD_D int head(const Place& row) const {
        return grid.writes ? head_of<T>(p.dz.data + row.dz, dtype_of(p.dz)) : head_of<T>(p.z.data + row.z, dtype_of(p.z));
    }

    FASTKD_D Reader open(const Place& row) const {
        const int n = static_cast<int>(p.n), before = head(row);
        const Source<T> z(p.z.data + row.z, dtype_of(p.z), n, before);
        const Source<T> u = kSoft ? Source<T>(p.u.data + row.u, dtype_of(p.u), n, before) : z;
        return Reader(z, u, grid.share, dynamic_shared());
    }

    // Zeros in the columns from ``first`` on: those past the vocabulary, or all of a row that does not count.
    FASTKD_D void clear(const Place& place, int64_t first) const {
        if (!grid.writes || static_cast<int>(first) == static_cast<int>(p.columns)) return;
        const int64_t size = size_of(dtype_of(p.dz));
        char* const data = p.dz.data + place.dz;
        store_zeros(data + first * size, data + p.columns * size, Blocks::rank() * block_threads() + thread_rank(),
                    Blocks::count() * block_threads());
    }

    // The next row from this one on that counts. Those that do not are not read.
    FASTKD_D Task next_that_counts(Task task, int step) const {
        while (task.row < rows() && !task.counts) {
            clear(place(task.row), 0);
            if (is_first() && !p.from_stats) p.hard[task.row] = p.soft[task.row] = 0.0f;
            task = fetch(task.row + step);
        }
        return task;
    }

    static FASTKD_D bool is_first() { return Blocks::rank() == 0 && thread_rank() == 0; }

    // ---- Stage 1

    FASTKD_D RowState stage1(const Reader& reader, const Task& task, Exchange& exchange, int turn) const {
        // From the matrix, so that a resident row needs no address here.
        const float anchor = grid.smooths && task.label >= 0 ? shift_of(open(place(task.row)).x[task.label]) : 0.0f;
        const RowScale row = {k, squares(), grid.smooths, anchor, task.label, static_cast<int>(p.n)};
        return grid.is_power ? stage1<true>(reader, row, exchange, turn) : stage1<false>(reader, row, exchange, turn);
    }

    template <bool kPower>
    FASTKD_D RowState stage1(const Reader& reader, const RowScale& row, Exchange& exchange, int turn) const {
        using Sums = Stage1<kSoft, kPower, Functor>;
        RowState state;
        Peak<T> z_peak, u_peak;
        if constexpr (kResident) {
            reader.for_kept([&](const Vec<T>* place) {
                z_peak.include(reader.kept_at(place));
                if (kSoft) u_peak.include(reader.kept_at(place + kWarp));
            });
            const Peaks peaks = warp_peaks(z_peak, u_peak);
            state.z_peak = peaks.x, state.u_peak = peaks.y;
        }
        const auto add = [&](auto careful, int slot, const Vec<T>* place) {
            const Vec<T> z = reader.x_at(slot, place), u = kSoft ? reader.y_at(slot, place) : z;
            if constexpr (!kResident) {
                z_peak.include(z);
                if (kSoft) u_peak.include(u);
                const float z_now = z_peak.value(), u_now = kSoft ? u_peak.value() : 0.0f;
                if (z_now > state.z_peak || (kSoft && u_now > state.u_peak)) Sums::rescale(state, z_now, u_now, row);
            }
            Sums::template add<decltype(careful)::value>(state, z, u, reader.column(slot), row);
        };
        const int label_slot = reader.slot_of(row.label);
        reader.template for_main<false>(reader.is_ragged_at_0(), label_slot, [&](int slot, const Vec<T>* place) {
            add(std::false_type(), slot, place);
        });
        for (bool all = false;; all = true) {
            reader.for_special(all, reader.is_ragged_at_0(), label_slot, [&](int slot) {
                if (slot < reader.count) add(std::true_type(), slot, reader.place_of(slot));
            });
            if (all || Sums::is_finite(state)) break;
            RowState again;
            again.z_peak = state.z_peak, again.u_peak = state.u_peak;
            state = again;
        }
        Sums::finish(state, row);
        state.z_y = shuffle(state.z_y, label_slot & (kWarp - 1));  // of another warp's label it is 0
        state = Sums::template merge<kResident>(state, row);
        return exchange.reduce(state, turn, [&](const RowState& lane) { return Sums::merge_warps(lane, row); });
    }

    // The normalisers and, where stage 1 gives them, S and G.
    FASTKD_D void normalise(RowNumbers& row, const RowState& state, const Task& task) const {
        row = {};
        const float z_y = task.label >= 0 ? state.z_y : kNaN;
        row.z_peak = shift_of(state.z_peak);
        const float z_rounding = rounding_of(row.z_peak, k);
        if constexpr (kSoft) {
            row.u_peak = shift_of(state.u_peak);
            row.lse_s = log2f(state.s) + z_rounding;
            row.sums = {1.0f / state.s, 1.0f / state.t, log2f(state.t / state.s)};
            const float u_rounding = rounding_of(row.u_peak, k);
            row.log_ratio = (row.sums.log_ratio + (u_rounding - z_rounding)) * kLn2;
            // A slice of −inf alone has no mass, but the teacher's may.
            if (state.s == 0.0f) row.log_ratio = (log2f(state.t) + u_rounding) * kLn2;
        }
        if (grid.hard) {
            const float rounding = grid.is_power ? (squares() ? 2.0f : 1.0f) * z_rounding : rounding_of(row.z_peak, kLog2E);
            const float log_others = log2f(state.others) + rounding;
            row.lse_h = log_others;
            if (p.labels && task.label != kInAnotherSlice) {
                const float t = (row.z_peak - z_y) + log_others * kLn2;
                const LabelTerm term = label_term(t);
                row.rest = term.rest;
                // z_y − peak + softplus(t), without inf − inf where the label is a masked token.
                const float log_sum = t > 0.0f ? log_others * kLn2 + (term.loss - t) : (z_y - row.z_peak) + term.loss;
                if (z_y != -kInfinity) row.lse_h = log_sum * kLog2E;
                row.hard = term.loss - (grid.smooths ? p.smoothing * (state.sum_z / static_cast<float>(p.n)) : 0.0f);
            }
        }
        if constexpr (kMoment != Moment::kNone) {
            // Relative to the origins, as the sums are.
            using Sums = Stage1<kSoft, true, Functor>;
            const float mean = Sums::mean(state) * kLn2;
            const float second = Sums::second_mean(state) * kLn2;
            const Value<float> soft = value_from_means(linear.functor, mean, second, row.sums.log_ratio * kLn2);
            row.soft = soft.value, row.grad_sum = soft.grad_sum;
            row.again = is_near(row) ? Again::kNear : soft.has_digits ? Again::kNo : Again::kFar;
        }
        if (Functor::kSecond == Moment::kTeacherLog)
            row.entropy = (log2f(state.t) - state.second * row.sums.teacher) * kLn2;
    }

    FASTKD_D bool is_near(const RowNumbers& row) const { return row.soft < grid.near_below; }

    // ---- Stage 2

    FASTKD_D SumState stage2(const Reader& reader, const RowNumbers& row, Exchange& exchange, int turn) {
        linear.prepare(row.sums);
        const float z_origin = origin_of(row.z_peak, k), u_origin = origin_of(row.u_peak, k);
        SumState sums;
        reader.template for_each<true>([&](int slot) {
            const Vec<T> z = reader.x_at(slot), u = reader.y_at(slot);
#pragma unroll
            for (int j = 0; j < kColumns; ++j) linear.add(sums, fma(z[j], k, -z_origin), fma(u[j], k, -u_origin));
        });
        return exchange.reduce(merge(sums), turn, [](const SumState& lane) { return merge(lane); });
    }

    FASTKD_D void take_sums(RowNumbers& row, const SumState& sums) {
        linear.prepare(row.sums);
        const RowSums result = linear.finish(sums, row.sums, grid.log_w, grid.log_v);
        row.soft = result.value, row.grad_sum = result.grad_sum, row.other_side = result.other_side;
        // The hardware's logarithm is off by up to 4e-7.
        const bool is_rough = !Functor::kTwoSided && row.soft < 2.0f * kFewDigits * linear.weights();
        row.again = is_near(row) ? Again::kNear : is_rough || !linear.is_served() ? Again::kFar : Again::kNo;
    }

    template <bool kNear>
    FASTKD_D SumState stage2_by_functor(const Reader& reader, const RowNumbers& row, Exchange& exchange,
                                        int turn) const {
        SumState sums;
        reader.template for_each<true>([&](int slot) {
            for_columns(reader.x_at(slot), reader.y_at(slot), [&](int, float z, float u) {
                float p_s, excess;
                const TermGrad column = evaluate<kNear>(row, z, u, p_s, excess);
                sums.first += column.term;
                sums.second += column.g;
                if (Functor::kTwoSided) sums.third += p_s;
                if (kNear) sums.fourth += excess;
            });
        });
        return exchange.reduce(merge(sums), turn, [](const SumState& lane) { return merge(lane); });
    }

    FASTKD_D SumState stage2_by_functor(const Reader& reader, const RowNumbers& row, Exchange& exchange,
                                        int turn) const {
        return row.again == Again::kFar ? stage2_by_functor<false>(reader, row, exchange, turn)
                                        : stage2_by_functor<true>(reader, row, exchange, turn);
    }

    FASTKD_D void take_functor_sums(RowNumbers& row, const SumState& sums) const {
        const Again done = row.again;
        const float excess = sums.fourth;
        row.form = done == Again::kFar ? Form::kFar : Form::kNear;
        row.soft = sums.first;
        if (row.form == Form::kNear || Functor::kGradSum != GradSum::kConstant) row.grad_sum = sums.second;
        if (Functor::kTwoSided) {
            const float other = sums.second - sums.third;
            row.other_side = sums.second > -other ? 1.0f : 0.0f;
            if (row.other_side != 0.0f) row.grad_sum = other;
        }
        row.again = Again::kNo;
        if (done == Again::kFar && is_near(row)) row.again = Again::kNear;
        // What the rounding of the normalisers adds to every d shows in Σ (p_t − p_s) = 0. A divergence feels its square,
        // total variation itself.
        if (done == Again::kNear && (Functor::kTwoSided || excess * excess > 2e-6f * row.soft)) {
            row.again = Again::kCentred;
            row.log_ratio += excess;
        }
    }

    static FASTKD_D SumState merge(const SumState& lane) {
        float sums[] = {lane.first, lane.second, lane.third, lane.fourth};
        warp_sums(sums);
        return {sums[0], sums[1], sums[2], sums[3]};
    }

    // term and g of a column by the functor.
    template <bool kNear>
    FASTKD_D TermGrad evaluate(const RowNumbers& row, float z, float u, float& p_s, float& excess) const {
        const float lse_t = row.lse_s + row.log_ratio * kLog2E;
        const Offsets offsets = offsets_between(row.z_peak, row.u_peak);
        const float shift = ((row.u_peak - offsets.u) - (row.z_peak - offsets.z)) * inv_t() + row.log_ratio;
        const float p_t = exp2((u - row.u_peak) * k - lse_t);
        p_s = exp2((z - row.z_peak) * k - row.lse_s);
        const float d = log_ratio(z, u, offsets.z, offsets.u, inv_t(), shift);
        excess = kNear ? Excess(d, p_t, p_s).mass : 0.0f;
        return linear.functor.template column<kNear>(d, p_t, p_s);
    }

    // ---- Stage 3

    // Folds what stage 3 needs of a row into coefficients.
    FASTKD_D void fold(RowNumbers& row, const Task& task) {
        // What is NaN or +inf in the logits comparisons hide; the normalisers do not.
        if (!(row.log_ratio < kInfinity)) row.soft = row.grad_sum = kNaN;
        const float z_rounding = rounding_of(row.z_peak, k);
        const float z_weight = 2.0f * z_scale(task.row);
        const float z_grad = z_weight == 0.0f ? 0.0f : z_weight * (row.z_peak + row.lse_h * kLn2);
        const float hard_scale = task.hard_scale + z_grad;  // of softmax(z), but for the label's column
        const auto hard = [&](float rounding) {
            return hard_scale == 0.0f ? 0.0f : hard_scale * exp2(rounding - row.lse_h);
        };
        const bool has_hard = grid.hard;
        row.square = has_hard && grid.is_power && squares() ? hard(2.0f * z_rounding) : 0.0f;
        const float constant = has_hard && grid.is_power && !squares() ? hard(z_rounding) : 0.0f;
        row.hard_factor = has_hard ? hard(rounding_of(row.z_peak, kLog2E)) : 0.0f;
        row.label_hard = task.hard_scale * ((grid.smooths ? p.smoothing - uniform() : 0.0f) - row.rest);
        row.label_hard += z_grad * (1.0f - row.rest);
        linear.fold(row.sums, row.grad_sum, row.other_side, task.soft_scale * inv_t(), constant);
        row.soft_term = linear.c;
    }

    FASTKD_D float uniform() const { return grid.smooths ? p.smoothing / static_cast<float>(p.n) : 0.0f; }

    // Whether the places of the vectors were filled with those of the next row, if it has_next, as they became free.
    FASTKD_D bool stage3(const Reader& reader, const Reader& next, bool has_next, const RowNumbers& row, const Task& task,
                         const Place& place) {
        if (kSoft && row.form == Form::kNear)
            return stage3<Form::kNear, false>(reader, next, has_next, row, task, place);
        if (kSoft && row.form == Form::kFar)
            return stage3<Form::kFar, false>(reader, next, has_next, row, task, place);
        return grid.is_power ? stage3<Form::kLinear, true>(reader, next, has_next, row, task, place)
                             : stage3<Form::kLinear, false>(reader, next, has_next, row, task, place);
    }

    template <Form kForm, bool kPower>
    FASTKD_D bool stage3(const Reader& reader, const Reader& next, bool has_next, const RowNumbers& row, const Task& task,
                         const Place& place) {
        const float z_origin = origin_of(row.z_peak, k), u_origin = kSoft ? origin_of(row.u_peak, k) : 0.0f;
        const float hard_origin = origin_of(row.z_peak, kLog2E), even = task.hard_scale * uniform();
        const auto factor = [&] { return task.soft_scale * inv_t(); };
        // factor·(g − p_s·G), and what of the hard term is folded in.
        const auto tempered = [&](const Linear<Functor>& by, float square, float z, float u) {
            if constexpr (kForm == Form::kLinear) {
                const float x = fma(z, k, -z_origin), y = kSoft ? fma(u, k, -u_origin) : 0.0f;
                const float s = exp2(x), coefficient = by.coefficient(x, y, s);
                const float student = s * (kPower ? fma(square, s, coefficient) : coefficient);
                return Linear<Functor>::kTeacher ? fma(-by.c.other, exp2(y), student) : student;
            } else {
                float p_s, excess;
                TermGrad column = evaluate<kForm == Form::kNear>(row, z, u, p_s, excess);
                if (Functor::kTwoSided) column.g -= row.other_side * p_s;
                return factor() * soft_gradient<Functor>(column.g, column.apart, p_s, row.grad_sum);
            }
        };
        linear.c = row.soft_term;
        const float square = row.square;
        const Sink<T> dz_row{p.dz.data + place.dz, dtype_of(p.dz), static_cast<int>(p.n)};
        const auto with_hard = [&](float soft, float z) {
            if constexpr (kPower) return soft;
            return soft + fma(row.hard_factor, exp2(fma(z, kLog2E, -hard_origin)), -even);
        };
        // The gradient of a vector that may hold the label or stick out of the row.
        const auto careful = [&](int slot) {
            const int first = reader.column(slot);
            const Vec<T> z = reader.x_at(slot);
            float dz[kColumns];
            for_columns(z, kSoft ? reader.y_at(slot) : z, [&](int j, float z_j, float u_j) {
                float value;
                if (first + j == task.label) {
                    Linear<Functor> alone = linear;
                    alone.fold(row.sums, row.grad_sum, row.other_side, factor(), 0.0f);
                    value = tempered(alone, 0.0f, z_j, u_j) + row.label_hard;
                } else {
                    value = with_hard(tempered(linear, square, z_j, u_j), z_j);
                }
#pragma unroll
                for (int i = 0; i + 1 < kColumns; ++i) dz[i] = dz[i + 1];
                dz[kColumns - 1] = value;
            });
            dz_row.store(first, dz);
        };
        const bool refill = kForm == Form::kLinear && kResident && next.direct && has_next;
        const bool special_0 = reader.is_ragged_at_0() || next.is_ragged_at_0();
        const int label_slot = reader.slot_of(task.label);
        if constexpr (kForm == Form::kLinear) {
            reader.template for_main<true>(special_0, label_slot, [&](int slot, Vec<T>* at) {
                const Vec<T> z = reader.x_at(slot, at), u = kSoft ? reader.y_at(slot, at) : z;
                float dz[kColumns];
#pragma unroll
                for (int j = 0; j < kColumns; ++j) dz[j] = with_hard(tempered(linear, square, z[j], u[j]), z[j]);
                dz_row.store_whole(reader.column(slot), dz);
                if constexpr (kResident) next.copy(slot, at, refill);
            });
        }
        reader.for_special(kForm != Form::kLinear, special_0, label_slot, [&](int slot) {
            if (slot < reader.count) careful(slot);
            if (refill && slot < next.count) next.fill(slot);
        });
        return refill;
    }

    // ---- A row

    FASTKD_D void read(RowNumbers& row, int index) const {
        const float* stats = p.stats + static_cast<int64_t>(index) * kNumStats;
        row = {};
        row.z_peak = stats[kPeakStudent];
        row.u_peak = stats[kPeakTeacher];
        row.lse_h = stats[kLogHard] * kLog2E;
        row.lse_s = stats[kLogStudent] * kLog2E;
        row.log_ratio = stats[kLogRatio];
        row.rest = stats[kLabelRest];
        row.grad_sum = stats[kGradSum];
        if (Functor::kTwoSided) row.other_side = stats[kGradForm];
        row.form = !kSoft ? Form::kLinear : !Functor::kTwoSided && stats[kGradForm] != 0.0f ? Form::kNear : Form::kFar;
    }

    FASTKD_D void write(const RowNumbers& row, int index) const {
        p.hard[index] = row.hard;
        p.soft[index] = (row.soft < 0.0f ? 0.0f : row.soft) + row.entropy;
        float* stats = p.stats + static_cast<int64_t>(index) * kNumStats;
        stats[kPeakStudent] = row.z_peak;
        stats[kPeakTeacher] = row.u_peak;
        stats[kLogHard] = row.lse_h * kLn2;
        stats[kLogStudent] = row.lse_s * kLn2;
        stats[kLogRatio] = row.log_ratio;
        stats[kGradSum] = row.grad_sum;
        stats[kLabelRest] = row.rest;
        stats[kGradForm] = Functor::kTwoSided ? row.other_side : row.form == Form::kNear ? 1.0f : 0.0f;
    }
};

// Of an SM. Walks that load take more registers, and so do three walks over rows that may be converted.
template <class T, bool kSummed, bool kResident>
constexpr int kBlocks = kResident && !(kSummed && (kPairsRegisters || sizeof(T) == 4)) ? 3 : 2;

template <class T, class Functor, bool kSoft, bool kResident>
FASTKD_KERNEL void FASTKD_BOUNDS((kBlocks<T, kSoft && kMomentOf<Functor> == Moment::kNone, kResident>))
kd_rows_kernel(const KDRowsParams p, const Functor functor, const RowGrid grid) {
    FASTKD_SHARED(Exchange<kResident>, exchange);
    FASTKD_SHARED(RowNumbers, numbers);
    using Kernel = KDRow<T, Functor, kSoft, kResident>;
    Kernel kernel(p, functor, grid);

    if (thread_rank() == 0) exchange.blocks.init(grid, block_rank());
    cluster_arrive();
    // A row that is not kept has blocks of its own.
    const int step = kResident ? grid_blocks() / cluster_size() : kernel.rows();
    Task task = kernel.next_that_counts(kernel.fetch(block_rank() / cluster_size()), step);
    Place place = kernel.place(task.row);
    auto reader = kernel.open(place);
    if (task.row < kernel.rows()) reader.start();
    cluster_wait();

    // One thread works on the numbers, where they lie; the others have read what they were before a reduction.
    const auto publish = [&](const Task& task, auto&& work) {
        if (thread_rank() == 0) {
            work();
            kernel.fold(numbers, task);
        }
        block_barrier();
    };
    for (int turn = 0; task.row < kernel.rows();) {
        Task next = {kernel.rows(), 0.0f, 0.0f, -1, false};
        if constexpr (kResident) next = kernel.fetch(task.row + step);
        if (!kResident && p.from_stats) {
            block_barrier();
            publish(task, [&] { kernel.read(numbers, task.row); });
        } else {
            copy_async_wait();
            const RowState state = kernel.stage1(reader, task, exchange, turn++);
            publish(task, [&] { kernel.normalise(numbers, state, task); });
            if constexpr (Kernel::kSummed) {
                const SumState sums = kernel.stage2(reader, numbers, exchange, turn++);
                publish(task, [&] { kernel.take_sums(numbers, sums); });
            }
            while (kSoft && numbers.again != Again::kNo) {
                const SumState sums = kernel.stage2_by_functor(reader, numbers, exchange, turn++);
                publish(task, [&] { kernel.take_functor_sums(numbers, sums); });
            }
            if (kernel.is_first()) kernel.write(numbers, task.row);
        }
        if constexpr (kResident) next = kernel.next_that_counts(next, step);
        const Place next_place = kernel.place(next.row);
        const auto next_reader = kernel.open(next_place);
        const bool has_next = next.row < kernel.rows();
        bool refilled = false;
        if (grid.writes) {
            kernel.clear(place, p.n);
            refilled = kernel.stage3(reader, next_reader, has_next, numbers, task, place);
        }
        if (has_next && !refilled) next_reader.start();
        // Worked out again where stage 3 has no registers to keep it.
        task = next, place = Functor::kApart ? kernel.place(next.row) : next_place;
        reader = next_reader;
    }
}

}  // namespace fastkd
