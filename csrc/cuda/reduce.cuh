// Reductions over a row: lanes by shuffles, warps by their block's shared memory, blocks by stores into each other's, or
// by global memory.
#pragma once

#include <type_traits>

#include "grid.cuh"

namespace fastkd {

constexpr int kMaxWarps = kMaxThreads / kWarp;

FASTKD_D float warp_max(float x) {
    for (int mask = kWarp / 2; mask > 0; mask /= 2) x = max(shuffle_xor(x, mask), x);
    return x;
}

FASTKD_D float warp_sum(float x) {
    for (int mask = kWarp / 2; mask > 0; mask /= 2) x += shuffle_xor(x, mask);
    return x;
}

// Four sums at once, in half the operations: lanes hand over what they do not go on with.
FASTKD_D void warp_sums(float (&x)[4]) {
    const bool upper = (thread_rank() & 16) != 0, odd = (thread_rank() & 8) != 0;
    const float a = (upper ? x[2] : x[0]) + shuffle_xor(upper ? x[0] : x[2], 16);
    const float b = (upper ? x[3] : x[1]) + shuffle_xor(upper ? x[1] : x[3], 16);
    float sum = (odd ? b : a) + shuffle_xor(odd ? a : b, 8);
    for (int mask = 4; mask > 0; mask /= 2) sum += shuffle_xor(sum, mask);
    for (int i = 0; i < 4; ++i) x[i] = shuffle(sum, 8 * i);
}

FASTKD_D bool in_first_warp() { return thread_rank() < kWarp; }

// Where a warp or a block leaves its state. A State is a struct of floats that, by default, has seen nothing; here it
// lies as its bytes, since shared memory has no constructors.
struct alignas(16) StatePlace {
    float values[12];
};

template <class State>
FASTKD_D State state_in(const StatePlace* places, int lane, int count) {
    State state;
    if (lane < count) memcpy(static_cast<void*>(&state), &places[lane], sizeof(State));
    return state;
}

// Where the blocks of a row meet that are no cluster, in global memory.
struct Meeting {
    StatePlace places[2][kMaxParts];
    uint32_t arrived;  // 0 at first
};

// How the rows of a call are shared out over blocks.
struct Split {
    int share;          // vectors of a block
    Meeting* meetings;  // one a row; null where blocks need none
};

// The blocks that share a row come in two kinds. exchange(state, turn), called by each one's first warp with the state of
// the block, gives lane i that of block i. The turn chooses between two sets of places: a block that is one ahead writes
// to the other set, and none can be two ahead, since the exchange between needs the state of all.

// Those of a kept row: a cluster. Stores complete on the receiver's barrier, so nobody waits for a cluster.
struct ClusterBlocks {
    StatePlace places[2][kMaxCluster];
    Barrier barriers[2];

    static FASTKD_D int rank() { return cluster_rank(); }
    static FASTKD_D int count() { return cluster_size(); }

    // By one thread, before the barrier of the kernel's start.
    FASTKD_D void init(const Split&, int) {
        for (Barrier& barrier : barriers) barrier_init(&barrier, 1);
    }

    template <class State>
    FASTKD_D State exchange(const State& state, int turn) {
        const int lane = thread_rank() % kWarp, size = cluster_size();
        StatePlace* to = places[turn % 2];
        Barrier* barrier = &barriers[turn % 2];
        if (lane == 0) barrier_expect(barrier, size * static_cast<int>(sizeof(State)));
        if (lane < size) {
            StatePlace own;
            memcpy(&own, &state, sizeof(State));
            for (int i = 0; i < static_cast<int>(sizeof(State) / sizeof(float)); ++i)
                store_async(&to[cluster_rank()].values[i], lane, own.values[i], barrier);
        }
        barrier_wait(barrier, turn / 2 % 2);
        return state_in<State>(to, lane, size);
    }
};

// Those of a row that is streamed: its parts, which all run at once, wherever they are.
struct PartBlocks {
    Meeting* meeting;

    static FASTKD_D int rank() { return part_rank(); }
    static FASTKD_D int count() { return part_count(); }

    // By one thread; a block's first barrier shows it to the others.
    FASTKD_D void init(const Split& split, int row) { meeting = split.meetings + row; }

    template <class State>
    FASTKD_D State exchange(const State& state, int turn) {
        const int lane = thread_rank() % kWarp;
        StatePlace* const places = meeting->places[turn % 2];
        if (lane == 0) {
            memcpy(&places[rank()], &state, sizeof(State));
            global_arrive(&meeting->arrived);
        }
        global_wait(&meeting->arrived, (turn + 1) * count());
        return state_in<State>(places, lane, count());
    }
};

template <bool kResident>
using RowBlocks = std::conditional_t<kResident, ClusterBlocks, PartBlocks>;

// Each warp leaves its state in ``warps``. The first warp merges these, and then what the blocks of the row exchange.
template <bool kResident>
struct Exchange {
    StatePlace warps[kMaxWarps];
    RowBlocks<kResident> blocks;

    // ``state`` is that of the warp, and merge(state) merges one state a lane, in every lane. The first warp returns
    // the whole row's; the others return before, and wait for what it makes of it. Every thread of the row calls this,
    // with turn 0, 1, 2, ...
    template <class State, class Merge>
    FASTKD_D State reduce(State state, int turn, Merge&& merge) {
        static_assert(sizeof(State) <= sizeof(StatePlace), "a state fits a place");
        const int lane = thread_rank() % kWarp;
        if (lane == 0) memcpy(&warps[thread_rank() / kWarp], &state, sizeof(State));
        block_barrier();
        if (!in_first_warp()) return state;
        state = merge(state_in<State>(warps, lane, block_threads() / kWarp));
        if (blocks.count() == 1) return state;
        return merge(blocks.exchange(state, turn));
    }
};

}  // namespace fastkd
