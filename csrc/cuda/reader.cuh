// The walk over one row of one or two tensors, by vectors.
#pragma once

#include "vec.cuh"

namespace fastkd {

// Rows x and, if kPair, y: kept in shared memory from the start, or loaded again at each walk. A block has a contiguous
// share of the vectors, its threads take them in turn, and each thread sees only what it copied itself.
template <class T, bool kPair, bool kResident>
struct RowReader {
    int head;
    Row<const T> x, y;
    int begin, end;  // vectors of this block
    Vec<T>*x_kept, *y_kept;

    FASTKD_D RowReader(const T* x_data, const T* y_data, int n, char* shared)
        : head(head_of(x_data)), x(x_data, n, head), y(y_data, n, head) {
        const int vectors = (n + head + Vec<T>::kColumns - 1) / Vec<T>::kColumns;
        const int share = (vectors + cluster_size() - 1) / cluster_size();
        begin = share * cluster_rank();
        end = begin + share < vectors ? begin + share : vectors;
        x_kept = reinterpret_cast<Vec<T>*>(shared);
        y_kept = x_kept + share;
    }

    FASTKD_D int column(int index) const { return index * Vec<T>::kColumns - head; }

    FASTKD_D void keep(const Row<const T>& row, Vec<T>* kept) const {
        const int step = block_threads();
        int first = column(begin + thread_rank());
        Vec<T>* to = kept + thread_rank();
#pragma unroll 1
        for (int left = end - begin - thread_rank(); left > 0; left -= step) {
            if (row.is_whole(first)) {
                copy_async(to, row.data + first);
            } else {
                *to = load(row, first);
            }
            first += step * Vec<T>::kColumns;
            to += step;
        }
    }

    FASTKD_D void start() const {
        if constexpr (kResident) {
            keep(x, x_kept);
            if constexpr (kPair) keep(y, y_kept);
        }
    }

    // visit(first column, x, y) of one vector.
    template <class Visit>
    FASTKD_D void at(int index, Visit&& visit) const {
        Vec<T> x_vec, y_vec;
        if constexpr (kResident) {
            x_vec.words = x_kept[index - begin].words;
            if constexpr (kPair) y_vec.words = y_kept[index - begin].words;
        } else {
            x_vec = load(x, column(index));
            if constexpr (kPair) y_vec = load(y, column(index));
        }
        visit(column(index), x_vec, y_vec);
    }

    // The same of every vector, forwards, or backwards so that the row's end is still in cache.
    template <bool kReverse, class Visit>
    FASTKD_D void for_each(Visit&& visit) const {
        const int first = begin + thread_rank();
        const int steps = first < end ? (end - first - 1) / block_threads() + 1 : 0;
        for (int i = 0; i < steps; ++i) at(first + (kReverse ? steps - 1 - i : i) * block_threads(), visit);
    }

    FASTKD_D int index_of(int column) const { return (column + head) / Vec<T>::kColumns; }

    // Whether this thread walks over a vector.
    FASTKD_D bool walks(int index) const {
        return index >= begin && index < end && (index - begin) % block_threads() == thread_rank();
    }
};

}  // namespace fastkd
