// Threads, barriers, shuffles and asynchronous stores of a grid whose rows are worked on by clusters of blocks. The
// kernels use these names alone, so that the same source also runs on a CPU under the shim of the tests (FASTKD_SIMT).
#pragma once

#include "../numeric.h"

#ifdef FASTKD_SIMT
#include "simt.h"
#else

#define FASTKD_D __device__ __forceinline__
#define FASTKD_KERNEL __global__
// So many blocks an SM, so that one's loads overlap another's arithmetic: 3 leave a thread 80 registers.
#define FASTKD_BOUNDS(blocks) __launch_bounds__(256, blocks)

namespace fastkd {

// From sm_100 on pairs of floats are multiplied, whose registers must be neighbours: longer walks do not fit 80 there.
#if __CUDA_ARCH__ >= 1000
constexpr bool kPairsRegisters = true;
#else
constexpr bool kPairsRegisters = false;
#endif

FASTKD_D int thread_rank() { return static_cast<int>(threadIdx.x); }
FASTKD_D int block_threads() { return static_cast<int>(blockDim.x); }
FASTKD_D int block_rank() { return static_cast<int>(blockIdx.x); }
FASTKD_D int grid_blocks() { return static_cast<int>(gridDim.x); }

// The grid's second dimension.
FASTKD_D int part_rank() { return static_cast<int>(blockIdx.y); }
FASTKD_D int part_count() { return static_cast<int>(gridDim.y); }

FASTKD_D float shuffle_xor(float x, int mask) { return __shfl_xor_sync(0xffffffffu, x, mask); }

FASTKD_D uint32_t shuffle_xor(uint32_t x, int mask) { return __shfl_xor_sync(0xffffffffu, x, mask); }

FASTKD_D float shuffle(float x, int lane) { return __shfl_sync(0xffffffffu, x, lane); }

FASTKD_D void block_barrier() { __syncthreads(); }

FASTKD_D void atomic_or(uint32_t* word, uint32_t bits) { atomicOr(word, bits); }

// Blocks of a cluster: rank and size within it; 0 and 1 where none was launched, as before sm_90, which has no clusters and
// no stores that complete on a barrier of the block they go to.
FASTKD_D int cluster_rank() {
    unsigned rank = 0;
#if __CUDA_ARCH__ >= 900
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
#endif
    return static_cast<int>(rank);
}

FASTKD_D int cluster_size() {
    unsigned size = 1;
#if __CUDA_ARCH__ >= 900
    asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
#endif
    return static_cast<int>(size);
}

// Barrier over the cluster's threads in two halves, for a kernel's start: what was written before it, the barriers
// below included, is seen by everyone who has waited. It orders all of memory, so no row passes one.
FASTKD_D void cluster_arrive() {
#if __CUDA_ARCH__ >= 900
    asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
#endif
}

FASTKD_D void cluster_wait() {
#if __CUDA_ARCH__ >= 900
    asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}

// A transaction barrier in shared memory. A phase of it ends when it has been armed (barrier_expect, by one thread) and
// as many bytes as that said have been stored; phases have parity 0, 1, 0, ...
struct alignas(8) Barrier {
    uint64_t state;
};

FASTKD_D unsigned shared_address(const void* pointer) {
    return static_cast<unsigned>(__cvta_generic_to_shared(pointer));
}

FASTKD_D void barrier_init(Barrier* barrier, int arrivals) {
#if __CUDA_ARCH__ >= 900
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
}

FASTKD_D void barrier_expect(Barrier* barrier, int bytes) {
#if __CUDA_ARCH__ >= 900
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
                 : "memory");
#endif
}

FASTKD_D void barrier_wait(Barrier* barrier, int parity) {
#if __CUDA_ARCH__ >= 900
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "again:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@!done bra again;\n"
        "}\n" ::"r"(shared_address(barrier)),
        "r"(parity)
        : "memory");
#endif
}

// Writes *local, in this block's shared memory, as it lies in block ``rank`` of the cluster, and completes 4 bytes on
// that block's barrier.
FASTKD_D void store_async(float* local, int rank, float value, Barrier* barrier) {
#if __CUDA_ARCH__ >= 900
    unsigned remote, remote_barrier;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(shared_address(local)), "r"(rank));
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote_barrier) : "r"(shared_address(barrier)), "r"(rank));
    asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.f32 [%0], %1, [%2];" ::"r"(remote),
                 "f"(value), "r"(remote_barrier)
                 : "memory");
#endif
}

// A barrier of blocks that all run at once: a number in global memory, 0 at first. What threads wrote before they arrived
// is seen by everyone who has waited for all of them.
FASTKD_D void global_arrive(uint32_t* arrived) {
    asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(arrived) : "memory");
}

FASTKD_D void global_wait(const uint32_t* arrived, int count) {
    uint32_t seen;
    do {
        asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(seen) : "l"(arrived) : "memory");
    } while (seen < static_cast<uint32_t>(count));
}

// 16 bytes from global to shared memory, if ``wanted``, which this thread sees once it has waited. A predicate, not a
// branch.
FASTKD_D void copy_async(void* shared, const void* global, bool wanted) {
    asm volatile(
        "{\n"
        ".reg .pred wanted;\n"
        "setp.ne.s32 wanted, %2, 0;\n"
        "@wanted cp.async.cg.shared.global [%0], [%1], 16;\n"
        "}\n" ::"r"(shared_address(shared)),
        "l"(global), "r"(static_cast<int>(wanted))
        : "memory");
}

FASTKD_D void copy_async_wait() { asm volatile("cp.async.wait_all;" ::: "memory"); }

FASTKD_D char* dynamic_shared() {
    extern __shared__ __align__(16) char memory[];
    return memory;
}

}  // namespace fastkd

#define FASTKD_SHARED(type, name) __shared__ type name

#endif  // FASTKD_SIMT

namespace fastkd {

constexpr int kWarp = 32;
constexpr int kMaxThreads = 256;
constexpr int kMaxCluster = 16;
constexpr int kMaxParts = kWarp;  // a lane merges the state of one

}  // namespace fastkd
