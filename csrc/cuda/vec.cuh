// 16 bytes of a row at a time, c = 4 or 8 columns: vector loads and stores wherever the row allows them.
//
// A row that does not start on a 16-byte boundary (V = 50257) is walked from the boundary before it: vector v holds
// the columns c·v − head … c·v − head + c − 1. The vectors that stick out of the row, at most one at each end, are read
// and written column by column; outside the row they read −inf.
#pragma once

#include "grid.cuh"

namespace fastkd {

struct alignas(16) Words {
    uint32_t x, y, z, w;
};

template <class T>
struct Vec {
    static constexpr int kColumns = 16 / static_cast<int>(sizeof(T));
    union {
        Words words;
        T columns[kColumns];
    };
    FASTKD_D Vec() {}
    FASTKD_D float operator[](int j) const { return to_float(columns[j]); }
};

template <class T>
FASTKD_D int head_of(const T* row) {
    return static_cast<int>(reinterpret_cast<uintptr_t>(row) % 16 / sizeof(T));
}

// Whether a vector at column ``first`` lies in the row and on a 16-byte boundary.
template <class T>
FASTKD_D bool is_whole(const T* row, int first, int n) {
    return first >= 0 && first + Vec<T>::kColumns <= n && reinterpret_cast<uintptr_t>(row + first) % 16 == 0;
}

template <class T>
FASTKD_D Vec<T> load(const T* row, int first, int n) {
    Vec<T> vec;
    if (is_whole(row, first, n)) {
        vec.words = *reinterpret_cast<const Words*>(row + first);
        return vec;
    }
#pragma unroll
    for (int j = 0; j < Vec<T>::kColumns; ++j) {
        const bool inside = first + j >= 0 && first + j < n;
        from_float(inside ? to_float(row[inside ? first + j : 0]) : -kInfinity, vec.columns[j]);
    }
    return vec;
}

// Reads columns first … first + kCount − 1, which need not be a vector of this type; −inf outside the row.
template <class T, int kCount>
FASTKD_D void load_floats(const T* row, int first, int n, float (&values)[kCount]) {
    constexpr int kColumns = Vec<T>::kColumns;
    if constexpr (kCount % kColumns == 0) {
#pragma unroll
        for (int start = 0; start < kCount; start += kColumns) {
            const Vec<T> vec = load(row, first + start, n);
#pragma unroll
            for (int j = 0; j < kColumns; ++j) values[start + j] = vec[j];
        }
    } else {
#pragma unroll
        for (int j = 0; j < kCount; ++j) {
            const bool inside = first + j >= 0 && first + j < n;
            values[j] = inside ? to_float(row[inside ? first + j : 0]) : -kInfinity;
        }
    }
}

// Writes columns first … first + kCount − 1, those outside the row left out.
template <class T, int kCount>
FASTKD_D void store(T* row, int first, int n, const float (&values)[kCount]) {
    constexpr int kColumns = Vec<T>::kColumns;
#pragma unroll
    for (int start = 0; start < kCount; start += kColumns) {
        if (start + kColumns <= kCount && is_whole(row, first + start, n)) {
            Vec<T> vec;
#pragma unroll
            for (int j = 0; j < kColumns && start + j < kCount; ++j) from_float(values[start + j], vec.columns[j]);
            *reinterpret_cast<Words*>(row + first + start) = vec.words;
        } else {
#pragma unroll
            for (int j = start; j < start + kColumns && j < kCount; ++j) {
                if (first + j >= 0 && first + j < n) from_float(values[j], row[first + j]);
            }
        }
    }
}

// Zeros in columns [first, end), the block's threads side by side.
template <class T>
FASTKD_D void store_zeros(T* row, int64_t first, int64_t end, int rank, int size) {
    for (int64_t column = first + rank; column < end; column += size) from_float(0.0f, row[column]);
}

}  // namespace fastkd
