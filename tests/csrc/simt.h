// A CPU in the place of a GPU: each CUDA thread is a thread of the operating system, a cluster's blocks run at once,
// and what csrc/cuda/grid.cuh names is defined here. It runs the very kernels that the GPU build launches, slowly.
#pragma once

#include <atomic>
#include <barrier>
#include <cstdlib>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <thread>
#include <vector>

#define FASTKD_D inline
#define FASTKD_KERNEL inline
#define FASTKD_BOUNDS(blocks)
#define FASTKD_SHARED(type, name) type& name = *reinterpret_cast<type*>(fastkd::simt::shared(__LINE__, sizeof(type)))

namespace fastkd::simt {

constexpr int kWarpSize = 32;
constexpr size_t kStaticBytes = 1 << 16;

struct Warp {
    float values[kWarpSize];
    std::barrier<> barrier{kWarpSize};
};

struct Block {
    std::unique_ptr<char[], decltype(&std::free)> memory;  // static shared memory, then dynamic
    std::vector<Warp> warps;
    std::barrier<> barrier;
    Block(int threads, size_t dynamic)
        : memory(static_cast<char*>(std::aligned_alloc(64, kStaticBytes + (dynamic + 63) / 64 * 64)), &std::free),
          warps(threads / kWarpSize),
          barrier(threads) {}
};

struct Cluster {
    std::vector<std::unique_ptr<Block>> blocks;
    std::barrier<> barrier;
    std::mutex mutex;  // of its transaction barriers
    Cluster(int size, int threads, size_t dynamic) : barrier(size * threads) {
        for (int i = 0; i < size; ++i) blocks.push_back(std::make_unique<Block>(threads, dynamic));
    }
};

// What the hardware keeps for a thread.
struct Thread {
    Cluster* cluster;
    int rank, block, threads;
    int grid_block, grid_blocks;
    std::optional<std::barrier<>::arrival_token> arrived;
    std::vector<std::pair<void*, const void*>> copies;  // under way
};
inline thread_local Thread self;

inline char* memory(int block) { return self.cluster->blocks[block]->memory.get(); }

// A static shared variable, by the line that declares it: the same offset in every block.
inline char* shared(int line, size_t bytes) {
    static std::mutex mutex;
    static std::map<int, size_t> offsets;
    static size_t used = 0;
    const std::lock_guard lock(mutex);
    const auto [entry, fresh] = offsets.try_emplace(line, used);
    if (fresh) used += (bytes + 63) / 64 * 64;
    if (used > kStaticBytes) std::abort();
    return memory(self.block) + entry->second;
}

// Runs kernel(arguments...) on ``clusters`` clusters, one after the other. ``threads`` is a multiple of 32.
template <class Kernel, class... Arguments>
void launch(Kernel kernel, int clusters, int size, int threads, size_t dynamic, const Arguments&... arguments) {
    for (int index = 0; index < clusters; ++index) {
        Cluster cluster(size, threads, dynamic);
        std::vector<std::thread> all;
        for (int i = 0; i < size * threads; ++i) {
            all.emplace_back([&, i] {
                self = {&cluster, i % threads, i / threads, threads, index * size + i / threads, clusters * size,
                        std::nullopt, {}};
                kernel(arguments...);
            });
        }
        for (std::thread& thread : all) thread.join();
    }
}

}  // namespace fastkd::simt

namespace fastkd {

constexpr bool kHasClusters = true, kPairsRegisters = false;

inline int thread_rank() { return simt::self.rank; }
inline int block_threads() { return simt::self.threads; }
inline int block_rank() { return simt::self.grid_block; }
inline int grid_blocks() { return simt::self.grid_blocks; }
inline int cluster_rank() { return simt::self.block; }
inline int cluster_size() { return static_cast<int>(simt::self.cluster->blocks.size()); }

template <class T>
T shuffle(T x, int lane) {
    simt::Warp& warp = simt::self.cluster->blocks[simt::self.block]->warps[simt::self.rank / simt::kWarpSize];
    static_assert(sizeof(T) == sizeof(float));
    __builtin_memcpy(&warp.values[simt::self.rank % simt::kWarpSize], &x, sizeof(T));
    warp.barrier.arrive_and_wait();
    __builtin_memcpy(&x, &warp.values[lane], sizeof(T));
    warp.barrier.arrive_and_wait();
    return x;
}

template <class T>
T shuffle_xor(T x, int mask) {
    return shuffle(x, simt::self.rank % simt::kWarpSize ^ mask);
}

inline void block_barrier() { simt::self.cluster->blocks[simt::self.block]->barrier.arrive_and_wait(); }

inline void cluster_arrive() { simt::self.arrived = simt::self.cluster->barrier.arrive(); }

inline void cluster_wait() {
    simt::self.cluster->barrier.wait(std::move(*simt::self.arrived));
    simt::self.arrived.reset();
}

// A phase ends when all arrivals have come and as many bytes as they expect.
struct alignas(8) Barrier {
    std::mutex* mutex;
    int arrivals, pending, bytes;
    std::atomic<int> phase;
    void end_if_complete() {
        if (pending != 0 || bytes != 0) return;
        pending = arrivals;
        ++phase;
        phase.notify_all();
    }
};

inline void barrier_init(Barrier* barrier, int arrivals) {
    new (barrier) Barrier{&simt::self.cluster->mutex, arrivals, arrivals, 0, 0};
}

inline void barrier_expect(Barrier* barrier, int bytes) {
    const std::lock_guard lock(*barrier->mutex);
    barrier->bytes += bytes;
    --barrier->pending;
    barrier->end_if_complete();
}

inline void barrier_wait(Barrier* barrier, int parity) {
    for (int phase = barrier->phase; phase % 2 == parity; phase = barrier->phase) barrier->phase.wait(phase);
}

// The same variable as it lies in another block.
template <class T>
T* in_block(T* local, int rank) {
    return reinterpret_cast<T*>(simt::memory(rank) + (reinterpret_cast<char*>(local) - simt::memory(simt::self.block)));
}

inline void store_async(float* local, int rank, float value, Barrier* local_barrier) {
    Barrier* barrier = in_block(local_barrier, rank);
    const std::lock_guard lock(*barrier->mutex);
    *in_block(local, rank) = value;
    barrier->bytes -= sizeof(float);
    barrier->end_if_complete();
}

// Nothing is there before the wait, not even for the thread itself.
inline void copy_async(void* shared, const void* global, bool wanted) {
    if (wanted) simt::self.copies.emplace_back(shared, global);
}
inline void copy_async_wait() {
    for (const auto& [shared, global] : simt::self.copies) __builtin_memcpy(shared, global, 16);
    simt::self.copies.clear();
}
inline char* dynamic_shared() { return simt::memory(simt::self.block) + simt::kStaticBytes; }

}  // namespace fastkd
