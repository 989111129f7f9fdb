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

FASTKD_D bool in_first_warp() { return thread_rank() < kWarp; }

// A block's part of the reductions of its cluster. State is a struct of floats; by default it has seen nothing.
//
// Each warp leaves its state in ``warps``; the first warp merges these, stores the block's to every block of the
// cluster, itself included, and merges what came. Stores complete on the receiver's barrier, so nobody waits for a
// cluster. The turn of a reduction chooses between two sets of places: a block that is one ahead writes to the other
// set, and none can be two ahead, since the reduction between needs the state of all.
template <class State>
struct Exchange {
    static constexpr int kValues = static_cast<int>(sizeof(State) / sizeof(float));

    State warps[kMaxWarps];
    State blocks[2][kMaxCluster];
    Barrier barriers[2];

    // By one thread, before the barrier of the kernel's start.
    FASTKD_D void init() {
        for (Barrier& barrier : barriers) barrier_init(&barrier, 1);
    }

    // merge(state) merges the lanes of a warp, in every lane. The first warp returns the whole row's state; the other
    // warps, which return before, then wait for what it makes of it. Every thread of the cluster calls it.
    template <class Merge>
    FASTKD_D State reduce(State state, int turn, Merge&& merge) {
        const int lane = thread_rank() % kWarp, cluster = cluster_size();
        state = merge(state);
        if (lane == 0) warps[thread_rank() / kWarp] = state;
        block_barrier();
        if (!in_first_warp()) return state;
        state = merge(lane < block_threads() / kWarp ? warps[lane] : State());
        if (!kHasClusters || cluster == 1) return state;
        State* places = blocks[turn % 2];
        Barrier* barrier = &barriers[turn % 2];
        if (lane == 0) barrier_expect(barrier, cluster * static_cast<int>(sizeof(State)));
        if (lane < cluster) {
            float values[kValues];
            memcpy(values, &state, sizeof(State));
            float* place = reinterpret_cast<float*>(&places[cluster_rank()]);
            for (int i = 0; i < kValues; ++i) store_async(place + i, lane, values[i], barrier);
        }
        barrier_wait(barrier, turn / 2 % 2);
        return merge(lane < cluster ? places[lane] : State());
    }
};

}  // namespace fastkd
