// A CPU in the place of a GPU, and a hostile one: what csrc/cuda/grid.cuh names is defined here, so that the very
// kernels of the GPU build run, slowly. Each CUDA thread is a fiber, and only one runs at a time; which one, an order
// drawn from a seed decides. It does what a GPU may do and rarely does:
//
// - Several clusters run at once, where rows have parts all; their blocks start late and in any order, and one may starve
//   while others run on.
// - A block's shared memory appears, full of NaN, when the block starts, and is gone when it has exited. Each variable
//   ends at a page that nothing may touch. Whoever reaches for a block that has not started or has exited is stopped.
// - A copy's target is NaN from its issue to the wait. Stores that complete on a barrier arrive late and in any order.
// - A misaligned access of 16 bytes, a barrier that nobody has initialised, and threads that wait for one that has left
//   end the program, with a message.
//
// Under the thread sanitizer two accesses race unless what the hardware promises orders them; shuffles do not.
#pragma once

#include <cstddef>
#include <cstdint>

#define FASTKD_D inline
#define FASTKD_KERNEL inline
#define FASTKD_BOUNDS(blocks)
#define FASTKD_SHARED(type, name) type& name = *static_cast<type*>(fastkd::simt::shared(__LINE__, sizeof(type)))

namespace fastkd {

// Of transactions: arrivals and bytes that a phase waits for.
struct alignas(8) Barrier {
    uint64_t state;
};

constexpr bool kPairsRegisters = false;

namespace simt {

// Of the thread that runs.
struct Thread {
    int rank, threads;  // within the block
    int block, blocks;  // within the cluster
    int grid_block, grid_blocks;
    int part, parts;  // the grid's second dimension
};
extern const Thread* self;

void* shared(int line, size_t bytes);  // a static variable, by the line that declares it
char* dynamic_shared();
uint32_t shuffle(uint32_t x, int lane);
void cluster_arrive();
void cluster_wait();
void block_barrier();
void copy_async(void* shared, const void* global);
void copy_async_wait();
void barrier_init(Barrier* barrier, int arrivals);
void barrier_expect(Barrier* barrier, int bytes);
void barrier_wait(Barrier* barrier, int parity);
void store_async(void* local, int rank, const void* value, int bytes, Barrier* local_barrier);
void global_arrive(uint32_t* arrived);
void global_wait(const uint32_t* arrived, int count);

struct Grid {
    int clusters, size, threads;  // a cluster's size in blocks; threads of a block: a multiple of 32
    size_t shared;      // dynamic, of a block
    uint64_t seed;      // of the order
    int parts = 1;      // of them all
};
void run(const Grid& grid, void (*kernel)(const void*), const void* closure);

template <class Kernel, class... Arguments>
void launch(const Grid& grid, Kernel kernel, const Arguments&... arguments) {
    const auto call = [&] { kernel(arguments...); };
    run(grid, [](const void* closure) { (*static_cast<const decltype(call)*>(closure))(); }, &call);
}

}  // namespace simt

inline int thread_rank() { return simt::self->rank; }
inline int block_threads() { return simt::self->threads; }
inline int block_rank() { return simt::self->grid_block; }
inline int grid_blocks() { return simt::self->grid_blocks; }
inline int part_rank() { return simt::self->part; }
inline int part_count() { return simt::self->parts; }
inline void block_barrier() { simt::block_barrier(); }
inline void atomic_or(uint32_t* word, uint32_t bits) { __atomic_fetch_or(word, bits, __ATOMIC_RELAXED); }
inline int cluster_rank() { return simt::self->block; }
inline int cluster_size() { return simt::self->blocks; }
template <class T>
T shuffle(T x, int lane) {
    uint32_t bits;
    static_assert(sizeof(T) == sizeof(bits));
    __builtin_memcpy(&bits, &x, sizeof(T));
    bits = simt::shuffle(bits, lane);
    __builtin_memcpy(&x, &bits, sizeof(T));
    return x;
}

template <class T>
T shuffle_xor(T x, int mask) {
    return shuffle(x, thread_rank() % 32 ^ mask);
}

inline void cluster_arrive() { simt::cluster_arrive(); }
inline void cluster_wait() { simt::cluster_wait(); }
inline void copy_async(void* shared, const void* global, bool wanted) {
    if (wanted) simt::copy_async(shared, global);
}
inline void copy_async_wait() { simt::copy_async_wait(); }
inline void barrier_init(Barrier* barrier, int arrivals) { simt::barrier_init(barrier, arrivals); }
inline void barrier_expect(Barrier* barrier, int bytes) { simt::barrier_expect(barrier, bytes); }
inline void barrier_wait(Barrier* barrier, int parity) { simt::barrier_wait(barrier, parity); }
inline void store_async(float* local, int rank, float value, Barrier* local_barrier) {
    simt::store_async(local, rank, &value, sizeof(value), local_barrier);
}
inline void global_arrive(uint32_t* arrived) { simt::global_arrive(arrived); }
inline void global_wait(const uint32_t* arrived, int count) { simt::global_wait(arrived, count); }
inline char* dynamic_shared() { return simt::dynamic_shared(); }

}  // namespace fastkd
