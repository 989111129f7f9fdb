// Reductions over a cluster: lanes by shuffles, then warps and blocks by slots and one barrier.
#pragma once

#include "grid.cuh"

namespace fastkd {

constexpr int kMaxSlots = kMaxThreads / kWarp * kMaxCluster;  // warps of a cluster

FASTKD_D float warp_max(float x) {
    for (int mask = kWarp / 2; mask > 0; mask /= 2) x = max(shuffle_xor(x, mask), x);
    return x;
}

FASTKD_D float warp_sum(float x) {
    for (int mask = kWarp / 2; mask > 0; mask /= 2) x += shuffle_xor(x, mask);
    return x;
}

// Each warp's ``kValues`` numbers, in every block of the cluster: slot = warp + warps·rank.
template <int kValues>
struct Slots {
    float values[kValues][kMaxSlots];

    // The warp's lanes write to different blocks. Lane 0 of a lone block is enough.
    FASTKD_D void publish(const float (&value)[kValues]) {
        const int lane = thread_rank() % kWarp, warp = thread_rank() / kWarp;
        const int slot = cluster_rank() * (block_threads() / kWarp) + warp;
        if (lane < cluster_size()) {
            for (int i = 0; i < kValues; ++i) store_remote(&values[i][slot], lane, value[i]);
        }
    }

    static FASTKD_D int count() { return cluster_size() * (block_threads() / kWarp); }

    // Over the slots, in the same order in every warp.
    FASTKD_D float max(int i) const {
        float peak = -kInfinity;
        for (int slot = thread_rank() % kWarp; slot < count(); slot += kWarp) peak = fastkd::max(values[i][slot], peak);
        return warp_max(peak);
    }

    template <class Value>
    FASTKD_D float sum_of(Value&& value) const {
        float total = 0.0f;
        for (int slot = thread_rank() % kWarp; slot < count(); slot += kWarp) total += value(slot);
        return warp_sum(total);
    }

    FASTKD_D float sum(int i) const {
        return sum_of([&](int slot) { return values[i][slot]; });
    }
};

}  // namespace fastkd
