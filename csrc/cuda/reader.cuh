// The walk over one row of one or two tensors, by vectors.
#pragma once

#include "vec.cuh"

namespace fastkd {

// Vectors of T that a row of n columns may touch, wherever it begins.
template <class T>
FASTKD_HD constexpr int64_t max_vectors(int64_t n) {
    return n / (16 / static_cast<int64_t>(sizeof(T))) + 2;
}

// Bytes of shared memory that keep a share of vectors: whole warps of them, see place_of.
FASTKD_HD constexpr int64_t kept_bytes(int64_t share, int tensors) {
    return (share + kWarp - 1) / kWarp * kWarp * 16 * tensors;
}

// Rows x and, if kPair, y: kept in shared memory between the walks, or loaded again at each. A block has a contiguous
// share of the vectors, its threads, a power of two, take them in turn, and each thread sees only what it put into
// shared memory itself: a slot that it has read for the last time it may fill with the next row, without a barrier.
//
// A walk has a main loop over vectors that lie in the row, and in every other row too, and a part for the special ones:
// those at the ends, and one that the caller names.
template <class T, bool kPair, bool kResident>
struct RowReader {
    static constexpr int kColumns = Vec<T>::kColumns, kTensors = kPair ? 2 : 1;
    Source<T> x, y;
    int first;     // column of the block's first vector
    int count;     // vectors of the block
    int main_end;  // of the main loop
    int share;     // vectors that each block has room for
    bool direct;   // vectors are copied as they are
    Vec<T>* kept;

    FASTKD_D RowReader(const Source<T>& x, const Source<T>& y, int share, char* shared)
        : x(x), y(y), share(share), kept(reinterpret_cast<Vec<T>*>(shared)) {
        const int begin = share * RowBlocks<kResident>::rank();
        const auto within = [&](int vectors) {
            const int left = vectors - begin;
            return left < 0 ? 0 : left < share ? left : share;
        };
        first = begin * kColumns - x.head;
        count = within(static_cast<unsigned>(x.row.n + x.head + kColumns - 1) / kColumns);
        main_end = within(static_cast<unsigned>(x.row.n) / kColumns);
        direct = x.is_direct() && (!kPair || y.is_direct());
    }

    FASTKD_D int column(int slot) const { return first + slot * kColumns; }
    FASTKD_D int slot_of(int column) const { return (column - first) >> (kColumns == 8 ? 3 : 2); }
    FASTKD_D bool is_ragged_at_0() const { return first < 0; }

    // Whether this thread walks over a slot.
    static FASTKD_D bool owns(int slot) { return (slot & (block_threads() - 1)) == thread_rank(); }

    // Where x's vector of a slot lies; y's is kWarp further. So a thread steps by one stride for both.
    FASTKD_D Vec<T>* place_of(int slot) const { return kept + (slot + (slot & -kWarp) * (kTensors - 1)); }

    FASTKD_D Vec<T> x_at(int slot) const { return x_at(slot, place_of(slot)); }
    FASTKD_D Vec<T> y_at(int slot) const { return y_at(slot, place_of(slot)); }
    FASTKD_D Vec<T> x_at(int slot, const Vec<T>* place) const { return kResident ? kept_at(place) : x.load(column(slot)); }
    FASTKD_D Vec<T> y_at(int slot, const Vec<T>* place) const {
        return kResident ? kept_at(place + kWarp) : y.load(column(slot));
    }

    // Begins the copy of a vector that lies in the row, if ``wanted``; else nothing happens.
    FASTKD_D void copy(int slot, Vec<T>* place, bool wanted) const {
        copy_async(place, x.row.data + column(slot), wanted);
        if constexpr (kPair) copy_async(place + kWarp, y.row.data + column(slot), wanted);
    }

    // Fills any slot.
    FASTKD_D void fill(int slot) const {
        const int at = column(slot);
        Vec<T>* const place = place_of(slot);
        if (direct && at >= 0 && at <= x.row.n - kColumns) return copy(slot, place, true);
        place[0] = x.load(at);
        if constexpr (kPair) place[kWarp] = y.load(at);
    }

    // Begins to fill all slots.
    FASTKD_D void start() const {
        if constexpr (kResident) {
#pragma unroll 1
            for (int slot = thread_rank(); slot < count; slot += block_threads()) fill(slot);
        }
    }

    // main(slot, place) of the vectors of the main loop but those that are special: slot 0 on request, and ``apart``, if
    // it is one of this block's. If nothing is kept, backwards on request, so that the row's end is still in cache.
    template <bool kReverse, class Main>
    FASTKD_D void for_main(bool special_0, int apart, Main&& main) const {
        const int step = block_threads();
        int slot = thread_rank() + (special_0 && thread_rank() == 0 ? step : 0);
        int stop = owns(apart) && apart >= slot && apart < main_end ? apart : main_end;
        if constexpr (kReverse && !kResident) {
            const int last = slot < main_end ? slot + (main_end - 1 - slot) / step * step : -1;
            for (int at = last; at >= slot; at -= step) {
                if (at != stop) main(at, kept);
            }
        } else {
#pragma unroll 1
            for (Vec<T>* place = place_of(slot);;) {
                const Vec<T>* const end = place_of(stop);
#pragma unroll 1
                for (; place < end; place += step * kTensors, slot += step) main(slot, place);
                if (stop == main_end) break;
                slot += step, place += step * kTensors;
                stop = main_end;
            }
        }
    }

    // visit(slot) of the others, and of slots beyond the row that may belong to the next; or, if ``all``, of every vector.
    template <class Visit>
    FASTKD_D void for_special(bool all, bool special_0, int apart, Visit&& visit) const {
        const bool has_apart = static_cast<unsigned>(apart) < static_cast<unsigned>(main_end);
        const bool has_0 = special_0 && main_end > 0;
        if (!all && !has_0 && !has_apart && main_end == share) return;
        int own = thread_rank();
#pragma unroll 1
        for (int i = 0;; ++i, own += block_threads()) {
            const int special = i == 0 ? (has_0 ? 0 : -1) : i == 1 ? (has_apart ? apart : -1) : main_end + i - 2;
            const int slot = all ? own : special;
            if (all ? slot >= count : i == 4) break;
            if (all || (slot >= 0 && slot < share && owns(slot) && !(i == 1 && has_0 && slot == 0))) visit(slot);
        }
    }

    // visit(slot) of every vector.
    template <bool kReverse, class Visit>
    FASTKD_D void for_each(Visit&& visit) const {
        const int step = block_threads();
        const int turns = thread_rank() < count ? (count - 1 - thread_rank()) / step + 1 : 0;
#pragma unroll 1
        for (int i = 0; i < turns; ++i) visit(thread_rank() + (kReverse && !kResident ? turns - 1 - i : i) * step);
    }

    // visit(place) of every vector that is kept.
    template <class Visit>
    FASTKD_D void for_kept(Visit&& visit) const {
        const Vec<T>* const end = place_of(count);
#pragma unroll 2
        for (const Vec<T>* place = place_of(thread_rank()); place < end; place += block_threads() * kTensors) visit(place);
    }

    static FASTKD_D Vec<T> kept_at(const Vec<T>* place) {
        Vec<T> vec;
        vec.words = place->words;
        return vec;
    }
};

}  // namespace fastkd
