// 16 bytes of a row at a time, c = 4 or 8 columns: vector loads and stores wherever the row allows them.
//
// A row that does not start on a 16-byte boundary (V = 50257) is walked from the boundary before it: vector v holds
// the columns c·v − head … c·v − head + c − 1. The vectors that stick out of the row, at most one at each end, are read
// and written column by column; outside the row they read −inf.
#pragma once

#include <type_traits>

#include "grid.cuh"

namespace fastkd {

struct __attribute__((may_alias, aligned(16))) Words {
    uint32_t word[4];
};

template <class T>
struct Vec {
    static constexpr int kColumns = 16 / static_cast<int>(sizeof(T));
    union {
        Words words;
        T columns[kColumns];
    };
    FASTKD_D Vec() {}
    FASTKD_D float operator[](int j) const {
        if constexpr (std::is_same_v<T, bfloat16>) {  // one operation a column, of which the compiler makes two
            const uint32_t pair = words.word[j / 2];
            return bit_cast<float>(j % 2 == 0 ? pair << 16 : pair & 0xffff0000u);
        } else {
            return to_float(columns[j]);
        }
    }
};

template <class T>
FASTKD_D int head_of(const T* row) {
    return static_cast<int>(reinterpret_cast<uintptr_t>(row) % 16 / sizeof(T));
}

// Columns 0 … n − 1 of a row, walked by vectors of which the first begins ``head`` columns before it.
template <class T>
struct Row {
    T* data;
    int n;
    int last_whole;  // the last column at which a vector lies in the row; −1 if the walk is off 16-byte boundaries

    FASTKD_D Row(T* data, int n, int head) : data(data), n(n) {
        const bool aligned = (reinterpret_cast<uintptr_t>(data) - head * sizeof(T)) % 16 == 0;
        last_whole = aligned ? n - static_cast<int>(16 / sizeof(T)) : -1;
    }
    FASTKD_D bool is_whole(int first) const { return first >= 0 && first <= last_whole; }
    FASTKD_D bool holds(int column) const { return column >= 0 && column < n; }
};

// Columns first … first + kColumns − 1; −inf outside the row.
template <class Element>
FASTKD_D auto load(const Row<Element>& row, int first) {
    using T = std::remove_const_t<Element>;
    Vec<T> vec;
    if (row.is_whole(first)) {
        vec.words = *reinterpret_cast<const Words*>(row.data + first);
        return vec;
    }
#pragma unroll
    for (int j = 0; j < Vec<T>::kColumns; ++j) {
        const bool inside = row.holds(first + j);
        from_float(inside ? to_float(row.data[inside ? first + j : 0]) : -kInfinity, vec.columns[j]);
    }
    return vec;
}

// The same for columns first … first + kCount − 1, which need not be a vector of this type.
template <class T, int kCount>
FASTKD_D void load_floats(const Row<const T>& row, int first, float (&values)[kCount]) {
    constexpr int kColumns = Vec<T>::kColumns;
    if constexpr (kCount % kColumns == 0) {
#pragma unroll
        for (int start = 0; start < kCount; start += kColumns) {
            const Vec<T> vec = load(row, first + start);
#pragma unroll
            for (int j = 0; j < kColumns; ++j) values[start + j] = vec[j];
        }
    } else {
#pragma unroll
        for (int j = 0; j < kCount; ++j) {
            const bool inside = row.holds(first + j);
            values[j] = inside ? to_float(row.data[inside ? first + j : 0]) : -kInfinity;
        }
    }
}

// Writes columns first … first + kCount − 1, those outside the row left out.
template <class T, int kCount>
FASTKD_D void store(const Row<T>& row, int first, const float (&values)[kCount]) {
    constexpr int kColumns = Vec<T>::kColumns;
#pragma unroll
    for (int start = 0; start < kCount; start += kColumns) {
        if (start + kColumns <= kCount && row.is_whole(first + start)) {
            Vec<T> vec;
#pragma unroll
            for (int j = 0; j < kColumns && start + j < kCount; ++j) from_float(values[start + j], vec.columns[j]);
            *reinterpret_cast<Words*>(row.data + first + start) = vec.words;
        } else {
#pragma unroll
            for (int j = start; j < start + kColumns && j < kCount; ++j) {
                if (row.holds(first + j)) from_float(values[j], row.data[first + j]);
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
