// Threads, barriers and shuffles of a grid whose rows are worked on by clusters of blocks. The kernels use these names
// alone, so that the same source also runs on a CPU under the shim of the tests (FASTKD_SIMT).
#pragma once

#include "../numeric.h"

#ifdef FASTKD_SIMT
#include "simt.h"
#else

#define FASTKD_D __device__ __forceinline__
#define FASTKD_KERNEL __global__
// So many blocks an SM, so that one's loads overlap another's arithmetic: 3 leave a thread 80 registers, 2 leave 128.
#define FASTKD_BOUNDS(blocks) __launch_bounds__(256, blocks)

namespace fastkd {

FASTKD_D int thread_rank() { return static_cast<int>(threadIdx.x); }
FASTKD_D int block_threads() { return static_cast<int>(blockDim.x); }
FASTKD_D int64_t block_rank() { return blockIdx.x; }

FASTKD_D float shuffle_xor(float x, int mask) { return __shfl_xor_sync(0xffffffffu, x, mask); }

// Blocks of a cluster: rank and size within it; 0 and 1 before sm_90, and where no cluster was launched.
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

// The first half of the barrier that a kernel begins with, before anything is written.
FASTKD_D void cluster_start() {
#if __CUDA_ARCH__ >= 900
    asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
#endif
}

// Barrier over the cluster in two halves: what the arriving threads wrote, to shared memory anywhere in the cluster,
// is seen by those that have waited. Of a single block it is the block's barrier, in the second half.
FASTKD_D void cluster_arrive() {
#if __CUDA_ARCH__ >= 900
    asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
#endif
}

FASTKD_D void cluster_wait() {
#if __CUDA_ARCH__ >= 900
    asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#else
    __syncthreads();
#endif
}

// Writes *local, in this block's shared memory, as it lies in block ``rank`` of the cluster.
FASTKD_D void store_remote(float* local, int rank, float value) {
#if __CUDA_ARCH__ >= 900
    const unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(local));
    unsigned remote;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(address), "r"(rank));
    asm volatile("st.shared::cluster.f32 [%0], %1;" ::"r"(remote), "f"(value) : "memory");
#else
    *local = value;
#endif
}

// 16 bytes from global to shared memory, which this thread sees once it has waited.
FASTKD_D void copy_async(void* shared, const void* global) {
    const unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(shared));
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(address), "l"(global) : "memory");
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

}  // namespace fastkd
