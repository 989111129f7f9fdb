// The walk over one row of one or two tensors, by vectors.
#pragma once

#include "vec.cuh"

namespace fastkd {

// Rows x and, if kPair, y: kept in shared memory from the start, or loaded again at each walk. A block has a contiguous
// share of the vectors, its threads take them in turn, and each thread sees only what it copied itself.
template <class T, bool kPair, bool kResident>
struct RowReader {
    const T *x_row, *y_row;
    int head, n;
    int begin, end;  // vectors of this block
    Vec<T>*x_kept, *y_kept;

    FASTKD_D RowReader(const T* x, const T* y, int n, char* shared) : x_row(x), y_row(y), head(head_of(x)), n(n) {
        const int vectors = (n + head + Vec<T>::kColumns - 1) / Vec<T>::kColumns;
        const int share = (vectors + cluster_size() - 1) / cluster_size();
        begin = share * cluster_rank();
        end = begin + share < vectors ? begin + share : vectors;
        x_kept = reinterpret_cast<Vec<T>*>(shared);
        y_kept = x_kept + share;
    }

    FASTKD_D int column(int index) const { return index * Vec<T>::kColumns - head; }

    FASTKD_D void keep(const T* row, Vec<T>* kept) const {
        for (int index = begin + thread_rank(); index < end; index += block_threads()) {
            const int first = column(index);
            if (is_whole(row, first, n)) {
                copy_async(kept + (index - begin), row + first);
            } else {
                kept[index - begin] = load(row, first, n);
            }
        }
    }

    FASTKD_D void start() const {
        if constexpr (kResident) {
            keep(x_row, x_kept);
            if constexpr (kPair) keep(y_row, y_kept);
        }
    }

    // visit(first column, x, y) of every vector, forwards, or backwards so that the row's end is still in cache.
    template <bool kReverse, class Visit>
    FASTKD_D void for_each(Visit&& visit) const {
        const int first = begin + thread_rank();
        const int steps = first < end ? (end - first - 1) / block_threads() + 1 : 0;
        for (int i = 0; i < steps; ++i) {
            const int index = first + (kReverse ? steps - 1 - i : i) * block_threads();
            const int at = column(index);
            if constexpr (kResident) {
                visit(at, x_kept[index - begin], y_kept[kPair ? index - begin : 0]);
            } else {
                const Vec<T> x = load(x_row, at, n);
                visit(at, x, kPair ? load(y_row, at, n) : x);
            }
        }
    }
};

}  // namespace fastkd
