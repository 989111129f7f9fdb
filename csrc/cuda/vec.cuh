// Rows by vectors: 16 bytes at a time, or as many columns of a narrower type, wherever the row allows it.
//
// A row is walked in steps of as many columns. The first step begins ``head`` columns before the row, so that the steps
// of one tensor, the one that is written, lie on boundaries of its vectors (V = 50257). A tensor that is off by another
// number of columns is read by two neighbouring vectors, which are shifted. The steps that stick out of the row, at most
// a few at each end, are read and written column by column; outside the row they read −inf.
#pragma once

#include <initializer_list>
#include <type_traits>

#include "../params.h"
#include "reduce.cuh"

namespace fastkd {

// The bytes that are moved at once.
template <int kWords>
struct __attribute__((may_alias, aligned(4 * kWords))) Words {
    uint32_t word[kWords];
};

// What lies in one step of a row of T: 16 bytes.
template <class T>
struct Vec {
    static constexpr int kColumns = 16 / static_cast<int>(sizeof(T));
    union {
        Words<4> words;
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

// visit(i, column of a, column of b) of every column, a word at a time in a loop that is not unrolled: for what is needed
// seldom, and would be long. Words go round, since registers have no index.
template <class T, class Visit>
FASTKD_D void for_columns(Vec<T> a, Vec<T> b, Visit&& visit) {
    constexpr int kOfWord = Vec<T>::kColumns / 4;
#pragma unroll 1
    for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (int j = 0; j < kOfWord; ++j) visit(i * kOfWord + j, a[j], b[j]);
        for (Vec<T>* vec : {&a, &b}) {
            auto& w = vec->words.word;
            const uint32_t first = w[0];
            w[0] = w[1], w[1] = w[2], w[2] = w[3], w[3] = first;
        }
    }
}

// The larger columns of two words, each of one or two columns; of a NaN and a number, the number.
template <class T>
FASTKD_D uint32_t max_columns(uint32_t a, uint32_t b) {
    if constexpr (sizeof(T) == 4) {
        return bit_cast<uint32_t>(max(bit_cast<float>(a), bit_cast<float>(b)));
    } else {
#ifdef __CUDA_ARCH__
    uint32_t c;
    if constexpr (std::is_same_v<T, bfloat16>) {
        asm("max.bf16x2 %0, %1, %2;" : "=r"(c) : "r"(a), "r"(b));
    } else {
        asm("max.f16x2 %0, %1, %2;" : "=r"(c) : "r"(a), "r"(b));
    }
    return c;
#else
    const auto larger = [](uint32_t x, uint32_t y) {
        const float of_x = to_float(bit_cast<T>(static_cast<uint16_t>(x)));
        const float of_y = to_float(bit_cast<T>(static_cast<uint16_t>(y)));
        return (of_x > of_y || of_y != of_y ? x : y) & 0xffffu;
    };
    return larger(a, b) | larger(a >> 16, b >> 16) << 16;
#endif
    }
}

// The running maximum of a thread's vectors, as words.
template <class T>
struct Peak {
    uint32_t word = sizeof(T) == 4 ? 0xff800000u : std::is_same_v<T, bfloat16> ? 0xff80ff80u : 0xfc00fc00u;  // −inf

    FASTKD_D void include(const Vec<T>& vec) {
        const auto& w = vec.words.word;
        word = max_columns<T>(word, max_columns<T>(max_columns<T>(w[0], w[1]), max_columns<T>(w[2], w[3])));
    }
    FASTKD_D float value() const {
        Vec<T> vec;
        vec.words.word[0] = word;
        if constexpr (sizeof(T) == 4) return vec[0];
        return max(vec[0], vec[1]);
    }
};

struct Peaks {
    float x, y;
};

// The maxima of a warp; two of two bytes are one word.
template <class T>
FASTKD_D Peaks warp_peaks(const Peak<T>& x, const Peak<T>& y) {
    if constexpr (sizeof(T) == 4) return {warp_max(x.value()), warp_max(y.value())};
    uint32_t both = max_columns<T>((x.word & 0xffffu) | y.word << 16, x.word >> 16 | (y.word & 0xffff0000u));
    for (int mask = kWarp / 2; mask > 0; mask /= 2) both = max_columns<T>(both, shuffle_xor(both, mask));
    Vec<T> vec;
    vec.words.word[0] = both;
    return {vec[0], vec[1]};
}

// Columns before a row up to the boundary of a step of kStep columns.
template <int kStep, class T>
FASTKD_D int head_of(const T* row) {
    return static_cast<unsigned>(reinterpret_cast<uintptr_t>(row)) / sizeof(T) % kStep;
}

// Columns 0 … n − 1 of a row, walked in steps of kStep columns that begin ``head`` columns before it.
template <class T, int kStep>
struct Row {
    static constexpr int kSize = static_cast<int>(sizeof(T));
    static constexpr int kColumns = kStep * kSize < 16 ? kStep : 16 / kSize;  // of a vector; a step may have several
    T* data;
    int n;
    int shift;  // by how many columns the steps are off the vectors' boundaries

    FASTKD_D Row(T* data, int n, int head)
        : data(data), n(n), shift((head_of<kColumns>(data) - head) & (kColumns - 1)) {}

    // Whether the vectors that hold columns first … first + kColumns − 1 lie in the row.
    FASTKD_D bool is_whole(int first) const {
        return first >= shift && first <= n - (shift == 0 ? kColumns : 2 * kColumns - shift);
    }
    FASTKD_D bool holds(int column) const { return column >= 0 && column < n; }
    FASTKD_D float operator[](int column) const { return to_float(data[column]); }
};

// Columns first … first + kColumns − 1 from the two vectors that hold them, given that they lie in the row.
template <class T, int kStep>
FASTKD_D auto load_shifted(const Row<T, kStep>& row, int first) {
    constexpr int kWords = Row<T, kStep>::kColumns * Row<T, kStep>::kSize / 4;
    const auto* vectors = reinterpret_cast<const Words<kWords>*>(row.data + (first - row.shift));
    const Words<kWords> low = vectors[0], high = vectors[1];
    uint32_t word[2 * kWords];
    for (int i = 0; i < kWords; ++i) word[i] = low.word[i], word[kWords + i] = high.word[i];
    const int bytes = row.shift * Row<T, kStep>::kSize;
#pragma unroll
    for (int by = kWords / 2; by > 0; by /= 2) {
        if (bytes & 4 * by) {
#pragma unroll
            for (int i = 0; i + by < 2 * kWords; ++i) word[i] = word[i + by];
        }
    }
    Words<kWords> result;
#pragma unroll
    for (int i = 0; i < kWords; ++i)
        result.word[i] = bytes & 2 ? word[i] >> 16 | word[i + 1] << 16 : word[i];
    return result;
}

// The columns of a step; ``outside``, which is −inf, outside the row.
template <class Element, int kStep>
FASTKD_D void load(const Row<const Element, kStep>& row, int first, Element outside, Element (&columns)[kStep]) {
    using R = Row<const Element, kStep>;
    constexpr int kWords = R::kColumns * R::kSize / 4;
#pragma unroll
    for (int start = 0; start < kStep; start += R::kColumns) {
        const int at = first + start;
        if (row.is_whole(at)) {
            const Words<kWords> words = row.shift == 0 ? *reinterpret_cast<const Words<kWords>*>(row.data + at)
                                                       : load_shifted(row, at);
            memcpy(&columns[start], &words, sizeof(words));
        } else {
#pragma unroll
            for (int j = 0; j < R::kColumns; ++j) columns[start + j] = row.holds(at + j) ? row.data[at + j] : outside;
        }
    }
}

template <class Element>
FASTKD_D Element minus_infinity() {
    Element value;
    from_float(-kInfinity, value);
    return value;
}

template <class Element, int kStep>
FASTKD_D void load_floats(const Row<const Element, kStep>& row, int first, float (&values)[kStep]) {
    Element columns[kStep];
    load(row, first, minus_infinity<Element>(), columns);
#pragma unroll
    for (int j = 0; j < kStep; ++j) values[j] = to_float(columns[j]);
}

// Two columns of two bytes as a word.
template <class T>
FASTKD_D uint32_t pack(float low, float high) {
#ifdef __CUDA_ARCH__
    uint32_t pair;
    if constexpr (std::is_same_v<T, bfloat16>) {
        asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    } else {
        asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    }
    return pair;
#else
    T columns[2];
    from_float(low, columns[0]);
    from_float(high, columns[1]);
    return columns[0].bits | static_cast<uint32_t>(columns[1].bits) << 16;
#endif
}

// A step's columns, from floats.
template <class T, int kStep, class Pack>
FASTKD_D void round_pairs(const float (&values)[kStep], T (&columns)[kStep], Pack&& pack) {
#pragma unroll
    for (int j = 0; j < kStep; j += 2) {
        const uint32_t pair = pack(values[j], values[j + 1]);
        memcpy(&columns[j], &pair, sizeof(pair));
    }
}

template <class T, int kStep>
FASTKD_D void round_columns(const float (&values)[kStep], T (&columns)[kStep]) {
    if constexpr (sizeof(T) == 4) {
        memcpy(columns, values, sizeof(columns));
    } else {
        round_pairs(values, columns, [](float low, float high) { return pack<T>(low, high); });
    }
}

// Writes the columns of a step to where its vectors' boundaries are.
template <class T, int kStep>
FASTKD_D void store_whole(T* to, const T (&columns)[kStep]) {
    using R = Row<T, kStep>;
    constexpr int kWords = R::kColumns * R::kSize / 4;
#pragma unroll
    for (int start = 0; start < kStep; start += R::kColumns) {
        Words<kWords> words;
        memcpy(&words, &columns[start], sizeof(words));
        *reinterpret_cast<Words<kWords>*>(to + start) = words;
    }
}

// The same of any step; columns outside the row are left out.
template <class T, int kStep>
FASTKD_D void store_columns(const Row<T, kStep>& row, int first, const T (&columns)[kStep]) {
    if (row.shift == 0 && first >= 0 && first <= row.n - kStep) return store_whole(row.data + first, columns);
#pragma unroll
    for (int j = 0; j < kStep; ++j) {
        if (row.holds(first + j)) row.data[first + j] = columns[j];
    }
}

template <class T, int kStep>
FASTKD_D void store(const Row<T, kStep>& row, int first, const float (&values)[kStep]) {
    T columns[kStep];
    round_columns(values, columns);
    store_columns(row, first, columns);
}

template <class T>
FASTKD_HD constexpr DType type_of() {
    return std::is_same_v<T, float> ? DType::kFloat32 : std::is_same_v<T, bfloat16> ? DType::kBFloat16 : DType::kFloat16;
}

// bfloat16 or float16, which of them is known at run time: one copy of the code that moves them serves both.
struct Narrow {
    using Bits = uint16_t;
    bool is_bfloat16;

    FASTKD_D explicit Narrow(DType dtype) : is_bfloat16(dtype == DType::kBFloat16) {}
    FASTKD_D Bits outside() const { return is_bfloat16 ? 0xff80 : 0xfc00; }  // −inf
    FASTKD_D float widen(Bits bits) const {
        return is_bfloat16 ? to_float(bit_cast<bfloat16>(bits)) : to_float(bit_cast<float16>(bits));
    }
    FASTKD_D uint32_t pack(float low, float high) const {
        return is_bfloat16 ? fastkd::pack<bfloat16>(low, high) : fastkd::pack<float16>(low, high);
    }
};

// Whether a row in a kernel of T is of a narrower type.
template <class T>
FASTKD_HD bool is_narrower(DType dtype) {
    return std::is_same_v<T, float> && dtype != DType::kFloat32;
}

// The columns of a row as vectors of T. In kernels of T = float, the row may be of any type.
template <class T>
struct Source {
    static constexpr int kColumns = Vec<T>::kColumns;
    Row<const T, kColumns> row;
    DType dtype;
    int head;

    FASTKD_D Source(const char* data, DType dtype, int n, int head)
        : row(reinterpret_cast<const T*>(data), n, head), dtype(dtype), head(head) {}

    // Whether its vectors can be copied as they are.
    FASTKD_D bool is_direct() const { return row.shift == 0 && !is_narrower<T>(dtype); }

    FASTKD_D Vec<T> load(int first) const {
        Vec<T> vec;
        if (is_narrower<T>(dtype)) {
            const Narrow type(dtype);
            Narrow::Bits columns[kColumns];
            fastkd::load(narrow(), first, type.outside(), columns);
            float values[kColumns];
#pragma unroll
            for (int j = 0; j < kColumns; ++j) values[j] = type.widen(columns[j]);
            memcpy(&vec, values, sizeof(vec));
        } else {
            T columns[kColumns];
            fastkd::load(row, first, minus_infinity<T>(), columns);
            memcpy(&vec, columns, sizeof(vec));
        }
        return vec;
    }

    FASTKD_D float operator[](int column) const {
        return is_narrower<T>(dtype) ? Narrow(dtype).widen(narrow().data[column]) : row[column];
    }

private:
    FASTKD_D Row<const Narrow::Bits, kColumns> narrow() const {
        return {reinterpret_cast<const Narrow::Bits*>(row.data), row.n, head};
    }
};

// A row to be written, the steps being on its vectors' boundaries. In kernels of T = float it may be of any type.
template <class T>
struct Sink {
    static constexpr int kColumns = Vec<T>::kColumns;
    char* data;
    DType dtype;
    int n;

    // A step that lies in the row.
    FASTKD_D void store_whole(int first, const float (&values)[kColumns]) const {
        as_its_type(values, [&](auto* row, const auto& columns) { fastkd::store_whole(row + first, columns); });
    }

    // Any step.
    FASTKD_D void store(int first, const float (&values)[kColumns]) const {
        as_its_type(values, [&](auto* row, const auto& columns) {
            const Row<std::remove_reference_t<decltype(*row)>, kColumns> to(row, n, head_of<kColumns>(row));
            store_columns(to, first, columns);
        });
    }

    FASTKD_D void store_column(int column, float value) const {
        as_its_type({value}, [&](auto* row, const auto& columns) { row[column] = columns[0]; });
    }

private:
    template <class Visit>
    FASTKD_D void as_its_type(const float (&values)[kColumns], Visit&& visit) const {
        if (is_narrower<T>(dtype)) {
            const Narrow type(dtype);
            Narrow::Bits columns[kColumns];
            round_pairs(values, columns, [&](float low, float high) { return type.pack(low, high); });
            visit(reinterpret_cast<Narrow::Bits*>(data), columns);
        } else {
            T columns[kColumns];
            round_columns(values, columns);
            visit(reinterpret_cast<T*>(data), columns);
        }
    }
};

// Columns before a row of a matrix up to the boundary of a step.
template <class T>
FASTKD_D int head_of(const char* row, DType dtype) {
    return is_narrower<T>(dtype) ? head_of<Vec<T>::kColumns>(reinterpret_cast<const uint16_t*>(row))
                                 : head_of<Vec<T>::kColumns>(reinterpret_cast<const T*>(row));
}

struct __attribute__((may_alias)) HalfWord {
    uint16_t bits;
};

// Zeros in bytes [begin, end) of a row, which hold whole columns; the row's threads side by side.
FASTKD_D void store_zeros(char* begin, char* end, int rank, int size) {
    const auto up = [](char* p) { return p + (16 - reinterpret_cast<uintptr_t>(p) % 16) % 16; };
    char* const first = up(begin) < end ? up(begin) : end;
    char* const last = end - reinterpret_cast<uintptr_t>(end) % 16;
    for (char* at = first + 16 * static_cast<int64_t>(rank); at < last; at += 16 * static_cast<int64_t>(size))
        *reinterpret_cast<Words<4>*>(at) = Words<4>{};
    // The ends, by pairs of bytes.
    for (char* at = begin + 2 * rank; at < first; at += 2 * size) *reinterpret_cast<HalfWord*>(at) = {};
    for (char* at = (last > first ? last : first) + 2 * rank; at < end; at += 2 * size)
        *reinterpret_cast<HalfWord*>(at) = {};
}

}  // namespace fastkd
