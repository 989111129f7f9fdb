// The walk over one row of one or two tensors, by vectors.
#pragma once

#include "vec.cuh"

namespace fastkd {

// Vectors of T that a row of n columns may touch, wherever it begins, and those that a block has room for.
template <class T>
FASTKD_HD constexpr int64_t max_vectors(int64_t n) {
    return n / (16 / static_cast<int64_t>(sizeof(T))) + 2;
}

template <class T>
FASTKD_D int share_of(int n) {
    return (static_cast<int>(max_vectors<T>(n)) + cluster_size() - 1) / cluster_size();
}

// Rows x and, if kPair, y: kept in shared memory between the walks, or loaded again at each. A block has a contiguous
// share of the vectors, its threads take them in turn, and each thread sees only what it put into shared memory itself:
// a slot that it has read for the last time it may fill with the next row, and no barrier is needed.
template <class T, bool kPair, bool kResident>
struct RowReader {
    static constexpr int kColumns = Vec<T>::kColumns;
    Source<T> x, y;
    int first;        // column of the block's first vector
    int count;        // vectors of the block
    int direct_end;   // vectors that begin at 0 … direct_end − 1 are copied as they are
    Vec<T>*x_kept, *y_kept;

    // ``share``: vectors that each block has room for.
    FASTKD_D RowReader(const Source<T>& x, const Source<T>& y, int share, char* shared) : x(x), y(y) {
        const int vectors = (x.row.n + x.head + kColumns - 1) / kColumns, begin = share * cluster_rank();
        first = begin * kColumns - x.head;
        const int left = vectors - begin;
        count = left < 0 ? 0 : left < share ? left : share;
        const bool direct = x.is_direct() && (!kPair || y.is_direct());
        direct_end = direct ? x.row.n - kColumns + 1 : 0;
        x_kept = reinterpret_cast<Vec<T>*>(shared);
        y_kept = x_kept + share;
    }

    FASTKD_D int column(int slot) const { return first + slot * kColumns; }

    // Begins the copy of the vector of a slot, if it is one that is copied as it is.
    FASTKD_D void copy(int slot) const {
        const int at = column(slot);
        if (at < 0 || at >= direct_end) return;
        copy_async(x_kept + slot, x.row.data + at);
        if constexpr (kPair) copy_async(y_kept + slot, y.row.data + at);
    }

    FASTKD_D void fill(int slot) const {
        x_kept[slot] = x.load(column(slot));
        if constexpr (kPair) y_kept[slot] = y.load(column(slot));
    }

    // Begins to fill the slots. ``refilled``: those that are copied as they are have been, one by one.
    FASTKD_D void start(bool refilled) const {
        if constexpr (!kResident) return;
        const bool direct = direct_end > 0;
        if (!refilled || !direct) {
#pragma unroll 2
            for (int slot = thread_rank(); slot < count; slot += block_threads()) direct ? copy(slot) : fill(slot);
        }
        // The ragged ends last, so that nothing waits behind them.
        if (direct && first < 0 && thread_rank() == 0) fill(0);
        if (direct && column(count) > x.row.n && (count - 1) % block_threads() == thread_rank()) fill(count - 1);
    }

    // visit(slot, x, y) of every vector, forwards, or, if they are loaded again, backwards on request, so that the
    // row's end is still in cache.
    template <bool kReverse, class Visit>
    FASTKD_D void for_each(Visit&& visit) const {
        const int step = block_threads();
        if constexpr (kResident) {
#pragma unroll 1
            for (int slot = thread_rank(); slot < count; slot += step) visit(slot, x_kept[slot], kPair ? y_kept[slot] : Vec<T>());
        } else {
            const int steps = thread_rank() < count ? (count - 1 - thread_rank()) / step + 1 : 0;
#pragma unroll 1
            for (int i = 0; i < steps; ++i) {
                const int slot = thread_rank() + (kReverse ? steps - 1 - i : i) * step;
                visit(slot, x.load(column(slot)), kPair ? y.load(column(slot)) : Vec<T>());
            }
        }
    }
};

}  // namespace fastkd
