// What a sparse teacher, who lists K columns of a row, needs of the others: their sum, and the gradient.
//
// Math    c = max z_j, rest = log Σ exp((z_j − c)/T) over the columns j that are not listed; the hard term and the
//         z-loss are those of kd_rows.cuh without a soft term. With g of the K + 1 outcomes, dz is the hard part and,
//         at a listed column, g_i/T, at the others g_K/T·exp((z_j − c)/T − rest).
// Shapes  z, dz [B, S, columns], each its own, last stride 1; listed [N, K] int32, −1 for none; g [N, K + 1]; labels,
//         scales, losses and stats as in kd_rows, with kLogRatio = rest
// Bytes   an element, e bytes wide: rest e, gradient 2e, the floor; scratch memory [N, K]
// Grid    that of kd_rows.cuh where rows are streamed
// Listing A walk cannot compare its columns with K numbers each. Before each stretch of it, 32 columns a thread, those
//         listed among these are marked, in a word of its own for each thread, so that the walk reads no shared memory.
//         The gradient needs no marks: all columns are written as if they were not listed, then the K once more.
#pragma once

#include "kd_rows.cuh"

namespace fastkd {

// A word of each thread.
struct ThreadWords {
    uint32_t words[kMaxThreads];
};

template <class T>
struct RestRow {
    static constexpr int kColumns = Vec<T>::kColumns;
    static constexpr int kTurns = 32 / kColumns;  // of a stretch
    using Hard = KDRow<T, NoSoftTerm, false, false>;
    using Reader = typename Hard::Reader;
    using Exchange = typename Hard::Exchange;

    Hard hard;
    const RestParams& p;
    int listed;  // of a row
    float k;     // log2(e)/T

    FASTKD_D RestRow(const RestParams& p, const RowGrid& grid)
        : hard(p, NoSoftTerm{}, grid), p(p), listed(static_cast<int>(p.k)), k(kLog2E / p.temperature) {}

    FASTKD_D Task fetch() const {
        Task task = hard.fetch(block_rank());
        task.counts = task.counts || p.soft_scale[task.row] != 0.0f;
        return task;
    }

    // visit(i, column, slot) of what is listed of this block's vectors.
    template <class Visit>
    FASTKD_D void for_listed(const Reader& reader, const Task& task, Visit&& visit) const {
        const int32_t* const columns = p.listed + static_cast<int64_t>(task.row) * listed;
        for (int i = thread_rank(); i < listed; i += block_threads()) {
            const int slot = reader.slot_of(columns[i]);
            if (columns[i] >= 0 && slot >= 0 && slot < reader.count) visit(i, columns[i], slot);
        }
    }

    // Marks what is listed of the stretch that begins at slot ``begin``, and takes the thread's own marks.
    FASTKD_D uint32_t mark(const Reader& reader, const Task& task, int begin, uint32_t* marks) const {
        marks[thread_rank()] = 0;
        block_barrier();
        for_listed(reader, task, [&](int, int column, int slot) {
            slot -= begin;
            if (slot < 0 || slot >= kTurns * block_threads()) return;
            const int turn = static_cast<unsigned>(slot) / block_threads();
            const int bit = turn * kColumns + ((column - reader.first) & (kColumns - 1));
            atomic_or(&marks[slot - turn * block_threads()], 1u << bit);
        });
        block_barrier();
        return marks[thread_rank()];
    }

    // Stage 1. Of the state, u_peak and t are those of the rest.
    template <bool kPower>
    FASTKD_D RowState state(const Reader& reader, const Task& task, Exchange& exchange, uint32_t* marks) const {
        using Sums = Stage1<false, kPower, NoSoftTerm>;
        const float anchor = hard.grid.smooths && task.label >= 0 ? shift_of(reader.x[task.label]) : 0.0f;
        const RowScale row = {kLog2E, false, hard.grid.smooths, anchor, task.label, reader.x.row.n};
        const int label_slot = reader.slot_of(row.label);
        RowState state;
        Peak<T> z_peak;
        for (int begin = 0; begin < reader.count; begin += kTurns * block_threads()) {
            uint32_t is_listed = mark(reader, task, begin, marks);
#pragma unroll 1
            for (int i = 0; i < kTurns; ++i, is_listed >>= kColumns) {
                const int slot = begin + i * block_threads() + thread_rank();
                if (slot >= reader.count) break;
                const Vec<T> z = reader.x_at(slot);
                z_peak.include(z);
                if (z_peak.value() > state.z_peak) Sums::rescale(state, z_peak.value(), 0.0f, row);
                if (slot == label_slot) {
                    Sums::template add<true>(state, z, z, reader.column(slot), row);
                } else {
                    Sums::template add<false>(state, z, z, reader.column(slot), row);
                }
                add_unlisted(state, z, is_listed);
            }
        }
        Sums::finish(state, row);
        state.z_y = shuffle(state.z_y, label_slot & (kWarp - 1));  // of another warp's label it is 0
        return exchange.reduce(merge_rest(Sums::template merge<false>(state, row)), 0, [&](const RowState& lane) {
            return merge_rest(Sums::merge_warps(lane, row));
        });
    }

    FASTKD_D void add_unlisted(RowState& state, const Vec<T>& z, uint32_t is_listed) const {
        float u[kColumns], peak = state.u_peak;
#pragma unroll
        for (int j = 0; j < kColumns; ++j) {
            u[j] = is_listed >> j & 1 ? -kInfinity : z[j];
            peak = max(u[j], peak);
        }
        if (peak > state.u_peak) move_rest(state, peak);
        const float shift = shift_of(state.u_peak);
#pragma unroll
        for (int j = 0; j < kColumns; ++j) state.t += exp2((u[j] - shift) * k);
    }

    // A peak may be of the smallest float, which over T overflows: no product has it alone.
    FASTKD_D void move_rest(RowState& state, float peak) const {
        state.t *= rescale(state.u_peak, peak, k);
        state.u_peak = peak;
    }

    FASTKD_D RowState merge_rest(RowState state) const {
        move_rest(state, warp_max(state.u_peak));
        state.t = warp_sum(state.t);
        return state;
    }

    FASTKD_D void write(const RowState& state, const Task& task) const {
        RowNumbers row;
        hard.normalise(row, state, task);
        row.u_peak = shift_of(state.u_peak);
        row.log_ratio = log2f(state.t) * kLn2;
        hard.write(row, task.row);
        p.soft[task.row] = row.log_ratio;
    }

    // Stage 3, from what write() left.
    FASTKD_D void gradient(const Reader& reader, const Task& task, const Place& place, const RowNumbers& row,
                           float* scratch) const {
        const float inv_t = 1.0f / p.temperature;
        const float* const outcome_grad = p.outcome_grad + static_cast<int64_t>(task.row) * (listed + 1);
        float* const of_listed = scratch + static_cast<int64_t>(task.row) * listed;
        const float hard_origin = origin_of(row.z_peak, kLog2E);
        const float even = task.hard_scale * hard.uniform();
        const bool is_empty = row.log_ratio == -kInfinity;
        const float of_rest = is_empty ? 0.0f : outcome_grad[listed] * inv_t * exp2(-row.log_ratio * kLog2E);
        const auto of_softmax = [&](float z) {
            return fma(row.hard_factor, exp2(fma(z, kLog2E, -hard_origin)), -even);
        };
        const auto unlisted = [&](float z, float hard_part) {
            return fma(of_rest, exp2((z - row.u_peak) * k), hard_part);
        };
        const Sink<T> dz_row{p.dz.data + place.dz, hard.dtype_of(p.dz), static_cast<int>(p.n)};

        // The listed columns, before the logits may be written over.
        for_listed(reader, task, [&](int i, int column, int) {
            const float hard_part = column == task.label ? row.label_hard : of_softmax(reader.x[column]);
            of_listed[i] = fma(outcome_grad[i], inv_t, hard_part);
        });
        block_barrier();
        const int label_slot = reader.slot_of(task.label);
        reader.template for_each<false>([&](int slot) {
            const Vec<T> z = reader.x_at(slot);
            float dz[kColumns];
#pragma unroll
            for (int j = 0; j < kColumns; ++j) dz[j] = unlisted(z[j], of_softmax(z[j]));
            if (slot == label_slot) {
#pragma unroll
                for (int j = 0; j < kColumns; ++j) {
                    if (reader.column(slot) + j == task.label) dz[j] = unlisted(z[j], row.label_hard);
                }
            }
            dz_row.store(reader.column(slot), dz);
        });
        block_barrier();
        for_listed(reader, task, [&](int i, int column, int) { dz_row.store_column(column, of_listed[i]); });
    }
};

template <class T>
FASTKD_KERNEL void FASTKD_BOUNDS(3) rest_rows_kernel(const RestParams p, const RowGrid grid) {
    FASTKD_SHARED(Exchange<false>, exchange);
    FASTKD_SHARED(ThreadWords, marks);
    const RestRow<T> kernel(p, grid);
    const Task task = kernel.fetch();
    if (!task.counts) {
        if (kernel.hard.is_first()) p.hard[task.row] = p.soft[task.row] = 0.0f;
        return;
    }
    if (thread_rank() == 0) exchange.blocks.init(grid, task.row);
    const auto reader = kernel.hard.open(kernel.hard.place(task.row));
    const RowState state = grid.is_power ? kernel.template state<true>(reader, task, exchange, marks.words)
                                         : kernel.template state<false>(reader, task, exchange, marks.words);
    if (kernel.hard.is_first()) kernel.write(state, task);
}

template <class T>
FASTKD_KERNEL void FASTKD_BOUNDS(3) rest_grad_kernel(const RestParams p, float* scratch, const RowGrid grid) {
    FASTKD_SHARED(RowNumbers, numbers);
    RestRow<T> kernel(p, grid);
    const Task task = kernel.fetch();
    const Place place = kernel.hard.place(task.row);
    kernel.hard.clear(place, task.counts ? p.n : 0);
    if (!task.counts) return;
    if (thread_rank() == 0) {
        kernel.hard.read(numbers, task.row);
        kernel.hard.fold(numbers, task);
    }
    block_barrier();
    kernel.gradient(kernel.hard.open(place), task, place, numbers, scratch);
}

}  // namespace fastkd
