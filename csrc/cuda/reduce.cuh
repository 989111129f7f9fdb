// Reductions over a cluster: lanes by shuffles, warps by their block's shared memory, blocks by stores into each other's.
#pragma once

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

// Where the warps of a block and the blocks of a cluster leave their states. A State is a struct of floats that, by
// default, has seen nothing; here it lies as its bytes, since shared memory has no constructors.
//
// Each warp leaves its state in ``warps``. The first warp merges these, stores the block's state to every block of the
// cluster, itself included, and merges what came. Stores complete on the receiver's barrier, so nobody waits for a
// cluster. The turn of a reduction chooses between two sets of places: a block that is one ahead writes to the other
// set, and none can be two ahead, since the reduction between needs the state of all.
struct Exchange {
    struct alignas(16) Place {
        float values[12];
    };

    Place warps[kMaxWarps];
    Place blocks[2][kMaxCluster];
    Barrier barriers[2];

    // By one thread, before the barrier of the kernel's start.
    FASTKD_D void init() {
        for (Barrier& barrier : barriers) barrier_init(&barrier, 1);
    }

    // ``state`` is that of the warp, and merge(state) merges one state a lane, in every lane. The first warp returns the
    // whole row's; the others return before, and wait for what it makes of it. Every thread of the cluster calls this,
    // with turn 0, 1, 2, ...
    template <class State, class Merge>
    FASTKD_D State reduce(State state, int turn, Merge&& merge) {
        static_assert(sizeof(State) <= sizeof(Place), "a state fits a place");
        const int lane = thread_rank() % kWarp, size = cluster_size();
        if (lane == 0) memcpy(&warps[thread_rank() / kWarp], &state, sizeof(State));
        block_barrier();
        if (!in_first_warp()) return state;
        state = merge(state_in<State>(warps, lane, block_threads() / kWarp));
        if (!kHasClusters || size == 1) return state;
        Place* places = blocks[turn % 2];
        Barrier* barrier = &barriers[turn % 2];
        if (lane == 0) barrier_expect(barrier, size * static_cast<int>(sizeof(State)));
        if (lane < size) {
            Place own;
            memcpy(&own, &state, sizeof(State));
            for (int i = 0; i < static_cast<int>(sizeof(State) / sizeof(float)); ++i)
                store_async(&places[cluster_rank()].values[i], lane, own.values[i], barrier);
        }
        barrier_wait(barrier, turn / 2 % 2);
        return merge(state_in<State>(places, lane, size));
    }

   private:
    template <class State>
    static FASTKD_D State state_in(const Place* places, int lane, int count) {
        State state;
        if (lane < count) memcpy(static_cast<void*>(&state), &places[lane], sizeof(State));
        return state;
    }
};

}  // namespace fastkd
